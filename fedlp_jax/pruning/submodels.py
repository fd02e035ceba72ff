"""Submodels: what one client holds and computes.

A client of a shallow level runs a shallow network, not the whole one with masked layers. Some of
its variables are shared with the server's variables of the same name. The others are private, such
as the exit head of a FedLP-Hetero client, which no deeper model has, or a layer that `personal`
names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fedlp_jax.errors import FedLPError, check_choice
from fedlp_jax.prng import Purpose, drawn_once, head_key, initial_key, root_key
from fedlp_jax.pruning.layers import path_pattern
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import Array, Batch, PyTree, Variables

Heads = Literal["persist", "reset_to_init", "shared"]
Depths = str | int | Sequence[float] | Sequence[int] | np.ndarray

_FLAG_SHARE = 0.6  # share of clients at the flagged depth in the authors' code


class Submodel(NamedTuple):
    """One level: its task, and how its variables map to the server's."""

    task: Task
    extract: Callable[[Variables], Variables]  # server's variables -> the part this level shares
    merge: Callable[[Variables, PyTree], Variables]  # shared, private -> the level's variables
    split: Callable[[Variables], tuple[Variables, PyTree]]  # the inverse of `merge`
    embed: Callable[[Variables, Variables], Variables]  # (shared tree, like) -> zeros elsewhere
    private: Callable[[Array, Batch], PyTree]  # (key, example) -> initial private variables
    private_shapes: PyTree  # of what `private` returns
    name: str = ""  # after which metrics of the level are named
    slices: bool = False  # it holds parts of layers, so that entries are averaged one by one
    idle: bool = False  # nobody holds it; it is there to be tested
    # (root key, round i32[], client i32[]) -> this level with other `extract` and `embed`, if a
    # client's part of the server's variables changes from round to round
    place: Callable[[Array, Array, Array], Submodel] | None = None


class Submodels(NamedTuple):
    """The levels of a scheme, and the level of each client."""

    init: Callable[[Task, Array, Batch], Variables]  # (task, key, example) -> server's variables
    # (task, server's variables or their shapes, example) -> G levels, the last the whole model
    levels: Callable[[Task, Variables, Batch], tuple[Submodel, ...]]
    assign: Callable[[Task, Array, int], np.ndarray]  # (task, root key, K) -> i32[K], from 0
    persist: bool = False  # private variables are stored from round to round
    shared_heads: bool = False  # the server's variables hold a head for every level
    personal: bool = False  # private variables belong to every level, so the server has no model
    # (root key, client i32[]) -> the key of the client's first private variables
    private_key: Callable[[Array, Array], Array] = head_key
    resets: bool = False  # private variables begin anew in every round
    # variables of a whole model -> the part that the server holds
    of_server: Callable[[Variables], Variables] = lambda variables: variables
    slices: bool = False  # as of its levels


def whole() -> Submodels:
    """Every client holds the whole model."""
    return Submodels(
        init=_whole_model,
        levels=lambda task, variables, example: (full(task),),
        assign=lambda task, root, clients: np.zeros(clients, np.int32),
    )


def _whole_model(task: Task, key: Array, example: Batch) -> Variables:
    return task.init(key, example)


def by_depth(depths: Depths, heads: Heads = "persist") -> Submodels:
    """A fixed depth for each client: FedLP-Hetero (arXiv:2303.06360).

    Args:
      depths: how depths 1 to G are assigned to clients, see `assign_depths`.
      heads: where the exit head of a shallow client lives. "persist": with the client, from round
        to round. "reset_to_init": nowhere; it starts from the client's first draw in every round,
        as in the authors' code. "shared": on the server, which holds one head per depth and
        averages it like any other layer.

    Raises:
      FedLPError: an unknown value of heads.
    """
    check_choice("heads", heads, ("persist", "reset_to_init", "shared"))

    def levels(task: Task, variables: Variables, example: Batch) -> tuple[Submodel, ...]:
        return tuple(
            depth_prefix(task, depth, variables, example) for depth in range(1, task.depth + 1)
        )

    def assign(task: Task, root: Array, clients: int) -> np.ndarray:
        return assign_depths(depths, root, clients, task.depth) - 1

    return Submodels(
        union_of_depths if heads == "shared" else _whole_model,
        levels,
        assign,
        persist=heads == "persist",
        shared_heads=heads == "shared",
        resets=heads == "reset_to_init",
    )


