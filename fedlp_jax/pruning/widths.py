"""Width submodels: a client holds some units of every hidden layer, as a smaller dense network.

Units are the channels of a convolution or the outputs of a linear layer. At rate r a layer of C
units is cut to `ceil(r C)` of them; the next layer loses the same units of its inputs. Inputs and
outputs of the network are never cut. Which units a client holds is an `Order`.

Cut axes are found by shapes. Let an axis have N entries in the whole model and P in the narrowest,
in which every hidden layer has one unit. It then consists of P blocks of N / P units: P is 1 for
plain channels, the number of pixels where an image of channels was flattened, and N where nothing
is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fedlp_jax.errors import FedLPError, check_array
from fedlp_jax.prng import Purpose, client_key, root_key
from fedlp_jax.pruning.submodels import Submodel, Submodels, draw_levels, full, whole
from fedlp_jax.tasks.task import Aux, Task
from fedlp_jax.types import Array, Batch, Variables

Widths = float | Sequence[float] | np.ndarray

# (root key, round i32[], client i32[], C) -> i32[C]: the units in the order in which a client takes
# them. Layers of equal C share it, as a shortcut needs that adds one's outputs to another's.
Order = Callable[[Array, Array, Array, int], Array]

_MOST_LEVELS = 16  # each is compiled by itself
_NARROWEST = 1e-9  # a rate at which every layer has one unit


class Cut(NamedTuple):
    """An axis of an array: blocks of `units` entries, of which a client has `held` of each."""

    blocks: int
    units: int
    held: int


def rolling(key: Array, round: Array, client: Array, units: int) -> Array:
    """A window that moves on by one unit a round, and wraps (FedRolex)."""
    del key, client
    return (jnp.arange(units, dtype=jnp.int32) + (round - 1)) % units


def drawn(key: Array, round: Array, client: Array, units: int) -> Array:
    """A random order for each client and round (Federated Dropout)."""
    key = jax.random.fold_in(client_key(key, round, client, Purpose.UNITS), units)
    return jnp.argsort(jax.random.uniform(key, (units,), jnp.float32)).astype(jnp.int32)


def by_width(
    widths: Widths,
    shares: Sequence[float] | None = None,
    order: Order | None = None,
    *,
    rescale: bool = False,
    per_batch: bool = False,
) -> Submodels:
    """A fixed width for each client.

    Args:
      widths: one rate r in (0, 1], several that clients draw from, or K, one per client.
      shares: the probability of each of several rates; None = all alike.
      order: which units a client holds, such as `rolling`; None = the first.
      rescale: the outputs of cut layers are divided by r in training, as by HeteroFL's Scaler.
      per_batch: every batch trains a width drawn from the rates up to the client's own, as in
        FjORD. The other units get no gradient, but are computed.

    Raises:
      FedLPError: a rate outside (0, 1], too many of them, or shares that do not fit.
    """
    values = np.atleast_1d(check_array("widths", widths, gt=0, le=1))
    rates = np.unique(values)
    if values.ndim != 1 or not 1 <= len(rates) <= _MOST_LEVELS:
        raise FedLPError(
            f"widths has shape {list(values.shape)} with {len(rates)} different rates; give 1 to "
            f"{_MOST_LEVELS}, each of which is compiled by itself."
        )
    probability = _probabilities(values, shares)
    if rates[0] == 1:
        return whole()  # layers need not be averaged entry by entry

    def levels(task: Task, variables: Variables, example: Batch) -> tuple[Submodel, ...]:
        held = tuple(
            width_slice(
                task,
                float(rate),
                variables,
                example,
                order,
                rescale,
                narrower=[float(p) for p in rates[rates < rate]] if per_batch else (),
            )
            for rate in rates
        )
        if rates[-1] == 1:
            return held
        return (*held, full(task)._replace(name="width_1", slices=True, idle=True))

    def assign(task: Task, root: Array, clients: int) -> np.ndarray:
        del task
        level = np.searchsorted(rates, values).astype(np.int32)
        if shares is None and len(values) == clients:
            return level
        if len(values) > len(rates):
            raise FedLPError(
                f"widths has {len(values)} numbers, some of them equal; give one per client "
                f"(K={clients}), or different rates and their `shares`."
            )
        return level[draw_levels(probability, root, clients)]

    return Submodels(lambda t, k, e: t.init(k, e), levels, assign, slices=True)


def width_slice(
    task: Task,
    rate: float,
    variables: Variables,
    example: Batch,
    order: Order | None = None,
    rescale: bool = False,
    narrower: Sequence[float] = (),
) -> Submodel:
    """The submodel of one width.

    Args:
      task: the whole task, with `at_width`.
      rate: r, in (0, 1].
      variables: the server's, or their shapes.
      example: a batch, for shapes.
      order: as in `by_width`.
      rescale: as in `by_width`.
      narrower: rates below r, ascending; each batch trains one of them or r itself.

    Raises:
      FedLPError: the model has no widths, or narrower models have other variables.
    """
    if task.at_width is None:
        raise FedLPError(
            "this model has no widths; give its linen module a field `width_rate: float = 1.0` by "
            "which it scales its hidden layers, as fl.models.MLP, FedLPCNN, MNISTCNN and ResNet do."
        )
    part = task if rate == 1 else task.at_width(rate)
    cuts = _cuts(task, part, rate, variables, example)
    if rescale and rate < 1:
        linear = {
            path[:-1]
            for path, x in flatten_dict(variables).items()
            if path[-1] == "kernel" and x.ndim - 1 in cuts.get(path, {})
        }
        part = part._replace(loss=_rescaled(part, linear, 1 / rate))
    if narrower:
        below = [_cuts(task, task.at_width(p), p, variables, example) for p in narrower]
        part = part._replace(loss=_narrowed(part, [*below, cuts]))

    def at(orders: dict[int, Array]) -> Submodel:
        def extract(variables: Variables) -> Variables:
            return _mapped(variables, cuts, lambda x, axis, cut: _taken(x, axis, cut, orders))

        def embed(shared: Variables, like: Variables) -> Variables:
            del like
            return _mapped(shared, cuts, lambda x, axis, cut: _put_back(x, axis, cut, orders))

        return full(part)._replace(
            extract=extract, embed=embed, name=f"width_{rate:g}", slices=True
        )

    units = sorted({cut.units for axes in cuts.values() for cut in axes.values()})
    if order is None or not units:
        return at({})

    def place(key: Array, round: Array, client: Array) -> Submodel:
        return at({n: order(key, round, client, n) for n in units})._replace(place=place)

    return at({})._replace(place=place)


def _cuts(
    task: Task, part: Task, rate: float, whole: Variables, example: Batch
) -> dict[tuple[str, ...], dict[int, Cut]]:
    """The cut axes of each array that has some."""
    narrowest: Any = task.at_width and task.at_width(_NARROWEST)
    trees = [jax.eval_shape(t.init, root_key(0), example) for t in (part, narrowest)]
    wide, narrow, least = (flatten_dict(tree) for tree in (whole, *trees))
    if not wide.keys() == narrow.keys() == least.keys():
        other = sorted(wide.keys() ^ narrow.keys() | wide.keys() ^ least.keys())[0]
        raise FedLPError(
            f"{'/'.join(other)} does not exist in all widths of the model; keep the names of its "
            "layers independent of `width_rate`."
        )
    cuts: dict[tuple[str, ...], dict[int, Cut]] = {}
    for path, x in wide.items():
        shapes = x.shape, narrow[path].shape, least[path].shape
        for axis, (n, held, blocks) in enumerate(zip(*shapes, strict=True)):
            if n == held:
                continue
            if held > n or n % blocks or held % blocks:
                raise FedLPError(
                    f"axis {axis} of {'/'.join(path)} has {n} entries, {held} at width {rate:g} "
                    f"and {blocks} where each layer has one unit, which are not blocks of units; "
                    "scale each hidden layer to ceil(width_rate x units)."
                )
            cuts.setdefault(path, {})[axis] = Cut(blocks, n // blocks, held // blocks)
    return cuts


def _mapped(
    tree: Variables,
    cuts: dict[tuple[str, ...], dict[int, Cut]],
    change: Callable[[Array, int, Cut], Array],
) -> Variables:
    """Applies `change` to every cut axis of every array."""
    leaves = flatten_dict(tree)
    for path in leaves:
        for axis, cut in cuts.get(path, {}).items():
            leaves[path] = change(leaves[path], axis, cut)
    return unflatten_dict(leaves)


def _taken(x: Array, axis: int, cut: Cut, orders: dict[int, Array]) -> Array:
    """The held units of a whole axis, the lowest first."""
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    x = x.reshape(*before, cut.blocks, cut.units, *after)
    if cut.units in orders:
        x = jnp.take(x, jnp.sort(orders[cut.units][: cut.held]), axis + 1, mode="clip")
    else:
        x = jax.lax.slice_in_dim(x, 0, cut.held, axis=axis + 1)
    return x.reshape(*before, cut.blocks * cut.held, *after)


def _put_back(x: Array, axis: int, cut: Cut, orders: dict[int, Array]) -> Array:
    """The inverse of `_taken`, with zeros for the units that are not held."""
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    x = x.reshape(*before, cut.blocks, cut.held, *after)
    missing = [(0, 0)] * x.ndim
    missing[axis + 1] = (0, cut.units - cut.held)
    x = jnp.pad(x, missing)
    if cut.units in orders:
        order = orders[cut.units]
        places = jnp.concatenate([jnp.sort(order[: cut.held]), order[cut.held :]])
        x = jnp.take(x, jnp.argsort(places), axis + 1, mode="clip")
    return x.reshape(*before, cut.blocks * cut.units, *after)


def _rescaled(task: Task, modules: set[tuple[str, ...]], factor: float) -> Callable[..., Any]:
    """The loss of a task whose linear layers `modules` have outputs larger by a factor."""

    def loss(variables: Variables, batch: Batch, key: Array) -> Any:
        leaves = flatten_dict(variables)
        for path, x in leaves.items():
            if path[:-1] in modules:
                leaves[path] = x * jnp.asarray(factor, x.dtype)
        return task.loss(unflatten_dict(leaves), batch, key)

    return loss


def _narrowed(
    task: Task, choices: Sequence[dict[tuple[str, ...], dict[int, Cut]]]
) -> Callable[..., Any]:
    """The loss of a task at a width that is drawn for each batch.

    Units beyond that width have weights 0, so they change no output and get no gradient. That is
    the narrower network unless the model normalises over units.

    Args:
      task: of the widest.
      choices: the cut axes at each width, from the narrowest, which cuts all that any other does.
    """

    def loss(variables: Variables, batch: Batch, key: Array) -> tuple[Array, Aux]:
        draw = jax.random.fold_in(key, Purpose.UNITS)
        choice = jax.random.randint(draw, (), 0, len(choices), jnp.int32)

        def trained(path: tuple[str, ...], x: Array) -> Array:
            mask = jnp.ones((1,) * x.ndim, bool)
            for axis, cut in choices[0].get(path, {}).items():
                at = [
                    cuts.get(path, {}).get(axis, cut._replace(held=cut.units)) for cuts in choices
                ]
                held = jnp.asarray([one.held for one in at], jnp.int32)[choice]
                unit = jnp.arange(x.shape[axis], dtype=jnp.int32) % (x.shape[axis] // cut.blocks)
                mask &= jnp.expand_dims(unit < held, [i for i in range(x.ndim) if i != axis])
            return mask

        old = flatten_dict(variables)
        masks = {path: trained(path, x) for path, x in old.items()}
        masked = {path: jnp.where(masks[path], x, jnp.zeros_like(x)) for path, x in old.items()}
        value, aux = task.loss(unflatten_dict(masked), batch, key)
        statistics = flatten_dict(aux.statistics)
        for path, new in statistics.items():
            statistics[path] = jnp.where(masks[path], new, old[path])
        return value, aux._replace(statistics=unflatten_dict(statistics))

    return loss


def _probabilities(values: np.ndarray, shares: Sequence[float] | None) -> np.ndarray:
    """The probability of each rate, `f64[G]`."""
    if shares is None:
        return np.full(len(values), 1 / len(values))
    given = check_array("shares", shares, ge=0)
    if given.shape != values.shape or abs(given.sum() - 1) > 1e-6:
        raise FedLPError(
            f"shares has shape {list(given.shape)} and sum {given.sum():g}; give one probability "
            f"for each of the {len(values)} widths, which sum to 1."
        )
    return given
