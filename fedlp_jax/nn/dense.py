"""Dense layers whose kernel's gradient is computed where the optimizer uses it.

A batch of ten makes a kernel's gradient a product with an inner dimension of ten: as many numbers
are written as the kernel has, for little arithmetic. As a GEMM of its own it is written to memory
and read again by the optimizer. As a sum of ten outer products it is elementwise, and XLA's CPU
backend computes it within the loop that steps the parameters: it is never stored. Accelerators
have the bandwidth, and few kernels are better there, so they keep the GEMM.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.custom_derivatives import SymbolicZero

from fedlp_jax.nn.xla import after
from fedlp_jax.types import Array

# Rows of a batch up to which outer products win, by backend (measured: `benchmarks.dense`).
_ROWS = {"cpu": 16}

_as_written: contextvars.ContextVar[bool] = contextvars.ContextVar("as_written", default=False)


def settings() -> bool:
    """What `as_written` says here, for caches of traced programs; jax does not see it."""
    return _as_written.get()


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """Makes every product that is traced within, and its gradients, that of lax: to be counted."""
    token = _as_written.set(True)
    try:
        yield
    finally:
        _as_written.reset(token)


def dot_general(
    lhs: Array,
    rhs: Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **rest: Any,
) -> Array:
    """`lax.dot_general`; a product `[..., in] @ [in, out]` of few rows has the gradient above.

    Everything else, and every product on an accelerator, is passed on as it is. Where the gradient
    is that one, it has reverse mode only.

    Args:
      lhs: `[..., in]`.
      rhs: `[in, out]`.
      dimension_numbers: as in lax, like all that follow.
      precision: of the products.
      preferred_element_type: of the result.
      **rest: what else lax takes.
    """
    plain = preferred_element_type is None and not any(v is not None for v in rest.values())
    last = (((lhs.ndim - 1,), (0,)), ((), ()))
    numbers = tuple(tuple(tuple(axes) for axes in pair) for pair in dimension_numbers)
    most = 0 if _as_written.get() else _ROWS.get(jax.default_backend(), 0)
    few = 1 <= math.prod(lhs.shape[:-1]) <= most
    # Short floats would be summed as such, where a GEMM sums them in float32.
    long = lhs.dtype == rhs.dtype and lhs.dtype in (jnp.float32, jnp.float64)
    if not (plain and few and long and rhs.ndim == 2 and lhs.ndim >= 2 and numbers == last):
        return lax.dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, **rest
        )
    out = outer(lhs.reshape(-1, lhs.shape[-1]), rhs, dimension_numbers, precision)
    return out.reshape(*lhs.shape[:-1], rhs.shape[-1])


def outer(x: Array, kernel: Array, dimension_numbers: Any = None, precision: Any = None) -> Array:
    """`x[B, in] @ kernel[in, out]`; the kernel's gradient is `sum_b x[b] (outer) dy[b]`."""
    del dimension_numbers  # there is but one way
    return _product(precision)(x, kernel)


@functools.cache
def _product(precision: Any) -> Callable[[Array, Array], Array]:
    """`[B, in] @ [in, out]`, with its gradients."""
    dot = functools.partial(lax.dot_general, precision=precision)

    @jax.custom_vjp
    def product(x: Array, kernel: Array) -> Array:
        return dot(x, kernel, (((1,), (0,)), ((), ())))

    def forward(x: Any, kernel: Any) -> tuple[Array, Any]:
        # The input of a first layer needs no gradient, and nothing must ask for it.
        saved = (x.value, kernel.value if x.perturbed else None)
        return product(x.value, kernel.value), saved

    def backward(saved: Any, dy: Any) -> tuple[Array | None, Array]:
        x, kernel = saved
        if isinstance(dy, SymbolicZero):
            dy = jnp.zeros(dy.shape, dy.dtype)
        dx = None
        if kernel is not None:
            dx = dot(dy, kernel, (((1,), (1,)), ((), ())))
            # What dy becomes steps the kernel that dx is computed with. Without an order between
            # the two XLA would copy the kernel in each step, so as to be able to step it first.
            dy = after(dx, dy)
        outer = (a[:, None] * b[None, :] for a, b in zip(x, dy, strict=True))
        return dx, functools.reduce(lax.add, outer)

    product.defvjp(forward, backward, symbolic_zeros=True)
    return product


def dense_interceptor(
    next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    """Makes every `linen.Dense` whose author chose no other function use `dot_general` above.

    For `flax.linen.intercept_methods`; see `fedlp_jax.nn.conv.flax` on how.
    """
    module = context.module
    if (
        context.method_name != "__call__"
        or not isinstance(module, nn.Dense)
        or module.dot_general is not None
        or module.dot_general_cls is not None
    ):
        return next_fun(*args, **kwargs)
    object.__setattr__(module, "dot_general", dot_general)
    try:
        return next_fun(*args, **kwargs)
    finally:
        object.__setattr__(module, "dot_general", None)


def inject(module: nnx.Module) -> None:
    """Makes the `nnx.Linear`s within a module, which is changed, use `dot_general` above."""
    for _, part in nnx.iter_modules(module):
        if isinstance(part, nnx.Linear) and part.dot_general is lax.dot_general:
            part.dot_general = dot_general
