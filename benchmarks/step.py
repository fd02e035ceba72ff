"""The modelled cost of one optimizer step of one client; never a clock."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

import fedlp_jax as fl
from fedlp_jax.accounting.macs import forward_macs
from fedlp_jax.types import Array, Batch, Normalize, Variables

_FLOAT = 4  # bytes
# An activation is written and read forward; read backward, and its gradient written and read.
_ACTIVATION_PASSES = 5
# A parameter is read forward and backward, its gradient written; the optimizer reads both and
# writes the parameter. The optimizer reads and writes each number of its state.
_PARAMETER_PASSES, _PASSES_OF_A_SLOT = 6, 2


class StepCost(NamedTuple):
    """One step of a batch. Floating-point operations: 2 for a multiply-accumulate."""

    macs: int  # of convolutions and products, one example, forward
    written: float  # operations of these: forward and both gradients, without the input's
    # Operations of the compiled step, with the lowerings of the convolutions; NaN if jax has no
    # CPU device.
    lowered: float
    activation_bytes: float  # memory traffic, if no cache held anything
    parameter_bytes: float

    @property
    def bytes(self) -> float:
        """All memory traffic."""
        return self.activation_bytes + self.parameter_bytes


def cost(
    module: nn.Module,
    optimizer: optax.GradientTransformation,
    image: tuple[int, ...],
    batch_size: int,
) -> StepCost:
    """The cost of a step.

    Args:
      module: a linen module.
      optimizer: of the client.
      image: shape of an example, stored as uint8.
      batch_size: B.
    """
    task = fl.classification(module)
    batch = _batch(image, batch_size)
    variables = jax.eval_shape(task.init, jax.random.key(0), batch)
    params = flatten_dict(variables["params"])
    size = sum(math.prod(x.shape) for x in params.values())
    state = jax.eval_shape(optimizer.init, variables["params"])
    slots = sum(math.prod(x.shape) for x in jax.tree.leaves(state)) // size
    return StepCost(
        macs=sum(_macs(task, variables, image)),
        written=written(module, image, batch_size),
        lowered=_lowered(task, optimizer, variables, state, batch),
        activation_bytes=float(_FLOAT * _ACTIVATION_PASSES * _outputs(module, variables, batch)),
        parameter_bytes=float(_FLOAT * size * (_PARAMETER_PASSES + _PASSES_OF_A_SLOT * slots)),
    )


def written(module: nn.Module, image: tuple[int, ...], batch_size: int) -> float:
    """Operations of a step as written, see `StepCost`; the arguments are those of `cost`."""
    task = fl.classification(module)
    variables = jax.eval_shape(task.init, jax.random.key(0), _batch(image, batch_size))
    macs = _macs(task, variables, image)
    return 2.0 * batch_size * (3 * sum(macs) - macs[0])


def _macs(task: fl.Task, variables: Variables, image: tuple[int, ...]) -> list[int]:
    """Of each layer's products, one example, forward, in the order computed."""
    params = flatten_dict(variables["params"])
    products = {"/".join(path[:-1]) for path in params if path[-1] == "kernel"}
    counts = forward_macs(task, variables, _batch(image, 1))
    return [count for name, count in counts.items() if name in products]


def _batch(image: tuple[int, ...], rows: int) -> Batch:
    normalize = Normalize(np.float32(1), np.float32(0))
    return Batch(jnp.zeros((rows, *image), jnp.uint8), jnp.zeros(rows, jnp.int32), None, normalize)


def _outputs(module: nn.Module, variables: Variables, batch: Batch) -> int:
    """Size of the outputs of all layers with parameters, for a batch."""
    inputs = jax.ShapeDtypeStruct(batch.inputs.shape, jnp.float32)

    def apply(variables: Variables, x: Array) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            mutable = ["batch_stats", "intermediates"]
            return module.apply(variables, x, True, capture_intermediates=True, mutable=mutable)

    shapes = flatten_dict(jax.eval_shape(apply, variables, inputs)[1]["intermediates"])
    layers = {path[:-1] for path in flatten_dict(variables["params"])}
    outputs = [calls[0] for (*path, _), calls in shapes.items() if tuple(path) in layers]
    return sum(math.prod(x.shape) for x in outputs)


def _lowered(
    task: fl.Task,
    optimizer: optax.GradientTransformation,
    variables: Variables,
    state: Any,
    batch: Batch,
) -> float:
    def step(variables: Variables, state: Any) -> Any:
        def loss(params: Any) -> Any:
            return task.loss({**variables, "params": params}, batch, jax.random.key(0))

        gradient, aux = jax.grad(loss, has_aux=True)(variables["params"])
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, variables["params"])
            return optax.apply_updates(variables["params"], updates), state, aux

    try:  # XLA's CPU backend counts operations; its GPU backend does not
        cpu = jax.devices("cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return math.nan
    with jax.default_device(cpu):
        return float(jax.jit(step).lower(variables, state).cost_analysis()["flops"])
