"""One client's round: what it reads, trains, sends and keeps. Written for ONE client."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from fedlp_jax.accounting.ledger import Wire, wire_of
from fedlp_jax.aggregation.pipeline import UpdatePipeline, joined
from fedlp_jax.aggregation.reducer import UploadInfo
from fedlp_jax.aggregation.server import ServerRule
from fedlp_jax.aggregation.uploads import Upload, expected_bits, first_state, transmit
from fedlp_jax.clients.asynchrony import Asynchrony, discounted
from fedlp_jax.clients.local_training import (
    Bounds,
    Client,
    GateRule,
    LocalTraining,
    LocalWork,
    Step,
    Trained,
    is_finite,
    local_update,
)
from fedlp_jax.clients.outcomes import ClientOutcome, corrupted, flipped, with_flipped_labels
from fedlp_jax.execution.client_state import ClientState
from fedlp_jax.execution.loops import RunLoops, run_loops
from fedlp_jax.execution.map_clients import entry
from fedlp_jax.execution.packing import Packed, pack, unpack
from fedlp_jax.nn.gated import Gate
from fedlp_jax.prng import Purpose, client_key, root_key
from fedlp_jax.pruning.layers import LayerRule, LayerTable, layer_table
from fedlp_jax.pruning.masks import MaskPolicy, always
from fedlp_jax.pruning.submodels import Submodel, Submodels
from fedlp_jax.tasks.task import Aux, Task
from fedlp_jax.types import (
    NO_TERMS,
    Array,
    Batch,
    ClientMetrics,
    Examples,
    PyTree,
    Terms,
    Variables,
    cast_like,
)


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of an algorithm, as `compose` puts them together."""

    task: Task
    work: LocalWork
    client_optimizer: optax.GradientTransformation
    submodels: Submodels
    policy: MaskPolicy
    pipeline: UpdatePipeline
    server_optimizer: optax.GradientTransformation
    by_examples: bool  # a_k is the number of examples, else 1
    layers: LayerRule
    client_schedule: float | Callable[[Array], Any] | None
    local_training: LocalTraining
    server_rule: ServerRule | None
    upload: Upload | None
    asynchrony: Asynchrony | None = None
    own_classes: bool = False
    # Trees that a client sends and reads besides the model, and numbers that it sends; None = not
    # counted yet.
    exchanged: tuple[int, int, int] | None = None

    def in_rounds(self) -> Parts:
        """The parts without what is called before the first round, and numbers in the state.

        Where algorithms differ in these alone, such as in keep, rounds are equal functions.
        """
        number = not (self.client_schedule is None or callable(self.client_schedule))
        rule = self.server_rule
        return dataclasses.replace(
            self,
            submodels=self.submodels._replace(init=_before_rounds, assign=_before_rounds),
            policy=self.policy._replace(
                init=_before_rounds, expected=always, received=always, cohort_rounds=1
            ),
            server_rule=None if rule is None else rule._replace(init=_before_rounds),
            client_schedule=1.0 if number else self.client_schedule,
            exchanged=self._exchanged(),
        )

    def scale_of(self, round: Array) -> Array:
        """`f32[]`, what a schedule by the round makes of the clients' updates."""
        assert callable(self.client_schedule)
        return jnp.asarray(self.client_schedule(round), jnp.float32)

    def wire(self, layers: LayerTable) -> Wire:
        """Bytes of what is exchanged: the model, and what the algorithm adds to it.

        Args:
          layers: the layer table, or `layers_of_levels` where clients hold slices.
        """
        sent, read, numbers = self.exchanged or self._exchanged()
        sizes = None
        if self.upload is not None:
            sizes = np.array([expected_bits(self.upload, int(n)) / 8 for n in layers.params.flat])
            sizes = sizes.reshape(layers.params.shape)
        feedback = len(layers) if self.pipeline.reducer.select is not None else 0
        return wire_of(layers, sent, read, numbers + feedback, sizes)

    def _exchanged(self) -> tuple[int, int, int]:
        variables = {"params": {"any": jax.ShapeDtypeStruct((), jnp.float32)}}
        read, sent = jax.eval_shape(self._terms_exchanged, variables)
        return len(sent.trees), len(read.trees), len(sent.numbers)

    def _terms_exchanged(self, variables: Variables) -> tuple[Terms, Terms]:
        """What a client reads besides the model, and sends with its update."""
        read = NO_TERMS
        if self.server_rule is not None:
            read = self.server_rule.broadcast(self.server_rule.init(variables["params"], 1))
        return read, _extras_like(self, variables, read)


