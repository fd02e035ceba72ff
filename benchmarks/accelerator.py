"""What this host does with the four workloads, in ten minutes: for a GPU or TPU, runs anywhere.

    python -m benchmarks.accelerator [--json FILE] [--minutes 10] [--smoke]

It needs the package (`pip install -e .`) and jax for the accelerator (`pip install 'jax[cuda13]'`),
but no data. With PyTorch for CUDA it also compares with CUDA graphs. A CPU runs smaller sizes.

Cells are measured one after another, in parts that share the time: the ceilings of the hardware;
the workloads at their own cohorts, beside naive JAX and PyTorch; 100 to 4,096 clients at once;
equality with a CPU, and what changes the price of a step, one by one: kernels that repeat, options
of XLA, uneven clients, levels, precision. What a part leaves of its time goes to the next; cells
that a part had no time for come last. Cells run in a separate process, which is killed when a cell
takes too long; another starts for other flags of XLA. A cell that is killed or does not fit is
measured again on a smaller size. Every cell ends as a row with `result`, `error` or `skipped`, and
FILE is complete after each. A FILE that is there is continued: cells with a result keep it, so
several short loans of one kind of card add up; a row says where its commit or versions were others.

"of the floor" is the time in which the memory traffic of the step, as XLA counts it in the compiled
program (see benchmarks.kernels), passes at the measured bandwidth, over the measured time. "of the
peak" is the rate of operations as written over the peak of products at the same precision. Goals
are those of an H200 with 4,250 GB/s, in the proportion of the measured bandwidth.
"""

from __future__ import annotations

import collections
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import command, goals
from fedlp_jax.errors import why
from fedlp_jax.execution.plan import GPU_KERNELS

Cell = dict[str, Any]
Row = dict[str, Any]  # "cell", "seconds", and "result", "error" or "skipped"

_ROOT = Path(__file__).parents[1]
_WORKER = (sys.executable, "-m", "benchmarks.cells")
_CELL_SECONDS = 120.0
_LEAST_SECONDS = 20.0  # of a cell, if its part has them
_SLOW = {"mixed depths": 75.0}  # of cells whose programs take XLA that long
_SPARED_SECONDS = 5.0  # for each cell to come
_FEW = 8  # clients where a workload's own cohort is too much
_MEBIBYTE = 2**20
# Keys of a cell that concern its process: words for XLA_FLAGS, and a value for JAX_PLATFORMS.
_PROCESS = ("flags", "platform")
_FIXED, _TUNED = (f"{GPU_KERNELS[name]}=true" for name in ("fixed", "tuned"))
_ANY = " ".join(f"{flag}=false" for flag in GPU_KERNELS.values())
_SMALL_GRAPHS = "--xla_gpu_graph_min_graph_size=1"
_LEVELS = ("in_turn", "side_by_side")
_CONCURRENT = "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT_REGIONS"


class Part(NamedTuple):
    """Cells that share some of the time, the most informative first."""

    name: str
    share: float  # of the time that is left when it begins
    cells: Sequence[Cell]


def main() -> None:
    """Runs it."""
    parser = command.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything together")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    earlier = _earlier(options.json, options.smoke)
    notes = {key: earlier[key] for key in ("notes",) if key in earlier}
    rows: list[Row] = []
    for row in measure(options.smoke, deadline, known=earlier.get("cells", [])):
        if rows:
            rows.append(row)
            goals.add_shares(rows)
        else:
            _refuse_other_card(earlier, row, options.json)
            rows = [row, *_kept(earlier, row)]
        print(_line(row), flush=True)
        if options.json:
            about = {"minutes": options.minutes, "smoke": options.smoke}
            found = {"goals": goals.reached(rows), "cells": rows[1:]}
            command.save(options.json, notes | about | found | rows[0]["result"])
    for goal in goals.reached(rows):
        print(f"goal: {goals.in_words(goal)}")
    for row in rows:
        if "result" not in row:
            print(f"not measured: {_name(row['cell'])}: {row.get('error') or row['skipped']}")


