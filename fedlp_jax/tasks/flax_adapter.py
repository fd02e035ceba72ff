"""A flax module, linen or nnx -> two pure functions on a dict of variables.

Three things are done to a user's module without its author's help: convolutions and dense layers
take this package's lowering, rows that pad a batch stay out of batch normalisation, and the switch
between training and evaluation is found by its usual names.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
from flax import nnx

from fedlp_jax.errors import FedLPError
from fedlp_jax.nn import batch_norm as norm
from fedlp_jax.nn import conv, dense
from fedlp_jax.types import Array, Variables


class Apply(Protocol):
    """A network as a function of its variables."""

    def __call__(
        self, variables: Variables, inputs: Array, key: Array | None, valid: Array | None
    ) -> tuple[Array, Variables]:
        """Runs the network.

        Args:
          variables: as `init` made them.
          inputs: `f32[B, ...]`, normalised.
          key: for dropout, and the sign to train; None = evaluate.
          valid: `bool[B]` rows that may enter batch statistics; None = all.

        Returns:
          `(outputs, statistics)`: the updated collections other than "params".
        """


class Network(NamedTuple):
    """A model as pure functions."""

    init: Callable[[Array, Array], Variables]  # (key, inputs f32[B, ...]) -> variables
    apply: Apply
    at_depth: Callable[[int], Network] | None = None
    depth: int = 1  # submodels it offers: depths 1 to `depth`, the last is the whole


def network(module: Any) -> Network:
    """The network of a flax linen module, an nnx module, or a function `rngs -> nnx module`.

    A linen module with an integer field `depth` offers submodels: `module.clone(depth=c)` for c
    from 1 to `depth`. Sub-modules that depths share have the same names in all of them.

    An nnx instance carries its own initial parameters; a class or function of `rngs` is called
    with the run's key, so that its initial model follows the seed. Its `nnx.Param` are trained and
    its `nnx.BatchStat` are statistics; other variables stay as they were made.

    Raises:
      FedLPError: the object is neither.
    """
    if isinstance(module, nn.Module):
        return _linen(module)
    if isinstance(module, nnx.Module):
        return _nnx(module)
    # The signature of an nnx class is that of its metaclass; its own is at `__init__`.
    maker = module.__init__ if inspect.isclass(module) else module
    if callable(module) and "rngs" in inspect.signature(maker).parameters:
        return _nnx_factory(module)
    raise FedLPError(
        f"a model must be a flax linen module, an nnx module or a function of `rngs` that returns "
        f"one, not {type(module).__name__}."
    )


def _any_promotion() -> contextlib.AbstractContextManager[Any]:
    """Flax's own layers mix dtypes, which a process with strict promotion would refuse."""
    return jax.numpy_dtype_promotion("standard")


# --- rows that pad a batch ------------------------------------------------------------------

_valid_rows: contextvars.ContextVar[Array | None] = contextvars.ContextVar("valid", default=None)


@contextlib.contextmanager
def _rows(valid: Array | None) -> Iterator[None]:
    token = _valid_rows.set(valid)
    try:
        yield
    finally:
        _valid_rows.reset(token)


def _row_mask(x: Array) -> Array | None:
    """The current row mask, shaped to broadcast against `x: [B, ...]`."""
    valid = _valid_rows.get()
    if valid is None:
        return None
    if x.shape[0] != valid.shape[0]:
        raise FedLPError(
            f"a BatchNorm got {x.shape[0]} rows in a batch of {valid.shape[0]}: with clients whose "
            "number of examples is no multiple of batch_size, padding rows must be kept out of its "
            "statistics. Keep the batch axis first, or choose a batch_size that divides evenly."
        )
    return valid.reshape(valid.shape + (1,) * (x.ndim - 1))


