"""What the cells of the paper's table show: tables and figures of docs/paper.md and docs/theory.md.

    python -m benchmarks.paper [--results DIR] [--docs DIR] [--json FILE] [--smoke]

Reads the run directories in DIR/cells and trains nothing. Cohorts, depths and masks are functions
of the seed, so they are drawn again here, round by round, and compared with the uploads that the
runs booked. `--docs` writes the figures into that directory, and the tables between the markers of
its paper.md. Times are modelled: devices are slow or fast, as `PROFILES` says, and a round ends
with its last client.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fedlp_jax as fl
from benchmarks import command
from benchmarks.paper_figures import draw
from fedlp_jax import theory
from fedlp_jax.accounting.ledger import modelled_traffic, wire_of
from fedlp_jax.algorithms.reference_draws import reference_draws
from fedlp_jax.clients.devices import PASSES
from fedlp_jax.paper import results
from fedlp_jax.paper.cells import CellRun, Study, read_runs
from fedlp_jax.paper.costs import cell_arguments, row_levels
from fedlp_jax.paper.figures import draw_figures
from fedlp_jax.paper.published import ROWS, SPLIT_LABELS, Cell, cell_config
from fedlp_jax.prng import root_key
from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.simulation.cohorts import sample
from fedlp_jax.types import Cohort

CLIENTS, COHORT, SHAPE = 100, 10, (32, 32, 3)
IMAGES, EPOCHS = 500, 5  # of a client, on iid
MEGABYTE = 1e6
# Assumptions of ours: multiply-accumulates, bytes down and bytes up, a second.
PROFILES = {
    "workstation, 100 Mbit/s": fl.Profile(1e12, 1.25e7, 1.25e7),
    "phone, 20 Mbit/s down, 5 up": fl.Profile(1e10, 2.5e6, 6.25e5),
    "phone, 250 kbit/s down, 50 up": fl.Profile(1e10, 3.125e4, 6.25e3),
}
TARGETS = (0.6, 0.7, 0.75)  # test accuracy
_MARKERS = ("<!-- {} -->", "<!-- end of {} -->")


class Replay(NamedTuple):
    """What the rounds of a cell draw: R rounds, C clients, L layers."""

    layers: LayerTable
    level: np.ndarray  # i64[R, C]
    upload: np.ndarray  # f32[R, C, L], 1 = sent
    download: np.ndarray  # f32[R, C, L], 1 = received
    macs: np.ndarray  # i64[G], of one image's forward pass
    depths: np.ndarray  # i64[K], level of each client


def main() -> None:
    """Prints the tables, and writes what is asked for."""
    parser = command.parser(__doc__)
    parser.add_argument("--results", default="benchmarks/results/paper", metavar="DIR")
    parser.add_argument("--docs", metavar="DIR", help="write figures and tables here, as docs")
    options = parser.parse_args()
    study = Study(Path(options.results))
    runs = {run.path.name: (cell, run) for cell, rs in read_runs(study).items() for run in rs}
    if options.smoke:
        runs = dict(list(runs.items())[:2])
    found = {
        "exchange": [exchange(cell, run) for cell, run in runs.values()],
        "targets": [row for cell, run in runs.values() if (row := targets(cell, run))],
        "rounding": rounding(runs),
        "deepest": [deepest(*runs[name]) for name in runs if name.startswith("hetero-1-iid")],
    }
    tables = {name: table(name, rows) for name, rows in found.items()}
    print("\n\n".join(tables.values()))
    command.write(options.json, found)
    if options.docs:
        folder = Path(options.docs)
        page, made = folder / "paper.md", results.make_table(study)
        results.write_table(made, study.out)
        draw_figures(study)
        page.write_text(with_tables(page.read_text(), tables | {"cells": results.markdown(made)}))
        draw(folder, runs, found, {name: seconds(*runs[name]) for name in timed(runs)})


@functools.cache
def replay(cell: Cell, rounds: int) -> Replay:
    """Draws what the rounds of a cell draw; it needs no data."""
    config = cell_config(cell._replace(split="iid", draws="own"))
    algorithm = cell_arguments(config, SHAPE)["algorithm"]
    layers, levels, _ = row_levels(config.algorithm.name, SHAPE)
    keep = config.algorithm.arguments().get("keep") if cell.row.startswith("homo") else None
    root = root_key(cell.seed)
    if cell.draws == "reference":
        draws = reference_draws(
            np.arange(50_000) % 10,  # depths, cohorts and masks depend on their number alone
            split=cell_config(cell).partition.name,
            rounds=rounds,
            flag=config.algorithm.arguments().get("depths"),
            keep=keep,
            seed=cell.seed,
        )
        cohorts = np.sort(draws.cohorts, axis=1)
        depths = np.zeros(CLIENTS, int) if draws.depths is None else draws.depths - 1
        policy = None if keep is None else draws.policy()
    else:
        cohorts = np.stack([sample(cell.seed, r, CLIENTS, COHORT) for r in range(1, rounds + 1)])
        depths = np.asarray(algorithm.assign(root, CLIENTS))
        policy = None if keep is None else fl.masks.bernoulli(keep)
    level = depths[cohorts]
    download = np.stack([one.table.covered for one in levels])[level]
    upload = download
    if policy is not None:
        state = policy.init(layers, CLIENTS)
        empty = jnp.zeros(())

        @jax.jit
        def masks(clients: fl.types.Array, r: fl.types.Array) -> fl.types.Array:
            cohort = Cohort(clients, empty, empty, empty, empty)
            return policy.sample(root, state, cohort, r, jnp.ones((COHORT, len(layers))))[0].upload

        numbered = zip(
            cohorts.astype(np.int32), np.arange(1, rounds + 1, dtype=np.int32), strict=True
        )
        upload = np.stack([np.asarray(masks(ids, r)) for ids, r in numbered])
    macs = np.asarray([sum(one.macs.values()) for one in levels])
    return Replay(layers, level, upload, download, macs, depths)


def exchange(cell: Cell, run: CellRun) -> dict[str, Any]:
    """Predicted and measured megabytes sent, and layers that nobody sent, a round.

    Raises:
      ValueError: a round has booked another upload than its draws make.
    """
    drawn = replay(cell, run.rounds)
    senders = drawn.upload.sum(axis=1)  # f32[R, L]
    booked = np.asarray([row["upload_params"] for row in run.rows])
    if not np.array_equal(booked, senders @ drawn.layers.params):
        raise ValueError(f"{run.path} has not sent what its draws say.")
    sent = np.asarray([row["upload_bytes"] for row in run.rows]) / MEGABYTE
    inactive = (senders == 0).sum(axis=1)
    megabytes, layers = expected(cell, drawn)
    return {
        "directory": run.path.name,
        **_names(cell),
        "rounds": run.rounds,
        "megabytes_predicted": megabytes,
        "megabytes_measured": float(sent.mean()),
        "megabytes_error": _standard_error(sent),
        "inactive_predicted": layers,
        "inactive_measured": float(inactive.mean()),
        "inactive_error": _standard_error(inactive),
    }


def expected(cell: Cell, drawn: Replay) -> tuple[float, float]:
    """Megabytes sent and layers not sent in a round, on average over cohorts and masks.

    Depths are those that were drawn once for the run.
    """
    config = cell_config(cell).algorithm
    if config.name != "fedlp_hetero":
        keep = config.arguments().get("keep") or 1.0
        layers = theory.uploads(keep, COHORT, drawn.layers)
        sent = theory.communication(keep, COHORT, drawn.layers)["upload_bytes"]
        return sent / MEGABYTE, float((1 - layers.updated).sum())
    held = np.zeros((len(drawn.macs), len(drawn.layers)))
    held[drawn.level.ravel()] = drawn.download.reshape(-1, len(drawn.layers))
    owners = held[drawn.depths].sum(axis=0)  # of the K clients
    sent = modelled_traffic(drawn.layers, COHORT * owners / CLIENTS, owners, COHORT)["upload_bytes"]
    nobody = [math.comb(CLIENTS - int(n), COHORT) / math.comb(CLIENTS, COHORT) for n in owners]
    return float(sent) / MEGABYTE, sum(nobody)


def seconds(cell: Cell, run: CellRun) -> dict[str, np.ndarray]:
    """Modelled seconds until the end of each round, by profile; a round ends with its last client.

    As in `fedlp_jax.clients.outcomes`: download, then training, then upload.
    """
    drawn, wire = replay(cell, run.rounds), wire_of(replay(cell, run.rounds).layers)
    down = drawn.download @ wire.download
    up = drawn.upload @ wire.upload + wire.header
    macs = PASSES * drawn.macs[drawn.level] * IMAGES * EPOCHS
    return {
        name: np.cumsum((down / p.download + macs / p.compute + up / p.upload).max(axis=1))
        for name, p in PROFILES.items()
    }


def targets(cell: Cell, run: CellRun) -> dict[str, Any] | None:
    """Rounds, megabytes sent and modelled seconds until each accuracy is first reached; on iid."""
    if cell.split != "iid":
        return None
    accuracy = np.asarray([row["test_accuracy"] for row in run.rows])
    sent = np.cumsum([row["upload_bytes"] for row in run.rows]) / MEGABYTE
    clock = seconds(cell, run)
    row: dict[str, Any] = {"directory": run.path.name, **_names(cell), "rounds": run.rounds}
    for target in TARGETS:
        reached = np.flatnonzero(accuracy >= target)
        at = int(reached[0]) if len(reached) else None
        row[f"{target:.0%}"] = None if at is None else {
            "round": at + 1,
            "megabytes": float(sent[at]),
            **{name: float(times[at]) for name, times in clock.items()},
        }  # fmt: skip
    return row


def rounding(runs: Mapping[str, tuple[Cell, CellRun]]) -> list[dict[str, Any]]:
    """Runs of one cell on two machines: the same draws, so that they differ by rounding alone."""
    rows = []
    for name, (cell, there) in runs.items():
        here = runs.get(cell.name, (cell, None))[1]
        if "@" not in name or here is None:
            continue
        pairs = zip(here.rows, there.rows, strict=False)
        a, b = 100 * np.array([[x["test_accuracy"], y["test_accuracy"]] for x, y in pairs]).T
        rows.append(
            _names(cell)
            | {
                "rounds": len(a),
                "here": float(a[10:].mean()),
                "there": float(b[10:].mean()),
                "sd_of_difference": float((b - a)[10:].std(ddof=1)),
            }
        )
    return rows


def deepest(cell: Cell, run: CellRun) -> dict[str, Any]:
    """How often clients of depth 5 took part, and the accuracy of a few rounds."""
    drawn = replay(cell, run.rounds)
    deep = (drawn.level == drawn.level.max()).sum(axis=1)
    accuracy = [100 * row["test_accuracy"] for row in run.rows]
    change, some = np.diff(accuracy)[4:], deep[5:] > 0  # from round 6 on
    return {
        "directory": run.path.name,
        "rounds": run.rounds,
        "clients": int((drawn.depths == drawn.level.max()).sum()),
        "uploads_to_10": int(deep[:10].sum()),
        "uploads_to_20": int(deep[:20].sum()),
        "without_to_20": int((deep[:20] == 0).sum()),
        "accuracy_6_to_10": fmean(accuracy[5:10]),
        "accuracy_16_to_20": fmean(accuracy[15:20]),
        "accuracy_28_to_37": fmean(accuracy[27:37]) if run.rounds >= 37 else None,
        "change_with": float(change[some].mean()),
        "change_without": float(change[~some].mean()),
        "deep_by_round": deep.tolist(),
    }


def timed(runs: Mapping[str, tuple[Cell, CellRun]]) -> list[str]:
    """The longest run of each row on iid, with the authors' draws where two are as long."""
    longest: dict[str, str] = {}

    def rank(name: str) -> tuple[int, bool]:
        cell, run = runs[name]
        return run.rounds, cell.draws == "reference"

    for name, (cell, _) in runs.items():
        if cell.split == "iid":
            other = longest.get(cell.row)
            if other is None or rank(other) < rank(name):
                longest[cell.row] = name
    return [longest[row] for row in ROWS if row in longest]


