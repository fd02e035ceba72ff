"""Randomness by meaning: every draw is a pure function of (seed, round, client, purpose, step).

Keys are folded in that order. They are never split along a chain and never depend on a position in
the cohort. So the number of devices, the chunk width, cohort order, padding and the round at which
a run was stopped cannot change a draw. Neither can `JAX_DEFAULT_PRNG_IMPL`: keys are always
threefry2x32, which is counter-based, so a vmapped draw equals the single one.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.types import Array

# Rounds count from 1; what is drawn once, before the first round, belongs to round 0.
BEFORE_FIRST_ROUND = 0
SERVER = 2**31 - 1  # the client id of draws that belong to no client


class Purpose(enum.IntEnum):
    """What a key is for. The numbers are part of the results: append, never renumber."""

    INIT = 0
    SHUFFLE = 1
    TRAIN = 2
    MASK = 3
    HEAD = 4
    DEPTH = 5
    AVAILABILITY = 10
    DROPOUT = 11
    CORRUPTION = 12
    ATTACK = 13
    PROFILE = 14
    NOISE = 15
    UPLOAD = 16
    UNITS = 17
    DOWNLOAD = 18


def root_key(seed: int) -> Array:
    """The typed key of a run's seed, from which every other key is folded."""
    return jax.random.key(seed, impl="threefry2x32")


def client_key(root: Array, round: Array | int, client: Array | int, purpose: Purpose) -> Array:
    """The key of one client's draws for one purpose in one round.

    Args:
      root: `root_key` of the run's seed.
      round: i32[], from 1; `BEFORE_FIRST_ROUND` for draws made once.
      client: i32[], client id (not its position in the cohort), or `SERVER`.
      purpose: what the key is for.

    Returns:
      A typed key. Fold in the step to draw more than once.
    """
    key = jax.random.fold_in(root, round)
    key = jax.random.fold_in(key, client)
    return jax.random.fold_in(key, int(purpose))


def uniforms(
    root: Array, round: Array | int, clients: Array, purpose: Purpose, count: int
) -> Array:
    """`f32[C, count]` in [0, 1), drawn for each of the clients `i32[C]`; see `client_key`."""

    def draw(client: Array) -> Array:
        return jax.random.uniform(client_key(root, round, client, purpose), (count,), jnp.float32)

    return jax.vmap(draw)(clients)


def drawn_once(
    root: Array, clients: int, purpose: Purpose, draw: Callable[[Array], Array]
) -> np.ndarray:
    """`draw(key)` for each client before the first round: `[K, ...]`, on the host."""

    def of(client: Array) -> Array:
        return draw(client_key(root, BEFORE_FIRST_ROUND, client, purpose))

    return np.asarray(jax.jit(jax.vmap(of))(jnp.arange(clients, dtype=jnp.int32)))


def head_key(root: Array, client: Array | int) -> Array:
    """The key of a client's private variables: the same in every round."""
    return client_key(root, BEFORE_FIRST_ROUND, client, Purpose.HEAD)


def initial_key(root: Array) -> Array:
    """The key of the server's first variables."""
    return client_key(root, BEFORE_FIRST_ROUND, SERVER, Purpose.INIT)
