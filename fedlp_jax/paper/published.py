"""The result table of FedLP (arXiv:2303.06360): the published numbers, and each cell as a run.

The numbers come from the README of the authors' code (github.com/Zhuzzq/FedLP, commit fdc5d3b):
single runs of 200 rounds with seed 25. A cell is a row and a split. Its configuration equals
`configs/paper/ROW-SPLIT.yaml`, which a test asserts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from fedlp_jax.config.loading import Raw, merge, parse_config
from fedlp_jax.config.schema import Config
from fedlp_jax.errors import check_choice

SOURCE = "README of github.com/Zhuzzq/FedLP, commit fdc5d3b"
ROUNDS = 200  # of the published runs
SEED = 25
Draws = Literal["reference", "own"]
DRAWS: tuple[Draws, ...] = ("reference", "own")  # the authors', ours


class Row(NamedTuple):
    """A published row, and its algorithm."""

    label: str
    algorithm: Raw  # overrides that section of the protocol
    accuracy: tuple[float, float, float]  # %: iid, D-niid, M-niid
    comm: float  # thousand parameters that a client downloads and uploads in a round
    comp: float  # "MFLOPs", in fact 10^6 multiply-accumulates of one image's forward pass


def _homo(keep: float) -> Raw:
    return {"name": "fedlp_homo", "keep": keep}


def _hetero(depths: int | str) -> Raw:
    return {"name": "fedlp_hetero", "depths": depths}


ROWS = {
    "fedavg": Row("FedAvg", {}, (77.94, 77.67, 67.57), 1102.93, 36.36),
    "homo-0.1": Row("FedLP-Homo(0.1)", _homo(0.1), (75.32, 71.30, 44.21), 606.61, 36.36),
    "homo-0.3": Row("FedLP-Homo(0.3)", _homo(0.3), (78.20, 74.92, 63.24), 716.91, 36.36),
    "homo-0.5": Row("FedLP-Homo(0.5)", _homo(0.5), (77.60, 77.13, 66.01), 827.20, 36.36),
    "homo-0.7": Row("FedLP-Homo(0.7)", _homo(0.7), (78.47, 77.71, 70.29), 937.49, 36.36),
    "hetero-1": Row("FedLP-Hetero(1)", _hetero(1), (66.00, 67.66, 37.30), 169.60, 17.73),
    "hetero-3": Row("FedLP-Hetero(3)", _hetero(3), (68.82, 68.29, 39.54), 225.28, 24.62),
    "hetero-u": Row("FedLP-Hetero(u)", _hetero("uniform"), (72.42, 64.65, 57.51), 318.66, 23.83),
    "hetero-5": Row("FedLP-Hetero(5)", _hetero(5), (76.28, 76.34, 65.69), 710.80, 30.10),
}
SPLITS: dict[str, Raw] = {
    "iid": {"name": "iid"},
    "d-niid": {"name": "dirichlet", "alpha": 1.0},
    "m-niid": {"name": "mixed", "ratio": 0.95},
}
SPLIT_LABELS = {"iid": "iid", "d-niid": "D-niid", "m-niid": "M-niid"}

_PROTOCOL: Raw = {
    "behaviour": "reference",  # see docs/behaviours.md
    "data": {"name": "cifar10"},
    "partition": {"clients": 100},
    "model": {"name": "fedlp_cnn"},
    "algorithm": {
        "name": "fedavg",
        "epochs": 5,
        "batch_size": 10,
        "client_optimizer": {"name": "adam", "learning_rate": 0.001},
    },
    "rounds": ROUNDS,
    "cohort": 10,
    "eval_every": 1,
}
# Overrides of the protocol.
SCALES: dict[str, Raw] = {
    "paper": {},
    "small": {"rounds": 20},
    # The paper's model and algorithms on embedded 8 x 8 digits: it shows that everything works, and
    # its accuracies mean nothing.
    "smoke": {
        "data": {"name": "digits"},
        "partition": {"clients": 40},
        "algorithm": {"epochs": 1},
        "rounds": 2,
        "cohort": 4,
    },
}


class Cell(NamedTuple):
    """One number of the table, at one seed.

    With draws "reference" and seed 25 it is the published run again, but for initial weights and
    the order of batches. With draws "own" it is another run of the same method.
    """

    row: str
    split: str
    seed: int = SEED
    draws: Draws = "reference"

    @property
    def name(self) -> str:
        """The name of its directory."""
        return f"{self.row}-{self.split}-{self.draws}-seed{self.seed}"

    @property
    def published(self) -> float:
        """The published accuracy, %."""
        return ROWS[self.row].accuracy[list(SPLITS).index(self.split)]


def choose(
    rows: Sequence[str] = (),
    splits: Sequence[str] = (),
    seeds: int = 1,
    draws: Draws = "reference",
) -> list[Cell]:
    """Selects cells, in the order of the table, seed after seed.

    Args:
      rows: keys of `ROWS`; empty = all.
      splits: keys of `SPLITS`; empty = all.
      seeds: number of seeds, from 25 on.
      draws: "reference", as in the published runs; or "own".

    Raises:
      FedLPError: an unknown row, split or choice of draws.
    """
    check_choice("draws", draws, DRAWS)
    for row in rows:
        check_choice("row", row, tuple(ROWS))
    for split in splits:
        check_choice("split", split, tuple(SPLITS))
    return [
        Cell(row, split, seed, draws)
        for seed in range(SEED, SEED + seeds)
        for row in ROWS
        for split in SPLITS
        if row in (rows or ROWS) and split in (splits or SPLITS)
    ]


def cell_config(cell: Cell, scale: str = "paper", rounds: int | None = None) -> Config:
    """The configuration of a cell.

    Args:
      cell: the cell.
      scale: `paper` is the published protocol, `small` has fewer rounds, `smoke` is tiny and needs
        no data.
      rounds: overrides those of the scale.

    Raises:
      FedLPError: an unknown row, split, choice of draws or scale, or a number out of range.
    """
    check_choice("row", cell.row, tuple(ROWS))
    check_choice("split", cell.split, tuple(SPLITS))
    check_choice("scale", scale, tuple(SCALES))
    check_choice("draws", cell.draws, DRAWS)
    raw: Raw = {"name": f"{cell.row}-{cell.split}", "seed": cell.seed, "draws": cell.draws}
    own: Raw = {"algorithm": ROWS[cell.row].algorithm, "partition": SPLITS[cell.split]}
    more: Raw = {} if rounds is None else {"rounds": rounds}
    for layer in (_PROTOCOL, own, SCALES[scale], more):
        raw = merge(raw, layer)
    return parse_config(raw)