def table(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown table of results, by the name of their markers."""
    return _TABLES[name](rows)


def with_tables(page: str, tables: Mapping[str, str]) -> str:
    """A page with each table between its markers."""
    for name, table in tables.items():
        begin, end = (marker.format(name) for marker in _MARKERS)
        before, rest = page.split(begin)
        _, after = rest.split(end)
        page = f"{before}{begin}\n{table.strip()}\n{end}{after}"
    return page


def _exchange_table(rows: Sequence[Mapping[str, Any]]) -> str:
    titles = "run,rounds,MB a round predicted,measured,layers not sent predicted,measured"
    return _markdown(
        titles,
        (
            (
                f"`{row['directory']}`",
                str(row["rounds"]),
                f"{row['megabytes_predicted']:.3f}",
                _plus_minus(row["megabytes_measured"], row["megabytes_error"], 3),
                f"{row['inactive_predicted']:.2f}",
                _plus_minus(row["inactive_measured"], row["inactive_error"], 2),
            )
            for row in rows
        ),
    )


def _targets_table(rows: Sequence[Mapping[str, Any]]) -> str:
    titles = ",".join(
        ["run", "accuracy", "in round", "after MB sent", *(n.replace(",", ";") for n in PROFILES)]
    )
    lines = []
    for row in rows:
        for target in (f"{one:.0%}" for one in TARGETS):
            if row[target] is not None:
                at = row[target]
                times = [_duration(at[name]) for name in PROFILES]
                where = [str(at["round"]), f"{at['megabytes']:,.0f}"]
                lines.append((f"`{row['directory']}`", target, *where, *times))
    return _markdown(titles, sorted(lines, key=lambda line: line[1]))


def _rounding_table(rows: Sequence[Mapping[str, Any]]) -> str:
    titles = (
        "scheme,split,rounds compared,mean from round 11 on two CPU cores,on an H200,"
        "sd of the difference in a round"
    )
    return _markdown(
        titles,
        (
            (
                row["row"],
                row["split"],
                str(row["rounds"]),
                *(f"{row[name]:.2f}" for name in ("here", "there", "sd_of_difference")),
            )
            for row in rows
        ),
    )


def _deepest_table(rows: Sequence[Mapping[str, Any]]) -> str:
    titles = (
        "run,clients of depth 5 of 100,their uploads in rounds 1 to 10,in 1 to 20,"
        "rounds of 20 without any,mean accuracy of rounds 6 to 10,of 16 to 20,of 28 to 37,"
        "mean change in a round with such an upload (from round 6),in one without"
    )
    return _markdown(
        titles,
        (
            (
                f"`{row['directory']}`",
                *(
                    str(row[n])
                    for n in ("clients", "uploads_to_10", "uploads_to_20", "without_to_20")
                ),
                *(
                    "" if row[n] is None else f"{row[n]:.2f}"
                    for n in ("accuracy_6_to_10", "accuracy_16_to_20", "accuracy_28_to_37")
                ),
                *(f"{row[n]:+.2f}" for n in ("change_with", "change_without")),
            )
            for row in rows
        ),
    )


_TABLES = {
    "exchange": _exchange_table,
    "targets": _targets_table,
    "rounding": _rounding_table,
    "deepest": _deepest_table,
}


def _markdown(titles: str, lines: Any) -> str:
    heads = [title.replace(";", ",") for title in titles.split(",")]
    rule = ["---" if title in ("run", "scheme", "split") else "---:" for title in heads]
    return "\n".join(f"| {' | '.join(words)} |" for words in (heads, rule, *lines))


def _names(cell: Cell) -> dict[str, str]:
    return {"row": ROWS[cell.row].label, "split": SPLIT_LABELS[cell.split], "draws": cell.draws}


def _plus_minus(value: float, error: float, decimals: int) -> str:
    return f"{value:.{decimals}f}" + (f" ± {error:.{decimals}f}" if error else "")


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _duration(time: float) -> str:
    """`"45 s"`, `"12 min"`, `"3.4 h"`."""
    if time < 100:
        return f"{time:.3g} s"
    return f"{time / 60:.0f} min" if time < 6000 else f"{time / 3600:.1f} h"


if __name__ == "__main__":
    main()
