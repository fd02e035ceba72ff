"""Mask policies: which layers a client receives and sends, one number per client and layer.

Those here draw or name the layers before the training. Those that learn from earlier rounds are in
`learning`, and `policy` has their common form; this module has all of the names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.errors import FedLPError, check_array, check_choice, check_number, shown, warn
from fedlp_jax.prng import Purpose, uniforms
from fedlp_jax.pruning.layers import LayerTable, path_names, path_pattern
from fedlp_jax.pruning.learning import lazy as lazy
from fedlp_jax.pruning.learning import receive as receive
from fedlp_jax.pruning.learning import recycling as recycling
from fedlp_jax.pruning.policy import Feedback as Feedback
from fedlp_jax.pruning.policy import MaskPolicy as MaskPolicy
from fedlp_jax.pruning.policy import Masks as Masks
from fedlp_jax.pruning.policy import always as always
from fedlp_jax.types import Array, Cohort, PyTree

Keep = float | Mapping[str, float] | Sequence[Any] | np.ndarray | Callable[[Array], Any]


def full() -> MaskPolicy:
    """Every layer a client holds is sent. The same program as `bernoulli`, at keep = 1."""
    return bernoulli(1.0)


def bernoulli(keep: Keep) -> MaskPolicy:
    """Each client keeps each layer with some probability, independently: FedLP-Homo.

    `m_{k,l} ~ Bernoulli(p)`; a layer is sent if `m_{k,l} = 1` (arXiv:2303.06360; p is its
    layer-preserving rate).

    Args:
      keep: one of
        * a number: p for every client and layer;
        * a mapping from layer name to p_l; other layers are always kept;
        * K numbers, p_k per client, or L numbers, p_l per layer (if K = L, give `[K, 1]` or
          `[1, L]`), or a matrix `[K, L]`;
        * a schedule: a function of the round (`i32[]`, from 1) to a number or `f32[L]`. It is
          traced, so write it with jax.numpy; only its values in round 1 are checked.

    A layer with keep 0 is never sent: the server's copy, from which every client starts, keeps its
    first values. `init` warns of such a layer.

    Raises:
      FedLPError: (from `init`) a probability outside [0, 1], or a shape that does not fit.
    """
    schedule = keep if callable(keep) else None

    def init(layers: LayerTable, clients: int) -> PyTree:
        if schedule is not None:
            _check_schedule(schedule, layers)
            return ()
        matrix = keep_matrix(keep, layers, clients)
        _warn_of_unsent(matrix, layers)
        return jnp.asarray(matrix)

    def sample(
        key: Array, state: PyTree, cohort: Cohort, round: Array, coverage: Array
    ) -> tuple[Masks, PyTree]:
        slots, layers = coverage.shape
        if schedule is not None:
            keep_now = jnp.asarray(schedule(round), jnp.float32)
            probability = jnp.broadcast_to(keep_now.reshape(1, -1), (slots, layers))
        else:
            per_client = state.shape[0] > 1
            rows = state[jnp.maximum(cohort.client, 0)] if per_client else state
            probability = jnp.broadcast_to(rows, (slots, layers))
        # Uniform draws lie in [0, 1), so keep 1 always keeps and keep 0 never does.
        kept = uniforms(key, round, cohort.client, Purpose.MASK, layers) < probability
        upload = kept.astype(jnp.float32) * coverage
        return Masks(download=coverage, upload=upload, keep=probability), state

    def expected(layers: LayerTable, clients: int) -> np.ndarray:
        if schedule is None:
            return keep_matrix(keep, layers, clients)
        first = np.asarray(schedule(jnp.ones((), jnp.int32)), np.float32)
        return first.reshape(1, -1)

    return MaskPolicy(init, sample, expected)


def only(*names: str) -> MaskPolicy:
    """The named layers alone travel, both ways: part of a model is tuned, such as LoRA's factors.

    Server and clients hold the other layers from the start, and the server's copy keeps its bits. A
    client drops what it changes in them, so its optimizer should leave them alone, as
    `optax.partition` with `optax.set_to_zero` does; then their gradients are not computed either.

    Args:
      *names: layers.

    Raises:
      FedLPError: (from `init`) no name, or one that is no layer.
    """

    def init(layers: LayerTable, clients: int) -> Array:
        return jnp.asarray(expected(layers, clients))

    def sample(
        key: Array, state: Array, cohort: Cohort, round: Array, coverage: Array
    ) -> tuple[Masks, Array]:
        del key, cohort, round
        travels = state * coverage
        return Masks(travels, travels, keep=jnp.ones_like(travels)), state

    def expected(layers: LayerTable, clients: int) -> np.ndarray:
        del clients
        if not names or not set(names) <= set(layers.names):
            raise FedLPError(
                f"masks.only names {', '.join(names) or 'nothing'}; name some of the layers "
                f"{', '.join(layers.names)}."
            )
        return np.asarray([[name in names for name in layers.names]], np.float32)

    return MaskPolicy(init, sample, expected, received=expected)


def freeze(policy: MaskPolicy) -> MaskPolicy:
    """Clients train only the layers that they will send: the mask comes first, then the training.

    A frozen layer takes no step and, on a CPU whose clients run one at a time, no backward pass.

    Args:
      policy: that draws the layers to send.
    """
    draw = policy.sample  # alone, so that rounds do not depend on the rest of the policy

    def sample(
        key: Array, state: PyTree, cohort: Cohort, round: Array, coverage: Array
    ) -> tuple[Masks, PyTree]:
        masks, state = draw(key, state, cohort, round, coverage)
        return masks._replace(train=masks.upload), state

    return policy._replace(sample=sample)


def fixed(pattern: str, policy: MaskPolicy) -> MaskPolicy:
    """The layers that match stay as they begin: nobody trains them, and they do not travel.

    Args:
      pattern: a regular expression, searched in the path of each variable ("conv1/norm/scale").
      policy: of the other layers; not one by which clients keep models.

    Raises:
      FedLPError: no regular expression, or such a policy; from `init`, one that matches no layer,
        all, or a part of one.
    """
    expression = path_pattern(pattern)
    if policy.keeps_models:
        raise FedLPError(
            f"masks.fixed({pattern!r}, ...) never sends a layer to the clients, but under this "
            "policy they keep models that begin with what they receive; use a policy that sends "
            "every layer down, such as masks.bernoulli."
        )
    draw, learn_rest = policy.sample, policy.learn  # as in `freeze`

    def moving(layers: LayerTable) -> np.ndarray:
        matches: dict[int, set[bool]] = {}
        for path, layer in jax.tree_util.tree_leaves_with_path(layers.index):
            match = expression.search("/".join(path_names(path)[1:])) is not None
            matches.setdefault(layer, set()).add(match)
        parts = [layers.names[i] for i, both in matches.items() if len(both) > 1]
        if parts:
            raise FedLPError(
                f"{pattern!r} matches a part of the layer {parts[0]} only; match all of its "
                "variables or none, or cut it with `layers`."
            )
        moves = np.asarray([[True not in matches.get(i, {False}) for i in range(len(layers))]])
        if moves.all() or not moves.any():
            which = "none" if moves.all() else "all"
            raise FedLPError(
                f"{pattern!r} matches {which} of the layers {', '.join(layers.names)}; match some."
            )
        return moves.astype(np.float32)

    def init(layers: LayerTable, clients: int) -> PyTree:
        return jnp.asarray(moving(layers)), policy.init(layers, clients)

    def sample(
        key: Array, state: PyTree, cohort: Cohort, round: Array, coverage: Array
    ) -> tuple[Masks, PyTree]:
        moves, inner = state
        masks, inner = draw(key, inner, cohort, round, coverage * moves)
        train = coverage * moves if masks.train is None else masks.train * moves
        return masks._replace(train=train), (moves, inner)

    def expected(layers: LayerTable, clients: int) -> np.ndarray:
        return policy.expected(layers, clients) * moving(layers)

    def received(layers: LayerTable, clients: int) -> np.ndarray:
        return policy.received(layers, clients) * moving(layers)

    def learn(state: PyTree, feedback: Feedback) -> PyTree:
        assert learn_rest is not None
        return state[0], learn_rest(state[1], feedback)

    return policy._replace(
        init=init,
        sample=sample,
        expected=expected,
        received=received,
        learn=learn_rest and learn,
    )


def in_turn(
    groups: Sequence[Sequence[str]] | None = None,
    full_rounds: int = 5,
    group_rounds: int = 2,
    download: Literal["model", "group"] = "model",
) -> MaskPolicy:
    """One group of layers is trained and sent, the same by all: FedPart (arXiv:2410.11559).

    A cycle is `full_rounds` rounds of the whole model, then `group_rounds` rounds of each group.

    Args:
      groups: names of the layers of each group, shallow to deep; None = each layer alone, in the
        order in which a forward pass first uses them (`layers.order_of_use`).
      full_rounds: rounds of the whole model at the start of a cycle, from 0.
      group_rounds: rounds of each group, from 1.
      download: what a client receives. "group" counts on clients that have the rest from the rounds
        before, as they do where all take part in all rounds.

    Raises:
      FedLPError: a number out of range; from `init`, an unknown layer, or one in no group.
    """
    full_rounds = check_number("full_rounds", full_rounds, ge=0, integer=True)
    group_rounds = check_number("group_rounds", group_rounds, ge=1, integer=True)
    check_choice("download", download, ("model", "group"))
    if groups is not None and not all(_is_group(group) for group in groups):
        raise FedLPError(
            f"groups={shown(groups)} must be lists of layer names, such as [['fc1'], ['fc2']]."
        )

    def membership(layers: LayerTable) -> np.ndarray:
        order = layers.order or range(len(layers))
        named = [[layers.names[layer]] for layer in order] if groups is None else groups
        table = np.asarray(
            [[name in group for name in layers.names] for group in named], np.float32
        ).reshape(-1, len(layers))
        unknown = sorted({name for group in named for name in group} - set(layers.names))
        missing = [n for n, count in zip(layers.names, table.sum(axis=0), strict=True) if not count]
        if unknown or missing:
            what = f"name {', '.join(unknown)}" if unknown else f"leave out {', '.join(missing)}"
            raise FedLPError(
                f"the groups {what}; put each of the layers {', '.join(layers.names)} into one."
            )
        return table

    def init(layers: LayerTable, clients: int) -> PyTree:
        del clients
        numbers = jnp.asarray([full_rounds, group_rounds], jnp.int32)
        return jnp.asarray(membership(layers)), numbers

    def sample(
        key: Array, state: PyTree, cohort: Cohort, round: Array, coverage: Array
    ) -> tuple[Masks, PyTree]:
        del key, cohort
        table, (whole, each) = state
        place = (round - 1) % (whole + each * table.shape[0])
        turn = jnp.where(place < whole, 1.0, table[jnp.maximum(place - whole, 0) // each])
        due = coverage * turn[None]
        received = coverage if download == "model" else due
        return Masks(received, due, jnp.ones_like(due), train=due), state

    def expected(layers: LayerTable, clients: int) -> np.ndarray:
        del clients
        table = membership(layers)
        rounds = full_rounds + group_rounds * table.sum(axis=0, keepdims=True)
        return (rounds / (full_rounds + group_rounds * len(table))).astype(np.float32)

    received = expected if download == "group" else always
    return MaskPolicy(init, sample, expected, received, needs_order=groups is None)


def _is_group(group: Any) -> bool:
    names = isinstance(group, Sequence) and not isinstance(group, str)
    return names and all(isinstance(name, str) for name in group)


def _check_schedule(schedule: Callable[[Array], Any], layers: LayerTable) -> None:
    """Checks what can be known of a traced function: its shape, and its values in round 1."""
    number = jax.ShapeDtypeStruct((), jnp.int32)
    try:
        shape = jax.eval_shape(lambda n: jnp.asarray(schedule(n), jnp.float32), number).shape
        with jax.ensure_compile_time_eval():
            values = np.asarray(schedule(jnp.ones((), jnp.int32)), np.float32)
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FedLPError(
            "the keep schedule cannot be traced as a function of the round (i32[], from 1) to "
            f"numbers; write it with jax.numpy, as in jnp.where(round < 10, 1.0, 0.5): {reason}"
        ) from error
    if shape not in ((), (1,), (len(layers),)):
        raise FedLPError(
            f"the keep schedule returns an array of shape {list(shape)}; return one number, or one "
            f"per layer (L={len(layers)})."
        )
    check_array("the keep schedule in round 1", values, ge=0, le=1)


def _warn_of_unsent(matrix: np.ndarray, layers: LayerTable) -> None:
    """Warns of layers that nobody ever sends, unless that is so for all layers."""
    unsent = np.broadcast_to((matrix == 0).all(axis=0), (len(layers),))
    if unsent.any() and not unsent.all():
        names = [name for name, never in zip(layers.names, unsent, strict=True) if never]
        warn(
            f"keep=0 for {', '.join(names)}: no client ever sends it, so the server's copy, from "
            "which every client starts, keeps its first values. Give a keep above 0 to train it.",
            RuntimeWarning,
            stacklevel=2,
        )


def keep_matrix(
    keep: Keep, layers: LayerTable, clients: int, dtype: Any = np.float32
) -> np.ndarray:
    """`keep` as `[1 or K, 1 or L]` of a dtype, checked.

    Raises:
      FedLPError: a probability outside [0, 1], an unknown layer, or a shape that does not fit.
    """
    if isinstance(keep, Mapping):
        unknown = sorted(set(keep) - set(layers.names))
        if unknown:
            raise FedLPError(
                f"keep names unknown layers {unknown}; the layers are {', '.join(layers.names)}."
            )
        keep = np.array([[keep.get(name, 1.0) for name in layers.names]])
    meaning = "it is the probability that a client keeps a layer"
    matrix = check_array("keep", keep, ge=0, le=1, dtype=dtype, hint=meaning)
    count = len(layers)
    if matrix.ndim == 0:
        return matrix.reshape(1, 1)
    if matrix.ndim == 2 and matrix.shape[0] in (1, clients) and matrix.shape[1] in (1, count):
        return matrix
    if matrix.shape == (clients,) and clients != count:
        return matrix.reshape(clients, 1)
    if matrix.shape == (count,) and clients != count:
        return matrix.reshape(1, count)
    hint = " Give it as [K, 1] or [1, L]: K equals L here." if matrix.shape == (count,) else ""
    raise FedLPError(
        f"keep has shape {list(matrix.shape)}; give one number, one per client (K={clients}), one "
        f"per layer (L={count}), or a matrix of both.{hint}"
    )