def _before_rounds(*arguments: Any) -> Any:
    raise AssertionError("called within a round")


class Broadcast(NamedTuple):
    """What every client of a round reads."""

    variables: Variables
    examples: Examples
    key: Array  # the run's root key
    round: Array  # i32[], from 1
    scale: Array | None  # f32[], factor on client updates
    bound: Array | None  # f32[], largest norm of an upload
    terms: Terms  # what the algorithm lets clients read
    versions: Any = None  # older models as `Versions`, where the server does not wait


class ClientInput(NamedTuple):
    """What one client of a round reads for itself; with a leading slot axis, the cohort."""

    client: Client
    upload: UploadInfo
    outcome: ClientOutcome | None  # None = a run without faults
    staleness: Any = None  # i32[], versions that the client is behind
    train: Array | None = None  # f32[L], 1 = trained; None = all layers
    download: Array | None = None  # f32[L], 1 = received, where clients keep models; None = all


@dataclasses.dataclass(frozen=True)
class ClientProgram:
    """What all clients at one submodel level have in common, known when the round is traced."""

    parts: Parts
    submodel: Submodel
    layers: LayerTable  # of a payload of the submodel, indexed as those of the server's variables
    state_shapes: PyTree  # of what a client keeps; {} = nothing
    example: Batch  # one row
    corruption: str | None  # kind, of `fedlp_jax.clients.outcomes.KINDS`
    even_size: int | None  # the size of every client, if it is the same
    alone: bool  # clients are not vmapped with others
    lost_skip: bool  # lost clients take no step
    largest: int | None = None  # size of the largest client, where trip counts must be known

    @property
    def embeds(self) -> bool:
        """Whether a client's own contribution has the server's structure, not their sum only.

        Updates of all levels lie in one stack; clients that hold different parts of the server's
        variables add up there.
        """
        return self.parts.pipeline.reducer.stacked or self.submodel.place is not None


