"""Every picture of the package. Figures are made without pyplot, so no global state is touched."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fedlp_jax.errors import FedLPError, nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

# Two palettes that stay apart under the common colour blindnesses: Okabe and Ito's for lines
# (without the yellow, too pale on white), Paul Tol's muted one for areas.
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("-", "--", "-.", ":")
_AREAS = ["#332288", "#88CCEE", "#44AA99", "#117733", "#999933"]
_AREAS += ["#DDCC77", "#CC6677", "#882255", "#AA4499", "#BBBBBB"]
_SHOWN = 50  # clients drawn one by one

_AXES = {
    "round": "round",
    "upload_megabytes": "uploaded by all clients so far [MB]",
    "simulated_time": "modelled time so far [s]",
}
# What is summed over rounds for an axis: key of a row, factor.
_SUMS = {"upload_megabytes": ("upload_bytes", 1e-6), "simulated_time": ("simulated_time", 1.0)}


class Holdings(Protocol):
    """What is drawn of a `fedlp_jax.data.partition.Partition`."""

    @property
    def labels(self) -> np.ndarray:
        """`i32[N]`."""

    @property
    def num_classes(self) -> int:
        """Classes."""

    @property
    def clients(self) -> int:
        """K."""

    @property
    def sizes(self) -> np.ndarray:
        """`i64[K]`."""

    def rows(self, client: int) -> np.ndarray:
        """`i32[n_k]`."""


def partition(partition: Holdings, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draws the label mix of up to 50 clients, and how many examples every client holds.

    Args:
      partition: of any number of clients; of more than 50, 50 at equal distances are shown one by
        one, and the sizes of all of them as a histogram.
      path: file to write, whose ending says the format; None writes nothing.

    Returns:
      The figure, 6 x 4 inches.

    Raises:
      FedLPError: the file cannot be written.
    """
    figure = _figure()
    mixes, sizes = figure.subplots(2, 1, height_ratios=(3, 2))
    clients, held = partition.clients, partition.sizes
    shown = np.arange(min(clients, _SHOWN)) * clients // min(clients, _SHOWN)
    _draw_mixes(figure, mixes, partition, shown)
    sizes_are = f"{held.min():,} to {held.max():,} each, median {np.median(held):,.10g}"
    mixes.set_title(
        f"{held.sum():,} examples of {partition.num_classes} classes on {clients:,} "
        f"client{'s' * (clients > 1)}; "
        + (f"{held[0]:,} each" if (held == held[0]).all() else sizes_are),
        fontsize="small",
    )
    if clients <= _SHOWN:
        mixes.tick_params(labelbottom=False)
        sizes.bar(shown, held, width=0.85, color=_LINES[0])
        sizes.set(xlabel="client", ylabel="examples", xlim=mixes.get_xlim())
        sizes.set_xticks(mixes.get_xticks())
    else:
        mixes.set_xlabel(f"client ({len(shown)} of them, at equal distances)", fontsize="small")
        _draw_sizes(sizes, held)
    sizes.yaxis.set_major_formatter("{x:,.0f}")
    sizes.yaxis.set_major_locator(_whole_numbers(5))
    for axes in (mixes, sizes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize="small")
    return written(figure, path)


def curves(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | os.PathLike[str] | None = None,
    x: str = "round",
    y: str = "test_accuracy",
) -> Figure:
    """Draws a metric of one or more runs against rounds, uploads or modelled time.

    Args:
      histories: label -> rows of the run as in metrics.jsonl, one a round. Rows without `y` (rounds
        that were not evaluated) are passed over, but their uploads count.
      path: file to write, whose ending says the format; None writes nothing.
      x: "round"; "upload_megabytes" for the sum of `upload_bytes` so far, in 10^6 bytes; or
        "simulated_time" for the sum of the modelled seconds of rounds (`fl.Faults(profile=...)`).
      y: key of a row. Accuracies are shown in percent.

    Returns:
      The figure, 6 x 4 inches.

    Raises:
      FedLPError: `x` or `y` is unknown, there is nothing to draw, or the file cannot be written.
    """
    figure = _figure()
    axes = figure.subplots()
    draw_curves(axes, histories, x, y)
    if len(histories) > 1:
        _legend(figure, axes, list(histories))
    return written(figure, path)


