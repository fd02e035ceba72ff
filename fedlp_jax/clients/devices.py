"""Client devices: how fast each computes, downloads and uploads.

Times are modelled. Training takes a client's multiply-accumulates, counting a backward pass as two
forward passes; an exchange takes the bytes that the ledger books.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.errors import FedLPError, check_array, check_number
from fedlp_jax.prng import Purpose, drawn_once
from fedlp_jax.types import Array

PASSES = 3  # MACs of a step, in forward passes


class Machines(NamedTuple):
    """Speeds of clients."""

    compute: Array | np.ndarray  # f32[C], MACs a second
    download: Array | np.ndarray  # f32[C], bytes a second
    upload: Array | np.ndarray  # f32[C], bytes a second


@dataclasses.dataclass(frozen=True)
class Profile:
    """The devices of a population.

    Attributes:
      compute: MACs a second: one number, or K.
      download: bytes a second from the server: one number, or K.
      upload: bytes a second to it: one number, or K.
      spread: standard deviation of the natural logarithm of each client's speeds around these,
        drawn independently from (seed, client); 0 = none. At 1, one client in six is slower than
        the median by a factor of e.
    """

    compute: float | Sequence[float] | np.ndarray
    download: float | Sequence[float] | np.ndarray
    upload: float | Sequence[float] | np.ndarray
    spread: float = 0.0

    def machines(self, root: Array, clients: int) -> Machines:
        """The speeds of all K clients, `f32[K]` each.

        Raises:
          FedLPError: a speed that is not positive, a spread that is negative, or a number of speeds
            that is neither 1 nor K.
        """
        spread = check_number("profile.spread", self.spread, ge=0, lt=100)
        normal = drawn_once(
            root, clients, Purpose.PROFILE, lambda key: jax.random.normal(key, (3,), jnp.float32)
        )
        factor = np.exp(spread * normal.astype(np.float64))
        speeds = (_speeds(f"profile.{n}", getattr(self, n), clients) for n in Machines._fields)
        return Machines(
            *((s * f).astype(np.float32) for s, f in zip(speeds, factor.T, strict=True))
        )


def _speeds(name: str, value: object, clients: int) -> np.ndarray:
    """One number, or K, as `f64[K]`.

    Raises:
      FedLPError: with the name.
    """
    values = check_array(name, value, gt=0)
    if values.shape not in ((), (clients,)):
        raise FedLPError(
            f"{name} has shape {list(values.shape)}; give one number, or one for each of the "
            f"{clients} clients."
        )
    return np.broadcast_to(values, (clients,))
