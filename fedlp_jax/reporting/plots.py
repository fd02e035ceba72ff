"""Plots of partitions and learning curves.

Figures are made without pyplot and settings are scoped, so no global state of matplotlib changes.
matplotlib is imported by the first plot.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedlp_jax.data.files import replacing
from fedlp_jax.errors import FedLPError, nearest, shown, warn
from fedlp_jax.reporting.metrics import headline, headline_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

    from fedlp_jax.data.partition import Partition

Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl, one per round
Run = Any  # rows, a `History`, or a `Result`

# Two palettes that colour-blind readers can tell apart: Okabe and Ito's for lines
# (without the yellow, too pale on white), Paul Tol's muted one for areas.
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
AREAS = ["#332288", "#88CCEE", "#44AA99", "#117733", "#999933"]
AREAS += ["#DDCC77", "#CC6677", "#882255", "#AA4499", "#BBBBBB"]
_SHOWN = 50  # clients drawn one by one
_MARKED = 25  # points of a line that each get a marker; of more points, every few

AXES = {
    "round": "round",
    "upload_megabytes": "uploaded by all clients so far [MB]",
    "download_megabytes": "downloaded by all clients so far [MB]",
    "total_megabytes": "exchanged by all clients so far [MB]",
    "simulated_time": "modelled time so far [s]",
    "seconds": "measured time so far [s]",
}
# Axes that accumulate keys over rounds: keys, factor.
_SUMS = {
    "upload_megabytes": (("upload_bytes",), 1e-6),
    "download_megabytes": (("download_bytes",), 1e-6),
    "total_megabytes": (("upload_bytes", "download_bytes"), 1e-6),
    "simulated_time": (("simulated_time",), 1.0),
    "seconds": (("seconds",), 1.0),
}


class Style(NamedTuple):
    """How a curve is drawn, in matplotlib's terms."""

    colour: str
    dash: str
    marker: str


class Series(NamedTuple):
    """A metric of one or more runs over the rounds that all of them have."""

    rounds: list[int]
    across: np.ndarray  # f64[R'], abscissa, a mean over runs
    mean: np.ndarray  # f64[R']
    deviation: np.ndarray | None  # f64[R'], sample standard deviation; None for one run
    runs: int


