"""Charts to hover over, for `report`: what `plots` draws with matplotlib, as plotly figures.

plotly is imported by the first chart; it is the extra `fedlp-jax[report]`. Colours of text and grid
belong to the page, which has a light and a dark scheme.
"""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedlp_jax.errors import FedLPError
from fedlp_jax.reporting.plots import AREAS, AXES, LINES, Rows, Series, marks_every, series

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_DASHES = ("solid", "dash", "dashdot", "dot", "longdash")
_MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "x", "star")
_PATTERNS = ("", "/", "x", ".", "\\", "+")  # six, so that they repeat with another colour
_NAME = 18  # characters of a layer's name on an axis; more would leave a phone no room
_PREFIXES = (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1))
_COLUMNS = 400  # of a heat map at most; of more rounds, some share a column


class Mark(NamedTuple):
    """How all charts draw an experiment; colour-blind readers and grey print can tell it apart."""

    colour: str
    dash: str
    marker: str
    pattern: str


def marks(labels: Sequence[str]) -> dict[str, Mark]:
    """A mark for each label."""
    colours = (*LINES[:-1], "#888888")  # black would be lost on a dark page
    return {
        label: Mark(
            colours[i % len(colours)],
            _DASHES[i % len(_DASHES)],
            _MARKERS[i % len(_MARKERS)],
            _PATTERNS[i % len(_PATTERNS)],
        )
        for i, label in enumerate(labels)
    }


def curves(
    experiments: Mapping[str, Sequence[Rows]], x: str, y: str, of: dict[str, Mark]
) -> Figure:
    """A metric of each experiment that has it, a mean with a band of one standard deviation.

    Args:
      experiments: label -> the rows of each run.
      x: as for `plots.curves`.
      y: key of a row.
      of: label -> mark.
    """
    figure, accuracy = _figure(), "accuracy" in y
    for label, runs in experiments.items():
        if not all(any(row.get(y) is not None for row in rows) for rows in runs):
            continue
        line = series(label, list(runs), x, y)
        at = "" if x == "round" else f"<br>at %{{x:,.4g}} {AXES[x].split('[')[1][:-1]}"
        where = f"round %{{customdata[0]:,.0f}}{at}"
        _draw(figure, label, line, 100.0 if accuracy else 1.0, of[label], where)
    short = AXES[x].replace(" by all clients", "")  # a phone cuts a longer title
    figure.update_xaxes(title=short, rangemode="tozero")
    figure.update_yaxes(title=y.replace("_", " ") + " [%]" * accuracy)
    return figure


def over_clients(
    values: Mapping[str, Sequence[np.ndarray]], metric: str, of: dict[str, Mark]
) -> Figure:
    """Quantiles of a metric over clients, from the worst client to the best.

    Args:
      values: label -> for each run a number of each client.
      metric: its name.
      of: label -> mark.
    """
    shares = np.linspace(0, 1, 21)
    figure, accuracy = _figure(), "accuracy" in metric
    for label, runs in values.items():
        table = np.stack([np.quantile(run, shares) for run in runs])
        deviation = table.std(axis=0, ddof=1) if len(runs) > 1 else None
        percent = (100 * shares).round().astype(int)
        line = Series(percent.tolist(), percent, table.mean(axis=0), deviation, len(runs))
        where = "quantile %{customdata[0]:.0f}%"
        _draw(figure, label, line, 100.0 if accuracy else 1.0, of[label], where)
    figure.update_xaxes(title="clients at or below [%]", range=[-2, 102])
    figure.update_yaxes(title=metric.replace("_", " ") + " [%]" * accuracy)
    return figure


def _draw(figure: Figure, label: str, line: Series, scale: float, mark: Mark, where: str) -> None:
    import plotly.graph_objects as go

    mean, name = scale * line.mean, html.escape(label)
    if line.deviation is not None:
        spread = scale * line.deviation
        figure.add_trace(
            go.Scatter(
                x=[*line.across, *line.across[::-1]],
                y=[*(mean + spread), *(mean - spread)[::-1]],
                fill="toself", fillcolor=_faint(mark.colour), line={"width": 0},
                hoverinfo="skip", mode="lines",
            )
        )  # fmt: skip
    spread = np.zeros_like(mean) if line.deviation is None else scale * line.deviation
    shown = f" ± %{{customdata[1]:.4g}} ({line.runs} runs)" * (line.deviation is not None)
    figure.add_trace(
        go.Scatter(
            x=line.across, y=mean, name=name,
            mode="lines+markers",
            line={"color": mark.colour, "dash": mark.dash, "width": 2},
            marker={
                "symbol": mark.marker, "size": 7, "color": mark.colour,
                "maxdisplayed": 0 if marks_every(len(mean)) == 1 else 10,
            },
            customdata=np.stack([line.rounds, spread], axis=1),
            hovertemplate=f"<b>{name}</b><br>{where}<br>%{{y:.4g}}{shown}<extra></extra>",
        )
    )  # fmt: skip


