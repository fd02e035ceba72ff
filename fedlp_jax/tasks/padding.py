"""Padding rows of a batch: a mask for batch normalisation, and a check of everything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

from fedlp_jax.errors import FedLPError
from fedlp_jax.nn import conv
from fedlp_jax.types import Array

SCOPE = "padding_masked"  # name of the scope of computations that leave padding rows out
_PRIMES = (97, 101, 103, 107, 109, 113)  # batch sizes that stand out among all other sizes


def row_mask(x: Array, valid: Array) -> Array:
    """`valid: bool[B]`, shaped to broadcast against `x: [B, ...]`.

    Raises:
      FedLPError: `x` has another number of rows.
    """
    if x.shape[0] != valid.shape[0]:
        raise FedLPError(
            f"a BatchNorm got {x.shape[0]} rows in a batch of {valid.shape[0]}: if a client's "
            "number of examples is not a multiple of batch_size, its statistics must exclude "
            "padding rows. Keep the batch axis first, or choose a batch_size that divides evenly."
        )
    return valid.reshape(valid.shape + (1,) * (x.ndim - 1))


def mixes_rows(f: Callable[..., Any], rest: Any, *batch: Array) -> bool:
    """Whether a row of a batch may influence what `f` computes from another row.

    Traces `f(rest, *batch)` with a prime number of rows and looks for reductions, products, sorts,
    scans and shifts along axes of that size, outside of `SCOPE`. True if `f` cannot be traced so.

    Args:
      f: `(rest, *batch) -> outputs`.
      rest: arguments without a batch axis.
      *batch: arrays `[B, ...]`.
    """
    rest, arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (rest, batch))
    sizes = [n for x in jax.tree.leaves(rest) for n in x.shape]
    sizes += [n for x in arrays for n in x.shape[1:]]
    rows = next((p for p in _PRIMES if all(n % p for n in sizes)), 127)
    arrays = [jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for x in arrays]
    try:
        with conv.using("direct"):
            jaxpr = jax.make_jaxpr(f)(rest, *arrays).jaxpr
    except Exception:  # a model for one batch size
        return True
    return any(_mixes(equation, rows) for equation in _equations(jaxpr))


def _equations(jaxpr: Any, scope: str = "") -> Iterator[Any]:
    for equation in jaxpr.eqns:
        here = f"{scope}/{equation.source_info.name_stack}"
        if SCOPE in here:
            continue
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner, here)


def _mixes(equation: Any, rows: int) -> bool:
    """Whether one equation combines elements along an axis that holds `rows` rows."""

    def has_rows(size: int) -> bool:
        return size > 0 and size % rows == 0

    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return params["num_carry"] > 0 and has_rows(params["length"])
    if not equation.invars:
        return False
    shape = getattr(equation.invars[0].aval, "shape", ())
    if name == "dot_general":
        return has_rows(math.prod(shape[axis] for axis in params["dimension_numbers"][0][0]))
    if name == "concatenate":
        parts = [x.aval.shape[params["dimension"]] for x in equation.invars]
        return has_rows(sum(parts)) and not all(map(has_rows, parts))
    if name.startswith(("reduce_", "arg")) or name == "rev":
        axes = params.get("axes", params.get("dimensions", ()))
    else:
        axes = [
            params[key]
            for key in ("axis", "dimension")
            if name.startswith(("cum", "sort")) and isinstance(params.get(key), int)
        ]
    return any(has_rows(shape[axis]) for axis in axes)
