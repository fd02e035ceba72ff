"""compose: an algorithm from a task, submodels, a mask policy, optimizers and an aggregator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import optax

from fedlp_jax.aggregation import means, robust
from fedlp_jax.aggregation.pipeline import UpdatePipeline
from fedlp_jax.aggregation.privacy import Privacy, check_clip, check_privacy
from fedlp_jax.aggregation.reducer import Reducer
from fedlp_jax.aggregation.server import ServerRule
from fedlp_jax.aggregation.uploads import Upload, chain
from fedlp_jax.algorithms import presets
from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.client_round import Parts
from fedlp_jax.algorithms.round import client_states, initial_state, run_round
from fedlp_jax.clients.asynchrony import Asynchrony
from fedlp_jax.clients.local_training import (
    LocalTraining,
    LocalWork,
    check_work,
    examples_seen,
    local_steps,
)
from fedlp_jax.clients.optimizers import check_optimizer, warn_of_restarts
from fedlp_jax.clients.sgd import check_same_sgd
from fedlp_jax.errors import FedLPError, check_choice, shown
from fedlp_jax.pruning import masks
from fedlp_jax.pruning import submodels as submodel
from fedlp_jax.pruning.layers import LayerRule
from fedlp_jax.pruning.submodels import Submodels
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import Array, Variables

AGGREGATORS: dict[str, Callable[..., Reducer]] = {
    "masked_mean": means.masked_mean,
    "cohort_mean": means.cohort_mean,
    "inverse_probability": means.inverse_probability,
    **robust.RULES,
}


def compose(
    task: Task,
    *,
    client_optimizer: optax.GradientTransformation,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 32,
    submodels: Submodels | None = None,
    personal: str | None = None,
    policy: masks.MaskPolicy | None = None,
    aggregator: str | Mapping[str, Any] | Reducer = "masked_mean",
    clip: float | None = None,
    privacy: Privacy | None = None,
    server_optimizer: optax.GradientTransformation | None = None,
    behaviour: Literal["layerwise", "reference"] = "layerwise",
    weighting: Literal["examples", "uniform"] | None = None,
    layers: LayerRule | None = None,
    client_schedule: float | Callable[[Array], Any] | None = None,
    train_loss: Literal["examples", "batches"] | None = None,
    local_training: LocalTraining | None = None,
    server_rule: ServerRule | None = None,
    upload: Upload | Sequence[Upload] | None = None,
    asynchrony: Asynchrony | None = None,
    own_classes: bool = False,
) -> Algorithm:
    """Builds an algorithm. Every named one is a short call of this.

    A round draws the layer masks, trains every client of the cohort at its level, sums the masked
    and weighted updates, divides, and steps the server (`fedlp_jax.algorithms.round`).

    Args:
      task: from `fl.classification`, or your own.
      client_optimizer: any optax transform; its state is reset for each client and round.
      epochs: passes over a client's data; 1 if neither this nor `steps` is given.
      steps: optimizer steps instead of epochs.
      batch_size: B; the last batch of an epoch may be smaller.
      submodels: which part of the model each client holds; default `submodel.whole()`.
      personal: a regular expression for the variables that clients keep for themselves, such as
        "fc2" (`submodel.personal`); None = they share all.
      policy: which layers are sent; default `masks.full()`.
      aggregator: "masked_mean", "cohort_mean" or "inverse_probability"
        (`fedlp_jax.aggregation.means`); "median", "trimmed_mean", "krum",
        "multi_krum" or "geometric_median" (`fedlp_jax.aggregation.robust`), which need the memory
        of C models; a name with settings, as `{"name": "krum", "byzantine": 0.2}`; or a `Reducer`.
      clip: largest L2 norm of an upload; larger updates are scaled down to it.
      privacy: `fl.Privacy(clip, noise_multiplier, delta)`: client-level differential privacy.
      server_optimizer: optax transform that takes minus the aggregate as its gradient; by default
        the aggregate is added as it is.
      behaviour: the preset for `weighting`, `layers` and `train_loss` where they are None:
        "layerwise", the first value listed for each, or "reference", the second, as in the code of
        FedLP's authors (`docs/behaviours.md`).
      weighting: a_k: "examples" = the client's number of examples, "uniform" = 1.
      layers: what is kept or pruned as one: "by_module", "by_tensor", or a mapping from regular
        expression to layer name.
      client_schedule: factor on the client optimizer's updates: a number, which is then an argument
        of the compiled round and not a constant in it, or a function of the round (`i32[]`) in
        which the client began.
      train_loss: "examples" reports the mean over all examples seen; "batches" the mean over
        clients of the mean over steps of the batch's loss.
      local_training: what the algorithm changes of a client's training; None = nothing.
      server_rule: what it keeps on the server, and makes of the aggregate; None = nothing.
      upload: compression of updates: `fl.top_k`, `fl.quantize`, `fl.cast`, or several in order.
      asynchrony: when clients arrive and what late updates count, from
        `fedlp_jax.clients.asynchrony`; None = all begin together, and the server waits.
      own_classes: in training, the logits of classes that a client has no examples of are 0, so
        that it does not push them down: the masked loss of HeteroFL (arXiv:2010.01264). Train
        metrics are those of the masked logits.

    Raises:
      FedLPError: a setting that is out of range or unknown.
    """
    if epochs is None and steps is None:
        epochs = 1
    _check_parts(task, client_optimizer, server_optimizer)
    _check_classes(task, own_classes)
    work = check_work(LocalWork(batch_size, epochs, steps))
    preset = presets.named(behaviour)
    weighting = preset.weighting if weighting is None else weighting
    layers = preset.layers if layers is None else layers
    train_loss = preset.train_loss if train_loss is None else train_loss
    check_choice("weighting", weighting, ("examples", "uniform"))
    check_choice("train_loss", train_loss, ("examples", "batches"))
    parts = Parts(
        task,
        work,
        client_optimizer,
        _submodels(submodels, personal),
        policy or masks.full(),
        _pipeline(aggregator, clip, privacy, weighting),
        server_optimizer or optax.sgd(1.0),
        by_examples=weighting == "examples",
        layers=layers,
        client_schedule=client_schedule,
        local_training=local_training or LocalTraining(),
        server_rule=server_rule,
        upload=_chained(upload),
        asynchrony=asynchrony,
        own_classes=own_classes,
    )
    return _algorithm(parts, privacy, train_loss)


def _algorithm(parts: Parts, privacy: Privacy | None, train_loss: str) -> Algorithm:
    """The functions of an algorithm that consists of these parts."""
    if privacy is not None and parts.local_training.finish is not None:
        raise FedLPError(
            "privacy covers the update alone, but this algorithm decides itself what a client "
            "sends, which may leak; use fl.fedavg or fl.fedlp_homo with privacy."
        )
    upload = parts.upload
    if upload is not None and privacy is not None:
        raise FedLPError(
            "privacy needs updates of a known norm, which compression changes; omit upload or "
            "privacy."
        )
    _check_received(parts)
    if parts.asynchrony is not None:
        _check_asynchrony(parts, privacy)
    if parts.submodels.slices:
        _check_slices(parts, privacy)
    if parts.policy.keeps_models:
        _check_kept_models(parts, privacy)
    stateful = parts.submodels.persist or parts.local_training.init is not None
    stateful = stateful or (upload is not None and upload.init is not None)
    stateful = stateful or parts.policy.keeps_models
    return Algorithm(
        parts.task,
        init=partial(initial_state, parts),
        round=partial(run_round, parts.in_rounds()),
        layers=parts.layers,
        local_steps=lambda sizes: local_steps(sizes, parts.work),
        levels=partial(parts.submodels.levels, parts.task),
        assign=partial(parts.submodels.assign, parts.task),
        upload_rates=parts.policy.expected,
        download_rates=parts.policy.received,
        wire=parts.wire,
        client_state=partial(client_states, parts) if stateful else None,
        shared_heads=parts.submodels.shared_heads,
        personal=parts.submodels.personal,
        of_server=parts.submodels.of_server,
        asynchrony=parts.asynchrony
        and parts.asynchrony._replace(examples=lambda sizes: examples_seen(sizes, parts.work)),
        cohort_rounds=parts.policy.cohort_rounds,
        faults=parts.asynchrony is None,
        stacked=parts.pipeline.reducer.stacked,
        senders=parts.pipeline.reducer.senders,
        privacy=privacy,
        check=partial(_check_optimizers, parts),
        train_loss=train_loss,
    )


def _submodels(submodels: Submodels | None, personal: str | None) -> Submodels:
    if personal is not None:
        return submodel.personal(personal, submodels)
    return submodels or submodel.whole()


def _check_received(parts: Parts) -> None:
    """Refuses parts that need an aggregate other than the one they get."""
    pipeline, upload, rule = parts.pipeline, parts.upload, parts.server_rule
    reducer, feedback = pipeline.reducer, upload is not None and upload.init is not None
    changes = {
        "clip=": pipeline.clip is not None,
        "error feedback": feedback,
        "this algorithm": parts.local_training.init is not None,
    }
    if reducer.select is not None and any(changes.values()):
        what = next(name for name, does in changes.items() if does)
        raise FedLPError(
            f"the aggregator chooses who sends a layer once all have trained, but {what} changes "
            "before what clients send or keep; use aggregator='masked_mean', or omit clip= and "
            "error feedback."
        )
    if rule is None:
        return
    if rule.needs_sender_mean and not reducer.sender_mean:
        raise FedLPError(
            "this algorithm's rule for the server is defined for the mean over the clients that "
            "sent a layer; use aggregator='masked_mean', a reducer of your own with "
            "sender_mean=True, or fl.fedavg with this one."
        )
    lossy = upload is not None and not upload.whole
    if rule.whole_moves and (pipeline.clip is not None or lossy):
        raise FedLPError(
            "this algorithm's server adds up what clients moved, and the clients do too, so that "
            "nothing may be lost between them: omit clip, and use no upload but "
            "fl.top_k(share, error_feedback=True) alone; fl.quantize and fl.cast have no error "
            "feedback."
        )
    if rule.moves_resting and feedback:
        raise FedLPError(
            "this algorithm's server moves layers that nobody sends, but an upload with error "
            "feedback would send their updates later as well; use error_feedback=False."
        )


def _check_asynchrony(parts: Parts, privacy: Privacy | None) -> None:
    """Refuses what needs a cohort that begins together."""
    own = parts.local_training.finish is not None or parts.server_rule is not None
    if own or privacy is not None:
        what = "privacy" if privacy is not None else "this algorithm's own rule for the server"
        raise FedLPError(
            f"{what} needs clients that all begin with the server's newest model; use it without "
            "asynchrony, or server_optimizer= with asynchrony."
        )


def _check_slices(parts: Parts, privacy: Privacy | None) -> None:
    """Refuses what counts layers as one where clients hold parts of them."""
    if parts.pipeline.reducer.stacked:
        raise FedLPError(
            "a robust rule lets every sender of a layer vote on all of it, but here clients hold "
            "parts of layers; use aggregator='masked_mean', 'cohort_mean' or 'inverse_probability'."
        )
    if privacy is not None:
        raise FedLPError(
            "privacy adds noise to whole layers, also where no client holds their entries; use "
            "fl.fedavg or fl.fedlp_homo with privacy."
        )
    if parts.local_training.finish is not None:
        raise FedLPError(
            "this algorithm sends more than its update, which is not cut to a client's width; "
            "use a rule for gradients alone, such as FedProx, or whole submodels."
        )
    if parts.upload is not None and parts.upload.init is not None:
        raise FedLPError(
            "an upload with error feedback keeps what it did not send of a client's entries, which "
            "need not be its own in the next round; use upload=fl.top_k(..., error_feedback=False)."
        )


def _check_kept_models(parts: Parts, privacy: Privacy | None) -> None:
    """Refuses what needs the update of a client that does not know the server's model."""
    training, reducer = parts.local_training, parts.pipeline.reducer
    needs = {
        "privacy": privacy,
        "clip": parts.pipeline.clip,
        "upload": parts.upload,
        "asynchrony": parts.asynchrony,
        "a rule for local training": training.gradient or training.finish,
        "an aggregator that chooses senders by their updates": reducer.sends or reducer.select,
        "a width": parts.submodels.slices or None,
    }
    found = [name for name, value in needs.items() if value is not None]
    if found:
        raise FedLPError(
            f"{found[0]} needs clients that begin with the server's model, but these keep layers "
            "of their own and cannot know how far they are from the server's; omit it, or let "
            "clients receive every layer."
        )


