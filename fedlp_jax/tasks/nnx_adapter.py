"""A flax nnx module as a `Network`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from fedlp_jax.nn import nnx_layers
from fedlp_jax.tasks.network import (
    IDLE,
    STATISTICS,
    Network,
    any_promotion,
    switches,
    with_warnings,
)
from fedlp_jax.tasks.padding import SCOPE, row_mask
from fedlp_jax.types import Array, Variables

_KNOWN = (nnx.Param, nnx.BatchStat, nnx.RngState, nnx.Intermediate)


def nnx_network(module: nnx.Module) -> Network:
    """The network of a module; see `fedlp_jax.tasks.flax_adapter.network`."""
    masked = nnx.recursive_map(_with_mask, nnx_layers.inject(module))
    parts: Any = nnx.split(masked, nnx.Param, nnx.BatchStat, ...)
    graph, params, statistics, rest = parts
    arguments = switches(inspect.signature(type(module).__call__).parameters)
    variables = {"params": nnx.to_pure_dict(params)}
    if statistics:
        variables[STATISTICS] = nnx.to_pure_dict(statistics)

    def run(
        variables: Variables, inputs: Array, key: Array | None, valid: Array | None
    ) -> tuple[Any, Variables, list[str]]:
        params_now, statistics_now = jax.tree.map(lambda x: x, (params, statistics))
        nnx.replace_by_pure_dict(params_now, variables["params"])
        if statistics:
            nnx.replace_by_pure_dict(statistics_now, variables[STATISTICS])
        model = nnx.merge(graph, params_now, statistics_now, rest, copy=True)
        _set_mode(model, key is not None, valid)
        streams = [] if key is None else _reseed(model, key)
        counts = [stream.count.get_value() for stream in streams]
        others = _other_variables(model)
        with any_promotion():
            outputs = model(inputs, **arguments(key is not None))
        used = [s.count.get_value() is not c for s, c in zip(streams, counts, strict=True)]
        sentences = [IDLE] if used and not any(used) else []
        sentences += [
            f"the model changes its {type(variable).__name__} '{path}' in training, but between "
            "steps only nnx.Param and nnx.BatchStat are kept; derive it from nnx.BatchStat to keep "
            "it, and average it over clients."
            for path, (variable, value) in others.items()
            if variable.get_value() is not value
        ]
        updated = {}
        if statistics:
            updated[STATISTICS] = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        return outputs, updated, sentences

    return Network(lambda key, inputs: variables, with_warnings(run))


def _other_variables(model: nnx.Module) -> dict[str, tuple[Any, Any]]:
    """Path -> variable and its value, of those that a run neither trains nor averages."""
    return {
        ".".join(map(str, path)): (node, node.get_value())
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable) and not isinstance(node, _KNOWN)
    }


def factory_network(make: Callable[..., nnx.Module]) -> Network:
    """The network of the modules that a function of `rngs` makes."""
    # Only the structure of this instance matters; no run uses its random numbers.
    abstract = nnx_network(make(rngs=nnx.Rngs(0)))

    def init(key: Array, inputs: Array) -> Variables:
        return nnx_network(make(rngs=nnx.Rngs(key))).init(key, inputs)

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
        for name, value in switches(vars(part))(train).items():
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
