"""What `simulate` refuses, before anything is compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.aggregation.robust import stacked_bytes
from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.clients.failures import Faults
from fedlp_jax.data.files import usable_memory
from fedlp_jax.data.loading import Dataset
from fedlp_jax.data.partition import Partition
from fedlp_jax.errors import FedLPError, check_number, nearest, shown, warn
from fedlp_jax.execution import processes
from fedlp_jax.execution.packing import size_bytes
from fedlp_jax.execution.plan import Plan
from fedlp_jax.prng import root_key
from fedlp_jax.pruning.layers import LayerTable, path_names
from fedlp_jax.reporting.metrics import headline
from fedlp_jax.simulation.checkpoint import Checkpoint
from fedlp_jax.simulation.early_stop import EarlyStop
from fedlp_jax.simulation.keep_best import KeepBest
from fedlp_jax.simulation.profiling import Trace
from fedlp_jax.simulation.snapshot import Snapshot, describe
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import Array, Batch, ServerState, Variables

if TYPE_CHECKING:
    from fedlp_jax.simulation.spec import Spec


def initial_shapes(task: Task, root: Array, example: Batch) -> Variables:
    """The shapes of a task's variables, without computing them."""
    return jax.eval_shape(task.init, root, example)


def check_numbers(
    rounds: int, seed: int, eval_every: int | None, first_round: int = 1
) -> tuple[int, int, int | None, int]:
    """The four as Python's numbers.

    Raises:
      FedLPError: one is not whole, or too small or too large.
    """
    rounds = check_number("rounds", rounds, ge=0, integer=True)
    seed = check_number("seed", seed, ge=0, integer=True)
    if seed >= 2**32:
        raise FedLPError(f"seed={seed} must be below 2**32.")
    first_round = check_number("first_round", first_round, ge=1, integer=True)
    if first_round + rounds > 2**31:
        raise FedLPError(
            f"{rounds} rounds from round {first_round} on exceed 2**31, the last round that is "
            "counted; lower one of them."
        )
    if eval_every is not None:
        eval_every = check_number("eval_every", eval_every, ge=1, integer=True)
    return rounds, seed, eval_every, first_round


def check_start(rounds: int, first_round: int, checkpoint: Any, resume: Any) -> None:
    """Refuses what is no checkpoint, and a first round that contradicts one.

    Raises:
      FedLPError: with a way out.
    """
    check_kinds(checkpoint=checkpoint, resume=resume)
    if first_round != 1 and (checkpoint is not None or resume is not None):
        raise FedLPError(
            f"a run from first_round={shown(first_round)} on has no earlier rounds to save or "
            "resume; omit first_round, or omit checkpoint and resume."
        )
    if resume is not None and resume.round > check_number("rounds", rounds, ge=0, integer=True):
        raise FedLPError(
            f"the checkpoint has {resume.round} rounds, more than the {rounds} asked for."
        )


_KINDS: dict[str, tuple[type, str]] = {
    "checkpoint": (Checkpoint, 'fl.Checkpoint("folder")'),
    "resume": (Snapshot, 'fl.Checkpoint("folder").latest()'),
    "early_stop": (EarlyStop, "fl.EarlyStop(target=0.9)"),
    "keep_best": (KeepBest, 'fl.KeepBest("test_accuracy")'),
    "profile": (Trace, 'fl.Trace("folder", first=5, last=8)'),
}


def warn_of_first_block(algorithm: Algorithm, last_round: int) -> None:
    """Warns of a run that ends before its masks can depend on what was sent.

    Args:
      algorithm: whose drawn cohorts may stay for a block of rounds.
      last_round: of the run, counted from 1; 0 = a run without rounds.
    """
    block = algorithm.cohort_rounds
    if block > 1 and 0 < last_round <= block:
        warn(
            f"rounds={last_round} end within the first block of {block} rounds, after which the "
            f"algorithm begins to leave layers out; raise rounds above {block} or lower the "
            "interval.",
            stacklevel=5,
        )


def check_kinds(**arguments: Any) -> None:
    """Refuses arguments of `simulate` that are of another class; None is for all.

    Raises:
      FedLPError: with an example of the right class.
    """
    for name, value in arguments.items():
        kind, example = _KINDS[name]
        if value is not None and not isinstance(value, kind):
            raise FedLPError(
                f"{name}={shown(value)} is of type {type(value).__name__}; give {example}."
            )


def check_tested(name: str, rule: EarlyStop | KeepBest | None, spec: Spec) -> None:
    """Refuses a rule for a metric that evaluations do not measure, or for none if none is known.

    Raises:
      FedLPError: with those that they do.
    """
    if rule is None or (rule.metric is not None and not rule.metric.startswith("test_")):
        return
    algorithm, example = spec.algorithm, spec.example
    variables = initial_shapes(algorithm.task, spec.root, example)
    measured = jax.eval_shape(algorithm.task.evaluate, variables, example)
    depths = [f"_{level.name}" for level in spec.levels] if algorithm.shared_heads else []
    suffixes = ["_personal"] if algorithm.personal else ["", *depths]
    keys = [f"test_{metric}{suffix}" for suffix in suffixes for metric in measured]
    if rule.metric is None:
        if headline(dict.fromkeys(keys, 0.0)) is None:
            raise FedLPError(
                f"{name} has no metric, and the task has neither accuracy nor loss to take; give "
                f"{name}.metric, one of {', '.join(keys)}."
            )
    elif rule.metric not in keys:
        raise FedLPError(
            f"{name}.metric={shown(rule.metric)} is not measured{nearest(rule.metric, keys) or '.'}"
            f" Evaluations measure {', '.join(keys)}."
        )


