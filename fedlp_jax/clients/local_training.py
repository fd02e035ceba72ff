"""Local training of ONE client: epochs of stochastic gradient steps with any optax optimizer.

`LocalTraining` is what an algorithm changes of it: the gradient of each step, and what the client
sends and keeps at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from fedlp_jax.clients.sgd import SGD
from fedlp_jax.data.batching import shuffled_rows, take_batch
from fedlp_jax.errors import FedLPError, check_number
from fedlp_jax.execution.loops import Loops, RunLoops, run_loops
from fedlp_jax.nn import gated
from fedlp_jax.nn.gated import Gate
from fedlp_jax.prng import Purpose, client_key
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import Array, Batch, ClientMetrics, Examples, Mean, PyTree, Terms, Variables


class LocalWork(NamedTuple):
    """How much a client trains."""

    batch_size: int  # B; the last batch of an epoch may be smaller
    epochs: int | None = 1
    steps: int | None = None  # in place of epochs; a client starts a new epoch when it must


class Step(NamedTuple):
    """One step of ONE client, as a gradient rule sees it. Trees are of parameters."""

    gradient: PyTree  # of the loss
    params: PyTree  # where the gradient was taken
    start: PyTree  # what the client received; a private head is not in it
    number: Array  # i32[], from 0


class Trained(NamedTuple):
    """What the training of ONE client came to. Trees are of what it shares with the server."""

    start: PyTree  # parameters as received
    update: Variables  # what the training added, batch statistics included
    steps: Array  # i32[], steps taken
    scale: Array  # f32[], factor on the optimizer's updates, see `client_schedule` of `compose`
    sent: PyTree  # bool[] for each parameter: its layer will be sent


class LocalTraining(NamedTuple):
    """What an algorithm changes of the training of ONE client; a None leaves plain training.

    `terms` is what the client reads of the server's `Terms`. State and terms have trees of the
    parameters that the client shares with the server, without its private head: `on_common` maps
    over what two trees have in common.
    """

    # shared params or their shapes -> state before the client's first round
    init: Callable[[PyTree], PyTree] | None = None
    # (step, terms, state) -> gradient for the optimizer
    gradient: Callable[[Step, Terms, PyTree], PyTree] | None = None
    # (trained, terms, state) -> (update to send, what is sent with it, state)
    finish: Callable[[Trained, Terms, PyTree], tuple[Variables, Terms, PyTree]] | None = None
    # (number of the step, steps of the round) -> (path of a parameter, whether the client keeps it
    # for itself) -> whether the step trains it; parameters that share a gate should get the same
    # object
    trains: Callable[[Array, Array], Callable[[str, bool], Gate]] | None = None
    sgd: SGD | None = None  # what the client optimizer has to be, for every parameter


# (gradient, params, number of the step i32[]) -> gradient
GradientRule = Callable[[PyTree, PyTree, Array], PyTree]
# (params, number of the step, steps of the round) -> a `Gate` for each parameter
GateRule = Callable[[PyTree, Array, Array], PyTree]


class Client(NamedTuple):
    """One client as `local_update` sees it."""

    id: Array  # i32[]
    size: Array  # i32[], examples
    rows: Array  # i32[M]


class Bounds(NamedTuple):
    """Trip counts of the loops, common to the clients that are vmapped together."""

    epochs: Array | int  # i32[], largest number of epochs begun
    steps: Array | int  # i32[], largest number of steps in all
    longest: Array | int  # i32[], largest number of steps in an epoch
    shortest: Array | int  # i32[], smallest


def check_work(work: LocalWork) -> LocalWork:
    """Validates local work and converts NumPy integers to int.

    Raises:
      FedLPError: neither or both of epochs and steps, or a number below 1.
    """
    if (work.epochs is None) == (work.steps is None):
        raise FedLPError(
            f"give either epochs or steps (got epochs={work.epochs}, steps={work.steps})."
        )
    numbers = {name: value for name, value in work._asdict().items() if value is not None}
    return work._replace(
        **{name: check_number(name, value, ge=1, integer=True) for name, value in numbers.items()}
    )


def steps_per_epoch(size: Any, work: LocalWork) -> Any:
    """ceil(size / B), for NumPy and JAX integer arrays."""
    return (size + work.batch_size - 1) // work.batch_size


def local_steps(size: Any, work: LocalWork) -> Any:
    """Steps of a client with `size` examples in a round; 0 without examples."""
    per_epoch = steps_per_epoch(size, work)
    return work.epochs * per_epoch if work.steps is None else work.steps * per_epoch.clip(0, 1)


def examples_seen(size: Any, work: LocalWork) -> Any:
    """Examples that a client with `size` of them trains on in a round; each epoch counts."""
    if work.steps is None:
        return work.epochs * size
    per_epoch = steps_per_epoch(size, work).clip(1)
    return work.steps // per_epoch * size + work.steps % per_epoch * work.batch_size * (size > 0)


def loop_bounds(size: Any, work: LocalWork) -> Bounds:
    """Bounds for clients of `size: i32[W]` (or `i32[]`) that run in one chunk.

    Exact for one client or clients of one size. Otherwise an upper bound, and a client ignores the
    steps past its last.
    """
    per_epoch, steps = steps_per_epoch(size, work), local_steps(size, work)
    epochs = -(-steps // per_epoch.clip(1))
    return Bounds(epochs.max(), steps.max(), per_epoch.max(), per_epoch.min())


def _fixed_bounds(size: int, work: LocalWork) -> Bounds:
    """`loop_bounds` of clients of one size, as ints."""
    bounds: Any = loop_bounds(np.int32(size), work)
    return Bounds(*(int(bound) for bound in bounds))


def local_update(
    task: Task,
    optimizer: optax.GradientTransformation,
    work: LocalWork,
    even_size: int | None,
    alone: bool,
    all_train: bool,
    gradient_rule: GradientRule | None = None,
    largest: int | None = None,
    gate_rule: GateRule | None = None,
) -> Callable[..., tuple[Variables, ClientMetrics]]:
    """Builds the local training of one client.

    `x_{s+1} = x_s + scale * optimizer(grad loss(x_s; batch_s))`. The optimizer is reset in
    every round.

    Args:
      task: what is learnt.
      optimizer: any optax transform whose updates are added to the parameters.
      work: epochs or steps, and the batch size.
      even_size: the size of every client if it is the same; the padding masks are then omitted.
      alone: the client is not vmapped with others, so no step needs to be masked.
      all_train: no client skips its training, as lost clients do whose `size` is set to 0. With
        `even_size`, trip counts are then constants of the program, so an accelerator need not ask
        the host after every step whether to continue.
      gradient_rule: `(gradient, params, number i32[]) -> gradient`, applied in each step before
        the optimizer; None = the gradient of the loss.
      largest: no client has more examples. All trip counts are then constants, and a client
        ignores the steps past its last.
      gate_rule: which parameters a step trains; None = all.

    Returns:
      `train(variables, examples, client, bounds, key, round, scale, run) -> (variables, metrics)`;
      `scale` is `f32[]`, a factor on the optimizer's updates, or None; `run` runs the loops.
    """
    batch_size = work.batch_size
    full_batches = even_size is not None and even_size % batch_size == 0
    select = not alone and even_size is None
    known = largest or (even_size if all_train else None)
    fixed = None if known is None else _fixed_bounds(known, work)

    def train(
        variables: Variables,
        examples: Examples,
        client: Client,
        bounds: Bounds | None,
        key: Array,
        round: Array,
        scale: Array | None,
        run: RunLoops = run_loops,
    ) -> tuple[Variables, ClientMetrics]:
        key_shuffle = client_key(key, round, client.id, Purpose.SHUFFLE)
        key_train = client_key(key, round, client.id, Purpose.TRAIN)
        bounds = bounds if fixed is None else fixed
        assert bounds is not None
        per_epoch, steps = steps_per_epoch(client.size, work), local_steps(client.size, work)

        def order_of(epoch: Array) -> Array:
            key = jax.random.fold_in(key_shuffle, epoch)
            return shuffled_rows(key, client.rows, client.size, batch_size)

        def step(order: Array, epoch: Array, in_epoch: Array, carry: Any) -> Any:
            number = epoch * per_epoch + in_epoch
            batch = take_batch(examples, order, in_epoch, client.size, batch_size, full_batches)
            rule = _at(gradient_rule, number)
            key = jax.random.fold_in(key_train, number)
            gates = None if gate_rule is None else gate_rule(carry[0]["params"], number, steps)
            new = _sgd_step(task, optimizer, carry, batch, key, scale, rule, gates, alone)
            if not select:
                return new
            due = (in_epoch < per_epoch) & (number < steps)
            return jax.tree.map(lambda n, o: jnp.where(due, n, o), new, carry)

        if largest is not None and work.steps is not None:
            epochs = bounds.epochs if even_size is not None else None
            loops = _counting_steps(step, order_of, work.steps, per_epoch, epochs)
        else:
            ends_early = fixed is None or work.steps is not None
            loops = _counting_epochs(step, order_of, bounds, ends_early)
        carry = run(loops, _first_carry(task, optimizer, variables))
        return carry[0], carry[2]

    return train


def _first_carry(
    task: Task, optimizer: optax.GradientTransformation, variables: Variables
) -> tuple[Variables, PyTree, ClientMetrics]:
    """What the first step starts from."""
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(variables["params"])
    return variables, state, _zero_metrics(task.metrics)


def _counting_epochs(
    step: Callable[..., Any],
    order_of: Callable[[Array], Array],
    bounds: Bounds,
    ends_early: bool,
) -> Loops:
    """Epoch after epoch; where the last `ends_early`, the device computes how long it is."""

    def steps(index: Array) -> Array | int:
        if not ends_early:
            return bounds.longest
        return jnp.minimum(bounds.longest, bounds.steps - index * bounds.shortest)

    return Loops(bounds.epochs, steps, order_of, step)


def _counting_steps(
    step: Callable[..., Any],
    order_of: Callable[[Array], Array],
    steps: int,
    per_epoch: Array,
    epochs: Array | int | None,
) -> Loops:
    """One loop over a known number of steps; `epochs` = how many begin, if all clients are even.

    Then their orders are drawn before the loop. Uneven clients draw theirs anew in each step.
    """
    per_epoch = per_epoch.clip(1)  # an empty slot has none

    def orders(_: int) -> Array | None:
        if epochs is None:
            return None
        return jax.vmap(order_of)(jnp.arange(epochs, dtype=jnp.int32))

    def numbered(orders: Array | None, _: int, number: Array, carry: Any) -> Any:
        index, in_epoch = number // per_epoch, number % per_epoch
        order = order_of(index) if orders is None else orders[index]
        return step(order, index, in_epoch, carry)

    return Loops(None, lambda _: steps, orders, numbered)


def optimizer_step(
    role: str,
    optimizer: optax.GradientTransformation,
    gradient: PyTree,
    state: PyTree,
    params: PyTree,
    **extra: Any,
) -> tuple[PyTree, PyTree]:
    """Calls an optax optimizer; the caller sets standard promotion, which optax needs.

    Args:
      role: "client" or "server", for the error.
      optimizer: any optax transform.
      gradient: tree like `params`.
      state: the optimizer's.
      params: a tree of any floats.
      **extra: passed to an optimizer that takes it, under optax's names, such as the loss as
        `value`.

    Returns:
      The updates, to be added to `params`, and the new state.

    Raises:
      FedLPError: the optimizer needs more than that, as line searches do.
    """
    try:
        return optax.with_extra_args_support(optimizer).update(gradient, state, params, **extra)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        known = ", ".join(["gradient", "parameters", *extra])
        raise FedLPError(
            f"the {role}'s optimizer needs more than it is given ({known}): {error}. Use one such "
            "as optax.sgd or optax.adam."
        ) from error


def _sgd_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    carry: Any,
    batch: Batch,
    key: Array,
    scale: Array | None,
    gradient_rule: Callable[[PyTree, PyTree], PyTree] | None,
    gates: PyTree,
    alone: bool,
) -> Any:
    variables, state, metrics = carry
    params = variables["params"]

    def loss_of(params: Any) -> Any:
        return task.loss({**variables, "params": params}, batch, key)

    if gates is not None and alone and jax.default_backend() == "cpu":
        (loss, aux), gradient = gated.value_and_grad(loss_of, params, gates)
    else:
        (loss, aux), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
    if gates is not None:  # zeros, for optimizers that look at all gradients at once
        gradient = gated.chosen(gates, gradient, jax.tree.map(jnp.zeros_like, gradient))
    if gradient_rule is not None:
        gradient = gradient_rule(gradient, params)
    # optax's adam, adamw and schedules fail under the user's strict promotion.
    with jax.numpy_dtype_promotion("standard"):
        updates, new_state = optimizer_step(
            "client", optimizer, gradient, state, params, value=loss, grad=gradient
        )
        if scale is not None:
            updates = jax.tree.map(lambda u: u * scale.astype(u.dtype), updates)
        new_params = optax.apply_updates(params, updates)
        if gates is not None:
            new_params = gated.chosen(gates, new_params, params)
            new_state = _with_frozen(optimizer, gates, new_state, state)
    f32 = jnp.float32
    metrics = metrics._replace(
        means=jax.tree.map(lambda m, x: m + x.astype(f32), metrics.means, aux.metrics),
        batch_loss_sum=metrics.batch_loss_sum + loss.astype(f32),
        steps=metrics.steps + 1,
    )
    return {**aux.statistics, "params": new_params}, new_state, metrics


def _with_frozen(
    optimizer: optax.GradientTransformation, gates: PyTree, new: PyTree, old: PyTree
) -> PyTree:
    """An optimizer's new state, in which what belongs to a frozen parameter is the old."""
    moves = optax.tree_map_params(
        optimizer, lambda _, gate: gate, new, gates, transform_non_params=lambda _: True
    )
    return gated.chosen(moves, new, old)


def _at(rule: GradientRule | None, number: Array) -> Callable[[PyTree, PyTree], PyTree] | None:
    """The rule for one step."""
    return None if rule is None else lambda gradient, params: rule(gradient, params, number)


def _zero_metrics(names: Sequence[str]) -> ClientMetrics:
    zero = jnp.zeros((), jnp.float32)
    means = {name: Mean(zero, zero) for name in names}
    return ClientMetrics(means, zero, jnp.zeros((), jnp.int32), jnp.zeros((), bool))


def on_common(rule: Callable[..., Array], tree: PyTree, *parts: PyTree) -> PyTree:
    """Maps over the leaves that nested dictionaries have in common; `tree` keeps its others.

    Args:
      rule: (leaf of `tree`, leaf of each part) -> leaf.
      tree: such as the gradient of a model with a private head.
      *parts: such as control variates, which a head has not.
    """
    leaves, others = flatten_dict(tree), [flatten_dict(part) for part in parts]
    return unflatten_dict(
        {
            path: rule(x, *(part[path] for part in others)) if path in others[0] else x
            for path, x in leaves.items()
        }
    )


def is_finite(tree: Any) -> Array:
    """`bool[]`: no NaN and no infinity anywhere in the tree."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
