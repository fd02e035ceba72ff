"""report: runs as one HTML file that opens from disk and loads nothing from elsewhere."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedlp_jax.data.files import replacing
from fedlp_jax.errors import FedLPError, why
from fedlp_jax.reporting import charts
from fedlp_jax.reporting.charts import Mark
from fedlp_jax.reporting.compare import Rows, Run, check_run, compare, experiments
from fedlp_jax.reporting.environment import origin, versions
from fedlp_jax.reporting.metrics import headline_of
from fedlp_jax.reporting.plots import AXES, axes_of
from fedlp_jax.reporting.run_directory import CLIENTS, CONFIG, PARTITION, SUMMARY, read_metrics

_METRICS = re.compile("(test|train)_(?!macs|.*_depth_)")  # keys that are drawn by round
_WIDE = 3  # heat maps that take the whole width; more share it
_COLUMNS = 7  # experiments that are columns of the table; more are lines
_PLAIN = Mark("#888888", "solid", "circle", "")  # of bars that belong to all experiments
_QUANTILES = {"minimum": 0.0, "10% quantile": 0.1, "median": 0.5, "90% quantile": 0.9}
_QUANTILES |= {"maximum": 1.0}


class _Evidence(NamedTuple):
    """What is known of a run; empty where nothing is."""

    name: str
    rows: Rows
    clients: Mapping[str, np.ndarray]  # as in clients.npz
    partition: Mapping[str, np.ndarray]  # as in partition.npz
    layers: Mapping[str, Mapping[str, float]]  # as in summary.json
    config: str
    origin: str
    warnings: Sequence[str]


class _Chart(NamedTuple):
    title: str
    figure: Any
    wide: bool = False


def report(
    runs: Mapping[str, Run | Sequence[Run]] | Sequence[str | Path],
    out: str | Path,
    *,
    target: float | None = None,
    metric: str | None = None,
    title: str = "Federated learning runs",
) -> Path:
    """Writes one HTML file with everything that runs left.

    It holds the table of `fl.compare`; curves to hover over, against rounds, traffic and time,
    with seeds as a mean and a band of one standard deviation; the share of clients that sent each
    layer by round; upload and multiply-accumulates of each layer; how accuracies spread over
    clients; the partition; configurations, versions and warnings.
    The page follows the light or dark scheme of the reader, and prints in light.

    Args:
      runs: as for `fl.compare`. Run directories say the most: a `Result` has no configuration, rows
        are curves alone.
      out: the file, replaced in one step.
      target: of the table, as for `fl.compare`.
      metric: of the table and of the curves against costs, as for `fl.compare`.
      title: of the page.

    Returns:
      The path of the file.

    Raises:
      FedLPError: plotly is not installed, there is no run, or the file cannot be written.
    """
    script = charts.library()
    found = _evidence(runs)
    rows = {label: [run.rows for run in seeds] for label, seeds in found.items()}
    metric = metric or headline_of(row for seeds in rows.values() for run in seeds for row in run)
    table = compare(rows, target=target, metric=metric)
    of = charts.marks(list(found))
    tested = [k for k, v in rows.items() if any(metric in row for run in v for row in run)]
    body = [
        _section(
            "Summary", _table(_upright([table.header, *table.lines()])), " ".join(table.notes)
        ),
        _section("Learning curves", _legend(of) + _charts(_by_round(rows, of), "curve")),
        _section(
            f"{metric.replace('_', ' ').capitalize()} against cost",
            _legend({k: of[k] for k in tested}) + _charts(_by_cost(rows, metric, of), "cost"),
            "Traffic and modelled time are counted from masks and layer tables; measured time is "
            "read from a clock and leaves out compilation.",
        ),
        *_layers_kept(found),
        *_layer_costs(found, of),
        *_clients(found, of),
        *_partitions(found),
        _section("Settings", _settings(found)),
        _warnings(found),
    ]
    counted = sum(map(len, found.values()))
    subtitle = f"{_plural(counted, 'run')} of {_plural(len(found), 'experiment')}"
    page = _PAGE.format(
        title=html.escape(title),
        subtitle=f"{subtitle}, written by fedlp-jax {versions()['fedlp_jax']}",
        style=_STYLE,
        script=script,
        body="\n".join(body),
    )
    place = Path(out).expanduser()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as file:
            file.write(page.encode())
    except OSError as error:
        raise FedLPError(f"the report {place} cannot be written: {why(error)}.") from error
    return place


# WHAT RUNS LEFT


def _evidence(runs: Any) -> dict[str, list[_Evidence]]:
    if not runs:
        raise FedLPError("there is nothing to report; give at least one run.")
    if not isinstance(runs, Mapping):
        grouped = experiments(runs)
        return {label: [_of_directory(p) for p, _ in seeds] for label, seeds in grouped.items()}
    found = {}
    for label, given in runs.items():
        several = isinstance(given, list | tuple) and not (given and isinstance(given[0], Mapping))
        found[label] = [_of(run, label) for run in (given if several else [given])]
    return found


def _of(run: Run, label: str) -> _Evidence:
    if isinstance(run, str | Path):
        return _of_directory(check_run(Path(run)))
    if not hasattr(run, "history"):
        return _Evidence(label, list(run), {}, {}, {}, "", "", ())
    sent = run.costs.layer_upload_bits / 8
    parts = zip(run.layers.names, run.layers.params, sent, strict=True)
    layers = {name: {"params": int(p), "upload_bytes": float(b)} for name, p, b in parts}
    clients = run.clients.columns()
    sizes = {"sizes": run.clients.sizes} if len(run.clients.sizes) else {}
    return _Evidence(label, run.history.rows, clients, sizes, layers, "", "", run.warnings)


def _of_directory(path: Path) -> _Evidence:
    try:
        summary = json.loads((path / SUMMARY).read_text("utf-8"))
    except (OSError, ValueError):  # a run that goes on, or was killed
        summary = {}
    text = (path / CONFIG).read_text("utf-8")
    warnings = [*summary.get("warnings", [])]
    if summary.get("status") != "done":
        warnings.append(f"the run has not ended ({summary.get('status', 'there is no summary')}).")
    return _Evidence(
        path.name,
        read_metrics(path),
        _arrays(path / CLIENTS),
        _arrays(path / PARTITION),
        summary.get("layers", {}),
        text,
        origin(summary) if "device" in summary else "",
        warnings,
    )


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except (OSError, ValueError):  # of an unfinished run, or of an earlier version
        return {}


# SECTIONS


def _by_round(rows: Mapping[str, Sequence[Rows]], of: dict[str, Mark]) -> list[_Chart]:
    measured = {
        key: None
        for seeds in rows.values()
        for run in seeds
        for row in run
        for key, value in row.items()
        if value is not None and _METRICS.match(key)
    }
    return [
        _Chart(f"{y.replace('_', ' ').capitalize()} by round", charts.curves(rows, "round", y, of))
        for y in sorted(measured)
    ]


def _by_cost(rows: Mapping[str, Sequence[Rows]], metric: str, of: dict[str, Mark]) -> list[_Chart]:
    made = []
    for x in AXES:
        have = {k: v for k, v in rows.items() if all(x in axes_of(run) for run in v)}
        if x != "round" and have:
            made.append(
                _Chart(AXES[x].split(" [")[0].capitalize(), charts.curves(have, x, metric, of))
            )
    return made


def _layers_kept(found: Mapping[str, Sequence[_Evidence]]) -> list[str]:
    maps, whole = [], []
    for label, seeds in found.items():
        clients = [
            run.clients for run in seeds if "kept" in run.clients and len(run.clients["kept"])
        ]
        same = {tuple(run["layers"].tolist()) for run in clients}
        if len(same) != 1 or not next(iter(same)):
            continue
        if all(run["kept"][run["outcome"] == "arrived"].all() for run in clients):
            whole.append(label)
        else:
            maps.append(_Chart(label, charts.kept(clients)))
    if not (maps or whole):
        return []
    wide = len(maps) <= _WIDE
    body = _charts([chart._replace(wide=wide) for chart in maps], "kept") if maps else ""
    if whole:
        names = html.escape(", ".join(whole))
        body += f"<p>Every client sent every layer, in every round: {names}.</p>"
    text = "Of the clients that arrived in a round, the share that sent the layer."
    return [_section("Layers kept by round", body, text if maps else "")]


def _layer_costs(found: Mapping[str, Sequence[_Evidence]], of: dict[str, Mark]) -> list[str]:
    alike = {
        label: seeds
        for label, seeds in found.items()
        if seeds[0].layers and len({tuple(run.layers) for run in seeds}) == 1
    }
    if not alike:
        return []
    upload = {
        label: {
            layer: float(np.mean([run.layers[layer]["upload_bytes"] for run in seeds]))
            for layer in seeds[0].layers
        }
        for label, seeds in alike.items()
    }
    figure = charts.layer_costs(upload, of, "uploaded over the run", "B")
    made = [_Chart("Upload of each layer", figure)]
    models: dict[str, dict[str, tuple[int, int]]] = {}  # parameters and MACs of each layer
    for label, seeds in alike.items():
        sizes = {
            k: (int(v["params"]), int(v.get("forward_macs", 0))) for k, v in seeds[0].layers.items()
        }
        if sizes not in models.values():  # experiments of one model share a bar and a table
            models[label] = sizes
    macs = {
        label: {layer: float(count) for layer, (_, count) in sizes.items()}
        for label, sizes in models.items()
        if any(count for _, count in sizes.values())
    }
    if macs:
        plain = dict.fromkeys(macs, _PLAIN) if len(models) == 1 else of
        figure = charts.layer_costs(macs, plain, "forward pass of an example", "MAC")
        made.append(_Chart("Computation of each layer", figure))
    tables = (
        _layer_table(label if len(models) > 1 else "layer", sizes, with_macs=label in macs)
        for label, sizes in models.items()
    )
    text = "Bytes on the wire of all clients over the run, a mean over seeds" + (
        ", and multiply-accumulates (MACs) of one example in the whole model. A training step "
        "counts as three forward passes."
        if macs
        else "."
    )
    body = _legend({k: of[k] for k in upload}, bars=True) + _charts(made, "layers")
    return [_section("Cost of each layer", body + "".join(tables), text)]


def _layer_table(title: str, sizes: Mapping[str, tuple[int, int]], with_macs: bool) -> str:
    head = [title, "parameters", "MACs of an example"]
    totals = tuple(map(sum, zip(*sizes.values(), strict=True)))
    lines = [
        [layer, *(f"{number:,}" for number in row)]
        for layer, row in [*sizes.items(), ("all layers", totals)]
    ]
    return _table([line[: 2 + with_macs] for line in [head, *lines]])


def _clients(found: Mapping[str, Sequence[_Evidence]], of: dict[str, Mark]) -> list[str]:
    for metric in ("accuracy", "loss"):
        latest = {
            label: [_latest(run.clients, metric) for run in seeds if metric in run.clients]
            for label, seeds in found.items()
        }
        latest = {k: runs for k, v in latest.items() if (runs := [x for x in v if len(x)])}
        if latest:
            break
    else:
        return []
    scale, unit = (100, " [%]") if metric == "accuracy" else (1, "")
    head = ["", *(f"{name}{unit}" for name in _QUANTILES), f"standard deviation{unit}"]
    lines = []
    for label, runs in latest.items():
        each = [[*np.quantile(x, [*_QUANTILES.values()]), np.std(x)] for x in runs]
        lines.append([label, *(f"{scale * v:.4g}" for v in np.mean(each, axis=0))])
    chart = _Chart(
        f"Training {metric} over clients", charts.over_clients(latest, metric, of), wide=True
    )
    text = (
        f"The training {metric} of each client on its own examples, in the last round that it "
        "arrived in; of those that arrived in the second half of the rounds. Quantiles over "
        "clients, a mean over seeds."
    )
    body = _legend({k: of[k] for k in latest}) + _charts([chart], "clients")
    return [_section("Fairness over clients", body + _table(_upright([head, *lines])), text)]


def _latest(clients: Mapping[str, np.ndarray], metric: str) -> np.ndarray:
    """The last number of each client in the second half of the rounds, if it has one there."""
    known = ~np.isnan(clients[metric]) & (2 * clients["round"] > clients["round"].max(initial=0))
    latest = dict(zip(clients["client"][known].tolist(), clients[metric][known], strict=True))
    return np.asarray([*latest.values()], np.float64)


def _partitions(found: Mapping[str, Sequence[_Evidence]]) -> list[str]:
    made: list[_Chart] = []
    seen = set()
    for label, seeds in found.items():
        arrays = seeds[0].partition
        key = b"".join(arrays[name].tobytes() for name in sorted(arrays))
        if not arrays or key in seen:
            continue
        seen.add(key)
        whose = f" of {label}" if len(found) > 1 else ""
        if len(arrays.get("client", ())):
            some = len(arrays["client"]) < len(arrays["sizes"])
            what = f"Labels of {len(arrays['client'])} clients" if some else "Labels of the clients"
            made.append(_Chart(what + whose, charts.label_mix(arrays["client"], arrays["labels"])))
        title = f"Sizes of all {len(arrays['sizes']):,} clients{whose}"
        made.append(_Chart(title, charts.sizes(arrays["sizes"])))
    if not made:
        return []
    text = "Of the first run of each experiment; equal partitions are shown once."
    return [_section("Partition", _charts(made, "partition"), text)]


def _settings(found: Mapping[str, Sequence[_Evidence]]) -> str:
    parts = []
    for label, seeds in found.items():
        names = ", ".join(run.name for run in seeds)
        origins = dict.fromkeys(run.origin for run in seeds if run.origin)
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in origins)
        text = seeds[0].config
        config = f"<pre>{html.escape(text)}</pre>" if text else "<p>No configuration is known.</p>"
        head = f"<summary>{html.escape(label)}</summary><p>Runs: {html.escape(names)}</p>"
        parts.append(f"<details>{head}{lines}{config}</details>")
    return "".join(parts)


def _warnings(found: Mapping[str, Sequence[_Evidence]]) -> str:
    said: dict[str, list[str]] = {}
    for seeds in found.values():
        for run in seeds:
            for sentence in run.warnings:
                said.setdefault(sentence, []).append(run.name)
    items = (
        f"<li>{html.escape(sentence)} <small>({html.escape(', '.join(names))})</small></li>"
        for sentence, names in said.items()
    )
    return _section("Warnings", f"<ul>{''.join(items)}</ul>" if said else "<p>None.</p>")


# HTML


def _section(title: str, body: str, text: str = "") -> str:
    note = f"<p class=note>{html.escape(text)}</p>" if text else ""
    return f"<section><h2>{html.escape(title)}</h2>{note}{body}</section>"


def _charts(made: Iterable[_Chart], prefix: str) -> str:
    figures = (
        f"<figure{' class=wide' * chart.wide}><figcaption>{html.escape(chart.title)}</figcaption>"
        f"{charts.as_html(chart.figure, f'{prefix}-{i}')}</figure>"
        for i, chart in enumerate(made, start=1)
    )
    return f"<div class=charts>{''.join(figures)}</div>"


def _upright(lines: Sequence[Sequence[str]]) -> Sequence[Sequence[str]]:
    """A table with a column for each experiment, if there are few, so that it fits a screen."""
    few = len(lines) <= 1 + _COLUMNS
    return list(zip(*lines, strict=True)) if few else lines


def _table(lines: Sequence[Sequence[str]]) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    head, *body = lines
    rows = "".join(row("td", line) for line in body)
    return (
        f"<div class=scroll><table><thead>{row('th', head)}</thead><tbody>{rows}</tbody></table>"
        "</div>"
    )


def _legend(of: Mapping[str, Mark], bars: bool = False) -> str:
    entries = (
        f"<span class=entry>{_swatch(mark, bars)}{html.escape(label)}</span>"
        for label, mark in of.items()
    )
    return f"<p class=legend>{''.join(entries)}</p>"


def _swatch(mark: Mark, bar: bool) -> str:
    """The line and marker of an experiment, as in the charts."""
    if bar:
        return (
            f'<svg width="24" height="12"><rect width="24" height="12" fill="{mark.colour}"/>'
            f'<path d="{_HATCHES[mark.pattern]}" stroke="#fff" fill="none"/></svg>'
        )
    dashes = {"solid": "", "dash": "7 4", "dashdot": "7 3 2 3", "dot": "2 3", "longdash": "11 4"}
    shapes = {
        "circle": "M20 8m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
        "square": "M16 4h8v8h-8z",
        "triangle-up": "M20 3l5 9h-10z",
        "diamond": "M20 2.5l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
        "triangle-down": "M20 13l5 -9h-10z",
        "x": "M16 6l2 -2l2 2l2 -2l2 2l-2 2l2 2l-2 2l-2 -2l-2 2l-2 -2l2 -2z",
        "star": "M20 2l1.8 4h4.2l-3.4 2.7l1.3 4.3l-3.9 -2.6l-3.9 2.6l1.3 -4.3l-3.4 -2.7h4.2z",
    }
    return (
        f'<svg width="40" height="16"><path d="M0 8h40" stroke="{mark.colour}" stroke-width="2" '
        f'stroke-dasharray="{dashes[mark.dash]}"/>'
        f'<path d="{shapes[mark.marker]}" fill="{mark.colour}"/></svg>'
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


_HATCHES = {
    "": "",
    "/": "M0 6l6 -6M0 12l12 -12M6 12l12 -12M12 12l12 -12M18 12l6 -6",
    "\\": "M0 6l6 6M0 0l12 12M6 0l12 12M12 0l12 12M18 0l6 6",
    "x": "M0 12l12 -12l12 12M0 0l12 12l12 -12M6 12l12 -12M6 0l12 12",
    ".": "M3 3h2M11 3h2M19 3h2M7 9h2M15 9h2",
    "+": "M0 6h24M4 0v12M12 0v12M20 0v12",
}

# The policy keeps the page from loading anything, whatever the library would like to.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>{style}</style>
<script>{script}</script>
</head>
<body>
<header><h1>{title}</h1><p class=note>{subtitle}</p></header>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { --ink: #1f2328; --muted: #59636e; --page: #ffffff; --panel: #f6f8fa; --rule: #d1d9e0; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --muted: #9aa4af; --page: #0d1117; --panel: #151b23; --rule: #3d444d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1rem clamp(0.75rem, 3vw, 2.5rem) 4rem;
  font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); }
h1 { margin: 1rem 0 0; font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 0.5rem; padding-bottom: 0.25rem; font-size: 1.2rem;
  border-bottom: 1px solid var(--rule); }
.note { margin: 0.25rem 0 0.75rem; color: var(--muted); max-width: 50rem; }
.scroll { overflow-x: auto; margin-top: 0.75rem; background:
  linear-gradient(to right, var(--page) 30%, transparent) left / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--page) 30%, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to right, var(--rule), transparent) left / 0.75rem 100% no-repeat scroll,
  linear-gradient(to left, var(--rule), transparent) right / 0.75rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.3rem 0.75rem; text-align: right; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th { font-weight: 600; white-space: normal; vertical-align: bottom; max-width: 15rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.legend { display: flex; flex-wrap: wrap; gap: 0.25rem 1.5rem; margin: 0.5rem 0; }
.entry { display: inline-flex; align-items: center; gap: 0.5rem; overflow-wrap: anywhere; }
.entry svg { flex: none; }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; padding: 0.75rem 0.5rem 0.5rem; min-width: 0; background: var(--panel);
  border: 1px solid var(--rule); border-radius: 6px; break-inside: avoid; }
figure.wide { grid-column: 1 / -1; }
figcaption { padding-left: 0.5rem; font-weight: 600; overflow-wrap: anywhere; }
.plotly-graph-div text { fill: var(--ink) !important; }
.plotly-graph-div .hoverlayer text { fill: #ffffff !important; }
.plotly-graph-div .gridlayer path { stroke: var(--rule) !important; }
details { margin: 0.5rem 0; padding: 0.5rem 0.75rem; border: 1px solid var(--rule);
  border-radius: 6px; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
details p { margin: 0.5rem 0 0; color: var(--muted); font-size: 0.9rem; overflow-wrap: anywhere; }
pre { overflow-x: auto; padding: 0.75rem; background: var(--panel); font-size: 0.85rem; }
small { color: var(--muted); }
@media print { body { max-width: none; } .modebar { display: none; } }
"""
