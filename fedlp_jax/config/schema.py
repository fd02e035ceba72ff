"""What a configuration may hold: one pydantic model for each section.

The models are derived: `derive` reads the fields, types and defaults of a section from the
signature of the function or dataclass that the section configures. To make something new available
in YAML, add its function to the table of its section below. A function outside the package needs no
table: a section names it as `module:function`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Never, Union, get_args, get_origin
from typing import get_type_hints as hints_of

import optax
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetPydanticSchema,
    SerializeAsAny,
    Strict,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
    model_validator,
)

from fedlp_jax import algorithms
from fedlp_jax.aggregation.uploads import Upload, cast, quantize, top_k
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.algorithms.presets import BEHAVIOURS, DEFAULT, Behaviour
from fedlp_jax.clients.failures import Faults
from fedlp_jax.config import own
from fedlp_jax.data import partition as schemes
from fedlp_jax.data.loading import Dataset, load
from fedlp_jax.errors import FedLPError, check_choice, nearest, shown, why
from fedlp_jax.execution.plan import Plan
from fedlp_jax.nn import models
from fedlp_jax.pruning import masks
from fedlp_jax.reporting import sinks
from fedlp_jax.simulation.checkpoint import Checkpoint
from fedlp_jax.simulation.early_stop import EarlyStop
from fedlp_jax.simulation.keep_best import KeepBest
from fedlp_jax.tasks.classification import classification
from fedlp_jax.tasks.multi_label import multi_label
from fedlp_jax.tasks.next_token import next_token
from fedlp_jax.tasks.regression import regression

# VALUES

# Strict, because "1" and true are not numbers.
Whole = Annotated[int, Strict(), Field(ge=0, lt=2**32)]
Real = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Field(min_length=1, max_length=1000)]
_LEAVES: dict[Any, Any] = {int: Whole, float: Real, bool: Flag, str: Text, type(None): type(None)}


class Section(BaseModel):
    """A part of the configuration: the arguments of one function."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    factory: ClassVar[Callable[..., Any]]

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, raw: Any) -> Any:
        for field in map(str, raw) if isinstance(raw, Mapping) else ():
            if field not in cls.model_fields:
                known = ", ".join(cls.model_fields)
                hint = _owners(field) or nearest(field, cls.model_fields) or f"; it has {known}"
                raise FedLPError(f"{shown(field)} is not a field of {_kind_name(cls)}{hint}")
        return raw

    def arguments(self) -> dict[str, Any]:
        """The fields as arguments of the section's function."""
        fields = {name: getattr(self, name) for name in type(self).model_fields if name != "name"}
        return {name: _built(value) for name, value in fields.items()}

    def build(self, **arguments: Any) -> Any:
        """Calls the section's function with its fields; `arguments` win over them."""
        return type(self).factory(**self.arguments() | arguments)


def _built(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_built, value))
    return value.build() if isinstance(value, Section) else value


def _kind_name(cls: type[Section]) -> str:
    return "a configuration" if cls is Config else f"'{cls.__name__}'"


def _owners(field: str) -> str:
    """A hint at the sections that have this field."""
    for section, kinds in KINDS.items():
        owners = [name for name, kind in kinds.items() if field in kind.model_fields]
        if owners:
            return f"; it is '{section}.{field}', of {', '.join(owners)}"
    return ""


# DERIVATION


def derive(
    name: str, /, *functions: Callable[..., Any], without: Sequence[str] = (), **fields: Any
) -> type[Section]:
    """The section that holds the arguments of a function.

    Args:
      name: of the section's class, shown in messages.
      *functions: the first is called by `Section.build`; the others contribute the arguments that
        the first passes on as `**settings`. Arguments that YAML cannot express, such as
        functions, are left out.
      without: further arguments to leave out.
      **fields: fields to add or replace, as `(annotation, default)`.
    """
    derived = {
        argument: (annotation, default)
        for function in reversed(functions)
        for argument, hint, default in _arguments(function)
        if argument not in without and (annotation := _in_yaml(hint)) is not Never
    }
    return _section(functions[0], derived | fields, name)


