"""A plot: the train loss of several seeds as a mean with a band, next to another figure."""

import numpy as np
from matplotlib.figure import Figure

import fedlp_jax as fl


def compare(histories, path):
    """Draws loss against rounds and against uploads, side by side.

    Args:
      histories: label -> list of runs, each the rows of a `History`.
      path: file to write.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, x in zip(figure.subplots(1, 2), ("round", "upload_megabytes"), strict=True):
        fl.plots.draw_curves(axes, histories, x=x, y="train_loss")
    figure.axes[0].legend()
    return fl.plots.save(figure, path)


def test_two_panels_of_three_seeds(tmp_path):
    def run(seed):
        noise = np.random.default_rng(seed).normal(scale=0.05, size=20)
        return [
            {"round": r, "train_loss": 2 / r + noise[r - 1], "upload_bytes": 10**6}
            for r in range(1, 21)
        ]

    figure = compare({"FedAvg": [run(seed) for seed in range(3)]}, tmp_path / "loss.png")
    assert [len(axes.collections) for axes in figure.axes] == [1, 1]  # a band each
    assert (tmp_path / "loss.png").stat().st_size > 10_000