def kept(clients: Sequence[Mapping[str, np.ndarray]]) -> Figure:
    """A heat map: of the clients that arrived in a round, the share that sent each layer.

    Args:
      clients: the columns of `clients.npz` of each run, with the same layers.
    """
    import plotly.graph_objects as go

    layers = clients[0]["layers"].tolist()
    arrived = [run["outcome"] == "arrived" for run in clients]
    rounds = np.concatenate([r["round"][a] for r, a in zip(clients, arrived, strict=True)])
    sent = np.concatenate([r["kept"][a] for r, a in zip(clients, arrived, strict=True)])
    last = int(max(run["round"].max() for run in clients))
    width = -(-last // _COLUMNS)  # rounds of a column
    column = (rounds - 1) // width
    count = np.bincount(column, minlength=-(-last // width))
    total = np.zeros((len(count), len(layers)))
    np.add.at(total, column, sent)
    share = np.full_like(total, np.nan)
    np.divide(100 * total, count[:, None], out=share, where=count[:, None] > 0)
    figure = _figure(height=max(130 + 22 * len(layers), 220))
    figure.add_trace(
        go.Heatmap(
            z=share.T.round(1), x=1 + width * np.arange(len(count)) + (width - 1) / 2,
            y=[html.escape(name) for name in layers],
            colorscale="Cividis", zmin=0, zmax=100,
            colorbar={
                "title": {"text": "senders [%]", "side": "right"}, "thickness": 12,
                "outlinewidth": 0, "len": 1.0,
            },
            hovertemplate="%{y}<br>round %{x:,.0f}<br>sent by %{z:.0f}% of clients<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title="round" if width == 1 else f"round ({width} in a column)")
    _name_layers(figure, layers)
    return figure


def layer_costs(
    costs: Mapping[str, Mapping[str, float]], of: Mapping[str, Mark], title: str, unit: str
) -> Figure:
    """A cost of each layer, a bar for each experiment.

    Args:
      costs: label -> layer -> cost, a mean over runs.
      of: label -> mark.
      title: of the axis.
      unit: of the cost, such as "B"; the axis has thousands, millions or billions of it.
    """
    import plotly.graph_objects as go

    layers = list(dict.fromkeys(layer for by_layer in costs.values() for layer in by_layer))
    largest = max(max(by_layer.values(), default=0) for by_layer in costs.values())
    prefix, scale = next((p, s) for p, s in _PREFIXES if largest >= s or s == 1)
    unit = prefix + unit
    bar = 12 if len(costs) <= 4 else 6  # pixels
    figure = _figure(height=110 + len(layers) * (14 + bar * len(costs)))
    for label, by_layer in costs.items():
        mark = of[label]
        figure.add_trace(
            go.Bar(
                y=[html.escape(layer) for layer in layers],
                x=[by_layer.get(layer, 0) / scale for layer in layers],
                orientation="h", name=html.escape(label),
                marker={
                    "color": mark.colour,
                    "pattern": {
                        "shape": mark.pattern, "size": 6, "fillmode": "overlay",
                        "fgcolor": "#ffffff",
                    },
                },
                hovertemplate=f"<b>{html.escape(label)}</b><br>%{{y}}<br>%{{x:,.4g}} {unit}"
                "<extra></extra>",
            )
        )  # fmt: skip
    figure.update_xaxes(title=f"{title} [{unit}]", rangemode="tozero")
    _name_layers(figure, layers)
    return figure


def _name_layers(figure: Figure, layers: Sequence[str]) -> None:
    """Puts layers on the vertical axis, the first on top."""
    figure.update_yaxes(
        autorange="reversed",
        type="category",
        tickvals=list(range(len(layers))),
        ticktext=[html.escape(name) for name in short_names(layers)],
    )


def short_names(layers: Sequence[str]) -> list[str]:
    """Names for an axis. Long ones lose the modules that all of these share, and their end."""
    long = [name for name in layers if len(name) > _NAME]
    shared = os.path.commonpath(long) if len(long) > 1 else ""
    short = []
    for name in layers:
        if len(name) > _NAME and shared:
            name = "…" + name[len(shared) :]
        short.append(name if len(name) <= _NAME else name[: _NAME - 1] + "…")
    return short


def label_mix(client: np.ndarray, counts: np.ndarray) -> Figure:
    """Stacked bars: examples of each class that each client holds.

    Args:
      client: `i64[N]`, ids.
      counts: `i64[N, classes]`.
    """
    import plotly.graph_objects as go
    from plotly.colors import sample_colorscale

    classes = counts.shape[1]
    few = classes <= len(AREAS)
    colours = AREAS if few else sample_colorscale("Viridis", np.linspace(0, 1, classes).tolist())
    figure = _figure()
    for c in range(classes):
        figure.add_trace(
            go.Bar(
                x=[str(k) for k in client], y=counts[:, c], name=str(c),
                marker={"color": colours[c], "line": {"width": 0}}, showlegend=few,
                hovertemplate=f"client %{{x}}<br>class {c}: %{{y:,}} examples<extra></extra>",
            )
        )  # fmt: skip
    figure.update_layout(
        barmode="stack", bargap=0.1, showlegend=few,
        legend={"title": {"text": "class"}, "traceorder": "reversed", "itemwidth": 30},
    )  # fmt: skip
    title = "client" if few else f"client (dark: class 0, light: class {classes - 1})"
    figure.update_xaxes(title=title, type="category", nticks=10)
    figure.update_yaxes(title="examples")
    return figure


def sizes(examples: np.ndarray) -> Figure:
    """A histogram of the examples per client.

    Args:
      examples: `i64[K]`.
    """
    import plotly.graph_objects as go

    smallest, largest = int(examples.min()), int(examples.max())
    width = max(-(-(largest - smallest + 1) // 40), 1)
    edges = np.arange(smallest, largest + width + 1, width)
    count, _ = np.histogram(examples, edges - 0.5)
    upper = edges[1:] - 1
    names = [f"{a:,}" if a == b else f"{a:,} to {b:,}" for a, b in zip(edges, upper, strict=False)]
    figure = _figure()
    figure.add_trace(
        go.Bar(
            x=(edges[:-1] + upper) / 2, y=count, width=0.9 * width, marker={"color": LINES[0]},
            customdata=names,
            hovertemplate="%{customdata} examples<br>%{y:,} clients<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title="examples per client", tickformat=",d", nticks=8)
    figure.update_yaxes(title="clients", tickformat=",d", rangemode="tozero", nticks=6)
    if width == 1 and largest - smallest < 8:
        figure.update_xaxes(
            tickvals=np.arange(smallest, largest + 1), range=[smallest - 2, largest + 2]
        )
    return figure


def as_html(figure: Figure, identity: str) -> str:
    """A chart as part of a page that has the library, see `library`."""
    from plotly.io import to_html

    text: str = to_html(
        figure,
        full_html=False,
        include_plotlyjs=False,
        div_id=identity,
        default_height=f"{figure.layout.height}px",
        config={
            "responsive": True,
            "displaylogo": False,
            "showSendToCloud": False,  # plotly would send the chart to its makers
            "plotlyServerURL": "",
            "modeBarButtonsToRemove": ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d"],
        },
    )
    return text


def library() -> str:
    """The JavaScript of plotly, which a page embeds once.

    Raises:
      FedLPError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise FedLPError("a report needs plotly: pip install 'fedlp-jax[report]'.") from error
    text: str = get_plotlyjs()
    return text


def _figure(height: int = 320) -> Figure:
    import plotly.graph_objects as go

    axis = {
        "automargin": True, "zeroline": False, "gridcolor": "#d0d7de", "showline": True,
        "linecolor": "#8c959f", "ticks": "outside", "tickcolor": "#8c959f",
        "title": {"standoff": 8},
    }  # fmt: skip
    return go.Figure(
        layout={
            "template": "none", "height": height, "showlegend": False,
            "margin": {"l": 8, "r": 12, "t": 28, "b": 8},
            "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 13},
            "hoverlabel": {"bgcolor": "#24292f", "bordercolor": "#24292f", "align": "left"},
            "xaxis": axis, "yaxis": axis,
        }
    )  # fmt: skip


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"
