"""The random draws of the authors' runs of FedLP, drawn again.

The published table comes from single runs in which NumPy's legacy generator and Python's `random`
were both seeded with 25 (github Zhuzzq/FedLP, commit fdc5d3b). Everything but the initial weights
and the order of batches follows from them, in this order:

    partition -> for Hetero K depths, one by one -> the cohort of each round

from NumPy (Homo also chooses K rates, each from a list of one, which takes nothing from the
generator: it sees the cohorts of FedAvg), and from Python's generator one number for each entry of
the state dict and client of the cohort, entry by entry, in every round: the client sends the entry
if the number is below keep.

They matter. With flag 1 the authors drew 16 clients of depth 5 where 10 are expected, and only
those train the last layers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from fedlp_jax.data.partition import Partition, by_owner
from fedlp_jax.errors import FedLPError, check_choice, shown
from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.pruning.masks import MaskPolicy, Masks
from fedlp_jax.types import Array, Cohort, PyTree

Split = Literal["iid", "dirichlet", "mixed"]
SEED = 25  # of the published runs
DEPTHS = 5
# One entry of the state dict each, in its order; the counter of batches has no layer here.
_BLOCK = ("conv/kernel", "conv/bias", "norm/scale", "norm/bias", "norm/mean", "norm/var", None)
_ENTRIES = [
    *(f"conv{i}/{name}" if name else None for i in range(1, 7) for name in _BLOCK),
    *("fc1/kernel", "fc1/bias", "fc2/kernel", "fc2/bias"),
]


class ReferenceDraws(NamedTuple):
    """What the authors' code draws before and during a run of R rounds."""

    partition: Partition
    depths: np.ndarray | None  # i32[K], 1 to 5; None unless a flag is given
    cohorts: np.ndarray  # i64[R, C], in the order drawn
    uniforms: np.ndarray | None  # f64[R, E, C], one number an entry and client; None without keep
    keep: float | None

    def cohort(self, seed: int, round: int, clients: int) -> np.ndarray:
        """The cohort of a round, `i64[C]`: a rule for `simulate(cohort=...)`.

        Raises:
          FedLPError: the round lies beyond the R rounds that were drawn.
        """
        del seed, clients
        if round > len(self.cohorts):
            raise FedLPError(
                f"round {round} lies beyond the {len(self.cohorts)} rounds that were drawn; draw "
                f"rounds={round} or more."
            )
        return self.cohorts[round - 1]

    def policy(self) -> MaskPolicy:
        """The masks of the rounds, by the entries of FedLPCNN with layers `by_tensor`.

        Without a keep rate every layer is sent, by the same program; the layers may be any then.

        Raises:
          FedLPError: (from `init`) the layers are others.
        """
        if self.uniforms is None or self.keep is None:
            return _listed_masks(self.cohorts, None, 1.0)
        return _listed_masks(self.cohorts, self.uniforms < self.keep, self.keep)