def _earlier(file: str | None, smoke: bool) -> dict[str, Any]:
    """What an earlier call wrote, which this one can continue; empty if there is no file."""
    found: dict[str, Any] = {}
    if not file or not Path(file).exists():
        return found
    try:
        found = json.loads(Path(file).read_text("utf-8"))
        goals.reached([{"cell": {"kind": "environment"}, "result": found}, *found["cells"]])
        sizes, _ = found.get("smoke", False), found["device"]["kind"]
    except Exception as error:  # malformed JSON can raise almost anything
        raise SystemExit(
            f"{file} has no cells that this command could continue ({why(error)}); remove it, or "
            "choose another file."
        ) from None
    if sizes != smoke:
        raise SystemExit(
            f"{file} was measured with{'' if sizes else 'out'} --smoke; choose another file."
        )
    return found


def _refuse_other_card(earlier: dict[str, Any], first: Row, file: str) -> None:
    """Times of two kinds of cards must not stand in one file, and no card has none."""
    if "result" not in first:
        raise SystemExit(f"nothing can be measured here: {first.get('error')}.")
    if not earlier:
        return
    before, now = (found.get("device", {}).get("kind") for found in (earlier, first["result"]))
    if before != now:
        raise SystemExit(
            f"{file} was measured on {before}, and this is {now}; choose another file."
        )


def _kept(earlier: dict[str, Any], first: Row) -> list[Row]:
    """The rows of an earlier call that have a result, and where it differed from this one."""
    now = first["result"]
    other = {
        key: earlier[key]
        for key in ("versions", "commit")
        if key in earlier and earlier[key] != now.get(key)
    }
    return [other | row for row in _with_result(earlier.get("cells", []))]


def _with_result(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "result" in row]


def parts_for(platform: str, smoke: bool = False) -> list[Part]:
    """What is measured on a "cpu", or on an accelerator."""
    if smoke:
        return [Part("all", 1.0, _smoke_cells())]
    if platform == "cpu":
        return [Part("all", 1.0, _cpu_cells())]
    parts = [
        Part("ceilings", 0.1, _ceilings()),
        Part("own cohorts", 0.28, _own_cohorts()),  # a quarter of everything
        Part("lanes", 0.35, _lanes()),
        Part("arms", 1.0, _arms()),
    ]
    if platform == "gpu":
        return parts
    return [
        part._replace(cells=[cell for cell in part.cells if not {*_PROCESS} & {*cell}])
        for part in parts
    ]


def _smoke_cells() -> list[Cell]:
    few = {"kind": "rounds", "workload": "W2", "steps": 1, "cohort": 2}
    return [
        {"kind": "peak", "precision": "bfloat16", "smoke": True},
        {"kind": "bandwidth", "smoke": True},
        {"kind": "fill", "gibibytes": 2**20},  # a pebibyte: the next cell must still run
        few | {"dtype": "bfloat16"},
        few | {"uneven": True, "flags": _FIXED},
    ]


def _cpu_cells() -> list[Cell]:
    few = {"kind": "rounds", "steps": 5}
    depths = {"kind": "mixed depths", "cohort": 20, "steps": 5, "small": True}
    return [
        {"kind": "peak", "precision": "default"},
        {"kind": "bandwidth"},
        *(few | {"workload": name} for name in ("W2", "W3", "W4", "W1")),
        *(few | {"workload": "W2", "cohort": 32, "width": width} for width in (1, 4, 16)),
        *(few | {"workload": "W3", "cohort": cohort} for cohort in (16, 64, 256)),
        few | {"workload": "W2", "uneven": True},
        {"kind": "masked mean", "model": "MLP", "cohort": 10},
        *(depths | {"levels": levels} for levels in _LEVELS),
    ]


def _ceilings() -> list[Cell]:
    return [{"kind": "bandwidth"}] + [
        {"kind": "peak", "precision": precision} for precision in ("default", "bfloat16")
    ]


_STEPS = {"W2": 60, "W3": 6, "W1": 50, "W4": 5}  # of a client in the workload itself


def _own_cohorts() -> list[Cell]:
    """Each workload as it is, then naive JAX with any kernels, as it would be written, and PyTorch.

    PyTorch's process leaves the memory to itself.
    """
    of_workloads = [{"workload": name, "steps": steps} for name, steps in _STEPS.items()]
    ours = [{"kind": "rounds"} | one for one in of_workloads]
    naive = [{"kind": "naive", "flags": _ANY} | one for one in of_workloads]
    torch = {"kind": "torch graphs", "graphs": 10, "platform": "cpu"}
    return [*ours, *naive, *(torch | one for one in of_workloads)]


