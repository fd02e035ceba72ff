"""This package's convolutions in flax modules, without their author's help."""

from __future__ import annotations

from typing import Any, TypeVar

import flax.linen as nn
from jax import lax

from fedlp_jax.nn.conv.general import conv_general_dilated

NnxModule = TypeVar("NnxModule", bound=Any)


def conv_interceptor(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext):
    """Makes every `linen.Conv` whose author chose no other function use this file's lowering.

    For `flax.linen.intercept_methods`:

        with nn.intercept_methods(conv_interceptor):
            module.apply(variables, inputs)

    The field is set on the instance that flax bound for this one call, a clone of the user's
    module, and put back when the call ends.
    """
    module = context.module
    if (
        context.method_name != "__call__"
        or not isinstance(module, nn.Conv)
        or module.conv_general_dilated is not None
        or module.conv_general_dilated_cls is not None
    ):
        return next_fun(*args, **kwargs)
    # A call of a second clone instead would run other interceptors and capture outputs twice.
    object.__setattr__(module, "conv_general_dilated", conv_general_dilated)
    try:
        return next_fun(*args, **kwargs)
    finally:
        object.__setattr__(module, "conv_general_dilated", None)


def inject(module: NnxModule) -> NnxModule:
    """A copy of an nnx module whose convolutions use this file's lowering.

    Args:
      module: any nnx module; left as it is. Its arrays are shared with the copy.

    Returns:
      The copy. An `nnx.Conv` that was given a function of its own keeps it.
    """
    from flax import nnx  # imported here for its half second, which linen users need not pay

    copy = nnx.clone(module)
    for _, part in nnx.iter_modules(copy):
        if isinstance(part, nnx.Conv) and part.conv_general_dilated is lax.conv_general_dilated:
            part.conv_general_dilated = conv_general_dilated
    return copy
