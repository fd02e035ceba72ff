"""A flax linen module as a `Network`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from fedlp_jax.nn import linen_layers
from fedlp_jax.nn.batch_norm import BatchNorm
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


def linen_network(module: nn.Module) -> Network:
    """The network of a module; see `fedlp_jax.tasks.flax_adapter.network`."""
    arguments = switches(inspect.signature(type(module).__call__).parameters)
    fields = switches(())
    if not arguments(True):
        values = {field.name: getattr(module, field.name) for field in dataclasses.fields(module)}
        fields = switches([n for n, v in values.items() if v is None or isinstance(v, bool)])

    def switched(train: bool) -> nn.Module:
        return module.clone(**fields(train)) if fields(train) else module

    def init(key: Array, inputs: Array) -> Variables:
        with any_promotion(), nn.intercept_methods(linen_layers.interceptor):
            rngs = {"params": key, "dropout": key}
            return dict(switched(False).init(rngs, inputs, **arguments(False)))

    def run(
        variables: Variables, inputs: Array, key: Array | None, valid: Array | None
    ) -> tuple[Any, Variables, list[str]]:
        train = key is not None
        statistics = [name for name in variables if name != "params"]
        dropouts: list[bool] = []
        with (
            any_promotion(),
            nn.intercept_methods(_layer_interceptor(valid, dropouts)),
            nn.intercept_methods(linen_layers.interceptor),
        ):
            outputs, updated = switched(train).apply(
                variables,
                inputs,
                rngs={} if key is None else _streams(key),
                mutable=statistics if train else [],
                **arguments(train),
            )
        sentences = [IDLE] if dropouts and not any(dropouts) else []
        # A collection that this call did not touch stays as it was.
        kept = {name: updated.get(name, variables[name]) for name in statistics}
        sentences += [
            f"the model's collection '{name}' is taken for batch statistics: updated in training "
            f"and averaged over clients. Call it {STATISTICS} if it is that, or keep it out of "
            "the model's variables."
            for name in statistics
            if name != STATISTICS
            and len(jax.tree.leaves(kept[name])) == len(jax.tree.leaves(variables[name]))
        ]
        return outputs, kept, sentences

    depth = getattr(module, "depth", None)
    if depth is None and hasattr(module, "depth"):
        depth = getattr(module, "deepest", None)
    found = Network(init, with_warnings(run))
    if isinstance(depth, int) and not isinstance(depth, bool):
        found = found._replace(at_depth=lambda d: linen_network(module.clone(depth=d)), depth=depth)
    rate = getattr(module, "width_rate", None)
    if isinstance(rate, float | int) and not isinstance(rate, bool):
        found = found._replace(at_width=lambda r: linen_network(module.clone(width_rate=r * rate)))
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
