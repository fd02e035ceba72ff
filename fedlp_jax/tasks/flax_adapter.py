"""A flax module, linen or nnx, as two pure functions of a dict of variables.

Any module's convolutions and dense layers take this package's lowering, its batch normalisations
leave padding rows out, and it is switched between training and evaluation by the usual names. The
user's module object stays as it is.
"""

from __future__ import annotations

import inspect
from typing import Any

import flax.linen as nn

from fedlp_jax.errors import FedLPError
from fedlp_jax.tasks.linen_adapter import linen_network
from fedlp_jax.tasks.network import Network


def network(module: Any) -> Network:
    """The network of a flax linen module, an nnx module, or a function `rngs -> nnx module`.

    An argument of `__call__` switches training on or off if it is called `train`, `training`,
    `is_training`, or `deterministic`, `use_running_average`, `inference`. Without one, a linen
    module's field of such a name does, and in nnx all attributes of those names. A model that has
    batch statistics or dropout and uses neither in training costs a warning.

    A linen module with an integer field `depth` offers submodels: `module.clone(depth=c)` for c
    from 1 to `depth`, or to its property `deepest` if the field is None. Sub-modules that depths
    share have the same names in all of them.

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
        return linen_network(module)
    # Whoever uses nnx has imported it; others need not wait for it.
    from flax import nnx

    from fedlp_jax.tasks.nnx_adapter import factory_network, nnx_network

    if isinstance(module, nnx.Module):
        return nnx_network(module)
    # The signature of an nnx class is that of its metaclass; its own is at `__init__`.
    maker = module.__init__ if inspect.isclass(module) else module
    if callable(module) and "rngs" in inspect.signature(maker).parameters:
        return factory_network(module)
    raise FedLPError(
        f"a model must be a flax linen module, an nnx module or a function of `rngs` that returns "
        f"one, not {type(module).__name__}."
    )