def personal(pattern: str, of: Submodels | None = None) -> Submodels:
    """Clients keep some variables for themselves: they train them and never send them.

    The server does not hold these variables, so it has no whole model, and a run tests each client
    with its own (`fedlp_jax.simulation.personal`). FedPer (arXiv:1912.00818) keeps the head,
    LG-FedAvg (arXiv:2001.01523) the body, FedBN (arXiv:2102.07623) the normalisations.

    All clients begin with the same private variables: those that the server would have drawn, or
    those in the `variables` that a run is given.

    Args:
      pattern: a regular expression, searched in the path of each variable ("conv1/norm/scale"), as
        in `layers.layer_table`.
      of: the scheme whose submodels clients hold; None = `whole()`. Its private heads are kept too.

    Raises:
      FedLPError: no regular expression, or heads that are reset; from `init`, a pattern that
        matches nothing or every parameter.
    """
    return _with_personal(_matcher(pattern), f"personal layers {pattern!r}", of or whole())


def shared(pattern: str, of: Submodels | None = None) -> Submodels:
    """Clients share the variables that match, and keep all others for themselves.

    The complement of `personal`, with its arguments and errors.
    """
    matches = _matcher(pattern)
    what = f"shared layers {pattern!r}"
    return _with_personal(lambda path: not matches(path), what, of or whole())


def _with_personal(
    chosen: Callable[[tuple[str, ...]], bool], what: str, scheme: Submodels
) -> Submodels:
    """A scheme in which clients also keep the variables at the chosen paths."""
    if scheme.resets:
        raise FedLPError(
            f"{what}: clients keep layers from round to round, but heads='reset_to_init' keeps "
            "nothing; choose heads='persist' or 'shared'."
        )
    if scheme.personal:
        raise FedLPError(
            f"{what}: clients already keep layers; name all of them in one regular expression, "
            "such as 'fc1|fc2'."
        )
    if scheme.slices:
        raise FedLPError(
            f"{what}: clients of different widths hold different parts of a layer, which cannot be "
            "kept apart from the server's; give all clients the whole model or a depth."
        )

    def drop(variables: Variables) -> Variables:
        return _select(variables, {p for p in flatten_dict(variables) if not chosen(p)})

    def init(task: Task, key: Array, example: Batch) -> Variables:
        variables = scheme.init(task, key, example)
        _check_split(what, variables, drop(variables))
        return drop(variables)

    def levels(task: Task, variables: Variables, example: Batch) -> tuple[Submodel, ...]:
        server, given = drop(variables), flatten_dict(variables)
        dtype = jax.tree.leaves(server["params"])[0].dtype
        shapes = jax.eval_shape(lambda key: scheme.init(task, key, example), root_key(0))
        own = {
            path: given.get(path, jax.ShapeDtypeStruct(x.shape, dtype))
            for path, x in flatten_dict(shapes).items()
            if chosen(path)
        }
        _check_given(own, flatten_dict(shapes))
        like = unflatten_dict(flatten_dict(server) | own)
        return tuple(_keeping(level, own, like) for level in scheme.levels(task, like, example))

    return scheme._replace(
        init=init,
        levels=levels,
        persist=True,
        personal=True,
        private_key=lambda root, client: initial_key(root),
        of_server=drop,
    )


def _keeping(level: Submodel, own: dict[tuple[str, ...], Any], whole: Variables) -> Submodel:
    """A level whose part of the variables at the paths `own` is private.

    Args:
      level: of a scheme that shares them.
      own: variables of the whole model, or their shapes: clients begin with those that are arrays.
      whole: all variables of the whole model, or shapes.
    """
    shared = flatten_dict(jax.eval_shape(level.extract, whole))
    kept = {path: x for path, x in shared.items() if path in own}
    first = {path: own[path] for path in kept if isinstance(own[path], jax.Array | np.ndarray)}

    def extract(variables: Variables) -> Variables:
        # Stand-ins of no size: what the level makes of them is dropped.
        absent = {p: np.broadcast_to(np.zeros((), x.dtype), x.shape) for p, x in own.items()}
        everything = unflatten_dict(absent | flatten_dict(variables))
        held = level.extract(everything)
        return _select(held, _others(held, kept))

    def merge(shared_part: Variables, private_part: PyTree) -> Variables:
        mine = _select(private_part, set(kept))
        rest = _select(private_part, _others(private_part, kept))
        return level.merge(_joined(shared_part, mine), rest)

    def split(variables: Variables) -> tuple[Variables, PyTree]:
        held, private_part = level.split(variables)
        mine = _select(held, set(kept))
        return _select(held, _others(held, kept)), _joined(private_part, mine)

    def private(key: Array, example: Batch) -> PyTree:
        drawn = flatten_dict(level.task.init(key, example))
        mine = {path: drawn[path].astype(x.dtype) for path, x in kept.items()} | first
        return _joined(level.private(key, example), unflatten_dict(mine))

    return level._replace(
        extract=extract,
        merge=merge,
        split=split,
        private=private,
        private_shapes=_joined(level.private_shapes, unflatten_dict(kept)),
    )


