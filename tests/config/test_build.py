"""A configuration becomes the arguments of simulate()."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import HOMO

import fedlp_jax as fl
from fedlp_jax.aggregation.robust import RULES
from fedlp_jax.config.build import build
from fedlp_jax.config.loading import parse_config
from fedlp_jax.config.schema import OPTIMIZERS
from fedlp_jax.data.batching import example_of
from fedlp_jax.data.dataset import IDENTITY
from fedlp_jax.simulation.run import Simulation
from fedlp_jax.types import Examples

RAW = HOMO | {"plan": {"devices": 1, "width": 1}}


def build_raw(seed=0, faults=None, partition=(), **algorithm):
    raw = RAW | {"seed": seed, "faults": faults, "partition": RAW["partition"] | dict(partition)}
    return build(parse_config(raw | {"algorithm": RAW["algorithm"] | algorithm}))


def test_configurations_of_one_model_share_its_task_and_each_has_its_algorithm():
    known = {}
    keeps = ({"algorithm": RAW["algorithm"] | {"keep": keep}} for keep in (0.5, 0.25, 0.5))
    one, other, again = (build(parse_config(RAW | raw), known)["algorithm"] for raw in keeps)
    assert one is again is not other
    assert one.task is other.task
    assert build(parse_config(RAW))["algorithm"].task is not one.task


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("momentum", [{}, {"momentum": 0.9, "nesterov": True}])
def test_a_factor_on_the_updates_is_the_rate_bit_for_bit(name, momentum):
    settings = {"name": name, "learning_rate": 0.0317} | (momentum if name == "sgd" else {})
    optimizer = OPTIMIZERS[name](**settings)
    rng = np.random.default_rng(0)
    parameters = jnp.asarray(rng.normal(size=1000), jnp.float32)
    inside, outside = optimizer.build(), optimizer.build(learning_rate=1.0)
    with jax.numpy_dtype_promotion("standard"):
        states = inside.init(parameters), outside.init(parameters)
        for _ in range(3):
            gradient = jnp.asarray(rng.normal(size=1000), jnp.float32)
            expected, first = inside.update(gradient, states[0], parameters)
            unscaled, second = outside.update(gradient, states[1], parameters)
            states = first, second
            np.testing.assert_array_equal(expected, unscaled * jnp.float32(0.0317))


def test_optimizer_sections_are_the_optax_transforms():
    gradient = {"w": np.float32([1.0, -2.0])}
    parameters = {"w": np.float32([0.5, 0.5])}
    sgd = OPTIMIZERS["sgd"]
    transform = sgd(name="sgd", learning_rate=0.1, weight_decay=0.5).build()
    update, _ = transform.update(gradient, transform.init(parameters), parameters)
    np.testing.assert_allclose(update["w"], [-0.125, 0.175], rtol=1e-6)
    plain = sgd(name="sgd", learning_rate=0.1).build()
    size = sum(np.size(x) for x in jax.tree.leaves(plain.init(parameters)))
    assert size == 0  # no momentum, no state
    assert jax.tree.structure(plain.init(parameters)) == jax.tree.structure(
        optax.sgd(0.1).init(parameters)
    )


def test_the_partition_follows_the_seed_of_the_run_unless_it_has_its_own():
    def of(seed, own):
        return build_raw(seed=seed, partition={"seed": own})["clients"].hash

    assert of(1, None) != of(2, None)
    assert of(1, 5) == of(2, 5) == of(5, None)


def test_the_natural_partition_needs_client_ids(tmp_path):
    with pytest.raises(fl.FedLPError, match="'digits' has no client ids; choose iid"):
        build(parse_config(RAW | {"partition": {"name": "natural"}}))
    arrays = {"inputs": np.full((40, 4), 255, np.uint8), "labels": np.arange(40) % 2}
    own = {f"{part}_{k}": v for part in ("train", "test") for k, v in arrays.items()}
    np.savez(tmp_path / "own.npz", **own, client=np.arange(40) % 5)
    data = {"name": str(tmp_path / "own.npz"), "options": {"num_classes": 2}}
    arguments = build(parse_config(RAW | {"partition": {"name": "natural"}, "data": data}))
    assert arguments["clients"].clients == 5


def test_every_rule_can_be_named():
    for name in RULES:
        assert build_raw(aggregator=name)["algorithm"].stacked
    assert build_raw(aggregator={"name": "krum", "byzantine": 0.2})["algorithm"].stacked
    assert not build_raw(aggregator="cohort_mean")["algorithm"].stacked


def test_privacy_and_faults_reach_their_dataclasses():
    faults = {
        "dropout": [0.1] * 20,
        "corruption": {"kind": "sign_flip", "share": 0.2},
        "profile": {"compute": 1e9, "download": 1e6, "upload": 2e5},
    }
    arguments = build_raw(
        faults=faults,
        aggregator="cohort_mean",
        weighting="uniform",
        privacy={"clip": 1, "noise_multiplier": 2},
    )
    assert arguments["algorithm"].privacy == fl.Privacy(1.0, 2.0, 1e-5)
    assert arguments["faults"] == fl.Faults(
        dropout=(0.1,) * 20,
        corruption=fl.Corruption("sign_flip", 0.2),
        profile=fl.Profile(1e9, 1e6, 2e5),
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"aggregator": "krumm"}, "did you mean 'krum'"),
        ({"aggregator": {"name": "krum", "trim": 0.1}}, "does not take"),
        ({"aggregator": {"name": "krum", "byzantine": 0.7}}, "byzantine=0.7"),
        ({"aggregator": {"trim": 0.1}}, "aggregator None is unknown"),
        ({"clip": -1}, "clip=-1"),
        ({"epochs": 1, "steps": 3}, "epochs or steps"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"privacy": {"clip": 1, "noise_multiplier": 2}}, "privacy needs aggregator"),
        ({"partition": {"clients": 0}}, "clients=0 must be a whole number"),
        ({"partition": {"clients": 10_000}}, "clients cannot share"),
    ],
)
def test_what_a_function_refuses_is_refused(settings, sentence):
    with pytest.raises(fl.FedLPError, match=sentence):
        build_raw(**settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"keep": 1.5}, r"keep=1.5 must be a number in \[0, 1\]"),
        ({"keep": [0.5, 0.5, 0.5]}, "keep has shape"),
        ({"keep": {"nobody": 0.5}}, "unknown layers"),
        ({"layers": "by_modul"}, "by_module"),
        ({"name": "fedlp_hetero", "keep": 1, "depths": 7}, "this model has no depths"),
        ({"faults": {"dropout": 1.5}}, r"faults.dropout=1.5 must be a number in \[0, 1\]"),
        ({"faults": {"corruption": {"kind": "sign-flip", "share": 0}}}, "did you mean 'sign_flip'"),
        ({"faults": {"over_selection": 0.5}}, "faults.over_selection=0.5"),
    ],
)
def test_what_needs_the_model_is_refused_before_anything_compiles(settings, sentence):
    arguments = build_raw(**settings)
    del arguments["early_stop"]  # of the loop
    with pytest.raises(fl.FedLPError, match=sentence):
        Simulation(**arguments)


@pytest.mark.parametrize(
    ("task", "targets", "outputs"),
    [
        ("regression", np.zeros(20, np.float32), 1),
        ("regression", np.zeros((20, 3), np.float32), 3),
        ("multi_label", np.arange(60).reshape(20, 3) % 2, 3),
        ("classification", np.arange(20) % 4, 4),
    ],
)
def test_a_model_has_an_output_for_each_target_of_its_task(tmp_path, task, targets, outputs):
    inputs = np.zeros((20, 5), np.float32)
    arrays = {f"{split}_inputs": inputs for split in ("train", "test")}
    arrays |= {f"{split}_labels": targets for split in ("train", "test")}
    np.savez(tmp_path / "own.npz", **arrays)
    kind = "classes" if task == "classification" else "values"
    data = {"name": str(tmp_path / "own.npz"), "options": {"targets": kind}}
    arguments = build(parse_config(RAW | {"data": data, "task": {"name": task}}))
    built, example = arguments["algorithm"].task, batch_of_one(inputs, targets)
    held = jax.eval_shape(built.init, jax.random.key(0), example)
    shape = jax.eval_shape(built.outputs, held, example).shape
    assert shape == (1, outputs)
    built.check(shape, example, arguments["data"].num_classes)


def batch_of_one(inputs, targets):
    held = Examples(jnp.asarray(inputs), jnp.asarray(targets, jnp.float32), IDENTITY)
    if targets.dtype.kind == "i":
        held = held._replace(labels=jnp.asarray(targets, jnp.int32))
    return example_of(held)