def _chained(upload: Any) -> Upload | None:
    if upload is None or isinstance(upload, Upload):
        return upload
    if not isinstance(upload, list | tuple):
        raise FedLPError(
            f"upload={shown(upload)} is no upload; give one such as fl.quantize(levels=15), or "
            "several as fl.chain(fl.top_k(0.1), fl.quantize(levels=15))."
        )
    return chain(*upload)


def _pipeline(
    aggregator: str | Mapping[str, Any] | Reducer,
    clip: float | None,
    privacy: Privacy | None,
    weighting: str,
) -> UpdatePipeline:
    reducer = aggregator if isinstance(aggregator, Reducer) else _named(aggregator)
    if clip is not None:
        check_clip("clip", clip)
    if privacy is not None:
        check_privacy(privacy)
        if reducer.sends is not None:
            raise FedLPError(
                "privacy needs layers chosen without the data, but the aggregator's `sends` reads "
                "the update; omit sends or privacy."
            )
        if reducer.sensitivity is None or weighting != "uniform" or clip is not None:
            shown = "a reducer of your own" if aggregator is reducer else repr(aggregator)
            raise FedLPError(
                "privacy needs aggregator='cohort_mean' or 'inverse_probability', "
                "weighting='uniform' and no other clip: only then does one client change the "
                f"result by a known amount (got {shown}, {weighting!r}, clip={clip})."
            )
    return UpdatePipeline(reducer, clip, privacy)