def _lanes() -> list[Cell]:
    return [
        {"kind": "rounds", "workload": name, "steps": 5, "cohort": lanes, "width": lanes}
        for lanes in (100, 1024, 4096)
        for name in ("W1", "W2", "W3", "W4")
    ]


def _arms() -> list[Cell]:
    """Each changes one thing of a workload at its own cohort, or of 100 clients."""
    small, large = ({"kind": "rounds", "workload": w, "steps": _STEPS[w]} for w in ("W2", "W1"))
    depths = {"kind": "mixed depths", "cohort": 100, "steps": 20}
    return [
        {"kind": "equality", "workload": "W2"},
        *({"kind": "sweep", "workload": "W2", "runs": runs, "rounds": 30} for runs in (1, 10)),
        *(depths | {"levels": levels} for levels in _LEVELS),
        {"kind": "equality", "workload": "W1"},
        *(arm | {"flags": flags} for flags in (_FIXED, _ANY, _TUNED) for arm in (small, large)),
        {"kind": "equality", "workload": "W4"},
        *(arm | {"uneven": True} for arm in (small, large)),
        small | {"rounds_at_once": 16},
        large | {"dtype": "bfloat16"},
        *(arm | {"flat": True} for arm in (small, large)),
        small | {"flags": _SMALL_GRAPHS},
        large | {"flags": _SMALL_GRAPHS},
        small | {"flags": _CONCURRENT},
        depths | {"levels": "side_by_side", "flags": _CONCURRENT},
        {"kind": "masked mean", "model": "reference CNN", "cohort": 1000},
    ]


def measure(
    smoke: bool,
    deadline: float,
    limit: float = _CELL_SECONDS,
    worker: Sequence[str] = _WORKER,
    parts: Sequence[Part] | None = None,
    known: Sequence[Row] = (),
) -> Iterator[Row]:
    """Measures cells one after another; a failed cell does not stop the others.

    Args:
      smoke: tiny sizes.
      deadline: on `time.monotonic`; what was not measured by then is skipped.
      limit: seconds for a cell, including the start of its process; the first, which reports the
        host, gets twice as many.
      worker: command that answers each line with a line.
      parts: in place of those for the platform that the first cell reports.
      known: rows of earlier calls; a cell that has a result there is left out.
    """
    workers = Workers(worker)
    try:
        first = workers.row({"kind": "environment"}, min(2 * limit, deadline - time.monotonic()))
        yield first
        platform = first.get("result", {}).get("device", {}).get("platform", "cpu")
        late: list[Cell] = []  # their part had no time for them
        done = [row["cell"] for row in _with_result(known)]
        for part in parts or parts_for(platform, smoke):
            now = time.monotonic()
            end = now + part.share * (deadline - now)
            cells = [cell for cell in part.cells if cell not in done]
            late += yield from _part(cells, end, limit, workers, done)
        for cell in (yield from _part(late, deadline, limit, workers, done)):
            yield {"cell": cell, "seconds": 0.0, "skipped": "no time was left"}
    finally:
        workers.end()


def _part(
    cells: Sequence[Cell], end: float, limit: float, workers: Workers, done: Sequence[Cell]
) -> Generator[Row, None, list[Cell]]:
    """Measures cells until `end`; returns those that it had no time for, `done` are left out."""
    waiting, asked = collections.deque(cells), [*cells, *done]
    least = _LEAST_SECONDS
    while waiting:
        left = end - time.monotonic()
        if left < min(_LEAST_SECONDS, limit):
            break
        cell = waiting.popleft()
        least = max(least, _SLOW.get(cell["kind"], 0.0))
        fair = max(left - _SPARED_SECONDS * len(waiting), least)
        row = workers.row(cell, min(limit, left, fair))
        yield row
        late = "no answer" in row.get("error", "")
        least = max(_LEAST_SECONDS, 2 * row["seconds"] if late else 0.0)
        again = smaller(cell, late) if "error" in row else None
        if again is not None and again not in asked:
            waiting.appendleft(again)
            asked.append(again)
    return list(waiting)


