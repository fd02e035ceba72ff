"""The effect of each difference between `reference` and `layerwise` on a small run.

    python -m benchmarks.behaviours [--json FILE] [--page FILE] [--smoke]

Handwritten digits, 20 clients, 5 per round, a network of three convolutions with the layer of
FedLP's reference CNN. Every run is repeated with several seeds as `reference`, with one setting as
in `layerwise`, and as `layerwise`. Runs of one seed share cohorts, shuffles, depths and, as far as
the setting allows, masks and initial weights. The mean test accuracy of the last five rounds is
compared seed by seed. `--page` writes the table between the markers of a Markdown file. If the FILE
of `--json` exists, its results are read and nothing runs.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import optax

import fedlp_jax as fl
from benchmarks import command
from benchmarks.machine import machine
from fedlp_jax.algorithms.presets import BEHAVIOURS, Behaviour
from fedlp_jax.nn.models.base import Model, dense
from fedlp_jax.nn.models.cnn import ConvLayer

SEEDS, ROUNDS, LAST = 8, 20, 5
NOTHING, EVERYTHING = "nothing", "everything"  # not names of settings
REFERENCE, LAYERWISE = BEHAVIOURS["reference"], BEHAVIOURS["layerwise"]

# run -> (what it is, its partition, the settings it toggles)
RUNS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "homo": (
        "FedLP-Homo(0.3), Dirichlet(0.5)",
        "dirichlet",
        ("weighting", "layers", "train_loss", "init", "reference"),
    ),
    "mixed": ("FedLP-Homo(0.3), mixed(0.95)", "mixed", ("reference",)),
    "hetero": ("FedLP-Hetero(u), iid", "iid", ("heads",)),
}
_MARKERS = ("<!-- measured -->", "<!-- end -->")


class Network(Model):
    """`depth` convolutions, each with ReLU, normalisation and pooling, and a linear exit."""

    depth: int = 3

    @nn.compact
    def __call__(self, x: fl.types.Array, train: bool) -> fl.types.Array:
        """`f32[B, 8, 8, 1] -> logits f32[B, 10]`."""
        for i in range(1, self.depth + 1):
            x = ConvLayer(8 * 2**i, self.initial, name=f"conv{i}")(x, train)
            x = fl.models.max_pool(x)
        x = x.reshape(x.shape[0], -1)
        return dense(10, x.shape[-1], self.initial, f"fc{self.depth}")(x)


def main() -> None:
    """Runs everything, prints the table and writes the files."""
    parser = command.parser(__doc__)
    parser.add_argument("--page", help="write the table into this file, between its markers")
    options = parser.parse_args()
    if options.json and Path(options.json).exists():
        results = json.loads(Path(options.json).read_text())
    else:
        fl.setup()
        results = measure(2, 2, ["mixed"]) if options.smoke else measure(SEEDS, ROUNDS, RUNS)
        if options.json:
            command.save(options.json, results)
    print(table(results))
    if options.page:
        page = Path(options.page)
        page.write_text(with_table(page.read_text(), results))


def measure(seeds: int, rounds: int, names: Iterable[str]) -> dict[str, Any]:
    """Runs every variant with every seed: `{"runs": {run: {variant: [a row per seed]}}}`."""
    runs = {
        run: {
            name: [train(run, variant, seed, rounds) for seed in range(seeds)]
            for name, variant in variants(RUNS[run][2]).items()
        }
        for run in names
    }
    return {"seeds": seeds, "rounds": rounds, "runs": runs} | machine()


def variants(toggled: tuple[str, ...]) -> dict[str, Behaviour]:
    """The settings taken from `layerwise`: nothing, each one alone, everything."""
    single = {name: REFERENCE._replace(**{name: getattr(LAYERWISE, name)}) for name in toggled}
    return {NOTHING: REFERENCE, **single, EVERYTHING: LAYERWISE}


def train(run: str, behaviour: Behaviour, seed: int, rounds: int) -> dict[str, float]:
    """One run; accuracy over the last rounds and the training loss that was reported last."""
    data = fl.load("digits")
    labels, partition = data.train.labels, RUNS[run][1]
    if partition == "dirichlet":
        reference = behaviour.reference
        clients = fl.partition.dirichlet(
            labels, clients=20, alpha=0.5, seed=seed, reference=reference
        )
    elif partition == "mixed":
        clients = fl.partition.mixed(labels, clients=20, seed=seed, reference=behaviour.reference)
    else:
        clients = fl.partition.iid(labels, clients=20, seed=seed)
    settings: dict[str, Any] = {
        "client_optimizer": optax.adam(1e-3),
        "epochs": 2,
        "batch_size": 5,
        "weighting": behaviour.weighting,
        "layers": behaviour.layers,
        "train_loss": behaviour.train_loss,
    }
    task = fl.classification(Network(init=behaviour.init))
    if run == "hetero":
        algorithm = fl.fedlp_hetero(task, depths="uniform", heads=behaviour.heads, **settings)
    else:
        algorithm = fl.fedlp_homo(task, keep=0.3, **settings)
    history = fl.simulate(
        algorithm, data, clients, rounds=rounds, cohort=5, seed=seed, eval_every=1
    ).history
    jax.clear_caches()
    return {
        "accuracy": statistics.fmean(history["test_accuracy"][-LAST:]),
        "train_loss": float(history["train_loss"][-1]),
    }


def table(results: dict[str, Any]) -> str:
    """The Markdown table of the results."""
    lines = [
        "| run | as `layerwise` | accuracy, % | change, points | training loss |",
        "| --- | --- | --- | --- | --- |",
    ]
    for run, rows in results["runs"].items():
        title = RUNS[run][0]
        for name, ours in rows.items():
            accuracy = [100 * row["accuracy"] for row in ours]
            loss = statistics.fmean(row["train_loss"] for row in ours)
            what = name if name in (NOTHING, EVERYTHING) else f"`{name}`"
            spread = f"{statistics.fmean(accuracy):.1f} ± {statistics.stdev(accuracy):.1f}"
            change = "" if name == NOTHING else _change(rows[NOTHING], ours)
            lines.append(f"| {title} | {what} | {spread} | {change} | {loss:.3f} |")
    return "\n".join(lines)


def _change(reference: list[dict[str, float]], ours: list[dict[str, float]]) -> str:
    """Mean difference of accuracy over seeds, in points, and whether it exceeds the noise."""
    pairs = zip(ours, reference, strict=True)
    difference = [100 * (one["accuracy"] - other["accuracy"]) for one, other in pairs]
    mean, error = statistics.fmean(difference), _standard_error(difference)
    if not any(difference):
        return "none, to the bit"
    visible = "" if abs(mean) > 3 * error else ", no effect visible"
    return f"{mean:+.1f} ± {error:.1f}{visible}"


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def with_table(page: str, results: dict[str, Any]) -> str:
    """A page with the table between its markers, and with its seeds, versions and commit."""
    before, rest = page.split(_MARKERS[0])
    _, after = rest.split(_MARKERS[1])
    commit, _, dirty = str(results["commit"]).partition("-")
    made = (
        f"{results['seeds']} seeds of {results['rounds']} rounds; jax "
        f"{results['versions']['jax']}, {results['machine']['processor']}, commit "
        f"{commit[:12]}{' with changes' if dirty else ''}."
    )
    return f"{before}{_MARKERS[0]}\n{table(results)}\n\n{made}\n{_MARKERS[1]}{after}"


if __name__ == "__main__":
    main()