def train_client(
    program: ClientProgram,
    broadcast: Broadcast,
    inputs: ClientInput,
    packed: Packed,
    active: Array,
    bounds: Bounds | None,
    run: RunLoops = run_loops,
) -> tuple[PyTree, tuple[ClientMetrics, PyTree, PyTree, PyTree], Packed]:
    """ONE client's round: train its submodel and prepare its upload.

    Args:
      program: of its level.
      broadcast: what all clients read.
      inputs: what it reads for itself.
      packed: what it keeps between rounds; empty if nothing.
      active: `bool[]`, False = an idle lane.
      bounds: loop bounds of the clients that are vmapped together; None = those of
        `program.largest`.
      run: runs the loops of its training.

    Returns:
      What is summed over clients; its metrics, what is stacked, the bits of each layer, and its
      upload mask if that was not known before; what it keeps now.
      A contribution is either summed or stacked, and the other is `()`.
    """
    parts, level, outcome = program.parts, program.submodel, inputs.outcome
    if level.place is not None:
        level = level.place(broadcast.key, broadcast.round, inputs.client.id)
        program = dataclasses.replace(program, submodel=level)

    current = broadcast.variables
    if parts.asynchrony is not None:
        broadcast = _as_begun(parts, parts.asynchrony, broadcast, inputs.staleness)

    # Start from the server's variables and what the client kept, such as its head.
    start = level.extract(broadcast.variables)
    kept = unpack(packed, program.state_shapes)
    head = kept.get("head")
    if head is None:
        key = parts.submodels.private_key(broadcast.key, inputs.client.id)
        head = level.private(key, program.example)
    begin = level.merge(_received(program, inputs, start, kept), head)
    end, metrics = _trained(program, broadcast, inputs, bounds, begin, kept, run)
    end, new_head = level.split(end)

    # Send the update, unless the client is lost or its result is not finite.
    update = jax.tree.map(jnp.subtract, end, start)
    inputs, sent = _gated(program, inputs, update)
    payload, training = _finished(program, broadcast, inputs, start, update, metrics.steps, kept)
    counted = active
    if outcome is not None:
        attack = client_key(broadcast.key, broadcast.round, inputs.client.id, Purpose.ATTACK)
        payload = corrupted(program.corruption, payload, outcome, attack)
        counted = counted & outcome.arrives
    payload, residual, bits = _transmitted(program, broadcast, inputs, payload, kept)
    counted = is_finite((payload, new_head, training, residual)) & counted
    payload = parts.pipeline.clipped(payload, inputs.upload.mask, broadcast.bound, program.layers)
    if parts.asynchrony is not None:  # the client knew neither its age nor the newest model
        numbers, now = broadcast.versions.numbers, level.extract(current)
        payload = discounted(parts.asynchrony, numbers, inputs.staleness, payload, start, now)
    contribution = parts.pipeline.reducer.prepare(payload, inputs.upload, counted, program.layers)
    summed, stacked = contribution, ()
    if program.embeds:
        like = payload_like(parts, broadcast.variables, broadcast.terms)
        embedded = parts.pipeline.reducer.embed(contribution, level, like, program.layers)
        summed, stacked = ((), embedded) if parts.pipeline.reducer.stacked else (embedded, ())

    if kept:
        parts_of = {"head": new_head, "training": training, "upload": residual, "model": end}
        new = {name: parts_of[name] for name in kept}
        new_kept = jax.tree.map(lambda n, o: jnp.where(counted, n, o), new, kept)
        packed = pack(new_kept, {dtype: x.size for dtype, x in packed.items()})
    return summed, (metrics._replace(finite=counted), stacked, bits, sent), packed


def _as_begun(
    parts: Parts, asynchrony: Asynchrony, broadcast: Broadcast, staleness: Array
) -> Broadcast:
    """What ONE client read when it began.

    The round stays that of its arrival: with the client it makes the keys of draws unique.
    """
    version, schedule = broadcast.round - 1 - staleness, parts.client_schedule
    model = entry(broadcast.versions.ring, version % (asynchrony.most + 1))
    broadcast = broadcast._replace(variables=model)
    if not callable(schedule):
        return broadcast
    return broadcast._replace(scale=parts.scale_of(version + 1))


def client_state(
    parts: Parts, level: Submodel, variables: Variables, example: Batch
) -> ClientState:
    """What a client of one level keeps: head, model, and states of its training and its upload."""
    first, upload = parts.local_training.init, parts.upload
    shared = jax.eval_shape(level.extract, variables)
    whole = layer_table(variables, parts.layers).names

    def init(root: Array, client: Array) -> PyTree:
        state = {}
        if parts.submodels.persist:
            state["head"] = level.private(parts.submodels.private_key(root, client), example)
        if parts.policy.keeps_models:  # the policy lets a client receive the first one
            state["model"] = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shared)
        if first is not None:
            state["training"] = first(shared["params"])
        if upload is not None and upload.init is not None:
            table = layer_table(shared, parts.layers, whole)
            state["upload"] = first_state(upload, shared["params"], table)
        return state

    shapes = jax.eval_shape(lambda: init(root_key(0), jnp.zeros((), jnp.int32)))
    if parts.submodels.persist:
        shapes["head"] = level.private_shapes  # in the dtype of the server's variables
    return ClientState(init, shapes)


def _received(
    program: ClientProgram, inputs: ClientInput, start: Variables, kept: dict[str, PyTree]
) -> Variables:
    """What ONE client trains: the server's layers that it receives, and its own of the others."""
    if inputs.download is None:
        return start
    received = program.layers.expand(inputs.download > 0)
    return jax.tree.map(jnp.where, received, start, kept["model"])