def partition(partition: Partition, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draws the label mix of up to 50 clients, and the number of examples of every client.

    Args:
      partition: of any number of clients. Of more than 50, it draws 50 at equal distances one by
        one, and the sizes of all as a histogram.
      path: file to write; its suffix selects the format. None writes nothing.

    Returns:
      The figure, 6 x 4 inches.

    Raises:
      FedLPError: the file cannot be written.
    """
    figure = new_figure()
    mixes, sizes = figure.subplots(2, 1, height_ratios=(3, 2))
    clients, examples = partition.clients, partition.sizes
    drawn = some_clients(clients)
    _draw_mixes(figure, mixes, partition, drawn)
    spread = (
        f"{examples[0]:,} each"
        if (examples == examples[0]).all()
        else f"{examples.min():,} to {examples.max():,} each, median {np.median(examples):,.10g}"
    )
    mixes.set_title(
        f"{examples.sum():,} examples of {partition.num_classes} classes on {clients:,} "
        f"client{'s' * (clients > 1)}; {spread}",
        fontsize="small",
    )
    if clients <= _SHOWN:
        mixes.tick_params(labelbottom=False)
        sizes.bar(drawn, examples, width=0.85, color=LINES[0])
        sizes.set(xlabel="client", ylabel="examples", xlim=mixes.get_xlim())
        sizes.set_xticks(mixes.get_xticks())
    else:
        mixes.set_xlabel(f"client ({len(drawn)} of them, at equal distances)", fontsize="small")
        _draw_sizes(sizes, examples)
    sizes.yaxis.set_major_formatter("{x:,.0f}")
    sizes.yaxis.set_major_locator(_integers(5))
    for axes in (mixes, sizes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize="small")
    return save(figure, path)


def curves(
    histories: Mapping[str, Run | Sequence[Run]],
    path: str | os.PathLike[str] | None = None,
    x: str = "round",
    y: str = "test_accuracy",
) -> Figure:
    """Draws a metric of one or more runs against rounds, uploads or modelled time.

    Args:
      histories: label -> a run: its `Result`, its `history`, or rows as in metrics.jsonl, one per
        round; or label -> several runs (seeds), drawn as their mean and a band of one standard
        deviation. Rows without `y` (rounds without evaluation) are skipped, but their uploads
        count.
      path: file to write; its suffix selects the format. None writes nothing.
      x: "round"; "upload_megabytes", "download_megabytes" or "total_megabytes" for the bytes so far
        of all clients, in 10^6; "simulated_time" for the sum of the modelled seconds of rounds
        (`fl.Faults(profile=...)`); or "seconds" for the measured ones.
      y: key of a row. Accuracies are shown in percent.

    Returns:
      The figure, 6 x 4 inches.

    Raises:
      FedLPError: `x` or `y` is unknown, there is nothing to draw, or the file cannot be written.
    """
    figure = new_figure()
    axes = figure.subplots()
    draw_curves(axes, histories, x, y)
    if len(histories) > 1:
        _legend(figure, axes, list(histories))
    return save(figure, path)


def draw_curves(
    axes: Axes,
    histories: Mapping[str, Run | Sequence[Run]],
    x: str = "round",
    y: str = "test_accuracy",
    styles: Mapping[str, Style] | None = None,
) -> None:
    """Draws the lines of `curves` on existing axes, without a legend.

    Args:
      axes: matplotlib axes.
      histories: as for `curves`.
      x: as for `curves`.
      y: as for `curves`.
      styles: label -> style; labels without one take the next of a fixed cycle.

    Raises:
      FedLPError: `x` or `y` is unknown, or there is nothing to draw.
    """
    _check_axis(x)
    if not histories:
        raise FedLPError("There is no history to draw: pass at least one run, as {label: rows}.")
    last = 0.0
    for i, (label, runs) in enumerate(histories.items()):
        dash = _DASHES[i % len(_DASHES)]  # four and seven colours: 28 lines differ in print
        cycle = Style(LINES[i % len(LINES)], dash, _MARKERS[i % len(_MARKERS)])
        style = (styles or {}).get(label, cycle)
        last = max(last, _draw_curve(axes, label, runs, x, y, style))
    axes.set(xlabel=AXES[x], ylabel=y.replace("_", " "))
    axes.margins(x=0.02)
    axes.set_xlim(left=0)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    ticks = _ticks_to(last, integers=x == "round")
    # The last tick is the last point, which is no round number of megabytes or seconds.
    axes.set_xticks(ticks, [f"{t:,.10g}" for t in (*ticks[:-1], _three_digits(last))])
    if "accuracy" in y:
        from matplotlib.ticker import MaxNLocator

        axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))  # few decimals
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.6g}%")


def series(label: str, runs: Run | Sequence[Run], x: str, y: str) -> Series:
    """The numbers of one curve; the arguments are those of `curves`.

    Raises:
      FedLPError: `x` or `y` is unknown, or the runs have no round in common.
    """
    _check_axis(x)
    points = [_points(label, rows, x, y) for rows in _rows_of_runs(label, runs)]
    rounds = sorted(set.intersection(*(set(run) for run in points)))
    if not rounds:
        raise FedLPError(
            f"{label}: its {len(points)} runs have no round in common with {y!r}; draw them under "
            "a label each."
        )
    table = np.array([[run[round] for round in rounds] for run in points])  # [runs, rounds, 2]
    across, mean = table.mean(axis=0).T
    deviation = table[..., 1].std(axis=0, ddof=1) if len(points) > 1 else None
    return Series(rounds, across, mean, deviation, len(points))


def some_clients(clients: int) -> np.ndarray:
    """`i64[N]`, ids of at most 50 of K clients, at equal distances."""
    return np.arange(min(clients, _SHOWN)) * clients // min(clients, _SHOWN)


def marks_every(points: int) -> int:
    """One in how many points of a line gets a marker."""
    return 1 if points <= _MARKED else points // 8


def axes_of(rows: Rows) -> list[str]:
    """The abscissas that these rows have, in the order of `AXES`."""
    have = set.intersection(*(set(row) for row in rows)) if rows else set()
    return [x for x in AXES if x == "round" or have.issuperset(_SUMS[x][0])]


def draw_run(folder: Path, name: str, clients: Partition, rows: Rows) -> None:
    """Draws the plots of a finished run: its partition and its learning curves.

    A failure costs a warning, never the run.

    Args:
      folder: where the pictures go.
      name: of the run.
      clients: its partition.
      rows: of its metrics.jsonl.
    """
    with _warning(folder):
        partition(clients, folder / "partition.png")
        _draw_headline(folder, {name: [rows]})


def draw_sweep(folder: Path, runs: Mapping[str, Sequence[Rows]]) -> None:
    """Draws the learning curves of a sweep, for each label a mean and a band over its runs.

    Runs that were never tested, such as those that diverged, are left out. A failure costs a
    warning, never the sweep.

    Args:
      folder: where the pictures go.
      runs: label -> the rows of each run.
    """
    tested = {
        label: [rows for rows in seeds if any(map(headline, rows))] for label, seeds in runs.items()
    }
    with _warning(folder):
        _draw_headline(folder, {label: seeds for label, seeds in tested.items() if seeds})


def _draw_headline(folder: Path, runs: Mapping[str, Sequence[Rows]]) -> None:
    """Draws the metric that stands for the runs, against rounds and against costs."""
    rows = [row for seeds in runs.values() for run in seeds for row in run]
    if not (y := headline_of(rows, "")):
        return
    costs = {"upload_megabytes", "simulated_time"} & {*axes_of(rows)}
    for x in ("round", *sorted(costs)):
        curves(runs, folder / f"{y.removeprefix('test_')}_by_{x}.png", x, y)


@contextlib.contextmanager
def _warning(folder: Path) -> Iterator[None]:
    """Turns an error of drawing into a warning."""
    try:
        yield
    except Exception as error:
        warn(
            f"The plots in {folder} are incomplete: {error} Everything else is written.",
            stacklevel=4,
        )


def save(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """Writes a figure and returns it; None writes nothing.

    The file is replaced in one step, and a link at `path` is not followed. Fonts in PDF are Type
    42, which every printer and journal accepts.

    Raises:
      FedLPError: no permission, or a suffix that matplotlib does not know.
    """
    if path is None:
        return figure
    from matplotlib import rc_context

    place = Path(path)
    place = place.with_suffix(place.suffix or ".png")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with rc_context({"pdf.fonttype": 42, "ps.fonttype": 42}), replacing(place) as file:
            figure.savefig(file, format=place.suffix[1:])
    except (OSError, ValueError) as error:
        raise FedLPError(f"The picture {path} cannot be written: {error}") from None
    return figure


def new_figure(width: float = 6, height: float = 4) -> Figure:
    """An empty figure of this size in inches, without pyplot."""
    from fedlp_jax.reporting.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _integers(ticks: int) -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(ticks, integer=True)


def _ticks_to(last: float, integers: bool = True) -> np.ndarray:
    """Round ticks from 0, the last of them at the last point."""
    from matplotlib.ticker import MaxNLocator

    steps = [1, 2, 5, 10] if integers else [1, 2, 2.5, 5, 10]
    locator = MaxNLocator(9 if integers else 7, integer=integers, steps=steps)
    ticks = np.asarray(locator.tick_values(0, last))
    step = ticks[1] - ticks[0]
    return np.append(ticks[ticks < last - 0.6 * step], last)


def _three_digits(number: float) -> float:
    return float(f"{number:.3g}") if number < 1000 else round(number)


def _check_axis(x: str) -> None:
    if x not in AXES:
        raise FedLPError(
            f"x={x!r} is not an axis{nearest(x, AXES) or '.'} There are: {', '.join(AXES)}."
        )


def _draw_curve(
    axes: Axes, label: str, runs: Run | Sequence[Run], x: str, y: str, style: Style
) -> float:
    """Draws one line, with a band if it is of several runs; returns its last abscissa."""
    drawn = series(label, runs, x, y)
    rounds, across, mean, spread = drawn.rounds, drawn.across, drawn.mean, drawn.deviation
    axes.plot(
        across,
        mean,
        label=label,
        color=style.colour,
        linestyle=style.dash,
        linewidth=1.6,
        marker=style.marker,
        markevery=marks_every(len(rounds)),
        markersize=3.5,
    )
    if spread is not None:
        axes.fill_between(
            across, mean - spread, mean + spread, color=style.colour, alpha=0.2, linewidth=0
        )
    return float(across[-1])


def _rows_of_runs(label: str, runs: Any) -> list[Rows]:
    """The rows of each run of a label.

    Raises:
      FedLPError: the label holds neither a run nor several.
    """
    runs = getattr(runs, "history", runs)  # of a Result
    if hasattr(runs, "rows"):  # a History
        return [runs.rows]
    if isinstance(runs, Sequence) and not isinstance(runs, str):
        if all(isinstance(row, Mapping) for row in runs):
            return [runs]
        if not any(isinstance(run, Mapping) for run in runs):
            return [rows for run in runs for rows in _rows_of_runs(label, run)]
    raise FedLPError(
        f"{label}: {shown(runs)} is neither a run nor a list of runs; pass the Result of a run, "
        "its history, or rows as in metrics.jsonl."
    )


def _points(label: str, rows: Rows, x: str, y: str) -> dict[int, tuple[float, float]]:
    """Round -> abscissa and ordinate of one run, where it has `y`."""
    points: dict[int, tuple[float, float]] = {}
    total = 0.0
    for row in rows:
        if x in _SUMS:
            keys, factor = _SUMS[x]
            for key in keys:
                if key not in row:
                    raise FedLPError(
                        f"{label}: round {row.get('round')} has no {key} to add up; draw against "
                        "x='round'."
                    )
                total += row[key] * factor
        if row.get(y) is not None:
            points[row["round"]] = (row["round"] if x == "round" else total, row[y])
    if not points:
        known = sorted({key for row in rows for key in row})
        raise FedLPError(
            f"{label}: none of {len(rows)} rounds has {y!r}{nearest(y, known) or '.'} They have: "
            f"{', '.join(known) or 'nothing'}."
        )
    return points


def _legend(figure: Figure, axes: Axes, labels: Sequence[str]) -> None:
    """Names the curves: inside the axes where there is room, else below."""
    longest = max(map(len, labels))
    if len(labels) <= 8 and longest <= 30:
        axes.legend(fontsize="small", frameon=False)
        return
    ncols = max(72 // (longest + 8), 1)  # about 72 small characters fit below the axes
    figure.legend(loc="outside lower center", ncols=ncols, fontsize="small", frameon=False)


def _draw_mixes(figure: Figure, axes: Axes, partition: Partition, drawn: np.ndarray) -> None:
    """Stacked bars: the share of each class in the data of each client drawn."""
    classes = partition.num_classes
    labels = (partition.labels[partition.rows(k)] for k in drawn.tolist())
    counts = np.stack([np.bincount(own, minlength=classes) for own in labels])
    shares = counts / counts.sum(axis=1, keepdims=True)  # f64[drawn, classes]
    bottom = np.cumsum(shares, axis=1) - shares
    position = np.arange(len(drawn))
    if classes <= len(AREAS):
        for c in range(classes):
            axes.bar(position, shares[:, c], 0.85, bottom[:, c], color=AREAS[c], label=str(c))
        figure.legend(
            title="class", loc="outside right upper", fontsize="x-small", title_fontsize="x-small",
            frameon=False, reverse=True,
        )  # fmt: skip
    else:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        scale = ScalarMappable(Normalize(0, classes - 1), colormaps["viridis"])
        client, label = np.nonzero(counts)  # of many classes, most bars would be empty
        axes.bar(
            position[client], shares[client, label], 0.85, bottom[client, label],
            color=scale.to_rgba(label),
        )  # fmt: skip
        figure.colorbar(scale, ax=axes, label="class", fraction=0.05, pad=0.01)
    axes.set(ylabel="share of examples", ylim=(0, 1), xlim=(-0.7, len(drawn) - 0.3))
    ticks = position[:: max(len(drawn) // 5, 1)]
    axes.set_xticks(ticks, [f"{k:,}" for k in drawn[ticks]])


def _draw_sizes(axes: Axes, sizes: np.ndarray) -> None:
    """Histogram of the sizes of all clients, logarithmic if they span a factor over 50."""
    smallest, largest = int(sizes.min()), int(sizes.max())
    if largest > 50 * smallest:
        bins: np.ndarray = np.unique(np.geomspace(smallest, largest + 1, 40).round()) - 0.5
        axes.set_xscale("log")
    elif largest - smallest < 60:
        bins = np.arange(max(smallest - 2, 0), largest + 4) - 0.5
        axes.xaxis.set_major_locator(_integers(9))
    else:
        bins = np.linspace(smallest, largest, 41)
    axes.hist(sizes, bins=bins.tolist(), color=LINES[0])
    axes.set(xlabel="examples per client", ylabel="clients")
    axes.xaxis.set_major_formatter("{x:,.10g}")