def check_partition(clients: Partition, data: Dataset) -> None:
    """Refuses a partition of other examples or labels than the training split's.

    Raises:
      FedLPError: with the numbers.
    """
    examples = len(data.train.labels)
    if len(clients.labels) != examples:
        raise FedLPError(
            f"the partition was made for {len(clients.labels)} examples but the training split of "
            f"'{data.name}' has {examples}; partition its own labels."
        )
    if not data.has_classes:
        return
    others = int((clients.labels != data.train.labels).sum())
    if others:
        raise FedLPError(
            f"the partition was made from other labels: {others:,} of {examples:,} differ from the "
            f"training labels of '{data.name}'. Partition its own labels; to keep these rows, as "
            "after a partition by another attribute, pass fl.Partition(p.order, p.offset, "
            "data.train.labels, data.num_classes)."
        )


def check_model(algorithm: Algorithm, example: Batch, data: Dataset, root: Array) -> Variables:
    """Refuses a model that cannot take the inputs, or whose outputs do not fit the task.

    Returns:
      Its shapes.

    Raises:
      FedLPError: with the shape, or both numbers.
    """
    with _taking(data, example):
        variables = initial_shapes(algorithm.task, root, example)
    _check_kinds(variables)
    check_outputs(algorithm.task, variables, example, data)
    with _taking(data, example):
        _, aux = jax.eval_shape(algorithm.task.loss, variables, example, root)
    if set(aux.metrics) != set(algorithm.task.metrics) or "loss" not in aux.metrics:
        raise FedLPError(
            f"the task's loss measures {', '.join(aux.metrics) or 'nothing'}, but its `metrics` "
            f"are {', '.join(algorithm.task.metrics)}; make them the same, with 'loss' among them."
        )
    _check_step({k: v for k, v in variables.items() if k != "params"}, aux.statistics)
    return variables


def check_complete(task: Task, variables: Variables, example: Batch, data: Dataset) -> None:
    """Refuses variables that lack parameters of the model.

    Raises:
      FedLPError: with their paths, which clients may keep for themselves.
    """
    with _taking(data, example):
        shapes = initial_shapes(task, root_key(0), example)
    held = _parameters(variables)
    lacks = [path for path in _parameters(shapes) if path not in held]
    if lacks:
        raise FedLPError(
            f"the variables lack {', '.join(lacks)} of the model; where clients keep these for "
            "themselves, measure result.models, or read test_accuracy_personal of the run."
        )


def check_outputs(task: Task, variables: Variables, example: Batch, data: Dataset) -> None:
    """Refuses variables that do not run on the data, or outputs that do not fit the task.

    Raises:
      FedLPError: with the shape.
    """
    with _taking(data, example):
        outputs = jax.eval_shape(task.outputs, variables, example)
    task.check(outputs.shape, example, data.num_classes)


def _check_step(before: Variables, after: Variables) -> None:
    """Refuses statistics that a step gives another shape or dtype."""
    have, get = _leaves(before), _leaves(after)
    for path in sorted(set(have) | set(get)):
        was, becomes = (describe(tree[path]) if path in tree else "nothing" for tree in (have, get))
        if was != becomes:
            raise FedLPError(
                f"the model's variables{path} are {was} and become {becomes} in a step; "
                "make them the same. What is only reported is sown into 'intermediates'."
            )


def _check_kinds(variables: Variables) -> None:
    """Refuses variables that have no mean."""
    for path, leaf in _leaves(variables).items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise FedLPError(
                f"the model's variables{path} have dtype {leaf.dtype}, and only floats have a mean "
                "over clients; make them floats, or keep them out of the model's variables."
            )


@contextlib.contextmanager
def _taking(data: Dataset, example: Batch) -> Iterator[None]:
    """Turns whatever a model says while it is traced into a sentence about the data."""
    try:
        yield
    except (FedLPError, Warning):  # a warning that is an error by the user's filters
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FedLPError(
            f"the model cannot take the inputs of '{data.name}', of shape "
            f"{list(example.inputs.shape[1:])}: {reason}"
        ) from error


