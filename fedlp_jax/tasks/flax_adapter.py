"""A flax module, linen or nnx, as two pure functions of a dict of variables.

Any module's convolutions and dense layers take this package's lowering, its batch normalisations
leave padding rows out, and it is switched between training and evaluation by the usual names. The
user's module object stays as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
from flax import nnx

from fedlp_jax.errors import FedLPError, warner
from fedlp_jax.nn import flax as lowered
from fedlp_jax.nn.batch_norm import BatchNorm
from fedlp_jax.tasks.padding import SCOPE, mixes_rows, row_mask
from fedlp_jax.types import Array, Variables

_TRAIN = ("train", "training", "is_training")  # switches that are True while training
_EVALUATE = ("deterministic", "use_running_average", "inference")  # and False while training


_IDLE = (
    "the model has batch statistics or dropout but uses neither in training; switch it by an "
    f"argument of __call__ named {' or '.join(_TRAIN + _EVALUATE)}. (If that is on purpose, ignore "
    "this.)"
)
_MIXING = (
    "the model may combine rows of a batch outside of BatchNorm, and some batches are padded, so "
    "padding rows may enter; choose a batch_size that divides the number of examples of every "
    "client, or compute each row by itself."
)
_STATISTICS = "batch_stats"


class Apply(Protocol):
    """A network as a function of its variables."""

    def __call__(
        self, variables: Variables, inputs: Array, key: Array | None, valid: Array | None
    ) -> tuple[Any, Variables]:
        """Runs the network.

        Args:
          variables: as `init` returns them.
          inputs: `f32[B, ...]`, normalised.
          key: trains, with dropout by this key; None = evaluates.
          valid: `bool[B]`, rows that may enter batch statistics; None = all.

        Returns:
          `(outputs, statistics)`: the updated collections other than "params".
        """


class Network(NamedTuple):
    """A model as pure functions."""

    init: Callable[[Array, Array], Variables]  # (key, inputs f32[B, ...]) -> variables
    apply: Apply
    at_depth: Callable[[int], Network] | None = None
    depth: int = 1  # number of submodels, depths 1 to `depth`; the deepest is the whole model
    at_width: Callable[[float], Network] | None = None  # rate -> the network with fewer channels


# As `Apply`, and sentences to say if this is training.
_Run = Callable[
    [Variables, Array, "Array | None", "Array | None"], tuple[Any, Variables, list[str]]
]


def network(module: Any) -> Network:
    """The network of a flax linen module, an nnx module, or a function `rngs -> nnx module`.

    An argument of `__call__` switches training on or off if it is called `train`, `training`,
    `is_training`, or `deterministic`, `use_running_average`, `inference`. Without one, a linen
    module's field of such a name does, and in nnx all attributes of those names. A model that has
    batch statistics or dropout and uses neither in training costs a warning.

    A linen module with an integer field `depth` offers submodels: `module.clone(depth=c)` for c
    from 1 to `depth`. Sub-modules that depths share have the same names in all of them.

    One with a float field `width_rate` offers narrower networks: `module.clone(width_rate=r)` has
    `ceil(r x channels)` channels in its hidden layers, under the same names, and the same inputs
    and outputs.

    An nnx instance brings its initial parameters. A class or function of `rngs` gets the run's key,
    so that its initial model follows the seed. `nnx.Param`s are trained, `nnx.BatchStat`s are
    statistics, and other variables stay constant.

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


def _with_warnings(run: _Run) -> Apply:
    """Says what is assumed of a model: of its training switch, padding and variables."""
    warn = warner()
    mixing: bool | None = None

    def apply(
        variables: Variables, inputs: Array, key: Array | None, valid: Array | None
    ) -> tuple[Any, Variables]:
        nonlocal mixing
        outputs, statistics, sentences = run(variables, inputs, key, valid)
        if key is None:
            return outputs, statistics
        if _unchanged(variables, statistics):
            sentences.append(_IDLE)
        if valid is not None:
            if mixing is None:
                rest = (variables, key)
                mixing = mixes_rows(lambda r, x, v: run(r[0], x, r[1], v)[:2], rest, inputs, valid)
            if mixing:
                sentences.append(_MIXING)
        for sentence in dict.fromkeys(sentences):
            warn(sentence)
        return outputs, statistics

    return apply


def _unchanged(variables: Variables, statistics: Variables) -> bool:
    """Whether there are batch statistics, and a step returned the very same arrays."""
    before = jax.tree.leaves({name: variables[name] for name in statistics})
    after = jax.tree.leaves(statistics)
    same = len(before) == len(after) and all(map(operator.is_, before, after))
    return bool(before) and same


