"""Dense layers with a kernel gradient that XLA fuses into the optimizer step on CPUs.

With a batch of ten, a kernel's gradient is a product with inner dimension ten: little arithmetic,
and as many outputs as the kernel has entries. A GEMM writes it to memory, and the optimizer reads
it back. A sum of ten outer products is elementwise, so XLA's CPU backend computes it inside the
loop that updates the parameters and never stores it. Accelerators keep the GEMM: they have the
bandwidth, and few kernels are faster there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from fedlp_jax.nn.conv import lowering
from fedlp_jax.nn.xla import order_after
from fedlp_jax.types import Array

# Largest batch for which outer products win, by backend (measured: `benchmarks.dense`).
_ROWS = {"cpu": 16}


def dot_general(
    lhs: Array,
    rhs: Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **rest: Any,
) -> Array:
    """`lax.dot_general`; for few rows of `[..., in] @ [in, out]`, with outer-product gradients.

    All other products go to lax, as do all products on accelerators and under
    `conv.using("direct")`. The outer-product form has reverse mode only.

    Args:
      lhs: `[..., in]`.
      rhs: `[in, out]`.
      dimension_numbers: as in lax, like all that follow.
      precision: of the products.
      preferred_element_type: dtype of the result.
      **rest: further arguments of lax.
    """
    plain = preferred_element_type is None and not any(v is not None for v in rest.values())
    last = (((lhs.ndim - 1,), (0,)), ((), ()))
    numbers = tuple(tuple(tuple(axes) for axes in pair) for pair in dimension_numbers)
    direct = lowering.current() == lowering.DIRECT
    most = 0 if direct else _ROWS.get(jax.default_backend(), 0)
    few = 1 <= math.prod(lhs.shape[:-1]) <= most
    # Outer products would sum short floats in their own dtype; a GEMM sums them in float32.
    long = lhs.dtype == rhs.dtype and lhs.dtype in (jnp.float32, jnp.float64)
    if not (plain and few and long and rhs.ndim == 2 and lhs.ndim >= 2 and numbers == last):
        return lax.dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, **rest
        )
    out = outer(lhs.reshape(-1, lhs.shape[-1]), rhs, precision)
    return out.reshape(*lhs.shape[:-1], rhs.shape[-1])


def outer(x: Array, kernel: Array, precision: Any = None) -> Array:
    """`x[B, in] @ kernel[in, out]`; the kernel's gradient is `sum_b x[b] (outer) dy[b]`."""
    return _product(precision)(x, kernel)


@functools.cache
def _product(precision: Any) -> Callable[[Array, Array], Array]:
    """`[B, in] @ [in, out]`, with its gradients."""
    dot = functools.partial(lax.dot_general, precision=precision)

    @jax.custom_vjp
    def product(x: Array, kernel: Array) -> Array:
        return dot(x, kernel, (((1,), (0,)), ((), ())))

    def forward(x: Any, kernel: Any) -> tuple[Array, Any]:
        # The input of a first layer needs no gradient.
        saved = (x.value, kernel.value if x.perturbed else None)
        return product(x.value, kernel.value), saved

    def backward(saved: Any, dy: Any) -> tuple[Array | None, Array]:
        x, kernel = saved
        if isinstance(dy, SymbolicZero):
            dy = jnp.zeros(dy.shape, dy.dtype)
        dx = None
        if kernel is not None:
            dx = dot(dy, kernel, (((1,), (1,)), ((), ())))
            # dy updates the kernel that dx reads. Without an order between the two, XLA would copy
            # the kernel in each step to be free to update it first.
            dy = order_after(dx, dy)
        products = (a[:, None] * b[None, :] for a, b in zip(x, dy, strict=True))
        return dx, functools.reduce(lax.add, products)

    product.defvjp(forward, backward, symbolic_zeros=True)
    return product