def smaller(cell: Cell, late: bool) -> Cell | None:
    """A quarter of the clients of a cell that failed; None = there is no such cell.

    Args:
      cell: what failed.
      late: it was killed, probably while it compiled; XLA then takes kernels without timing them.
    """
    if cell["kind"] not in ("rounds", "naive", "mixed depths"):
        return None
    sizes = {key: -(-cell[key] // 4) for key in ("cohort", "width") if key in cell}
    sizes = sizes or {"cohort": _FEW}
    if sizes["cohort"] < 2:
        return None
    return cell | sizes | ({"flags": cell.get("flags", _FIXED)} if late else {})


class Workers:
    """The process that measures: one at a time, another for other flags or after an error."""

    def __init__(self, words: Sequence[str]):
        self._words = words
        self._process: Worker | None = None
        self._settings: dict[str, str] = {}

    def row(self, cell: Cell, seconds: float) -> Row:
        """The row of a cell, which may take so long, the start of a process included."""
        begin = time.monotonic()
        settings = {key: cell[key] for key in _PROCESS if key in cell}
        if settings != self._settings:
            self.end()
        if self._process is None:
            self._process, self._settings = Worker(self._words, **settings), settings
        answer = self._process.ask(cell, seconds)
        if "error" in answer:
            self.end()  # frees its memory on the accelerator
        return {"cell": cell, **answer, "seconds": time.monotonic() - begin}

    def end(self) -> None:
        """Kills the process, if there is one."""
        if self._process is not None:
            self._process.end()
        self._process = None


class Worker:
    """A process that measures."""

    def __init__(self, words: Sequence[str], flags: str = "", platform: str | None = None):
        xla = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
            env=os.environ
            | {"XLA_FLAGS": xla}
            | ({} if platform is None else {"JAX_PLATFORMS": platform}),
        )

    def ask(self, cell: Cell, seconds: float) -> dict[str, Any]:
        """Its answer to a cell, or an error."""
        assert self.process.stdin is not None and self.process.stdout is not None
        words = {key: value for key, value in cell.items() if key not in _PROCESS}
        try:
            self.process.stdin.write(json.dumps(words) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; reading says so
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return {"error": f"no answer within {seconds:.0f} s"}
        line = self.process.stdout.readline()
        if not line:
            return {"error": f"the process ended with code {self.process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Kills it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def _name(cell: Cell) -> str:
    words = (f"{key}={value}" for key, value in cell.items() if key not in ("kind", "smoke"))
    return " ".join([cell["kind"], *words])


def _line(row: Row) -> str:
    return f"{row['seconds']:6.1f} s  {_name(row['cell']):70} {_result_in_words(row)}"


def _result_in_words(row: Row) -> str:
    if "result" not in row:
        return str(row.get("error") or row["skipped"])
    kind, result = row["cell"]["kind"], row["result"]
    if kind == "environment":
        device = result["device"]
        return f"{device['count']} x {device['kind']}"
    if kind == "peak":
        return f"{result['flop_per_second'] / 1e12:.3f} TFLOP/s"
    if kind == "bandwidth":
        return f"{result['bytes_per_second'] / 1e9:.1f} GB/s"
    if kind == "rounds":
        return _rounds_in_words(result)
    if kind in ("naive", "torch graphs", "sweep"):
        return f"{goals.milliseconds(row):.4f} ms a client-step"
    if kind == "equality":
        return f"{result['difference']:.1e} of the update apart"
    if kind == "masked mean":
        return f"{result['ours_of_copy']:.0%} of a copy's speed"
    if kind == "mixed depths":
        return f"{result['ratio_to_fedavg']:.2f} of FedAvg's time"
    return "done"


def _rounds_in_words(result: dict[str, Any]) -> str:
    step, shares = result["step"], result.get("shares", {})
    return ", ".join(
        [
            f"{result['measured_ms_per_client_step']['median']:.4f} ms a client-step",
            f"{step['kernels_a_step']} kernels a step",
            *(f"{share:.1%} of the {name}" for name, share in shares.items()),
            f"compiled in {result['compile_seconds']:.1f} s",
            f"{result['compiled_bytes']['temporary'] / _MEBIBYTE:.0f} MiB",
            "same bits again" if result["digest"] == result["digest_again"] else "OTHER BITS again",
        ]
    )


if __name__ == "__main__":
    main()
