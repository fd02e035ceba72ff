"""What cells will take, before they are run: computation and upload, modelled, and time.

Time is measured on a short piece, three local steps of FedAvg by one cohort and one test, and
scaled by the modelled multiply-accumulates of what is to be run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedlp_jax.config.experiment import build, build_partition
from fedlp_jax.config.schema import Config
from fedlp_jax.data.loading import Dataset
from fedlp_jax.paper.cells import Study
from fedlp_jax.paper.costs import row_cost
from fedlp_jax.paper.published import Cell
from fedlp_jax.simulation.cohorts import cohort_size
from fedlp_jax.simulation.run import Simulation

HOW = (
    "Time is that of a short piece measured now ({steps} local steps of {clients} clients of "
    "FedAvg took {seconds:.2f} s, a test {test_seconds:.2f} s), scaled by modelled "
    "multiply-accumulates. Shallow submodels really take longer than that says. Compilation comes "
    "on top: {compiling:.0f} s for FedAvg here, a few times that for Hetero, once for each split."
)
_STEPS = 3


class Piece(NamedTuple):
    """A measured piece of a run."""

    steps: int
    clients: int
    seconds: float  # of the steps of all clients
    test_seconds: float  # of one evaluation
    compiling: float  # seconds


class Forecast(NamedTuple):
    """What one cell is expected to take."""

    cell: Cell
    upload_megabytes: float  # of all clients and rounds
    training_macs: float
    seconds: float


def forecast(study: Study, cells: Sequence[Cell]) -> tuple[list[Forecast], Piece]:
    """Expected time and cost of cells.

    Raises:
      FedLPError: the data cannot be read.
    """
    config = study.config(Cell("fedavg", "iid"))
    arguments = build(config)
    data: Dataset = arguments["data"]
    shape = data.train.inputs.shape[1:]
    piece = measure(config, arguments)
    rate = piece.seconds / (piece.clients * piece.steps * config.algorithm.batch_size)
    rate /= _training_macs("fedavg", shape)
    found = []
    for cell in cells:
        own, cost = study.config(cell), row_cost(cell.row, shape)
        clients = build_partition(own.partition, data, own.seed)
        visits = own.rounds * cohort_size(own.cohort, clients.clients, own.seed)
        images = visits * float(clients.sizes.mean()) * (own.algorithm.epochs or 1)
        macs = images * _training_macs(cell.row, shape)
        seconds = macs * rate + own.rounds * piece.test_seconds
        found.append(Forecast(cell, visits * cost.upload_bytes / 1e6, macs, seconds))
    return found, piece


def measure(config: Config, arguments: Mapping[str, Any]) -> Piece:
    """Times the second round of a FedAvg of few steps, and a test.

    Args:
      config: of a FedAvg cell.
      arguments: what `experiment.build` made of it.
    """
    local = config.algorithm.model_copy(update={"epochs": None, "steps": _STEPS})
    short = build(config.model_copy(update={"algorithm": local}))["algorithm"]
    changes = {"algorithm": short, "rounds": 3, "eval_every": None}
    run = Simulation(**{**arguments, **changes})
    run.compile()
    rows = [run.read(run.dispatch(round)) for round in (1, 2, 3)]  # the third is tested
    seconds, tested = rows[1]["seconds"], rows[2]["seconds"]
    compiling = sum(s for name, s in run.readings.items() if name.endswith("_compile_seconds"))
    return Piece(_STEPS, run.size, seconds, max(tested - seconds, 0.0), compiling)


def _training_macs(row: str, shape: tuple[int, ...]) -> float:
    """MACs, forward and backward, of one image and a client of expected depth."""
    cost = row_cost(row, shape)
    return 1e6 * (cost.comp_mmacs + cost.backward_mmacs)
