"""What clients keep between rounds: private variables, one stack per level.

The store lies outside the round. A round takes its cohort's rows and returns them changed, so its
cost follows the cohort, not the population.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import jax
import numpy as np

from fedlp_jax.keys import head_key
from fedlp_jax.placement import Plan, over_clients, replicated
from fedlp_jax.submodel import Submodel
from fedlp_jax.types import Array, Batch, FedLPError, PyTree

_NO_ROW = np.iinfo(np.int32).max


class PrivateStore:
    """Private variables of all clients, on the device.

    Attributes:
      stacks: for each level a tree of `[K_g, ...]`, K_g the clients at that level.
    """

    def __init__(
        self,
        levels: Sequence[Submodel],
        assigned: np.ndarray,
        root: Array,
        example: Batch,
        plan: Plan,
    ):
        """Draws every client's first private variables from (seed, client).

        Args:
          levels: G levels.
          assigned: `i32[K]`, the level of each client.
          root: the run's root key.
          example: a batch for shapes.
          plan: resolved.

        Raises:
          FedLPError: the store would not fit this machine's memory.
        """
        shapes = [jax.eval_shape(level.private, root, example) for level in levels]
        counts = np.bincount(assigned, minlength=len(levels))
        self._check_fits(shapes, counts, plan)
        self._level = assigned
        self._row = np.zeros(len(assigned), np.int32)
        self.stacks: tuple[PyTree, ...] = ()
        for g, level in enumerate(levels):
            members = np.flatnonzero(assigned == g)
            self._row[members] = np.arange(len(members), dtype=np.int32)

            def draw(client: Array, level: Submodel = level) -> PyTree:
                return level.private(head_key(root, client), example)

            stack = jax.jit(
                lambda ids, draw=draw: jax.lax.map(draw, ids), out_shardings=replicated(plan)
            )(np.asarray(members if len(members) else [0], np.int32))  # a level may be empty
            self.stacks += (stack,)
        self._gather = jax.jit(_gather, out_shardings=over_clients(plan))
        self._scatter = jax.jit(_scatter, donate_argnums=0, out_shardings=replicated(plan))

    def rows(self, client: np.ndarray) -> tuple[PyTree, ...]:
        """The private variables of the clients in slots `i32[D * P]`, per level `[D * P, ...]`."""
        return self._gather(self.stacks, self._indices(client))

    def put(self, client: np.ndarray, rows: tuple[PyTree, ...]) -> None:
        """Stores rows back; empty slots and other levels' rows are dropped."""
        self.stacks = self._scatter(self.stacks, self._indices(client), rows)

    def _indices(self, client: np.ndarray) -> tuple[np.ndarray, ...]:
        here = np.maximum(client, 0)
        return tuple(
            np.where((client >= 0) & (self._level[here] == g), self._row[here], _NO_ROW)
            for g in range(len(self.stacks))
        )

    @staticmethod
    def _check_fits(shapes: Sequence[PyTree], counts: np.ndarray, plan: Plan) -> None:
        per_client = [
            sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shape)) for shape in shapes
        ]
        need = int(np.dot(per_client, counts))
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        copies = plan.devices or 1 if jax.default_backend() == "cpu" else 1
        if need * copies > have // 2:
            raise FedLPError(
                f"heads='persist' would keep {need / 2**30:.1f} GiB for {int(counts.sum())} "
                f"clients on {copies} device(s), more than half of the {have / 2**30:.0f} GiB of "
                "this machine; use heads='shared' or 'reset_to_init', or fewer clients."
            )


def _gather(stacks: tuple[PyTree, ...], indices: tuple[Array, ...]) -> tuple[PyTree, ...]:
    return tuple(
        jax.tree.map(lambda x, i=i: x.at[i].get(mode="clip"), stack)
        for stack, i in zip(stacks, indices, strict=True)
    )


def _scatter(
    stacks: tuple[PyTree, ...], indices: tuple[Array, ...], rows: tuple[PyTree, ...]
) -> tuple[PyTree, ...]:
    return tuple(
        jax.tree.map(lambda x, r, i=i: x.at[i].set(r, mode="drop"), stack, row)
        for stack, i, row in zip(stacks, indices, rows, strict=True)
    )
