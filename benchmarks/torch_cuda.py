"""The same loop on a GPU: eager, and with a client's whole training as one CUDA graph.

Graphs are replayed one after another, or by several replicas at once, each on its own stream.

Images (normalised once in float32), labels and rows are on the GPU. The rows of a client are
gathered in one call, and the permutations of a round are drawn together. Products and convolutions
are TF32, the default of JAX on such a GPU, and cuDNN tries its algorithms before it takes one.

All work of a replica, captured or not, runs on one side stream: autograd remembers the stream on
which a parameter was first used, and a capture must not meet another.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import workloads
from benchmarks.torch_contender import Torch, Trainer
from benchmarks.workloads import Workload

_WARM_UP = 3  # clients before a capture: libraries choose algorithms and allocate memory


class Eager(Trainer):
    """Kernels started one by one."""

    def __init__(self, folder: Path, workload: Workload, device: str = "cuda"):
        self.device = torch.device(device)
        super().__init__(folder, workload)

    def placed(self, images: np.ndarray) -> torch.Tensor:
        """As they are, `[N, H, W, C]`, which is channels-last seen through `permute`."""
        return torch.from_numpy(images).to(self.device)

    def batches(self, order: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Images, `[B, C, H, W]`, and labels over `order`: views of what is gathered once."""
        images = self.images.index_select(0, order).permute(0, 3, 1, 2)
        labels = self.labels.index_select(0, order)
        size = self.workload.batch_size
        return zip(images.split(size), labels.split(size), strict=True)

    def orders(self, cohort: list[int], number: int) -> Iterable[torch.Tensor]:
        """Each client's rows in the order of random numbers; only `cohort` is transferred."""
        generator = torch.Generator(self.device).manual_seed(number)
        rows = self.rows.index_select(0, torch.tensor(cohort, device=self.device))
        draws = torch.rand(rows.shape, generator=generator, device=self.device)
        return rows.gather(1, draws.argsort(1)).unbind()

    def finish(self, total: list[torch.Tensor]) -> None:
        """The mean becomes the server's; returns when it has."""
        super().finish(total)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Graph(Eager):
    """A client's training, captured once in the first round and replayed for every client.

    The graph reads `server` and `order`, resets model and optimizer, and adds the weights to
    `total`; all these tensors stay in place. On a CPU nothing is captured, and the same function
    runs for every client.
    """

    def __init__(self, folder: Path, workload: Workload, device: str = "cuda"):
        super().__init__(folder, workload, device)
        self.order = self.rows[0].clone()
        self.total: list[torch.Tensor] = []
        self.replay: Callable[[], None] | None = None

    def replica(self) -> Graph:
        """A copy with its own model and the same images."""
        other = copy.copy(self)
        other.model, other.order = copy.deepcopy(self.model), self.order.clone()
        other.total, other.replay = [], None
        other._start()
        return other

    def check(self, order: np.ndarray) -> dict[str, np.ndarray]:
        """As without a graph; replaces the tensors of an earlier capture."""
        self.replay = None
        return super().check(order)

    def client(self) -> None:
        """Trains one client over `order` and adds its weights to `total`."""
        self.train(self.order)
        torch._foreach_add_(self.total, [t.data for t in self.floats])

    def clients(self, cohort: list[int], number: int) -> list[torch.Tensor]:
        """Trains some clients and returns the sum of their weights."""
        if self.replay is None:
            self.replay = self._captured()
        torch._foreach_zero_(self.total)
        for order in self.orders(cohort, number):
            self.order.copy_(order)
            self.replay()
        return self.total

    def _captured(self) -> Callable[[], None]:
        self.total = [torch.zeros_like(t) for t in self.server]
        if self.device.type == "cpu":
            return self.client
        torch.cuda.synchronize()  # nothing else may run
        start = time.perf_counter()
        for _ in range(_WARM_UP):
            self.client()
        graph = torch.cuda.CUDAGraph()
        self.capturable = True  # Adam's word for it; its fused kernel is the same either way
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            self.client()
        self.capturable = False
        torch.cuda.synchronize()
        self.compile_seconds = time.perf_counter() - start
        return graph.replay


class TorchCuda(Torch):
    """The contender on one GPU: `graphs` replicas that replay graphs, or none and no graph."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        if not torch.cuda.is_available():
            raise RuntimeError(f"PyTorch {torch.__version__} finds no CUDA device.")
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        self.folder, self.workload = folder, workloads.read(folder)
        graphs = min(settings["graphs"], self.workload.cohort)
        self.streams = [torch.cuda.Stream() for _ in range(max(1, graphs))]
        with torch.cuda.stream(self.streams[0]):
            self.trainer = (Graph if graphs else Eager)(folder, self.workload)
        self.others: list[Graph] = []
        for stream in self.streams[1:]:
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                self.others.append(self.trainer.replica())

    def check(self) -> dict[str, np.ndarray]:
        """The weights after a few steps of one client, in float64."""
        with torch.cuda.stream(self.streams[0]):
            return super().check()

    @property
    def compile_seconds(self) -> float:
        """Seconds of capturing graphs, warm-up included."""
        return sum(trainer.compile_seconds for trainer in (self.trainer, *self.others))

    def round(self, number: int) -> float:
        """Seconds of a round."""
        rng = np.random.default_rng(number)
        cohort = rng.choice(self.workload.clients, self.workload.cohort, replace=False).tolist()
        start = time.perf_counter()
        trainers, totals = [self.trainer, *self.others], []
        for i, (stream, trainer) in enumerate(zip(self.streams, trainers, strict=True)):
            with torch.cuda.stream(stream):
                if i:
                    torch._foreach_copy_(trainer.server, self.trainer.server)
                totals.append(trainer.clients(cohort[i :: len(trainers)], number))
        if self.others:
            torch.cuda.synchronize()
        with torch.cuda.stream(self.streams[0]):
            for other in totals[1:]:
                torch._foreach_add_(totals[0], other)
            self.trainer.finish(totals[0])
        return time.perf_counter() - start

    def peak_device_mb(self) -> float | None:
        """Of tensors; the process holds more."""
        return torch.cuda.max_memory_allocated() / 2**20