def _any_promotion() -> contextlib.AbstractContextManager[Any]:
    """Allows flax's own layers to mix dtypes in a process with strict promotion."""
    return jax.numpy_dtype_promotion("standard")


def _switches(names: Any) -> Callable[[bool], dict[str, Any]]:
    """`train -> {name: value}` for those of these names that are switches."""
    return lambda train: {
        **{name: train for name in _TRAIN if name in names},
        **{name: not train for name in _EVALUATE if name in names},
    }


# --- linen ----------------------------------------------------------------------------------


def _linen(module: nn.Module) -> Network:
    arguments = _switches(inspect.signature(type(module).__call__).parameters)
    fields = _switches(())
    if not arguments(True):
        values = {field.name: getattr(module, field.name) for field in dataclasses.fields(module)}
        fields = _switches([n for n, v in values.items() if v is None or isinstance(v, bool)])

    def switched(train: bool) -> nn.Module:
        return module.clone(**fields(train)) if fields(train) else module

    def init(key: Array, inputs: Array) -> Variables:
        with _any_promotion(), nn.intercept_methods(lowered.interceptor):
            rngs = {"params": key, "dropout": key}
            return dict(switched(False).init(rngs, inputs, **arguments(False)))

    def run(
        variables: Variables, inputs: Array, key: Array | None, valid: Array | None
    ) -> tuple[Any, Variables, list[str]]:
        train = key is not None
        statistics = [name for name in variables if name != "params"]
        dropouts: list[bool] = []
        with (
            _any_promotion(),
            nn.intercept_methods(_layer_interceptor(valid, dropouts)),
            nn.intercept_methods(lowered.interceptor),
        ):
            outputs, updated = switched(train).apply(
                variables,
                inputs,
                rngs={} if key is None else _streams(key),
                mutable=statistics if train else [],
                **arguments(train),
            )
        sentences = [_IDLE] if dropouts and not any(dropouts) else []
        # A collection that this call did not touch stays as it was.
        kept = {name: updated.get(name, variables[name]) for name in statistics}
        sentences += [
            f"the model's collection '{name}' is taken for batch statistics: updated in training "
            f"and averaged over clients. Call it {_STATISTICS} if it is that, or keep it out of "
            "the model's variables."
            for name in statistics
            if name != _STATISTICS
            and len(jax.tree.leaves(kept[name])) == len(jax.tree.leaves(variables[name]))
        ]
        return outputs, kept, sentences

    depth = getattr(module, "depth", None)
    found = Network(init, _with_warnings(run))
    if isinstance(depth, int) and not isinstance(depth, bool):
        found = found._replace(at_depth=lambda d: _linen(module.clone(depth=d)), depth=depth)
    rate = getattr(module, "width_rate", None)
    if isinstance(rate, float | int) and not isinstance(rate, bool):
        found = found._replace(at_width=lambda r: _linen(module.clone(width_rate=r * rate)))
    return found


def _streams(key: Array) -> dict[str, Array]:
    """Random streams; flax falls back on "params" for a stream of another name."""
    return {"dropout": key, "params": jax.random.fold_in(key, 1)}


def _layer_interceptor(valid: Array | None, dropouts: list[bool]) -> Callable[..., Any]:
    """Masks padding rows in every BatchNorm; notes for every Dropout whether it drops."""

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        if isinstance(module, nn.Dropout) and module.rate > 0:
            given = args[1] if len(args) > 1 else kwargs.get("deterministic")
            dropouts.append(not (module.deterministic if given is None else given))
        elif isinstance(module, nn.BatchNorm | BatchNorm) and valid is not None:
            # A derived class may lack the argument; the inherited method has it.
            takes_mask = "mask" in inspect.signature(context.orig_method.func).parameters
            if takes_mask and kwargs.get("mask") is None:
                mask = row_mask(args[0] if args else kwargs["x"], valid)
                with jax.named_scope(SCOPE):
                    return next_fun(*args, **{**kwargs, "mask": mask})
        return next_fun(*args, **kwargs)

    return intercept


# --- nnx ------------------------------------------------------------------------------------

_KNOWN = (nnx.Param, nnx.BatchStat, nnx.RngState, nnx.Intermediate)