def _section(
    factory: Callable[..., Any],
    fields: Mapping[str, Any],
    name: str | None = None,
    base: type[Section] = Section,
) -> type[Section]:
    in_order = dict(sorted(fields.items(), key=lambda field: field[0] != "name"))
    model: Any = create_model(name or factory.__name__, __base__=base, **in_order)
    model.factory = staticmethod(factory)
    return model


def _arguments(function: Callable[..., Any]) -> Iterator[tuple[str, Any, Any]]:
    """`(name, annotation, default)` of each argument; the default is ... where it is required."""
    # An nnx module inherits the fields of a dataclass without being one.
    is_dataclass = "__dataclass_fields__" in vars(function)
    if inspect.isclass(function) and not is_dataclass:
        function = function.__init__
    hints = hints_of(function)
    if is_dataclass:  # also linen modules, whose signature hides their fields
        for field in dataclasses.fields(function):  # type: ignore[arg-type]
            default = field.default
            if default is dataclasses.MISSING:
                make = field.default_factory
                default = ... if make is dataclasses.MISSING else make()
            yield field.name, hints[field.name], default
    else:
        for name, parameter in inspect.signature(function).parameters.items():
            variadic = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if not variadic and name != "self":
                required = parameter.default is parameter.empty
                yield name, hints.get(name, Any), ... if required else parameter.default


def _in_yaml(hint: Any) -> Any:
    """The annotation for values that come from YAML; Never where nothing from YAML fits."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _LEAVES:
        return _LEAVES[hint]
    if hint is optax.GradientTransformation:
        return one_of(OPTIMIZERS)
    if hint is Upload:
        return one_of(UPLOADS)
    if hint is masks.MaskPolicy:
        return one_of(POLICIES, "algorithm.policy")
    if origin is Literal:
        return hint
    if origin in (Union, types.UnionType):
        parts = [part for part in map(_in_yaml, inner) if part is not Never]
        return Never if parts in ([], [type(None)]) else _union(parts)
    if origin is tuple or origin is Sequence:
        item = Real | tuple[Real, ...] if inner[0] is Any else _in_yaml(inner[0])
        return tuple.__class_getitem__((item, ...))
    if origin is Mapping:
        return dict.__class_getitem__((Text, Any if inner[1] is Any else _in_yaml(inner[1])))
    if dataclasses.is_dataclass(hint):
        return derive(hint.__name__, hint)  # type: ignore[union-attr, arg-type]
    return Never


def _union(annotations: Iterable[Any]) -> Any:
    return functools.reduce(operator.or_, annotations)


def one_of(kinds: Mapping[str, type[Section]], section: str | None = None) -> Any:
    """The annotation of a section of several kinds; its field `name` says which.

    Args:
      kinds: by name.
      section: dotted, if a function of the user's own may be named; see `own_kind`.
    """

    def check(raw: Any, known: ValidatorFunctionWrapHandler) -> Any:
        if isinstance(raw, Mapping):
            if "name" not in raw:
                raise FedLPError(f"name is missing; it is one of {', '.join(kinds)}")
            if section is not None and own.is_own(raw["name"]):
                return own_kind(section, raw["name"]).model_validate(raw)
            if section is not None and ":" in str(raw["name"]):
                raise FedLPError(f"name {shown(raw['name'])} is not written as module:function")
            check_choice("name", raw["name"], tuple(kinds))
        return known(raw)

    union: Any = _union(kinds.values())
    as_given: Any = SerializeAsAny()  # also a user's section, with all its fields
    return Annotated[union, as_given, Field(discriminator="name"), WrapValidator(check)]


class OwnSection(Section):
    """The arguments of a user's function."""

    def build(self, **arguments: Any) -> Any:
        """Calls the function with its fields and those of `arguments` that it takes.

        An nnx module is made by its task, which has the `rngs`.
        """
        function = type(self).factory
        settings = self.arguments() | own.taken(function, arguments)
        if own.takes(function, "rngs") and not own.takes(function, "**"):
            return lambda rngs: function(**settings, rngs=rngs)
        return function(**settings)


