"""Sections are derived from what they configure, and refuse everything else in one sentence."""

import dataclasses
import inspect

import pytest

import fedlp_jax as fl
from fedlp_jax.algorithms.presets import BEHAVIOURS
from fedlp_jax.config import schema
from fedlp_jax.config.loading import parse_config
from fedlp_jax.config.schema import ALGORITHMS, preset
from fedlp_jax.errors import FedLPError

RAW = {
    "data": {"name": "digits"},
    "partition": {"name": "iid", "clients": 100},
    "model": {"name": "mlp", "hidden": [64]},
    "algorithm": {
        "name": "fedlp_homo",
        "keep": 0.5,
        "client_optimizer": {"name": "sgd", "learning_rate": 0.1},
    },
    "rounds": 10,
    "cohort": 10,
}


def raw(**fields):
    """`RAW` with fields laid over it, `__` for a dot."""
    tree = {**RAW, **{k: {**v} for k, v in RAW.items() if isinstance(v, dict)}}
    for field, value in fields.items():
        *path, last = field.split("__")
        section = tree
        for part in path:
            section[part] = {**section.get(part, {})}
            section = section[part]
        section[last] = value
    return tree


def refusal(tree):
    with pytest.raises(FedLPError) as error:
        parse_config(tree)
    sentence = str(error.value)
    assert "pydantic" not in sentence and "http" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("section", "function", "rest"),
    [
        (schema.PlanSection, fl.Plan, set()),
        (schema.CheckpointSection, fl.Checkpoint, {"directory", "settings", "overwrite"}),
        (schema.FaultsSection, fl.Faults, set()),
        (schema.PARTITIONS["dirichlet"], fl.partition.dirichlet, {"labels"}),
        (schema.MODELS["mlp"], fl.models.MLP, {"num_classes", "initial", "parent"}),
        (
            schema.MODELS["transformer"],
            fl.models.Transformer,
            {"num_classes", "initial", "parent", "deepest"},
        ),
        (schema.TASKS["next_token"], fl.next_token, {"module"}),
    ],
)
def test_a_section_has_the_arguments_and_defaults_of_what_it_configures(section, function, rest):
    fields = section.model_fields
    if dataclasses.is_dataclass(function):
        defaults = {f.name: f.default for f in dataclasses.fields(function)}
    else:
        defaults = {n: p.default for n, p in inspect.signature(function).parameters.items()}
    assert set(defaults) - rest <= set(fields)
    for name in set(defaults) - rest - {"seed", "dtype", "name"}:
        if not fields[name].is_required():
            assert fields[name].default == defaults[name]


def test_an_algorithm_takes_its_own_arguments_and_those_of_compose():
    fields = set(schema.ALGORITHMS["fedlp_hetero"].model_fields)
    assert {"depths", "heads", "keep", "clip", "privacy", "aggregator", "epochs"} <= fields
    assert not fields & {"task", "policy", "submodels", "behaviour", "client_schedule"}
    signature = inspect.signature(fl.compose).parameters
    assert schema.ALGORITHMS["fedavg"].model_fields["batch_size"].default == (
        signature["batch_size"].default
    )


def test_a_new_function_needs_no_schema_of_its_own():
    def gossip(task, *, degree: int = 2, graph: str = "ring", momentum: float | None = None):
        return degree, graph, momentum

    section = schema.derive("gossip", gossip)
    assert set(section.model_fields) == {"degree", "graph", "momentum"}  # YAML has no task
    assert section(degree=3).build(task=None) == (3, "ring", None)
    with pytest.raises(ValueError, match="'degre' is not a field of 'gossip'; did you mean"):
        section(degre=3)


def test_reads_all_fields_with_defaults():
    config = parse_config(RAW)
    assert (config.name, config.seed, config.model.hidden) == ("run", 0, (64,))
    assert config.algorithm.client_optimizer.momentum == 0.0
    assert config.partition.seed is None
    assert config.plan.build() == fl.Plan()
    with pytest.raises(ValueError, match="frozen"):
        config.rounds = 3


@pytest.mark.parametrize("keep", [0.5, 1, [0.1, 0.2], [[0.1], [1]], {"fc1": 0.2}])
def test_keep_takes_all_its_forms(keep):
    value = parse_config(raw(algorithm__keep=keep)).model_dump(mode="json")["algorithm"]["keep"]
    assert value == keep


def test_the_task_is_classification_unless_said_otherwise():
    assert parse_config(RAW).task.name == "classification"
    assert parse_config(raw(task={"name": "next_token", "padding": 0})).task.padding == 0


def test_a_cohort_of_one_and_of_all():
    one, share = (parse_config(raw(cohort=c)).cohort for c in (1, 1.0))
    assert (type(one), type(share)) == (int, float)


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "compose"])
@pytest.mark.parametrize("behaviour", ["layerwise", "reference"])
def test_a_behaviour_leaves_an_algorithm_the_weighting_of_its_own(name, behaviour):
    parameters = inspect.signature(ALGORITHMS[name].factory).parameters
    own = parameters["weighting"].default if "weighting" in parameters else None
    by_behaviour = {"layerwise": "examples", "reference": "uniform"}[behaviour]
    assert preset(ALGORITHMS[name], BEHAVIOURS[behaviour]).get("weighting", own) == (
        by_behaviour if own is None else own
    )