def _trained(
    program: ClientProgram,
    broadcast: Broadcast,
    inputs: ClientInput,
    bounds: Bounds | None,
    variables: Variables,
    kept: dict[str, PyTree],
    run: RunLoops,
) -> tuple[Variables, ClientMetrics]:
    """The variables of ONE client, its head included, after its local training."""
    parts, task = program.parts, program.submodel.task
    fields = _heeded_fields(program, broadcast, inputs, variables)
    if fields:
        task = _with_fields(task, fields)
    if program.corruption == "label_flip" and inputs.outcome is not None:
        task = with_flipped_labels(task, inputs.outcome)
    train = local_update(
        task,
        parts.client_optimizer,
        parts.work,
        program.even_size,
        alone=program.alone,
        all_train=not program.lost_skip,
        gradient_rule=_gradient_rule(program, broadcast, kept),
        gate_rule=_gate_rule(program, inputs),
        largest=program.largest,
    )
    return train(
        variables,
        broadcast.examples,
        inputs.client,
        bounds,
        broadcast.key,
        broadcast.round,
        broadcast.scale,
        run,
    )


def _heeded_fields(
    program: ClientProgram, broadcast: Broadcast, inputs: ClientInput, variables: Variables
) -> dict[str, Any]:
    """The fields of a `Batch` that a loss reads besides the examples, of ONE client."""
    task, client = program.submodel.task, inputs.client
    fields: dict[str, Any] = {}
    if task.heeds_round:
        late = 0 if program.parts.asynchrony is None else inputs.staleness
        fields["round"] = broadcast.round - late
    if program.parts.own_classes:
        labels = broadcast.examples.labels[client.rows]
        if program.corruption == "label_flip" and inputs.outcome is not None:
            labels = flipped(labels, inputs.outcome)
        outputs = jax.eval_shape(task.outputs, variables, program.example).shape[-1]
        own = jnp.arange(labels.shape[0], dtype=jnp.int32) < client.size
        is_class = labels[:, None] == jnp.arange(outputs, dtype=labels.dtype)[None]
        fields["classes"] = (is_class & own[:, None]).any(axis=0)
    return fields


def _with_fields(task: Task, fields: dict[str, Any]) -> Task:
    """The task whose loss gets these fields with every batch."""

    def loss(variables: Variables, batch: Batch, key: Array) -> tuple[Array, Aux]:
        return task.loss(variables, batch._replace(**fields), key)

    return task._replace(loss=loss)


def _gradient_rule(
    program: ClientProgram, broadcast: Broadcast, kept: dict[str, PyTree]
) -> Callable[[PyTree, PyTree, Array], PyTree] | None:
    """The algorithm's rule for the gradient of ONE client's steps; None = it has none."""
    rule = program.parts.local_training.gradient
    if rule is None:
        return None
    start = program.submodel.extract(broadcast.variables)
    terms = _terms_of(program.submodel, broadcast.terms)

    def gradient(gradient: PyTree, params: PyTree, number: Array) -> PyTree:
        step = Step(gradient, params, start["params"], number)
        with jax.numpy_dtype_promotion("standard"):  # numbers are float32, a model may not be
            return cast_like(rule(step, terms, kept.get("training", ())), gradient)

    return gradient


def _gated(
    program: ClientProgram, inputs: ClientInput, update: Variables
) -> tuple[ClientInput, Array | tuple[()]]:
    """The inputs with the upload mask that the reducer leaves, and that mask; () = all of it."""
    sends = program.parts.pipeline.reducer.sends
    if sends is None:
        return inputs, ()
    mask = jnp.where(sends(update, program.layers), inputs.upload.mask, 0.0)
    return inputs._replace(upload=inputs.upload._replace(mask=mask)), mask