def reference_draws(
    labels: Sequence[int] | np.ndarray,
    *,
    split: Split = "iid",
    clients: int = 100,
    cohort: int = 10,
    rounds: int = 200,
    flag: int | str | None = None,
    keep: float | None = None,
    alpha: float = 1.0,
    ratio: float = 0.95,
    seed: int = SEED,
) -> ReferenceDraws:
    """Draws what one run of the authors' code draws.

    Args:
      labels: integers `[N]`, of the training split in its original order.
      split: "iid"; "dirichlet", the D-niid of the table; or "mixed", its M-niid.
      clients: K.
      cohort: C.
      rounds: R.
      flag: for FedLP-Hetero: 1 to 5, the depth that six of ten clients are expected to have; or
        "uniform", the row "u" of the table.
      keep: for FedLP-Homo, the layer-preserving rate. Neither of the two is FedAvg.
      alpha: of the Dirichlet split.
      ratio: of the mixed split, the share dealt in shards.
      seed: of both generators.

    Raises:
      FedLPError: both a flag and a keep rate, or a number out of range.
    """
    check_choice("split", split, ("iid", "dirichlet", "mixed"))
    if flag is not None and keep is not None:
        raise FedLPError(f"flag={flag} is of FedLP-Hetero and keep={keep} of FedLP-Homo; give one.")
    if flag not in (None, "uniform", *range(1, DEPTHS + 1)):
        raise FedLPError(f"flag={shown(flag)} must be 'uniform' or a depth from 1 to {DEPTHS}.")
    if not 0 < cohort <= clients:
        raise FedLPError(f"cohort={cohort} must lie between 1 and the {clients} clients.")
    labels = np.asarray(labels)
    rng = np.random.RandomState(seed)
    if split == "iid":
        holdings = _deal(rng, len(labels), clients, len(labels) // clients)
    elif split == "dirichlet":
        holdings = _dirichlet(rng, labels, clients, alpha)
    else:
        holdings = _mixed(rng, labels, clients, ratio)
    depths = None
    if flag is not None:
        chances = np.full(DEPTHS, 0.2)
        if isinstance(flag, int):
            chances[:] = 0.1
            chances[flag - 1] = 0.6
        drawn = [rng.choice(np.arange(1, DEPTHS + 1), 1, p=chances)[0] for _ in range(clients)]
        depths = np.asarray(drawn, np.int32)
    cohorts = np.stack([rng.choice(clients, cohort, replace=False) for _ in range(rounds)])
    uniforms = None
    if keep is not None:
        python = random.Random(seed)
        numbers = [python.random() for _ in range(rounds * len(_ENTRIES) * cohort)]
        uniforms = np.reshape(numbers, (rounds, len(_ENTRIES), cohort))
    rows = np.concatenate(holdings).astype(np.int32)
    owner = np.repeat(np.arange(clients), [len(held) for held in holdings])
    partition = by_owner(rows, owner, clients, labels, repeats=True)
    return ReferenceDraws(partition, depths, cohorts, uniforms, keep)


def _deal(rng: np.random.RandomState, examples: int, clients: int, each: int) -> list[np.ndarray]:
    """Deals `each` of the first `examples` rows to every client.

    The pool is a Python set between two clients, so its order is that of a hash table, and which
    rows a draw takes depends on it.
    """
    pool, holdings = list(range(examples)), []
    for _ in range(clients):
        held = set(rng.choice(pool, each, replace=False).tolist())
        pool = list(set(pool) - held)
        holdings.append(np.asarray(list(held), np.int64))
    return holdings


def _dirichlet(
    rng: np.random.RandomState, labels: np.ndarray, clients: int, alpha: float
) -> list[np.ndarray]:
    """Splits each class, in the order of the data set, by shares from Dir(alpha) over clients."""
    labels = labels[: 1000 * clients]  # all the authors' code looks at
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    shares = rng.dirichlet([alpha] * clients, int(labels.max()) + 1)
    for label, share in enumerate(shares):
        rows = np.flatnonzero(labels == label)
        cuts = (np.cumsum(share)[:-1] * len(rows)).astype(int)
        for part, held in zip(parts, np.split(rows, cuts), strict=True):
            part.append(held)
    return [np.concatenate(part) for part in parts]


def _mixed(
    rng: np.random.RandomState, labels: np.ndarray, clients: int, ratio: float
) -> list[np.ndarray]:
    """Some of the first rows at random, then two shards of the rows sorted by label, to each.

    The authors sort with NumPy's default, whose order of equal labels depends on the processor;
    here equal labels keep their order.
    """
    count = len(labels)
    at_random = int(count * (1 - ratio))
    each = at_random // clients
    shard = count // clients // 2 - each // 2
    if shard < 1:
        raise FedLPError(
            f"ratio={ratio:g} with {count:,} examples for {clients:,} clients leaves shards of "
            f"{shard} examples; lower clients or raise ratio."
        )
    holdings = _deal(rng, at_random, clients, each)
    total = count // shard
    rows = np.argsort(labels[: total * shard], kind="stable").reshape(total, shard)
    pool = list(range(total))
    for client in range(clients):
        drawn = set(rng.choice(pool, 2, replace=False).tolist())
        pool = list(set(pool) - drawn)
        holdings[client] = np.concatenate([holdings[client], *(rows[i] for i in drawn)])
    return holdings


def _listed_masks(cohorts: np.ndarray, kept: np.ndarray | None, keep: float) -> MaskPolicy:
    """A policy that looks the masks of a client up in a list.

    Args:
      cohorts: `i64[R, C]`.
      kept: `bool[R, E, C]`; None = everything.
      keep: p.
    """

    def init(layers: LayerTable, clients: int) -> PyTree:
        del clients
        rate, ids = jnp.asarray(keep, jnp.float32), jnp.asarray(cohorts, jnp.int32)
        if kept is None:
            return rate, ids, jnp.ones((*cohorts.shape, len(layers)), jnp.float32)
        if set(layers.names) != {name for name in _ENTRIES if name}:
            raise FedLPError(
                "the authors' masks are those of FedLPCNN with layers='by_tensor' (40 layers); "
                f"these are {len(layers)} layers, the first '{layers.names[0]}'."
            )
        entries = [_ENTRIES.index(name) for name in layers.names]
        of_layers = kept[:, entries, :].transpose(0, 2, 1)
        return rate, ids, jnp.asarray(of_layers, jnp.float32)

    def expected(layers: LayerTable, clients: int) -> np.ndarray:
        del layers, clients
        return np.full((1, 1), keep, np.float32)

    return MaskPolicy(init, _look_up, expected)


def _look_up(
    key: Array, state: PyTree, cohort: Cohort, round: Array, coverage: Array
) -> tuple[Masks, PyTree]:
    del key
    rate, ids, masks = state
    is_client = (cohort.client[:, None] == ids[round - 1][None, :]).astype(jnp.float32)
    # One entry of a row is 1, the others 0: a sum picks the mask without rounding.
    upload = (is_client[:, :, None] * masks[round - 1][None]).sum(axis=1) * coverage
    return Masks(coverage, upload, jnp.broadcast_to(rate, coverage.shape)), state
