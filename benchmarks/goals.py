"""What `benchmarks.accelerator` measured, beside the hardware's limits and the goals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.workloads import WORKLOADS
from fedlp_jax.execution.plan import GPU_KERNELS

Row = dict[str, Any]

# On an NVIDIA H200, in ms of a client-step; another card's are in the proportion of its bandwidth.
_BANDWIDTH = 4250e9  # bytes a second that a copy reads and writes there
_OWN_COHORT = {"W1": 0.12, "W2": 0.011, "W3": 0.0059, "W4": 0.038}
_MANY_LANES = {"W1": 0.028, "W2": 0.0067, "W3": 0.005, "W4": 0.023}
_MANY = 100  # clients at once
_TO_NAIVE, _TO_TORCH = 1.0, 1 / 2.5  # our time over theirs, at most
_HETERO_TO_FEDAVG = 0.70
_TABLE_SECONDS = 600.0
_TABLE_STEPS = (
    27 * 200 * 10 * 250
)  # client-steps of the paper's table: cells, rounds, clients, steps


def add_shares(rows: Sequence[Row]) -> None:
    """Sets the last row's time beside the floor and the peak, if both were measured."""
    cell, result = rows[-1]["cell"], rows[-1].get("result")
    if cell["kind"] != "rounds" or result is None:
        return
    seconds = result["measured_ms_per_client_step"]["median"] / 1e3
    shares = result["shares"] = {}
    if bandwidth := _bandwidth(rows):
        shares["floor"] = result["step"]["bytes_a_client_step"] / bandwidth / seconds
    precision = cell.get("dtype", "default")
    for row in _results(rows, "peak", precision=precision):
        shares["peak"] = result["written_flop"] / row["result"]["flop_per_second"] / seconds


def milliseconds(row: Row) -> float:
    """Of a client-step."""
    return float(row["result"]["measured_ms_per_client_step"]["median"])


def reached(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each goal with what was measured; only a GPU has goals.

    Returns:
      For each goal `what`, `goal` and `measured`, the larger value allowed and the value found, in
      the same unit; None = not measured.
    """
    where = rows[0].get("result", {}).get("device", {}).get("platform") if rows else None
    if where != "gpu":
        return []
    bandwidth = _bandwidth(rows)
    scale = _BANDWIDTH / bandwidth if bandwidth else 1.0
    found = []

    def add(what: str, goal: float, measured: float | None) -> None:
        found.append({"what": what, "goal": goal, "measured": measured})

    for name in _OWN_COHORT:
        times = {
            kind: _least(_plain(rows, kind, name)) for kind in ("rounds", "naive", "torch graphs")
        }
        ours = times["rounds"]
        add(f"{name}, own cohort, ms a client-step", scale * _OWN_COHORT[name], ours)
        add(f"{name}, over naive JAX", _TO_NAIVE, _ratio(ours, times["naive"]))
        add(f"{name}, over torch's graphs", _TO_TORCH, _ratio(ours, times["torch graphs"]))
        many = _many(rows, "rounds", name)
        add(f"{name}, 100 lanes or more, ms a client-step", scale * _MANY_LANES[name], _least(many))
        if sweeps := _many(rows, "sweep", name):
            add(f"{name}, a sweep of as many", scale * _MANY_LANES[name], _least(sweeps))
        if name == "W1":
            table = _ratio(_least(many), 1e3 / _TABLE_STEPS)
            add("the paper's table, modelled from W1's steps, s", _TABLE_SECONDS, table)
    hetero = _results(rows, "mixed depths")
    clients = max((row["cell"]["cohort"] for row in hetero), default=_MANY)
    ratios = [r["result"]["ratio_to_fedavg"] for r in hetero if r["cell"]["cohort"] == clients]
    ratio = min(ratios, default=None)
    add(f"FedLP-Hetero(1) over FedAvg, {clients} clients", _HETERO_TO_FEDAVG, ratio)
    add("programs with other bits the second time", 0, _other_bits(rows))
    return found


def in_words(goal: dict[str, Any]) -> str:
    """One line of `reached`."""
    measured = goal["measured"]
    if measured is None:
        return f"{goal['what']}: at most {goal['goal']:.4g}; not measured"
    verdict = "reached" if measured <= goal["goal"] else "missed"
    return f"{goal['what']}: {measured:.4g}, at most {goal['goal']:.4g}: {verdict}"


def _results(rows: Sequence[Row], kind: str, **values: Any) -> list[Row]:
    """The measured rows of a kind whose cells have these values."""
    return [
        row
        for row in rows
        if row["cell"]["kind"] == kind
        and "result" in row
        and all(row["cell"].get(key) == value for key, value in values.items())
    ]


def _plain(rows: Sequence[Row], kind: str, workload: str) -> list[Row]:
    """Of a workload as it is: its own cohort, and no option that changes the program."""
    known = {"kind", "workload", "steps", "graphs", "platform"}
    if kind == "naive":
        known.add("flags")  # those without `fl.setup`
    return [r for r in _results(rows, kind, workload=workload) if {*r["cell"]} <= known]


def _many(rows: Sequence[Row], kind: str, name: str) -> list[Row]:
    """Of a workload in float32 with many clients at once."""
    found = _results(rows, kind, workload=name)
    return [r for r in found if _lanes(r["cell"]) >= _MANY and "dtype" not in r["cell"]]


def _lanes(cell: Mapping[str, Any]) -> int:
    """Clients that train at once."""
    if cell["kind"] == "sweep":
        return int(cell["runs"] * WORKLOADS[cell["workload"]].cohort)
    return int(cell.get("cohort") or WORKLOADS[cell["workload"]].cohort)


def _least(rows: Sequence[Row]) -> float | None:
    return min(map(milliseconds, rows), default=None)


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _bandwidth(rows: Sequence[Row]) -> float | None:
    found = _results(rows, "bandwidth")
    return found[0]["result"]["bytes_per_second"] if found else None


def _other_bits(rows: Sequence[Row]) -> int | None:
    """Programs that computed other bits the second time, in their process or another."""
    digests: dict[str, set[str]] = {}
    # What `fl.setup` chooses anyway, so a cell with these words is the same in a new process.
    tuned = ("flags", f"{GPU_KERNELS['tuned']}=true")
    for row in _results(rows, "rounds"):
        if f"{GPU_KERNELS['fixed']}=false" in row["cell"].get("flags", ""):
            continue  # which may choose other kernels
        cell = sorted(item for item in row["cell"].items() if item != tuned)
        # Those of another commit or other versions are other programs.
        program = str([cell, row.get("commit"), row.get("versions")])
        result = row["result"]
        digests.setdefault(program, set()).update({result["digest"], result["digest_again"]})
    return sum(len(seen) > 1 for seen in digests.values()) if digests else None