def _mask_batch_norm(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
    is_norm = isinstance(context.module, nn.BatchNorm | norm.BatchNorm)
    if is_norm and context.method_name == "__call__" and kwargs.get("mask") is None:
        kwargs = {**kwargs, "mask": _row_mask(args[0])}
    return next_fun(*args, **kwargs)


class _RowMaskedBatchNorm(nnx.BatchNorm):
    """nnx.BatchNorm that leaves out the rows that pad a batch."""

    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        return super().__call__(x, use_running_average, mask=_row_mask(x) if mask is None else mask)


# --- linen ----------------------------------------------------------------------------------


def _linen(module: nn.Module) -> Network:
    mode = _mode_arguments(type(module).__call__)

    def init(key: Array, inputs: Array) -> Variables:
        with _any_promotion(), nn.intercept_methods(conv.conv_interceptor):
            return dict(module.init({"params": key, "dropout": key}, inputs, **mode(False)))

    def apply(
        variables: Variables, inputs: Array, key: Array | None, valid: Array | None
    ) -> tuple[Array, Variables]:
        train = key is not None
        statistics = [name for name in variables if name != "params"]
        with (
            _any_promotion(),
            _rows(valid),
            nn.intercept_methods(conv.conv_interceptor),
            nn.intercept_methods(dense.dense_interceptor),
            nn.intercept_methods(_mask_batch_norm),
        ):
            outputs, updated = module.apply(
                variables,
                inputs,
                rngs={} if key is None else _streams(key),
                mutable=statistics if train else [],
                **mode(train),
            )
        # A collection that this call did not touch stays as it was.
        return outputs, {name: updated.get(name, variables[name]) for name in statistics}

    depth = getattr(module, "depth", None)
    if not isinstance(depth, int) or isinstance(depth, bool):
        return Network(init, apply)
    return Network(init, apply, lambda d: _linen(module.clone(depth=d)), depth)


def _streams(key: Array) -> dict[str, Array]:
    """Streams of random numbers: flax takes "params" for those of any other name."""
    return {"dropout": key, "params": jax.random.fold_in(key, 1)}


def _mode_arguments(call: Callable[..., Any]) -> Callable[[bool], dict[str, Any]]:
    """Finds how a module is told to train: `train`, `training`, or their opposites."""
    names = inspect.signature(call).parameters
    positive = [name for name in ("train", "training") if name in names]
    negative = [name for name in ("deterministic", "use_running_average") if name in names]
    return lambda train: {**dict.fromkeys(positive, train), **dict.fromkeys(negative, not train)}


# --- nnx ------------------------------------------------------------------------------------

_STATISTICS = "batch_stats"


def _nnx(module: nnx.Module) -> Network:
    graph, params, statistics, rest = _split_nnx(module)
    variables = {"params": nnx.to_pure_dict(params)}
    if statistics:
        variables[_STATISTICS] = nnx.to_pure_dict(statistics)

    def apply(
        variables: Variables, inputs: Array, key: Array | None, valid: Array | None
    ) -> tuple[Array, Variables]:
        params_now, statistics_now = jax.tree.map(lambda x: x, (params, statistics))
        nnx.replace_by_pure_dict(params_now, variables["params"])
        if statistics:
            nnx.replace_by_pure_dict(statistics_now, variables[_STATISTICS])
        model = nnx.merge(graph, params_now, statistics_now, rest, copy=True)
        if key is None:
            model.eval()
        else:
            model.train()
            _reseed(model, key)
        with _any_promotion(), _rows(valid):
            outputs = model(inputs)
        if not statistics:
            return outputs, {}
        return outputs, {_STATISTICS: nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))}

    return Network(lambda key, inputs: variables, apply)


def _nnx_factory(make: Callable[..., nnx.Module]) -> Network:
    # Only the structure of this instance is used; its random numbers never reach a run.
    abstract = _nnx(make(rngs=nnx.Rngs(0)))

    def init(key: Array, inputs: Array) -> Variables:
        return _nnx(make(rngs=nnx.Rngs(key))).init(key, inputs)

    return Network(init, abstract.apply)


def _split_nnx(module: nnx.Module) -> tuple[Any, Any, Any, Any]:
    model = conv.inject(module)
    dense.inject(model)
    for _, part in nnx.iter_modules(model):
        if type(part) is nnx.BatchNorm:
            object.__setattr__(part, "__class__", _RowMaskedBatchNorm)
    parts: Any = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    return parts


def _reseed(model: nnx.Module, key: Array) -> None:
    """Gives every random stream of the model a key of its own for this step."""
    streams = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.RngStream)]
    for i, stream in enumerate(streams):
        stream.key.set_value(jax.random.fold_in(key, i))
        stream.count.set_value(jax.numpy.zeros((), jax.numpy.uint32))
