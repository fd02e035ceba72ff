"""Fully connected networks."""

from __future__ import annotations

import flax.linen as nn

from fedlp_jax.nn.models.base import Model, WidthModel, dense
from fedlp_jax.types import Array


class MLP(WidthModel):
    """Linear layers `fc1`, `fc2`, ... with ReLU between them; flattens its inputs.

    The default is FedLP's MLP for MNIST: 494,762 parameters for 784 inputs and 10 classes.
    """

    hidden: tuple[int, ...] = (512, 128, 128, 64, 32)
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`f32[B, ...] -> logits f32[B, classes]`."""
        del train
        x = x.reshape(x.shape[0], -1)
        for i, features in enumerate(map(self.scaled, self.hidden), 1):
            x = nn.relu(dense(features, x.shape[-1], self.initial, f"fc{i}", self.dtype)(x))
        last = len(self.hidden) + 1
        return dense(self.num_classes, x.shape[-1], self.initial, f"fc{last}", self.dtype)(x)


class Logistic(Model):
    """Multinomial logistic regression: one linear layer `fc`; flattens its inputs."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`f32[B, ...] -> logits f32[B, classes]`."""
        del train
        x = x.reshape(x.shape[0], -1)
        return dense(self.num_classes, x.shape[-1], self.initial, "fc", self.dtype)(x)
