"""The benchmarks' networks in PyTorch, and their tensors under the names and axes of flax.

The reference CNN follows the code of FedLP's authors; `tests/algorithms/test_fidelity.py` compares
this package with it.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import nn
from torch.nn import functional

_CHANNELS = (3, 32, 32, 64, 64, 128, 128)
_DEEPEST = 5


class FedLPCNN(nn.Module):
    """3 x 3 convolutions, ReLU, then batch normalisation; two linear layers, nothing between them.

    Pooling after every second convolution and after the last. Depth 5 has six convolutions, depth
    c < 5 the first c + 1 of them and its own head.
    """

    def __init__(self, depth: int = _DEEPEST) -> None:
        super().__init__()
        layers = 6 if depth == _DEEPEST else depth + 1
        self.conv = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(_CHANNELS[: layers + 1])
        )
        self.norm = nn.ModuleList(nn.BatchNorm2d(b) for b in _CHANNELS[1 : layers + 1])
        side = 32 // 2 ** ((layers + 1) // 2)
        self.fc1, self.fc2 = nn.Linear(side**2 * _CHANNELS[layers], 128), nn.Linear(128, 10)
        head = "" if depth == _DEEPEST else f"exit{depth}_"
        self.names = {f"conv.{i}": f"conv{i + 1}/conv" for i in range(layers)}
        self.names |= {f"norm.{i}": f"conv{i + 1}/norm" for i in range(layers)}
        self.names |= {"fc1": f"{head}fc1", "fc2": f"{head}fc2"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, 3, 32, 32] -> [B, 10]`."""
        for i, (conv, norm) in enumerate(zip(self.conv, self.norm, strict=True), 1):
            x = norm(functional.relu(conv(x)))
            if i % 2 == 0 or i == len(self.conv):
                x = functional.max_pool2d(x, 2)
        return self.fc2(self.fc1(x.permute(0, 2, 3, 1).flatten(1)))


class SmallCNN(nn.Module):
    """Two 3 x 3 convolutions without padding, max-pooling, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3)
        self.fc1, self.fc2 = nn.Linear(14 * 14 * 64, 128), nn.Linear(128, 10)
        self.names = {n: n for n in ("conv1", "conv2", "fc1", "fc2")}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, 3, 32, 32] -> [B, 10]`."""
        x = functional.relu(self.conv2(functional.relu(self.conv1(x))))
        x = functional.max_pool2d(x, 2).permute(0, 2, 3, 1).flatten(1)
        return self.fc2(functional.relu(self.fc1(x)))


class MLP(nn.Module):
    """784-512-128-128-64-32-10."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (784, 512, 128, 128, 64, 32, 10)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.names = {f"layers.{i}": f"fc{i + 1}" for i in range(6)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, 1, 28, 28] -> [B, 10]`."""
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x))
        return self.layers[-1](x)


_FLAX = {"running_mean": "mean", "running_var": "var"}


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    """Flax path ("params/conv1/norm/scale") -> tensor, still in PyTorch's order of axes.

    The counters of batch normalisation are omitted: flax has none, and with a momentum they have no
    effect.
    """
    tensors = {}
    for module, path in model.names.items():
        layer = model.get_submodule(module)
        norm = isinstance(layer, nn.BatchNorm2d)
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if name in _FLAX:
                tensors[f"batch_stats/{path}/{_FLAX[name]}"] = tensor.data
            elif tensor.is_floating_point():
                kind = {"weight": "scale" if norm else "kernel"}.get(name, name)
                tensors[f"params/{path}/{kind}"] = tensor.data
    return tensors


def to_torch(x: np.ndarray) -> np.ndarray:
    """A tensor of flax in PyTorch's order of axes; a copy."""
    axes = {2: (1, 0), 4: (3, 2, 0, 1)}.get(x.ndim)
    return np.array(x.transpose(axes), order="C")


def to_flax(x: np.ndarray) -> np.ndarray:
    """A tensor of PyTorch in flax's order of axes; a copy."""
    axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(x.ndim)
    return np.array(x.transpose(axes), order="C")