def _gate_rule(program: ClientProgram, inputs: ClientInput) -> GateRule | None:
    """Which parameters ONE client's steps train; None = all of them, always."""
    rule, mask = program.parts.local_training.trains, inputs.train
    if rule is None and mask is None:
        return None
    layer_of = flatten_dict(program.layers.index["params"])

    def gates(params: PyTree, number: Array, steps: Array) -> PyTree:
        allowed = (lambda path, private: True) if rule is None else rule(number, steps)
        of_layer = [] if mask is None else [mask[i] > 0 for i in range(mask.shape[0])]
        # One object for all parameters with the same two gates, which it keeps alive.
        both: dict[Any, tuple[Gate, Gate, Gate]] = {}

        def gate(path: tuple[str | int, ...]) -> Gate:
            private = path not in layer_of
            first: Gate = True if private or not of_layer else of_layer[layer_of[path]]
            second = allowed("/".join(map(str, path)), private)
            if isinstance(first, bool) or isinstance(second, bool):
                return second if first is True else first if second is True else False
            key = id(first), id(second)
            if key not in both:
                both[key] = first, second, first & second
            return both[key][-1]

        return unflatten_dict({path: gate(path) for path in flatten_dict(params)})

    return gates


def _finished(
    program: ClientProgram,
    broadcast: Broadcast,
    inputs: ClientInput,
    start: Variables,
    update: Variables,
    steps: Array,
    kept: dict[str, PyTree],
) -> tuple[Variables, PyTree]:
    """What ONE client sends once it has trained, and the new state of its local training."""
    finish, state = program.parts.local_training.finish, kept.get("training", ())
    if finish is None:
        return update, state
    sent = program.layers.expand(inputs.upload.mask > 0)["params"]
    scale = jnp.ones((), jnp.float32) if broadcast.scale is None else broadcast.scale
    trained = Trained(start["params"], update, steps, scale, sent)
    terms = _terms_of(program.submodel, broadcast.terms)
    with jax.numpy_dtype_promotion("standard"):
        new_update, extras, new_state = finish(trained, terms, state)
    payload = joined(cast_like(new_update, update), extras)
    return payload, cast_like(new_state, state)


def _transmitted(
    program: ClientProgram,
    broadcast: Broadcast,
    inputs: ClientInput,
    payload: Variables,
    kept: dict[str, PyTree],
) -> tuple[Variables, PyTree, PyTree]:
    """What the server decodes of ONE client's payload, what the client keeps, and the bits."""
    upload, state = program.parts.upload, kept.get("upload", ())
    if upload is None:
        return payload, state, ()
    key = client_key(broadcast.key, broadcast.round, inputs.client.id, Purpose.UPLOAD)
    sent, layers = payload["params"], program.layers
    with jax.numpy_dtype_promotion("standard"):
        params, new, bits = transmit(upload, key, sent, inputs.upload.mask, state, layers)
    return {**payload, "params": cast_like(params, sent)}, cast_like(new, state), bits


def payload_like(parts: Parts, variables: Variables, terms: Terms) -> Variables:
    """A tree like a payload of the whole model: the variables, and zeros for the rest."""
    shapes = jax.eval_shape(lambda v, t: _extras_like(parts, v, t), variables, terms)
    return joined(variables, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))


def _extras_like(parts: Parts, variables: Variables, terms: Terms) -> Terms:
    """What a client with these variables would send with its update, without its values."""
    finish, first = parts.local_training.finish, parts.local_training.init
    if finish is None:
        return NO_TERMS
    params, one = variables["params"], jnp.ones((), jnp.float32)
    mask = jax.tree.map(lambda _: jnp.ones((), bool), params)
    trained = Trained(params, variables, jnp.ones((), jnp.int32), one, mask)
    with jax.numpy_dtype_promotion("standard"):
        return finish(trained, terms, () if first is None else first(params))[1]


def _terms_of(level: Submodel, terms: Terms) -> Terms:
    """The part of the terms that belongs to a level."""
    trees = terms.trees.items()
    return Terms(
        terms.numbers, {name: level.extract({"params": tree})["params"] for name, tree in trees}
    )