def check_faults(algorithm: Algorithm, faults: Any, cohort: Any) -> None:
    """Refuses faults where they would have no effect.

    Raises:
      FedLPError: the algorithm's round knows of none, or the cohort is not the server's choice.
    """
    if not isinstance(faults, Faults):
        raise FedLPError(f"faults is a {type(faults).__name__}; give fl.Faults(dropout=0.1, ...).")
    if algorithm.asynchrony is not None:
        raise FedLPError(
            "faults end a round that a server waits for, but this one does not wait; give the "
            "clients' devices as profile= of the algorithm, and omit faults."
        )
    if not algorithm.faults:
        raise FedLPError(
            "this algorithm's round ignores cohort.conditions, so faults would do nothing; "
            "use one made by compose."
        )
    if callable(cohort) and faults.over_selection != 1:
        raise FedLPError(
            f"faults.over_selection={faults.over_selection} enlarges a cohort that is drawn, but "
            "here a function says who is in it; let that give more clients."
        )


def check_cohorts(algorithm: Algorithm, size: int, max_cohort: int | None) -> None:
    """Refuses cohorts that are too small, or of changing size under differential privacy.

    Args:
      algorithm: any.
      size: C, of the largest cohort, or of the buffer of a server that does not wait.
      max_cohort: as in `simulate`.

    Raises:
      FedLPError: the server asks more clients than there are, or the accountant needs cohorts of
        one size.
    """
    enlarged = "cohort" if algorithm.asynchrony is None else "buffer"
    if algorithm.senders > size:
        raise FedLPError(
            f"senders={algorithm.senders} exceeds the {size} clients of a server step; lower "
            f"senders to at most {size}, or raise {enlarged}."
        )
    if max_cohort is not None and algorithm.privacy is not None:
        raise FedLPError(
            f"max_cohort={max_cohort} lets cohorts change in size, but privacy counts on one size; "
            "omit max_cohort."
        )


def check_stack(variables: Variables, layers: LayerTable, cohort: int, plan: Plan) -> int:
    """Predicts the memory of a robust rule, and refuses what does not fit.

    Args:
      variables: the server's shapes.
      layers: their table.
      cohort: C, with over-selection.
      plan: resolved.

    Returns:
      Modelled bytes over all devices.

    Raises:
      FedLPError: more than half of this machine's memory, or than all of the devices'.
    """
    need, have = stacked_bytes(variables, layers, cohort, plan), _usable_memory(plan.devices or 1)
    if need > have:
        fits = cohort * have // need
        raise FedLPError(
            f"a robust rule keeps the updates of all {cohort} clients side by side, about "
            f"{need / 2**30:.1f} GiB, but there are {have / 2**30:.1f} GiB to use; a cohort of "
            f"{fits} would fit, or take a mean with clip=, which needs one model."
        )
    return need


def check_size(variables: Variables) -> None:
    """Refuses a model of which the server's, a client's and an update do not fit one device.

    Raises:
      FedLPError: with both sizes.
    """
    model = size_bytes(variables)
    have = _usable_memory(devices=1)
    if 3 * model > have:
        raise FedLPError(
            f"the model takes {model / 2**30:.1f} GiB, a round at least three times as much, and "
            f"there are {have / 2**30:.1f} GiB to use; make it smaller."
        )


def check_steps(algorithm: Algorithm, clients: Partition) -> None:
    """Refuses more local steps than 32 bits count.

    Raises:
      FedLPError: with the largest number of steps of a client.
    """
    most = int(np.max(algorithm.local_steps(clients.sizes)))
    if most >= 2**31:
        raise FedLPError(
            f"a client takes {most:,} steps a round, where fewer than 2**31 are counted; lower "
            "epochs or steps."
        )


def initial_state(algorithm: Algorithm, example: Batch, root: Array, clients: int) -> ServerState:
    """The shapes of an algorithm's first state; what it refuses, it refuses before compiling."""
    return jax.eval_shape(lambda key: algorithm.init(key, example, clients, None), root)


def check_variables(variables: Variables | None, wanted: Variables) -> None:
    """Compares given variables with those the server would have made.

    Raises:
      FedLPError: with the first path that differs and both shapes.
    """
    if variables is None:
        return
    have, want = _leaves(variables), _leaves(wanted)
    for path in sorted(set(have) | set(want)):
        shape = have[path].shape if path in have else "nothing"
        needs = want[path].shape if path in want else "nothing"
        if shape != needs:
            raise FedLPError(
                f"variables{path} has shape {shape} but the server of this algorithm holds {needs} "
                "there. Give a tree like `result.state.variables` of such a run."
            )
        if not jnp.issubdtype(have[path].dtype, jnp.floating):
            raise FedLPError(f"variables{path} has dtype {have[path].dtype}; give floats.")


def _usable_memory(devices: int) -> int:
    """Bytes a run may plan for on so many devices: half of the machine's, which CPU devices share.

    Accelerators are taken to have what the smallest has; of other processes' only those know.
    """
    if jax.default_backend() == "cpu":
        return usable_memory()
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    limits = [found["bytes_limit"] for found in stats if "bytes_limit" in found]
    least = processes.least(min(limits, default=None))
    return 2**63 if least is None else devices * least


def _parameters(tree: Variables) -> list[str]:
    """The paths of the parameters, without their collection."""
    paths = [path_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return ["/".join(path[1:]) for path in paths if path[:1] == ("params",)]


def _leaves(tree: Variables) -> dict[str, Any]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): jnp.asarray(leaf) if not hasattr(leaf, "dtype") else leaf
        for path, leaf in found
    }
