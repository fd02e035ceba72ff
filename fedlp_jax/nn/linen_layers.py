"""Puts this package's convolutions and dense layers into flax linen modules.

A layer with its own function (`conv_general_dilated=`, `dot_general=`) keeps it.
"""

from __future__ import annotations

import copy
from typing import Any

import flax.linen as nn

from fedlp_jax.nn import dense
from fedlp_jax.nn.conv.lowering import conv_general_dilated

_LINEN = (
    (nn.Conv, "conv_general_dilated", conv_general_dilated),
    (nn.Dense, "dot_general", dense.dot_general),
)


def interceptor(
    next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    """Lowers every `linen.Conv` and `linen.Dense` inside the block.

        with nn.intercept_methods(interceptor):
            module.apply(variables, inputs)

    Sets the field on a shallow copy of the bound layer and calls the copy's method; the layer
    itself is unchanged. A layer that an inner interceptor handles too is left alone.
    """
    module = context.module
    # A call of `module.clone()` would run the interceptors and capture the outputs twice.
    if context.method_name == "__call__" and next_fun is context.orig_method:
        for kind, field, function in _LINEN:
            chosen = isinstance(module, kind) and (
                getattr(module, field) is None and getattr(module, f"{field}_cls") is None
            )
            if chosen:
                lowered = copy.copy(module)
                vars(lowered)[field] = function
                return context.orig_method.func(lowered, *args, **kwargs)
    return next_fun(*args, **kwargs)
