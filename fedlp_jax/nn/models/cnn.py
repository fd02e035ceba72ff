"""Convolutional networks: the reference CNN of FedLP at five depths, and its MNIST CNN."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from fedlp_jax.errors import FedLPError
from fedlp_jax.nn.batch_norm import BatchNorm
from fedlp_jax.nn.initializers import Init
from fedlp_jax.nn.models.base import WidthModel, conv, dense
from fedlp_jax.nn.pooling import max_pool
from fedlp_jax.types import Array

_CHANNELS = (32, 32, 64, 64, 128, 128)
_DEEPEST = 5
_HIDDEN = 128


class ConvLayer(nn.Module):
    """3 x 3 convolution, ReLU, then batch normalisation: one layer in FedLP's sense."""

    features: int
    initial: Init = "flax"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`f32[B, H, W, channels] -> f32[B, H, W, features]`."""
        layer = conv(self.features, (3, 3), x.shape[-1], self.initial, "conv", dtype=self.dtype)
        norm = BatchNorm(use_running_average=not train, dtype=self.dtype, name="norm")
        return norm(nn.relu(layer(x)))


class FedLPCNN(WidthModel):
    """The CNN of FedLP (arXiv:2303.06360) for 32 x 32 images, at one of five depths.

    Depth 5 is the global model: six `ConvLayer`s of 32, 32, 64, 64, 128, 128 channels with max
    pooling after every second one, then two linear layers with no activation between them. Depth
    c < 5 has the first c + 1 convolutions, another pooling if c + 1 is odd, and its own exit head.
    All depths share the names `conv1` to `conv6`. The heads are private: `fc1` and `fc2` at depth
    5, `exit{c}_fc1` and `exit{c}_fc2` at depth c < 5.

    For 32 x 32 x 3 inputs and 10 classes, depths 1 to 5 have 1,060,266, 554,602, 591,658, 403,626
    and 551,466 parameters; they share 10,272, 28,896, 65,952, 140,064 and all of them.
    """

    num_classes: int = 10
    depth: int = _DEEPEST

    def __post_init__(self) -> None:
        if type(self.depth) is not int or not 1 <= self.depth <= _DEEPEST:
            raise FedLPError(f"depth={self.depth!r} must be an integer from 1 to {_DEEPEST}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`f32[B, H, W, channels] -> logits f32[B, classes]`.

        Raises:
          FedLPError: H or W is not a multiple of 8.
        """
        if x.ndim != 4 or x.shape[1] % 8 or x.shape[2] % 8:
            raise FedLPError(
                "FedLPCNN pools three times, so height and width of its images [B, H, W, channels] "
                f"must be multiples of 8, not {list(x.shape)}; pad or crop them."
            )
        convolutions = len(_CHANNELS) if self.depth == _DEEPEST else self.depth + 1
        for i in range(1, convolutions + 1):
            channels = self.scaled(_CHANNELS[i - 1])
            x = ConvLayer(channels, self.initial, self.dtype, name=f"conv{i}")(x, train)
            if i % 2 == 0 or i == convolutions:
                x = max_pool(x)
        x = x.reshape(x.shape[0], -1)
        head = "" if self.depth == _DEEPEST else f"exit{self.depth}_"
        hidden = self.scaled(_HIDDEN)
        x = dense(hidden, x.shape[-1], self.initial, f"{head}fc1", self.dtype)(x)
        return dense(self.num_classes, hidden, self.initial, f"{head}fc2", self.dtype)(x)


class MNISTCNN(WidthModel):
    """The MNIST CNN of the FedLP authors' code for 28 x 28 images; 21,840 parameters, 10 classes.

    Two 5 x 5 convolutions without padding, each followed by max pooling and ReLU, then two linear
    layers. Training drops half of the second convolution's channels and half of the hidden units.
    """

    num_classes: int = 10

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`f32[B, H, W, channels] -> logits f32[B, classes]`; trains with the stream "dropout".

        Raises:
          FedLPError: the images are too small for two convolutions and two poolings.
        """
        if x.ndim != 4 or min(x.shape[1:3]) < 16:
            raise FedLPError(
                "MNISTCNN needs images [B, H, W, channels] of height and width 16 or more, not "
                f"{list(x.shape)}."
            )
        valid = {"padding": "VALID", "dtype": self.dtype}
        first, second, hidden = map(self.scaled, (10, 20, 50))
        x = conv(first, (5, 5), x.shape[-1], self.initial, "conv1", **valid)(x)
        x = nn.relu(max_pool(x))
        x = conv(second, (5, 5), first, self.initial, "conv2", **valid)(x)
        x = nn.Dropout(0.5, broadcast_dims=(1, 2), deterministic=not train)(x)
        x = nn.relu(max_pool(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(dense(hidden, x.shape[-1], self.initial, "fc1", self.dtype)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return dense(self.num_classes, hidden, self.initial, "fc2", self.dtype)(x)