@pytest.mark.parametrize("name", ["reference", "layerwise", None])
def test_a_behaviour_sets_what_is_not_given(name):
    tree = raw(
        behaviour=name, algorithm__weighting="uniform", model__init=None, partition__name="mixed"
    )
    config = parse_config(tree)
    reference = name == "reference"
    assert config.algorithm.weighting == "uniform"
    assert config.algorithm.layers == ("by_tensor" if reference else "by_module")
    assert config.model.init == ("pytorch" if reference else "flax")
    assert config.partition.reference == reference
    assert config.draws == ("reference" if reference else "own")
    assert parse_config(tree | {"draws": "own"}).draws == "own"
    assert "behaviour" not in config.model_dump()
    assert parse_config(tree | {"model": {"name": "transformer"}}).model.heads == 4  # of attention


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        # values
        ({"algorithm__keep": "half"}, "algorithm.keep: must be a number or a section or a list"),
        ({"algorithm__keep": "0.5"}, "(got '0.5')."),
        ({"algorithm__keep": [0.5, "x"]}, "algorithm.keep.1: must be a number or a list (got 'x')"),
        ({"algorithm__keep": True}, "(got True)."),
        ({"algorithm__keep": float("nan")}, "algorithm.keep: must be a finite number"),
        ({"rounds": -1}, "rounds: must be greater than or equal to 0 (got -1)."),
        ({"rounds": 2.5}, "rounds: must be a whole number (got 2.5)."),
        ({"rounds": True}, "rounds: must be a whole number (got True)."),
        ({"rounds": "5"}, "rounds: must be a whole number (got '5')."),
        ({"seed": 2**32}, "seed: must be less than 4294967296"),
        ({"eval_every": 0}, "eval_every: must be greater than or equal to 1 (got 0)."),
        ({"model__hidden": 64}, "model.hidden: must be a list (got 64)."),
        ({"task__name": "regresion"}, "'regresion' is unknown; did you mean 'regression'"),
        ({"task__padding": 0}, "task: name is missing; it is one of classification, next_token"),
        ({"name": "a/b"}, "name: a run's name must be usable as the name of a folder."),
        ({"name": ".."}, "name: a run's name must be usable as the name of a folder."),
        ({"data__name": 5}, "data.name: must be text (got 5)."),
        ({"plan__devices": 1.5}, "plan.devices: must be a whole number (got 1.5)."),
        (
            {"algorithm__client_optimizer__momentum": 1},
            "algorithm.client_optimizer.momentum: must be less than 1 (got 1).",
        ),
        (
            {"algorithm__client_optimizer__learning_rate": -1},
            "algorithm.client_optimizer.learning_rate: must be greater than or equal to 0",
        ),
        (
            {"algorithm__client_optimizer__nesterov": 1},
            "algorithm.client_optimizer.nesterov: must be true or false (got 1).",
        ),
        ({"algorithm__weighting": "exmples"}, "must be 'examples' or 'uniform' (got 'exmples')"),
        ({"faults": {"profile": {"compute": "fast", "download": 1, "upload": 1}}}, "got 'fast'"),
        ({"algorithm__privacy": {"clip": 1}}, "algorithm.privacy.noise_multiplier: is missing."),
        # kinds
        ({"algorithm__name": "fedlp-homo"}, "name 'fedlp-homo' is unknown; did you mean 'fedlp_h"),
        (
            {"model__name": "vit"},
            "Known: fedlp_cnn, mnist_cnn, mlp, resnet, logistic, transformer, char_lstm.",
        ),
        ({"model": {}}, "model: name is missing; it is one of fedlp_cnn,"),
        ({"model": "mlp"}, "model: must be a section (got 'mlp')."),
        ({"partition__name": "dirichlet"}, "partition.alpha: is missing."),
        ({"behaviour": "refrence"}, "behaviour: must be 'layerwise' or 'reference'"),
        # fields
        ({"roundz": 3}, "'roundz' is not a field of a configuration; did you mean 'rounds'?"),
        ({"keep": 0.5}, "it is 'algorithm.keep', of fedlp_homo, fedlp_hetero, "),
        ({"algorithm__kep": 1}, "'kep' is not a field of 'fedlp_homo'; did you mean 'keep'?"),
        ({"algorithm__depths": 1}, "'depths' is not a field of 'fedlp_homo'; it is"),
        ({"plan__device": 2}, "'device' is not a field of 'plan'; did you mean 'devices'?"),
        ({"faults": {"deadlin": 1.0}}, "did you mean 'deadline'?"),
        ({"algorithm.keep": 1}, "'algorithm.keep' is not a field of a configuration"),
    ],
)
def test_refuses_in_one_sentence(fields, sentence):
    refused = refusal(RAW | fields if "algorithm.keep" in fields else raw(**fields))
    assert sentence in refused
    assert "\n" not in refused


def test_names_every_problem():
    refused = refusal(raw(rounds=-1, algorithm__keep="x", plan__width=0.5))
    assert [line.split(":")[0] for line in refused.splitlines()] == [
        *("algorithm.keep", "rounds", "plan.width"),
    ]


@pytest.mark.parametrize("missing", ["data", "partition", "model", "algorithm", "rounds", "cohort"])
def test_names_what_is_missing(missing):
    assert refusal({k: v for k, v in RAW.items() if k != missing}) == f"{missing}: is missing."
