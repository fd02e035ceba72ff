"""Puts this package's convolutions and dense layers into flax nnx modules.

A layer with its own function (`conv_general_dilated=`, `dot_general=`) keeps it.
"""

from __future__ import annotations

from typing import TypeVar

from flax import nnx
from jax import lax

from fedlp_jax.nn import dense
from fedlp_jax.nn.conv.lowering import conv_general_dilated

NnxModule = TypeVar("NnxModule", bound=nnx.Module)


def inject(module: NnxModule) -> NnxModule:
    """A copy of an nnx module that uses this package's convolutions and dense layers.

    Args:
      module: any nnx module; unchanged. The copy shares its arrays.
    """
    clone = nnx.clone(module)
    for _, part in nnx.iter_modules(clone):
        if isinstance(part, nnx.Conv) and part.conv_general_dilated is lax.conv_general_dilated:
            part.conv_general_dilated = conv_general_dilated
        if isinstance(part, nnx.Linear) and part.dot_general is lax.dot_general:
            part.dot_general = dense.dot_general
    return clone
