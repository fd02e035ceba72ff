"""Asynchrony: clients that begin and end at times of their own, and a server that does not wait.

Each of the clients in flight trains the version of the model that it received when it began. The
server's next update takes the first B that arrive; the others go on. An update that is tau versions
old counts by a factor s(tau). Who arrives when follows from modelled seconds
(`fedlp_jax.clients.devices`), so it is known before anything is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.clients.devices import Profile
from fedlp_jax.errors import FedLPError, check_choice, check_number
from fedlp_jax.types import Array, PyTree, Variables, wide

Discount = Literal["constant", "polynomial", "hinge"]


class Asynchrony(NamedTuple):
    """How a server takes updates of older versions."""

    profile: Profile  # the clients' devices
    buffer: int  # B, arrivals that make an update
    most: int  # the largest staleness; what arrives later is discarded
    numbers: dict[str, Any]  # of `discount`, arguments of the compiled round
    # (numbers, staleness f[]) -> f[], what an update is multiplied by
    discount: Callable[[dict[str, Array], Array], Array]
    mixes: bool = False  # the server mixes in the client's model, not its update
    # examples i64[K] -> examples that a client trains on, each epoch counted
    examples: Callable[[np.ndarray], np.ndarray] = lambda sizes: sizes


class Versions(NamedTuple):
    """The server's state: version v of the model lies at v mod V, V = `most` + 1."""

    ring: Variables  # [V, ...]
    numbers: dict[str, Array]


def first_versions(asynchrony: Asynchrony, variables: Variables) -> Versions:
    """The state before the first update."""
    count = asynchrony.most + 1
    ring = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), variables)
    return Versions(ring, jax.tree.map(jnp.float32, asynchrony.numbers))


def discounted(
    asynchrony: Asynchrony,
    numbers: dict[str, Array],
    staleness: Array,
    update: PyTree,
    received: PyTree,
    current: PyTree,
) -> PyTree:
    """What ONE client's update counts for.

    Args:
      asynchrony: the rule.
      numbers: its own, from the state.
      staleness: `i32[]`, tau.
      update: `x_k - received`, as the server has decoded and clipped it.
      received: the version that the client began with.
      current: the server's.
    """
    if asynchrony.mixes:  # x_k - current
        update = jax.tree.map(lambda u, r, c: u + (r - c), update, received, current)
    dtype = wide(jax.tree.leaves(update)[0].dtype)
    numbers = {name: x.astype(dtype) for name, x in numbers.items()}
    factor = asynchrony.discount(numbers, staleness.astype(dtype))
    return jax.tree.map(lambda u: u * factor.astype(u.dtype), update)


def asynchrony(
    profile: Profile | None,
    buffer: int,
    max_staleness: int,
    discount: Discount,
    *,
    rate: float = 1.0,
    exponent: float = 0.5,
    slope: float = 10.0,
    grace: float = 4.0,
    mixes: bool = False,
) -> Asynchrony:
    """Checks the settings of an asynchronous server.

    Args:
      profile: the clients' devices.
      buffer: B.
      max_staleness: the largest tau; the server keeps one version more than that.
      discount: s(tau) = 1; `(1 + tau)^-exponent`; or, for "hinge", 1 up to `grace` and
        `1 / (slope (tau - grace) + 1)` after it.
      rate: a factor on s.
      exponent: see `discount`.
      slope: see `discount`.
      grace: see `discount`.
      mixes: as in `Asynchrony`.

    Raises:
      FedLPError: no profile, or a number out of range.
    """
    if not isinstance(profile, Profile):
        raise FedLPError(
            "without a profile nothing takes time, so nobody arrives before another; give "
            "profile=fl.Profile(compute=1e9, download=1e6, upload=1e6)."
        )
    check_choice("discount", discount, ("constant", "polynomial", "hinge"))
    numbers = {
        "rate": check_number("rate", rate, gt=0, le=1),
        "exponent": check_number("exponent", exponent, ge=0),
        "slope": check_number("slope", slope, gt=0),
        "grace": check_number("grace", grace, ge=0),
    }

    def factor(numbers: dict[str, Array], tau: Array) -> Array:
        if discount == "polynomial":
            return numbers["rate"] * (1 + tau) ** -numbers["exponent"]
        if discount == "hinge":
            late = jnp.maximum(tau - numbers["grace"], 0.0)
            return numbers["rate"] / (numbers["slope"] * late + 1)
        return numbers["rate"]

    return Asynchrony(
        profile,
        check_number("buffer", buffer, ge=1, integer=True),
        check_number("max_staleness", max_staleness, ge=0, integer=True),
        numbers,
        factor,
        mixes,
    )