@functools.cache
def own_kind(section: str, name: str) -> type[Section]:
    """The section that holds the arguments of a user's function.

    Args:
      section: dotted, such as "model".
      name: `module:function`.

    Raises:
      FedLPError: there is no such function, or its annotations cannot be read.
    """
    function = own.imported(name)
    passes_on = section == "algorithm" and own.takes(function, "**")
    try:
        arguments = list(_arguments(function))
        if passes_on:  # such a function sets the policy itself
            arguments = [one for one in _arguments(compose) if one[0] != "policy"] + arguments
    except (NameError, TypeError, ValueError) as error:
        raise FedLPError(f"the arguments of {name} cannot be read: {why(error)}") from error
    fields = {
        argument: (Any if hint is Any else _in_yaml(hint), default)
        for argument, hint, default in arguments
        if argument not in _GIVEN[section] and (hint is Any or _in_yaml(hint) is not Never)
    }
    if "seed" in fields:  # null = the run's
        fields["seed"] = (Whole | None, None)
    return _section(function, fields | {"name": (Literal[name], ...)}, name, OwnSection)


# What a user's function gets from elsewhere than its section.
_GIVEN = {
    "partition": ("labels",),
    "model": ("num_classes", "rngs", "parent"),
    "task": ("module", "normalize", "augment"),
    "algorithm": ("task", "client_schedule", "behaviour"),
    "algorithm.policy": (),
}


def _kinds(
    functions: Mapping[str, Callable[..., Any]],
    *more: Callable[..., Any],
    without: Sequence[str] = (),
    **fields: Any,
) -> dict[str, type[Section]]:
    """One section for each function of a table; see `derive`."""
    return {
        name: derive(name, function, *more, without=without, **fields, name=(Literal[name], ...))
        for name, function in functions.items()
    }


# SECTIONS


