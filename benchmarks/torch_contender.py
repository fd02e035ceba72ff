"""A plain, strong PyTorch loop: one client after another, in one or two processes.

Images are normalised once, in advance; convolutions are channels-last, optimizers fused. A client
starts by copying the server's tensors into its model, and ends by adding its own to a running sum.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks import workloads
from benchmarks.torch_networks import MLP, FedLPCNN, SmallCNN, named, to_flax, to_torch
from benchmarks.workloads import Workload

_MODELS = {"fedlp_cnn": FedLPCNN, "small_cnn": SmallCNN, "mlp": MLP}


class Trainer:
    """The part of a round that one process computes."""

    device = torch.device("cpu")
    capturable = False  # of Adam; true while a CUDA graph is captured
    compile_seconds = 0.0

    def __init__(self, folder: Path, workload: Workload):
        self.workload = workload
        convolves = workload.model != "mlp"
        self.layout = torch.channels_last if convolves else torch.contiguous_format
        inputs = np.load(folder / "inputs.npy").astype(np.float32)
        gain, shift = np.load(folder / "normalize.npy")[:, : inputs.shape[-1]]
        self.images = self.placed(inputs * gain + shift)
        labels, rows = np.load(folder / "labels.npy"), np.load(folder / "rows.npy")
        self.labels = torch.from_numpy(labels.astype(np.int64)).to(self.device)
        self.rows = torch.from_numpy(rows.astype(np.int64)).to(self.device)
        self.model = _MODELS[workload.model]().to(self.device, memory_format=self.layout)
        self.folder = folder
        with np.load(folder / "initial.npz") as file:
            self.initial = {key: to_torch(file[key]) for key in file}
        self._start()

    def placed(self, images: np.ndarray) -> torch.Tensor:
        """Normalised images, `[N, H, W, C]`, as `batches` needs them."""
        return torch.from_numpy(images.transpose(0, 3, 1, 2)).contiguous(memory_format=self.layout)

    def batches(self, order: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Images, `[B, C, H, W]`, and labels over `order`."""
        for rows in order.split(self.workload.batch_size):
            yield self.images[rows], self.labels[rows]

    def train(self, order: torch.Tensor) -> None:
        """One client from the server's weights over `order`, a batch at a time."""
        with torch.no_grad():
            torch._foreach_copy_([t.data for t in self.floats], self.server)
        w = self.workload
        if w.optimizer == "adam":
            optimizer: Any = torch.optim.Adam(
                self.model.parameters(), w.learning_rate, fused=True, capturable=self.capturable
            )
        else:
            optimizer = torch.optim.SGD(
                self.model.parameters(), w.learning_rate, w.momentum, fused=True
            )
        for images, labels in self.batches(order):
            loss = functional.cross_entropy(self.model(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    def check(self, order: np.ndarray) -> dict[str, np.ndarray]:
        """The weights after training over `order` in float64, under flax's names."""
        fast = (self.images, self.labels, self.floats, self.server)
        inputs = np.load(self.folder / "inputs.npy", mmap_mode="r")[order].astype(np.float64)
        gain, shift = np.load(self.folder / "normalize.npy").astype(np.float64)
        channels = inputs.shape[-1]
        self.model.double()
        self.images = self.placed(inputs * gain[:channels] + shift[:channels])
        self.labels = self.labels[torch.from_numpy(order).to(self.device)]
        self._start()
        self.train(torch.arange(len(order), device=self.device))
        weights = {
            name: to_flax(tensor.detach().cpu().numpy())
            for name, tensor in named(self.model).items()
        }
        self.model.float()
        self.images, self.labels, self.floats, self.server = fast
        self._start()
        return weights

    def clients(self, cohort: list[int], number: int) -> list[torch.Tensor]:
        """Trains some clients and returns the sum of their weights."""
        total = [torch.zeros_like(t) for t in self.server]
        for order in self.orders(cohort, number):
            self.train(order)
            torch._foreach_add_(total, [t.data for t in self.floats])
        return total

    def orders(self, cohort: list[int], number: int) -> Iterable[torch.Tensor]:
        """Each client's rows, shuffled."""
        for client in cohort:
            generator = torch.Generator().manual_seed(number * self.workload.clients + client)
            rows = self.rows[client]
            yield rows[torch.randperm(len(rows), generator=generator)]

    def finish(self, total: list[torch.Tensor]) -> None:
        """The mean becomes the server's."""
        torch._foreach_copy_(self.server, torch._foreach_div(total, self.workload.cohort))

    def _start(self) -> None:
        """Initial weights, in the model and as the server's."""
        with torch.no_grad():
            for name, tensor in named(self.model).items():
                tensor.copy_(torch.from_numpy(self.initial[name]))
        both = (*self.model.parameters(), *self.model.buffers())
        self.floats = [t for t in both if t.is_floating_point()]
        self.server = [t.detach().clone() for t in self.floats]


class Torch:
    """The contender: `processes` trainers of `threads` threads each."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.workload = workloads.read(folder)
        self.folder = folder
        threads, processes = settings["threads"], settings["processes"]
        self.trainer = _trainer(folder, self.workload, threads)
        self.others = []
        for _ in range(processes - 1):
            # Spawned, not forked: a forked process inherits locked thread pools.
            context = multiprocessing.get_context("spawn")
            here, there = context.Pipe()
            sums = [torch.zeros_like(t).share_memory_() for t in self.trainer.server]
            server = [t.clone().share_memory_() for t in self.trainer.server]
            process = context.Process(
                target=_serve,
                args=(folder, self.workload, threads, there, sums, server),
                daemon=True,
            )
            process.start()
            here.recv()
            self.others.append((here, sums, server))

    @property
    def compile_seconds(self) -> float:
        """0, unless there are graphs to capture."""
        return self.trainer.compile_seconds

    def check(self) -> dict[str, np.ndarray]:
        """The weights after a few steps of one client, in float64."""
        return self.trainer.check(np.load(self.folder / "check.npy").astype(np.int64))

    def peak_device_mb(self) -> float | None:
        """None: it uses no device."""
        return None

    def round(self, number: int) -> float:
        """Seconds of a round."""
        rng = np.random.default_rng(number)
        cohort = rng.choice(self.workload.clients, self.workload.cohort, replace=False).tolist()
        start = time.perf_counter()
        parts = 1 + len(self.others)
        for i, (pipe, _, server) in enumerate(self.others, 1):
            torch._foreach_copy_(server, self.trainer.server)
            pipe.send((cohort[i::parts], number))
        total = self.trainer.clients(cohort[0::parts], number)
        for pipe, sums, _ in self.others:
            pipe.recv()
            torch._foreach_add_(total, sums)
        self.trainer.finish(total)
        return time.perf_counter() - start


def _trainer(folder: Path, workload: Workload, threads: int) -> Trainer:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    return Trainer(folder, workload)


def _serve(
    folder: Path, workload: Workload, threads: int, pipe: Any, sums: Any, server: Any
) -> None:
    """The second process: trains the clients it is sent."""
    trainer = _trainer(folder, workload, threads)
    trainer.server = server
    pipe.send("ready")
    while True:
        try:
            cohort, number = pipe.recv()
        except EOFError:
            return  # the first process has ended
        torch._foreach_copy_(sums, trainer.clients(cohort, number))
        pipe.send("done")