def _matcher(pattern: str) -> Callable[[tuple[str, ...]], bool]:
    """Whether a path, its collection included, matches."""
    expression = path_pattern(pattern)
    return lambda path: bool(expression.search(_joined_path(path)))


def _joined_path(path: tuple[str | int, ...]) -> str:
    """A path without its collection; a list of layers has numbers in it."""
    return "/".join(map(str, path[1:]))


def _check_split(what: str, variables: Variables, server: Variables) -> None:
    """Refuses a choice that leaves clients nothing to keep, or nothing to share."""
    paths = [_joined_path(path) for path in flatten_dict(variables) if path[0] == "params"]
    shared = len(jax.tree.leaves(server.get("params", {})))
    if shared == len(paths):
        raise FedLPError(
            f"{what}: clients keep none of the {len(paths)} parameters, which are "
            f"{', '.join(paths)}; choose a pattern that leaves them some."
        )
    if shared == 0:
        raise FedLPError(
            f"{what}: clients share none of the {len(paths)} parameters, which are "
            f"{', '.join(paths)}; choose a pattern that leaves some to share."
        )


def _check_given(own: dict[tuple[str, ...], Any], shapes: dict[tuple[str, ...], Any]) -> None:
    for path, x in own.items():
        if x.shape != shapes[path].shape:
            raise FedLPError(
                f"{'/'.join(map(str, path))} of the given variables is {list(x.shape)}, but "
                f"clients keep {list(shapes[path].shape)} there; give variables of this model."
            )


def full(task: Task) -> Submodel:
    """The whole model: everything is shared, nothing is private."""
    return Submodel(
        task,
        extract=lambda variables: variables,
        merge=lambda shared, private: shared,
        split=lambda variables: (variables, {}),
        embed=lambda shared, like: shared,
        private=lambda key, example: {},
        private_shapes={},
    )


def depth_prefix(task: Task, depth: int, whole: Variables, example: Batch) -> Submodel:
    """The submodel of one depth.

    Args:
      task: the whole task, with `at_depth`.
      depth: 1 to `task.depth`.
      whole: the server's variables or their shapes; a submodel's variable of the same path is
        shared, any other is private.
      example: a batch, for shapes.

    Raises:
      FedLPError: the model has no depths, a shared variable has different shapes in both, or
        nothing is shared.
    """
    part = _at_depth(task, depth)
    server = flatten_dict(whole)
    shapes = flatten_dict(jax.eval_shape(part.init, root_key(0), example))
    shared = set(shapes) & set(server)
    if not any(path[0] == "params" for path in shared):
        raise FedLPError(f"the submodel of depth {depth} shares no parameter with the whole model.")
    for path in sorted(shared):
        if shapes[path].shape != server[path].shape:
            raise FedLPError(
                f"{'/'.join(map(str, path))} is {shapes[path].shape} at depth {depth} but "
                f"{server[path].shape} in the whole model; shared variables need one shape, "
                "private ones a name of their own."
            )

    # Private variables have the dtype of the server's.
    dtype = next(x.dtype for path, x in server.items() if path[0] == "params")
    private_shapes = {
        p: jax.ShapeDtypeStruct(x.shape, dtype) for p, x in shapes.items() if p not in shared
    }

    def private(key: Array, batch: Batch) -> PyTree:
        return jax.tree.map(lambda x: x.astype(dtype), split(part.init(key, batch))[1])

    def split(variables: Variables) -> tuple[Variables, PyTree]:
        return _select(variables, shared), _select(variables, set(private_shapes))

    def embed(shared_part: Variables, like: Variables) -> Variables:
        have = flatten_dict(shared_part)
        everywhere = flatten_dict(like)
        return unflatten_dict(
            {path: have.get(path, jnp.zeros_like(x)) for path, x in everywhere.items()}
        )

    return Submodel(
        part,
        extract=lambda variables: _select(variables, shared),
        merge=_joined,
        split=split,
        embed=embed,
        private=private,
        private_shapes=unflatten_dict(private_shapes),
        name=f"depth_{depth}",
    )