def sgd(
    learning_rate: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Gradient descent with momentum and an L2 penalty, both optional."""
    # A trace of zero momentum would carry a copy of the parameters for nothing.
    descent = optax.sgd(learning_rate, momentum or None, nesterov)
    decay = optax.add_decayed_weights(weight_decay)
    return optax.chain(decay, descent) if weight_decay else descent


_NOT_NEGATIVE = Annotated[Real, Field(ge=0)]
_DECAY = Annotated[Real, Field(ge=0, lt=1)]  # of a running mean
_RANGES = {"momentum": _DECAY, "b1": _DECAY, "b2": _DECAY, "eps": Annotated[Real, Field(gt=0)]}


def _optimizer(function: Callable[..., optax.GradientTransformation]) -> type[Section]:
    """A section with the numbers and flags of an optax optimizer."""
    fields: dict[str, Any] = {"name": (Literal[function.__name__], ...)}
    fields["learning_rate"] = (_NOT_NEGATIVE, ...)
    for name, parameter in inspect.signature(function).parameters.items():
        # The default says the type, since optax's annotations allow arrays and schedules.
        if isinstance(parameter.default, bool):
            fields[name] = (Flag, parameter.default)
        elif isinstance(parameter.default, float):
            fields[name] = (_RANGES.get(name, _NOT_NEGATIVE), parameter.default)
    return _section(function, fields)


OPTIMIZERS = {
    function.__name__: _optimizer(function)
    for function in (sgd, optax.adam, optax.adamw, optax.yogi, optax.adagrad)
}
PARTITIONS = _kinds(
    {
        "iid": schemes.iid,
        "dirichlet": schemes.dirichlet,
        "shards": schemes.shards,
        "mixed": schemes.mixed,
        "quantity": schemes.quantity,
    },
    seed=(Whole | None, None),  # null = the run's
)
PARTITIONS |= _kinds({"natural": schemes.natural})
PARTITIONS |= _kinds({"file": schemes.from_file}, path=(Text, ...))
MODELS = _kinds(
    {
        "fedlp_cnn": models.FedLPCNN,
        "mnist_cnn": models.MNISTCNN,
        "mlp": models.MLP,
        "resnet": models.ResNet,
        "logistic": models.Logistic,
        "transformer": models.Transformer,
        "char_lstm": models.CharLSTM,
    },
    without=("num_classes", "parent", "initial", "deepest"),
    init=(Literal["flax", "pytorch"], "flax"),
    dtype=(Literal["float32", "bfloat16"], "float32"),  # of activations
)
TASKS = _kinds(
    {
        "classification": classification,
        "next_token": next_token,
        "regression": regression,
        "multi_label": multi_label,
    },
    without=("module", "normalize", "augment"),
)
UPLOADS = _kinds({function.__name__: function for function in (top_k, quantize, cast)})
POLICIES = _kinds({"full": masks.full, "bernoulli": masks.bernoulli})
_CLASSIFICATION = TASKS["classification"].model_validate({"name": "classification"})
# Each algorithm, and the arguments of `compose` that it sets itself besides the policy.
_ALGORITHMS: dict[Callable[..., Any], tuple[str, ...]] = {
    algorithms.fedavg: (),
    algorithms.fedlp_homo: (),
    algorithms.fedlp_hetero: (),
    algorithms.fedlp_q: ("upload",),
    algorithms.fedprox: (),
    algorithms.fedavgm: ("server_optimizer",),
    algorithms.fedadagrad: ("server_optimizer",),
    algorithms.fedadam: ("server_optimizer",),
    algorithms.fedyogi: ("server_optimizer",),
    algorithms.scaffold: (),
    algorithms.fednova: (),
    algorithms.feddyn: (),
    algorithms.fedcm: (),
    algorithms.fedexp: ("aggregator",),
    algorithms.fedper: (),
    algorithms.lg_fedavg: (),
    algorithms.fedbn: (),
    algorithms.inclusivefl: (),
    algorithms.depthfl: (),
    algorithms.heterofl: (),
    algorithms.fedrolex: (),
    algorithms.federated_dropout: (),
    algorithms.fjord: (),
    algorithms.fedbuff: (),
    algorithms.fedasync: (),
    algorithms.fedrep: ("steps",),
    algorithms.fedbabu: (),
    algorithms.fedlama: ("aggregator", "upload"),
    algorithms.fedldf: ("aggregator", "upload"),
    algorithms.fedluar: (),
    algorithms.freeze: (),
    algorithms.fedpart: (),
    compose: (),
}
_POLICY = ("policy",)
ALGORITHMS = {
    name: section
    for function, sets in _ALGORITHMS.items()
    for name, section in _kinds(
        {function.__name__: function},
        compose,
        without=("behaviour", "client_schedule", *sets, *(() if function is compose else _POLICY)),
    ).items()
}
KINDS = {  # the sections that come in several kinds
    "partition": PARTITIONS,
    "model": MODELS,
    "task": TASKS,
    "algorithm": ALGORITHMS,
    "algorithm.client_optimizer": OPTIMIZERS,
    "algorithm.server_optimizer": OPTIMIZERS,
    "algorithm.upload": UPLOADS,
    "algorithm.policy": POLICIES,
}


class Data(Section):
    """Which data set; the arguments of `fl.load`."""

    factory = staticmethod(load)

    name: Text
    data_dir: Text | None = None
    options: dict[Text, Any] = {}  # arguments of some data sets

    def build(self, **arguments: Any) -> Dataset:
        """Loads the data set.

        Raises:
          FedLPError: it cannot be read, or a user's function returned something else.
        """
        if own.is_own(self.name):
            function = own.imported(self.name)
            arguments = own.taken(function, {"data_dir": self.data_dir}) | self.options
            return own.check_made(self.name, function(**arguments), Dataset)
        folder = self.data_dir and os.path.expanduser(self.data_dir)
        return load(os.path.expanduser(self.name), folder, **self.options, **arguments)


PlanSection = derive("plan", Plan)
SINKS = _kinds({"wandb": sinks.wandb}) | _kinds(
    {"tensorboard": sinks.tensorboard},
    directory=(Text | None, None),  # null = in the run directory
)
CheckpointSection = derive("checkpoint", Checkpoint, without=("directory", "settings", "overwrite"))
FaultsSection = derive("faults", Faults)
EarlyStopSection = derive("early_stop", EarlyStop)
KeepBestSection = derive("keep_best", KeepBest, without=("path",))


class SweepSection(Section):
    """What `fedlp sweep` runs: each point of a grid of fields, with each seed."""

    factory: ClassVar[Callable[..., Any]] = staticmethod(dict)

    grid: dict[Text, tuple[Any, ...]] = {}  # dotted field -> its values
    seeds: Annotated[Whole, Field(ge=1)] = 1  # how many, from the run's own on


def preset(kind: type[Section], behaviour: Behaviour = BEHAVIOURS[DEFAULT]) -> dict[str, Any]:
    """What a behaviour sets of a section's fields where a file does not.

    A field that its function sets otherwise stays: HeteroFL's weighting, a transformer's `heads`.
    """
    fields, usual = kind.model_fields, BEHAVIOURS[DEFAULT]._asdict()
    return {
        name: value
        for name, value in behaviour._asdict().items()
        if name in fields and fields[name].default in (None, usual[name])
    }


def _folder_name(name: str) -> str:
    if not name.strip(". ") or "/" in name or "\\" in name or not name.isprintable():
        raise FedLPError("a run's name must be usable as the name of a folder")
    return name


def _type(annotation: Any) -> Any:
    """A derived annotation, for a field that mypy sees as Any."""
    return GetPydanticSchema(lambda _, handler: handler(annotation))


class Config(Section):
    """One run: the arguments of `fl.simulate`."""

    name: Annotated[Text, AfterValidator(_folder_name)] = "run"
    seed: Whole = 0
    data: Data
    partition: Annotated[Any, _type(one_of(PARTITIONS, "partition"))]
    model: Annotated[Any, _type(one_of(MODELS, "model"))]
    task: Annotated[Any, _type(one_of(TASKS, "task"))] = _CLASSIFICATION
    algorithm: Annotated[Any, _type(one_of(ALGORITHMS, "algorithm"))]
    rounds: Whole
    cohort: Whole | Real  # clients of a round, or their share
    # "reference" = partition, depths, cohorts and masks as the authors' code draws them
    draws: Literal["own", "reference"] = "own"
    eval_every: Annotated[Whole, Field(ge=1)] | None = None  # rounds; null = the last only
    faults: Annotated[Any, _type(FaultsSection | None)] = None
    early_stop: Annotated[Any, _type(EarlyStopSection | None)] = None
    keep_best: Annotated[Any, _type(KeepBestSection | None)] = None  # as best.npz
    sinks: tuple[Annotated[Any, _type(one_of(SINKS))], ...] = ()
    plan: Annotated[Any, _type(PlanSection)] = PlanSection()
    checkpoint: Annotated[Any, _type(CheckpointSection)] = CheckpointSection()
    behaviour: Literal["layerwise", "reference"] | None = Field(None, exclude=True)
    sweep: SweepSection | None = Field(None, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _apply_behaviour(cls, raw: Any) -> Any:
        """Replaces `behaviour` by its settings; a field that is set wins."""
        if not isinstance(raw, Mapping) or raw.get("behaviour") not in (None, *BEHAVIOURS):
            return raw
        behaviour = BEHAVIOURS[raw.get("behaviour") or DEFAULT]
        raw = {**raw, "behaviour": None}
        if raw.get("draws") is None:
            raw["draws"] = behaviour.draws
        for section in ("partition", "model", "algorithm"):
            values = raw.get(section)
            if isinstance(values, Mapping) and values.get("name") in (*KINDS[section],):
                defaults = preset(KINDS[section][values["name"]], behaviour)
                raw[section] = defaults | {
                    k: v for k, v in values.items() if v is not None or k not in defaults
                }
        return raw