def _named(aggregator: str | Mapping[str, Any]) -> Reducer:
    settings = {"name": aggregator} if isinstance(aggregator, str) else dict(aggregator)
    name: Any = settings.pop("name", None)
    check_choice("aggregator", name, tuple(AGGREGATORS))
    try:
        return AGGREGATORS[name](**settings)
    except TypeError as error:
        raise FedLPError(f"aggregator '{name}' does not take {settings}.") from error


def _check_optimizers(parts: Parts, model: Variables, sizes: np.ndarray) -> None:
    check_optimizer("client", parts.client_optimizer, model["params"])
    check_optimizer("server", parts.server_optimizer, model["params"])
    if parts.local_training.sgd is not None:
        params, shared = model["params"], parts.submodels.of_server(model)["params"]
        check_same_sgd(parts.client_optimizer, params, shared, parts.local_training.sgd)
    warn_of_restarts(parts.client_optimizer, model["params"], local_steps(sizes, parts.work))


def _check_classes(task: Task, own_classes: Any) -> None:
    if not isinstance(own_classes, bool):
        raise FedLPError(f"own_classes={shown(own_classes)} must be true or false.")
    if own_classes and not task.heeds_classes:
        raise FedLPError(
            "own_classes=True leaves out the logits of classes that a client has no examples of, "
            "but this task has no classes; use fl.classification, or own_classes=False."
        )


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
                f"{name}_optimizer={optimizer!r} is not an optax transform; use one such as "
                "optax.sgd(0.1)."
            )