def draw_curves(
    axes: Axes,
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    x: str = "round",
    y: str = "test_accuracy",
    styles: Mapping[str, tuple[str, str]] | None = None,
) -> None:
    """Draws what `curves` draws on axes of one's own, without a legend.

    Args:
      axes: of matplotlib.
      histories: as for `curves`.
      x: as for `curves`.
      y: as for `curves`.
      styles: label -> colour and line style; None = one after the other.

    Raises:
      FedLPError: `x` or `y` is unknown, or there is nothing to draw.
    """
    if x not in _AXES:
        raise FedLPError(
            f"x={x!r} is not an axis{nearest(x, _AXES) or '.'} There are: {', '.join(_AXES)}."
        )
    if not histories:
        raise FedLPError("There is no history to draw: pass at least one run, as {label: rows}.")
    for i, (label, rows) in enumerate(histories.items()):
        points = _points(label, rows, x, y)
        plain = _LINES[i % len(_LINES)], _DASHES[i // len(_LINES) % len(_DASHES)]
        colour, dash = (styles or {}).get(label, plain)
        axes.plot(
            *points,
            label=label,
            color=colour,
            linestyle=dash,
            linewidth=1.6,
            marker="o" if points.shape[1] <= 25 else "",
            markersize=3.5,
        )
    axes.set(xlabel=_AXES[x], ylabel=y.replace("_", " "))
    axes.margins(x=0.02)
    axes.set_xlim(left=0)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter("{x:,.10g}")
    if x == "round":
        axes.xaxis.set_major_locator(_whole_numbers(9))
    if "accuracy" in y:
        from matplotlib.ticker import PercentFormatter

        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _figure() -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(6, 4), dpi=150, layout="constrained")


def written(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """The figure, after it has been written where there is a path."""
    if path is not None:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path)
        except (OSError, ValueError) as error:  # no permission; an ending matplotlib does not know
            raise FedLPError(f"The picture {path} cannot be written: {error}") from None
    return figure


def _whole_numbers(ticks: int) -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(ticks, integer=True)


def _draw_mixes(figure: Figure, axes: Axes, partition: Holdings, shown: np.ndarray) -> None:
    """Stacked bars: the share of each class in the data of each client shown."""
    classes = partition.num_classes
    counts = np.stack(
        [
            np.bincount(partition.labels[partition.rows(k)], minlength=classes)
            for k in shown.tolist()
        ]
    )
    shares = counts / counts.sum(axis=1, keepdims=True)  # f64[shown, classes]
    bottom = np.cumsum(shares, axis=1) - shares
    position = np.arange(len(shown))
    if classes <= len(_AREAS):
        colours: Any = _AREAS
        for c in range(classes):
            axes.bar(position, shares[:, c], 0.85, bottom[:, c], color=colours[c], label=str(c))
        figure.legend(
            title="class", loc="outside right upper", fontsize="x-small", title_fontsize="x-small",
            frameon=False, reverse=True,
        )  # fmt: skip
    else:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        scale = ScalarMappable(Normalize(0, classes - 1), colormaps["viridis"])
        client, label = np.nonzero(counts)  # many classes: draw only the bars there are
        axes.bar(
            position[client], shares[client, label], 0.85, bottom[client, label],
            color=scale.to_rgba(label),
        )  # fmt: skip
        figure.colorbar(scale, ax=axes, label="class", fraction=0.05, pad=0.01)
    axes.set(ylabel="share of examples", ylim=(0, 1), xlim=(-0.7, len(shown) - 0.3))
    ticks = position[:: max(len(shown) // 5, 1)]
    axes.set_xticks(ticks, [f"{k:,}" for k in shown[ticks]])


def _draw_sizes(axes: Axes, sizes: np.ndarray) -> None:
    """Histogram of the sizes of all clients, logarithmic if they differ very much."""
    smallest, largest = int(sizes.min()), int(sizes.max())
    if largest > 50 * smallest:
        bins: np.ndarray = np.unique(np.geomspace(smallest, largest + 1, 40).round()) - 0.5
        axes.set_xscale("log")
    elif largest - smallest < 60:
        bins = np.arange(max(smallest - 2, 0), largest + 4) - 0.5
        axes.xaxis.set_major_locator(_whole_numbers(9))
    else:
        bins = np.linspace(smallest, largest, 41)
    axes.hist(sizes, bins=bins.tolist(), color=_LINES[0])
    axes.set(xlabel="examples of a client", ylabel="clients")
    axes.xaxis.set_major_formatter("{x:,.10g}")


def _legend(figure: Figure, axes: Axes, labels: Sequence[str]) -> None:
    """Names the curves: within the axes where there is room, else below."""
    longest = max(map(len, labels))
    if len(labels) <= 8 and longest <= 30:
        axes.legend(fontsize="small", frameon=False)
        return
    ncols = max(72 // (longest + 8), 1)  # about 72 small characters fit below the axes
    figure.legend(loc="outside lower center", ncols=ncols, fontsize="small", frameon=False)


def _points(label: str, rows: Sequence[Mapping[str, Any]], x: str, y: str) -> np.ndarray:
    """Abscissas and ordinates `f64[2, points]` of one run."""
    points: list[tuple[float, float]] = []
    so_far = 0.0
    for row in rows:
        if x in _SUMS:
            key, factor = _SUMS[x]
            if key not in row:
                raise FedLPError(
                    f"{label}: round {row.get('round')} has no {key}, which cannot be summed, "
                    "then; draw against x='round'."
                )
            so_far += row[key] * factor
        if row.get(y) is not None:
            points.append((row["round"] if x == "round" else so_far, row[y]))
    if not points:
        keys = sorted({key for row in rows for key in row})
        raise FedLPError(
            f"{label}: none of {len(rows)} rounds has {y!r}{nearest(y, keys) or '.'} They have: "
            f"{', '.join(keys) or 'nothing'}."
        )
    return np.asarray(points, np.float64).T
