"""Randomness by meaning: every draw is a pure function of (seed, round, client, purpose, step).

Keys are folded in that order and never split along a chain or by position in a cohort. So the
number of devices, the chunk width, the order of a cohort, padding, and where a run was stopped
cannot change a draw.
"""

from __future__ import annotations

import enum

import jax

from fedlp_jax.types import Array

# Rounds count from 1; what is drawn once, before the first round, belongs to round 0.
BEFORE_FIRST_ROUND = 0
SERVER = 2**31 - 1  # the client id of draws that belong to no client


class Purpose(enum.IntEnum):
    """What a key is for. Numbers are part of the results: never renumber, only append."""

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


def client_key(root: Array, round: Array | int, client: Array | int, purpose: Purpose) -> Array:
    """The key of one client's draws for one purpose in one round.

    Args:
      root: typed key of the run's seed.
      round: i32[], from 1; `BEFORE_FIRST_ROUND` for draws made once.
      client: i32[], client id (not its position in the cohort), or `SERVER`.
      purpose: what the key is for.

    Returns:
      A typed key; fold in the step for more than one draw.
    """
    key = jax.random.fold_in(root, round)
    key = jax.random.fold_in(key, client)
    return jax.random.fold_in(key, int(purpose))


def head_key(root: Array, client: Array | int) -> Array:
    """The key of a client's private variables: the same in every round."""
    return client_key(root, BEFORE_FIRST_ROUND, client, Purpose.HEAD)
