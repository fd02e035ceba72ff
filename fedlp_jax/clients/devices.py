"""What the clients' machines are: how fast each computes, downloads and uploads.

Times made of these are modelled: a client's training costs its multiply-accumulates, those of a
forward pass and twice as many of the backward pass, its exchange the bytes that the ledger books.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.errors import FedLPError, shown
from fedlp_jax.prng import BEFORE_FIRST_ROUND, Purpose, client_key
from fedlp_jax.types import Array

PASSES = 3  # a step's MACs, in those of a forward pass


class Machines(NamedTuple):
    """Speeds of some clients."""

    compute: Array | np.ndarray  # f32[C], MACs a second
    download: Array | np.ndarray  # f32[C], bytes a second
    upload: Array | np.ndarray  # f32[C], bytes a second


@dataclasses.dataclass(frozen=True)
class Profile:
    """The machines of a population.

    Attributes:
      compute: MACs a second: one number, or K.
      download: bytes a second from the server: one number, or K.
      upload: bytes a second to it: one number, or K.
      spread: standard deviation of the natural logarithm by which each client's three speeds differ
        from these, drawn from (seed, client), independently; 0 = not at all. At 1, one client in
        six is slower than the median by a factor of e.
    """

    compute: float | Sequence[float] | np.ndarray
    download: float | Sequence[float] | np.ndarray
    upload: float | Sequence[float] | np.ndarray
    spread: float = 0.0

    def machines(self, root: Array, clients: int) -> Machines:
        """The speeds of all K clients, `f32[K]` each.

        Raises:
          FedLPError: a speed or a spread that is no positive number, or neither one nor K of them.
        """
        number = isinstance(self.spread, int | float) and not isinstance(self.spread, bool)
        if not number or not 0 <= self.spread < 100:
            raise FedLPError(f"profile.spread={self.spread!r} must be a number in [0, 100).")

        def draw(client: Array) -> Array:
            key = client_key(root, BEFORE_FIRST_ROUND, client, Purpose.PROFILE)
            return jax.random.normal(key, (3,), jnp.float32)

        normal = np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(clients, dtype=jnp.int32)))
        factor = np.exp(self.spread * normal.astype(np.float64))
        speeds = (_positive(f"profile.{n}", getattr(self, n), clients) for n in Machines._fields)
        return Machines(
            *((s * f).astype(np.float32) for s, f in zip(speeds, factor.T, strict=True))
        )


def _positive(name: str, value: object, clients: int) -> np.ndarray:
    """One number, or K, as `f64[K]`, each above 0.

    Raises:
      FedLPError: with the name.
    """
    try:
        values = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise FedLPError(
            f"{name}={shown(value)} is not a number or an array of numbers."
        ) from error
    if values.shape not in ((), (clients,)):
        raise FedLPError(
            f"{name} has shape {list(values.shape)}; give one number, or one for each of the "
            f"{clients} clients."
        )
    good = np.isfinite(values) & (values > 0)
    if not good.all():
        raise FedLPError(f"{name}={values[~good].flat[0]:g} must be a number above 0.")
    return np.broadcast_to(values, (clients,))
