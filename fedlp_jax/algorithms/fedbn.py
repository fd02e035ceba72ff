"""FedBN: normalisations that stay with their clients (Li et al., ICLR 2021, arXiv:2102.07623).

Clients whose inputs differ have other means and variances in each layer, which an average of batch
statistics mixes up. A client therefore keeps scale, bias and statistics of every normalisation, and
all other variables are averaged as in FedAvg:

    x' = x + sum a_k (x_k - x) / sum a_k               without what a normalisation holds

A client that has not taken part yet is tested with normalisations as they were first drawn.
"""

from __future__ import annotations

from typing import Any

import jax
import optax
from flax.traverse_util import flatten_dict

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.errors import FedLPError
from fedlp_jax.pruning import masks
from fedlp_jax.pruning import submodels as submodel
from fedlp_jax.pruning.layers import path_pattern
from fedlp_jax.pruning.submodels import Submodels
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import Array, Batch, Variables

# Of the module that holds the variable itself, or the list that this module is in: a block such as
# PreNorm_0 holds other layers too.
_NORM = r"(?i)(norm|(?<![a-z])bn)[^/]*(/\d+)*/[^/]*$"


def fedbn(
    task: Task,
    *,
    client_optimizer: optax.GradientTransformation,
    norm: str = _NORM,
    keep: masks.Keep = 1.0,
    submodels: Submodels | None = None,
    **settings: Any,
) -> Algorithm:
    """FedBN: clients share all but their normalisations.

    Neither parameters nor statistics of a normalisation travel. Runs report
    `test_accuracy_personal`, see `fl.submodel.personal`.

    Args:
      task: what is learnt.
      client_optimizer: any optax transform.
      norm: a regular expression for the variables of normalisations, searched in their paths
        ("conv1/norm/scale"). The default finds what lies directly in a module with "norm" in its
        name, as flax and the models of this package name them, or with a part "bn", such as
        "fc2_bn" or "bn1".
      keep: the probability with which a layer is sent, as in `fedlp_homo`.
      submodels: which part of the model each client holds; None = the whole.
      **settings: as in `compose` (epochs, batch_size, server_optimizer, ...).

    Raises:
      FedLPError: (before anything compiles) a model without normalisation, batch statistics that
        `norm` does not find, or a matrix or convolution that it finds.
    """
    scheme = submodels or submodel.whole()
    kept, pattern = submodel.personal(norm, scheme), path_pattern(norm)

    def init(task: Task, key: Array, example: Batch) -> Variables:
        shapes = jax.eval_shape(lambda: scheme.init(task, key, example))
        params, statistics = (
            {"/".join(map(str, path)): x for path, x in flatten_dict(shapes.get(name, {})).items()}
            for name in ("params", "batch_stats")
        )
        missed = [path for path in statistics if not pattern.search(path)]
        if missed:
            raise FedLPError(
                f"fedbn keeps normalisations with clients, but {norm!r} does not find the batch "
                f"statistics {', '.join(missed)}; name them in norm."
            )
        found = [path for path in params if pattern.search(path)]
        if not found:
            raise FedLPError(
                f"fedbn keeps normalisations with clients, but the model has none: {norm!r} is "
                f"found in no path of its parameters, which are {', '.join(params)}; name them "
                "in norm, give a model with normalisation, or use fl.fedavg."
            )
        # Scales and biases have two dimensions in a norm over two axes, or of scanned layers.
        weights = [
            path
            for path in found
            if params[path].ndim > 1 and path.rpartition("/")[2] not in ("scale", "bias")
        ]
        if weights:
            raise FedLPError(
                f"fedbn keeps normalisations with clients, but {norm!r} also finds "
                f"{', '.join(weights)} with two dimensions or more; name normalisations alone in "
                "norm, or use fl.fedper(head=...) to keep other layers as well."
            )
        return kept.init(task, key, example)

    return compose(
        task,
        client_optimizer=client_optimizer,
        submodels=kept._replace(init=init),
        policy=masks.bernoulli(keep),
        **settings,
    )