def union_of_depths(task: Task, key: Array, example: Batch) -> Variables:
    """Variables of the deepest model and the exit heads of all shallower depths."""
    variables = flatten_dict(task.init(key, example))
    for depth in range(1, task.depth):
        for path, value in flatten_dict(_at_depth(task, depth).init(key, example)).items():
            variables.setdefault(path, value)
    return unflatten_dict(variables)


def assign_depths(depths: Depths, root: Array, clients: int, deepest: int) -> np.ndarray:
    """The depth of every client, drawn from (seed, client) alone.

    Args:
      depths: "uniform": each of 1..G with probability 1 / G; a flag f in 1..G: f with probability
        .6 and the others evenly, as in the authors' code; G probabilities; or K depths.
      root: typed key of the run's seed.
      clients: K.
      deepest: G.

    Returns:
      `i32[K]` in 1..G.

    Raises:
      FedLPError: any other value.
    """
    allowed = (
        f"give 'uniform', a flag 1 to {deepest}, {deepest} probabilities that sum to 1, or "
        f"{clients} depths, one per client"
    )
    if isinstance(depths, str):
        if depths != "uniform":
            raise FedLPError(f"depths='{depths}' is unknown; {allowed}.")
        depths = depth_probabilities("uniform", deepest)
    if isinstance(depths, int | np.integer) and not isinstance(depths, bool):
        if not 1 <= depths <= deepest:
            raise FedLPError(f"depths={depths} is outside 1 to {deepest}; {allowed}.")
        depths = depth_probabilities(int(depths), deepest)
    try:
        values = np.asarray(depths, np.float64)
    except (TypeError, ValueError) as error:
        raise FedLPError(f"depths={depths!r} cannot be read as numbers; {allowed}.") from error
    if values.shape == (deepest,) and (values >= 0).all() and abs(values.sum() - 1) < 1e-6:
        return 1 + draw_levels(values, root, clients)
    whole_numbers = values == np.round(values)
    if values.shape == (clients,) and (whole_numbers & (values >= 1) & (values <= deepest)).all():
        return values.astype(np.int32)
    raise FedLPError(f"depths has shape {list(values.shape)} and sum {values.sum():g}; {allowed}.")


def depth_probabilities(depths: str | int, deepest: int) -> list[float]:
    """The probabilities of depths 1 to G that "uniform" or a flag means."""
    if depths == "uniform":
        return [1.0 / deepest] * deepest
    flagged = _FLAG_SHARE if deepest > 1 else 1.0
    others = (1.0 - _FLAG_SHARE) / max(deepest - 1, 1)
    return [flagged if depth == depths else others for depth in range(1, deepest + 1)]


def draw_levels(probability: np.ndarray, root: Array, clients: int) -> np.ndarray:
    """The level of every client, `i32[K]` from 0, drawn from (seed, client) alone.

    Args:
      probability: of each level.
      root: typed key of the run's seed.
      clients: K.
    """
    uniforms = drawn_once(
        root, clients, Purpose.DEPTH, lambda key: jax.random.uniform(key, (), jnp.float32)
    )
    # Without the last edge, a rounding error in the sum cannot give a level past the last.
    edges = np.cumsum(probability)[:-1]
    return np.searchsorted(edges, uniforms, side="right").astype(np.int32)


def _at_depth(task: Task, depth: int) -> Task:
    if task.at_depth is None:
        raise FedLPError(
            "this model has no depths; give its module an integer field `depth`, as "
            "fl.models.MLP, FedLPCNN, ResNet and Transformer have, or use a scheme in which every "
            "client holds the whole model."
        )
    return task.at_depth(depth)


def _joined(tree: Variables, other: Variables) -> Variables:
    """Two trees of different paths in one."""
    return unflatten_dict(flatten_dict(tree) | flatten_dict(other))


def _others(tree: Variables, paths: Any) -> set[tuple[str, ...]]:
    """The paths of a tree that are not among `paths`."""
    return set(flatten_dict(tree)) - set(paths)


def _select(variables: Variables, paths: set[tuple[str, ...]]) -> Variables:
    return unflatten_dict({p: x for p, x in flatten_dict(variables).items() if p in paths})