def _nnx(module: nnx.Module) -> Network:
    masked = nnx.recursive_map(_with_mask, lowered.inject(module))
    parts: Any = nnx.split(masked, nnx.Param, nnx.BatchStat, ...)
    graph, params, statistics, rest = parts
    arguments = _switches(inspect.signature(type(module).__call__).parameters)
    variables = {"params": nnx.to_pure_dict(params)}
    if statistics:
        variables[_STATISTICS] = nnx.to_pure_dict(statistics)

    def run(
        variables: Variables, inputs: Array, key: Array | None, valid: Array | None
    ) -> tuple[Any, Variables, list[str]]:
        params_now, statistics_now = jax.tree.map(lambda x: x, (params, statistics))
        nnx.replace_by_pure_dict(params_now, variables["params"])
        if statistics:
            nnx.replace_by_pure_dict(statistics_now, variables[_STATISTICS])
        model = nnx.merge(graph, params_now, statistics_now, rest, copy=True)
        _set_mode(model, key is not None, valid)
        streams = [] if key is None else _reseed(model, key)
        counts = [stream.count.get_value() for stream in streams]
        others = _other_variables(model)
        with _any_promotion():
            outputs = model(inputs, **arguments(key is not None))
        used = [s.count.get_value() is not c for s, c in zip(streams, counts, strict=True)]
        sentences = [_IDLE] if used and not any(used) else []
        sentences += [
            f"the model changes its {type(variable).__name__} '{path}' in training, but between "
            "steps only nnx.Param and nnx.BatchStat are kept; derive it from nnx.BatchStat to keep "
            "it, and average it over clients."
            for path, (variable, value) in others.items()
            if variable.get_value() is not value
        ]
        updated = {}
        if statistics:
            updated[_STATISTICS] = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        return outputs, updated, sentences

    return Network(lambda key, inputs: variables, _with_warnings(run))


def _other_variables(model: nnx.Module) -> dict[str, tuple[Any, Any]]:
    """Path -> variable and its value, of those that a run neither trains nor averages."""
    return {
        ".".join(map(str, path)): (node, node.get_value())
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable) and not isinstance(node, _KNOWN)
    }


def _nnx_factory(make: Callable[..., nnx.Module]) -> Network:
    # Only the structure of this instance matters; no run uses its random numbers.
    abstract = _nnx(make(rngs=nnx.Rngs(0)))

    def init(key: Array, inputs: Array) -> Variables:
        return _nnx(make(rngs=nnx.Rngs(key))).init(key, inputs)

    return Network(init, abstract.apply)


def _with_mask(path: Any, part: Any) -> Any:
    """The same part, of a class that masks padding rows if it is a BatchNorm."""
    del path
    if not isinstance(part, nnx.BatchNorm):
        return part
    masked = object.__new__(_masked(type(part)))
    vars(masked).update(vars(part))
    return masked


@functools.cache
def _masked(kind: type[nnx.BatchNorm]) -> type[nnx.BatchNorm]:
    """The class, with padding rows left out by default; unchanged if it takes no `mask`."""
    if "mask" not in inspect.signature(kind.__call__).parameters:
        return kind

    class Masked(kind):  # type: ignore[misc, valid-type]
        valid: Array | None = None

        def __call__(self, x: Array, *args: Any, mask: Array | None = None, **kwargs: Any) -> Any:
            if mask is not None or self.valid is None:
                return super().__call__(x, *args, mask=mask, **kwargs)
            with jax.named_scope(SCOPE):
                return super().__call__(x, *args, mask=row_mask(x, self.valid), **kwargs)

    Masked.__name__, Masked.__qualname__ = kind.__name__, kind.__qualname__
    return Masked


def _set_mode(model: nnx.Module, train: bool, valid: Array | None) -> None:
    """Switches a model, which only this call uses, and hands it the valid rows."""
    # Of the class, since a module may have an attribute `train`.
    (nnx.Module.train if train else nnx.Module.eval)(model)
    for _, part in nnx.iter_modules(model):
        for name, value in _switches(vars(part))(train).items():
            if isinstance(getattr(part, name), bool):
                setattr(part, name, value)
        if valid is not None and isinstance(part, nnx.BatchNorm) and hasattr(part, "valid"):
            part.valid = nnx.data(valid)


def _reseed(model: nnx.Module, key: Array) -> list[nnx.RngStream]:
    """Derives a key for every random stream of the model; returns the streams of its Dropouts."""
    streams = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.RngStream)]
    for i, stream in enumerate(streams):
        stream.key.set_value(jax.random.fold_in(key, i))
        stream.count.set_value(jax.numpy.zeros((), jax.numpy.uint32))
    dropouts = [part for _, part in nnx.iter_modules(model) if isinstance(part, nnx.Dropout)]
    return [d.rngs for d in dropouts if d.rate > 0 and isinstance(d.rngs, nnx.RngStream)]
