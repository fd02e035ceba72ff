"""A small residual network for 32 x 32 images."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from fedlp_jax.errors import FedLPError, check_number
from fedlp_jax.nn.batch_norm import BatchNorm
from fedlp_jax.nn.initializers import Init
from fedlp_jax.nn.models.base import WidthModel, conv, dense
from fedlp_jax.types import Array

_STAGES = (16, 32, 64)
_BLOCKS = 2


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation, plus a shortcut.

    The shortcut is the input, or a 3 x 3 convolution with normalisation if the shape changes.
    """

    features: int
    stride: int = 1
    initial: Init = "flax"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`f32[B, H, W, channels] -> f32[B, H / stride, W / stride, features]`."""
        shortcut = x
        y = _conv_norm(self, x, self.stride, train, "1")
        y = _conv_norm(self, nn.relu(y), 1, train, "2")
        if x.shape != y.shape:
            shortcut = _conv_norm(self, x, self.stride, train, "_shortcut")
        return nn.relu(y + shortcut)


class Stem(nn.Module):
    """The first 3 x 3 convolution with batch normalisation and ReLU."""

    features: int
    initial: Init = "flax"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`f32[B, H, W, channels] -> f32[B, H, W, features]`."""
        return nn.relu(_conv_norm(self, x, 1, train, ""))


class ResNet(WidthModel):
    """Three stages of two residual blocks with 16, 32 and 64 channels, as in FedLP.

    195,738 parameters for 3 channels and 10 classes. Its modules, and so its layers, are `stem`,
    `stage{s}_block{b}` and `fc`. Stages 2 and 3 halve the image, and the head averages the rest:
    8 x 8 pixels of 32 x 32. Convolutions have no bias.

    Depth c, `clone(depth=c)`, has the first c stages and, below 3, a private exit head
    `exit{c}_fc`, so FedLP-Hetero can train it.

    Raises:
      FedLPError: the depth is not from 1 to 3.
    """

    num_classes: int = 10
    depth: int = len(_STAGES)  # stages

    def __post_init__(self) -> None:
        check_number("depth", self.depth, ge=1, le=len(_STAGES), integer=True)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`f32[B, H, W, channels] -> logits f32[B, classes]`.

        Raises:
          FedLPError: the inputs are not images.
        """
        if x.ndim != 4:
            raise FedLPError(f"ResNet needs images [B, H, W, channels], not {list(x.shape)}.")
        stages = [self.scaled(channels) for channels in _STAGES[: self.depth]]
        x = Stem(stages[0], self.initial, self.dtype, name="stem")(x, train)
        for s, features in enumerate(stages, 1):
            for b in range(1, _BLOCKS + 1):
                stride = 2 if s > 1 and b == 1 else 1
                name = f"stage{s}_block{b}"
                x = ResidualBlock(features, stride, self.initial, self.dtype, name=name)(x, train)
        head = "fc" if self.depth == len(_STAGES) else f"exit{self.depth}_fc"
        return dense(self.num_classes, stages[-1], self.initial, head, self.dtype)(x.mean((1, 2)))


def _conv_norm(
    module: Stem | ResidualBlock, x: Array, stride: int, train: bool, suffix: str
) -> Array:
    """Applies a convolution `conv{suffix}` and a normalisation `norm{suffix}` of a module."""
    layer = conv(
        module.features,
        (3, 3),
        x.shape[-1],
        module.initial,
        f"conv{suffix}",
        strides=stride,
        padding=1,
        use_bias=False,
        dtype=module.dtype,
    )
    norm = BatchNorm(use_running_average=not train, dtype=module.dtype, name=f"norm{suffix}")
    return norm(layer(x))
