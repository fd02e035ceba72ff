"""compose: an algorithm from a task, submodels, masks, optimizers and an aggregator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import optax

from fedlp_jax.aggregation import means as aggregate
from fedlp_jax.aggregation import robust
from fedlp_jax.aggregation.pipeline import Combination
from fedlp_jax.aggregation.privacy import Privacy, check_clip, check_privacy
from fedlp_jax.algorithms import presets as behaviours
from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.round import Composition
from fedlp_jax.clients.local_training import LocalWork, check_work, local_steps
from fedlp_jax.errors import FedLPError, check_choice
from fedlp_jax.pruning import masks
from fedlp_jax.pruning import submodels as submodel
from fedlp_jax.pruning.layers import LayerRule
from fedlp_jax.pruning.submodels import Submodels
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import Array

Rule = aggregate.Aggregator | robust.Robust
AGGREGATORS: dict[str, Callable[..., Rule]] = {
    "masked_mean": aggregate.masked_mean,
    "cohort_mean": aggregate.cohort_mean,
    "inverse_probability": aggregate.inverse_probability,
    **robust.RULES,
}
# With privacy the divisor must be a constant; see `fedlp_jax.aggregation.privacy`.
_FIXED_DIVISOR = ("cohort_mean", "inverse_probability")


def compose(
    task: Task,
    *,
    client_optimizer: optax.GradientTransformation,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 32,
    submodels: Submodels | None = None,
    policy: masks.MaskPolicy | None = None,
    aggregator: str | Mapping[str, Any] | Rule = "masked_mean",
    clip: float | None = None,
    privacy: Privacy | None = None,
    server_optimizer: optax.GradientTransformation | None = None,
    behaviour: Literal["layerwise", "reference"] = "layerwise",
    weighting: Literal["examples", "uniform"] | None = None,
    layers: LayerRule | None = None,
    client_schedule: float | Callable[[Array], Any] | None = None,
    train_loss: Literal["examples", "batches"] | None = None,
) -> Algorithm:
    """Builds an algorithm. Every named one is a short call of this.

    A round: draw the layer masks; train every client of the cohort at its level; sum the masked,
    weighted updates; divide; step the server (`fedlp_jax.algorithms.round`).

    Args:
      task: from `fl.classification`, or your own.
      client_optimizer: any optax transform, new for each client and round.
      epochs: passes over a client's data; 1 if neither this nor `steps` is given.
      steps: optimizer steps in place of epochs.
      batch_size: B; the last batch of an epoch may be smaller.
      submodels: who holds what; default `submodel.whole()`.
      policy: which layers are sent; default `masks.full()`.
      aggregator: "masked_mean", "cohort_mean" or "inverse_probability"
        (`fedlp_jax.aggregation.means`); "median", "trimmed_mean", "krum",
        "multi_krum" or "geometric_median" (`fedlp_jax.aggregation.robust`), which need the memory
        of C models; a name with settings, as `{"name": "krum", "byzantine": 0.2}`; or your own.
      clip: largest L2 norm of what a client sends; larger updates are scaled down to it.
      privacy: `fl.Privacy(clip, noise_multiplier, delta)`: client-level differential privacy.
      server_optimizer: optax transform fed with minus the aggregate; default: add it as it is.
      behaviour: what `weighting`, `layers` and `train_loss` are where they are None: "layerwise",
        the first of the values below, or "reference", the second, as in the code of FedLP's
        authors (`docs/behaviours.md`).
      weighting: "examples" weighs clients by their number of examples, "uniform" alike.
      layers: "by_module", "by_tensor", or a mapping from regular expression to layer name.
      client_schedule: factor on the client optimizer's updates: a number, which is then an argument
        of the compiled round rather than a constant in it, or a function of the round (`i32[]`).
      train_loss: "examples" reports the mean over all examples seen, "batches" the mean over
        clients of the mean over steps of the batch's loss.

    Raises:
      FedLPError: a setting that is out of range or unknown.
    """
    if epochs is None and steps is None:
        epochs = 1
    _check_parts(task, client_optimizer, server_optimizer)
    work = check_work(LocalWork(batch_size, epochs, steps))
    preset = behaviours.named(behaviour)
    weighting = preset.weighting if weighting is None else weighting
    layers = preset.layers if layers is None else layers
    train_loss = preset.train_loss if train_loss is None else train_loss
    check_choice("weighting", weighting, ("examples", "uniform"))
    check_choice("train_loss", train_loss, ("examples", "batches"))
    combination = _combination(aggregator, clip, privacy, weighting)
    submodels = submodels or submodel.whole()
    composition = Composition(
        task,
        work,
        client_optimizer,
        submodels,
        policy or masks.full(),
        combination,
        server_optimizer or optax.sgd(1.0),
        by_examples=weighting == "examples",
        layers=layers,
        client_schedule=client_schedule,
    )
    return Algorithm(
        task,
        init=composition.init,
        round=composition.round,
        layers=layers,
        local_steps=lambda sizes: local_steps(sizes, work),
        levels=lambda variables, example: submodels.levels(task, variables, example),
        assign=lambda root, clients: submodels.assign(task, root, clients),
        persist=submodels.persist,
        shared_heads=submodels.shared_heads,
        faults=True,
        stacked=combination.stacked,
        privacy=privacy,
        train_loss=train_loss,
    )


def _combination(
    rule: str | Mapping[str, Any] | Rule,
    clip: float | None,
    privacy: Privacy | None,
    weighting: str,
) -> Combination:
    name: Any = rule
    if not isinstance(rule, aggregate.Aggregator | robust.Robust):
        settings = {"name": rule} if isinstance(rule, str) else dict(rule)
        name = settings.pop("name", None)
        check_choice("aggregator", name, tuple(AGGREGATORS))
        try:
            rule = AGGREGATORS[name](**settings)
        except TypeError as error:
            raise FedLPError(f"aggregator '{name}' does not take {settings}.") from error
    if clip is not None:
        check_clip("clip", clip)
    if privacy is not None:
        check_privacy(privacy)
        if name not in _FIXED_DIVISOR or weighting != "uniform" or clip is not None:
            raise FedLPError(
                "privacy needs aggregator='cohort_mean' or 'inverse_probability', "
                "weighting='uniform' and no other clip: only then one client changes the result by "
                f"a known amount (got {name!r}, {weighting!r}, clip={clip})."
            )
    return Combination(rule, clip, privacy, rescaled=name == "inverse_probability")


def _check_parts(task: Any, client_optimizer: Any, server_optimizer: Any) -> None:
    if not isinstance(task, Task):
        raise FedLPError(
            f"task is a {type(task).__name__}; wrap a model as fl.classification(model)."
        )
    for name, optimizer in (("client", client_optimizer), ("server", server_optimizer)):
        if optimizer is None and name == "server":
            continue
        if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            raise FedLPError(
                f"{name}_optimizer={optimizer!r} is no optax transform; give one such as "
                "optax.sgd(0.1)."
            )
