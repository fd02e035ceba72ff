"""Fully connected networks."""

from __future__ import annotations

import flax.linen as nn

from fedlp_jax.errors import check_number
from fedlp_jax.nn.models.base import Model, WidthModel, dense
from fedlp_jax.types import Array


class MLP(WidthModel):
    """Linear layers `fc1`, `fc2`, ... with ReLU between them; flattens its inputs.

    The default is FedLP's MLP for MNIST: 494,762 parameters for 784 inputs and 10 classes.

    Depth c, `clone(depth=c)`, has the first c hidden layers and a private exit head `exit{c}_fc`.

    Raises:
      FedLPError: the depth is not from 1 to the number of hidden layers.
    """

    hidden: tuple[int, ...] = (512, 128, 128, 64, 32)
    num_classes: int = 10
    depth: int | None = None  # hidden layers; None = all

    def __post_init__(self) -> None:
        if self.depth is not None:
            check_number("depth", self.depth, ge=1, le=self.deepest, integer=True)
        super().__post_init__()

    @property
    def deepest(self) -> int:
        """The depth of the whole model; a model without hidden layers has depth 1."""
        return max(len(self.hidden), 1)

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`f32[B, ...] -> logits f32[B, classes]`."""
        del train
        x = x.reshape(x.shape[0], -1)
        for i, features in enumerate(map(self.scaled, self.hidden[: self.depth]), 1):
            x = nn.relu(dense(features, x.shape[-1], self.initial, f"fc{i}", self.dtype)(x))
        whole = self.depth in (None, self.deepest)
        head = f"fc{len(self.hidden) + 1}" if whole else f"exit{self.depth}_fc"
        return dense(self.num_classes, x.shape[-1], self.initial, head, self.dtype)(x)


class Logistic(Model):
    """Multinomial logistic regression: one linear layer `fc`; flattens its inputs."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`f32[B, ...] -> logits f32[B, classes]`."""
        del train
        x = x.reshape(x.shape[0], -1)
        return dense(self.num_classes, x.shape[-1], self.initial, "fc", self.dtype)(x)
