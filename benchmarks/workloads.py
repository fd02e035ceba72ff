"""The four workloads that all contenders run, independent of a framework.

W1  the reference CNN of FedLP on CIFAR-10, 10 clients of 500 images per round, Adam
W2  an MLP on MNIST, 10 clients of 600 per round, SGD with momentum
W3  the same MLP, 100 clients of 60 per round
W4  a small CNN on CIFAR-10, 50 clients of 50 per round, SGD

All train one local epoch in batches of 10. A client-step is one optimizer step of one client.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Workload:
    """Sizes and names; each contender has its own model and optimizer of that name."""

    data: str
    model: str
    clients: int
    per_client: int  # examples of each
    cohort: int
    optimizer: str
    learning_rate: float
    momentum: float = 0.0
    batch_size: int = 10
    image: tuple[int, ...] = (32, 32, 3)
    dtype: str | None = None  # of activations, if the model has a choice; None = float32
    flat: bool = False  # the optimizer sees all parameters as one vector

    @property
    def steps(self) -> int:
        """Of one client in a round."""
        return self.per_client // self.batch_size

    @property
    def client_steps(self) -> int:
        """Of a round."""
        return self.cohort * self.steps


_MNIST = {"data": "mnist", "model": "mlp", "optimizer": "sgd", "image": (28, 28, 1)}
WORKLOADS = {
    "W1": Workload("cifar10", "fedlp_cnn", 100, 500, 10, "adam", 1e-3),
    "W2": Workload(
        clients=100, per_client=600, cohort=10, learning_rate=0.01, momentum=0.5, **_MNIST
    ),
    "W3": Workload(
        clients=1000, per_client=60, cohort=100, learning_rate=0.01, momentum=0.5, **_MNIST
    ),
    "W4": Workload("cifar10", "small_cnn", 1000, 50, 50, "sgd", 0.1),
}


def smoke(workload: Workload) -> Workload:
    """A few clients with a few steps on generated images, as a test."""
    return dataclasses.replace(workload, data="synthetic", clients=4, per_client=20, cohort=2)


def made_up(workload: Workload) -> Workload:
    """Generated images of the same number and shapes, in place of the data set."""
    return dataclasses.replace(workload, data="synthetic")


def write(folder: Path, workload: Workload) -> None:
    """Puts a workload into a folder, for `read`."""
    values = dataclasses.asdict(workload)
    if not workload.flat:
        del values["flat"]  # so that the tree before it can read the others
    (folder / "workload.json").write_text(json.dumps(values))


def read(folder: Path) -> Workload:
    """The workload that `write` put into a folder."""
    values: dict[str, Any] = json.loads((folder / "workload.json").read_text())
    return Workload(**values | {"image": tuple(values["image"])})
