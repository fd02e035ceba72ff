"""`draws: reference`: a configuration with the random draws of the authors' code."""

import numpy as np
import pytest

import fedlp_jax as fl
from fedlp_jax.algorithms.reference_draws import reference_draws
from fedlp_jax.config.build import build
from fedlp_jax.config.experiment import run
from fedlp_jax.config.loading import parse_config
from fedlp_jax.prng import root_key

CONFIG = {
    "seed": 25,
    "behaviour": "reference",  # which sets the draws
    "data": {
        "name": "synthetic",
        "options": {"examples": 400, "test_examples": 10, "shape": [32, 32, 3]},
    },
    "partition": {"name": "iid", "clients": 20},
    "model": {"name": "fedlp_cnn"},
    "algorithm": {
        "name": "fedavg",
        "steps": 1,
        "batch_size": 2,
        "client_optimizer": {"name": "sgd", "learning_rate": 0.01},
    },
    "rounds": 1,
    "cohort": 5,
    "plan": {"devices": 1},
}
HOMO = {**CONFIG, "algorithm": {**CONFIG["algorithm"], "name": "fedlp_homo", "keep": 0.5}}
HETERO = {**CONFIG, "algorithm": {**CONFIG["algorithm"], "name": "fedlp_hetero", "depths": 1}}


def drawn(arguments, **settings):
    labels = arguments["data"].train.labels
    return reference_draws(labels, clients=20, cohort=5, rounds=3, **settings)


def test_partition_and_cohorts_are_those_of_the_seed():
    arguments = build(parse_config(CONFIG))
    expected = drawn(arguments)
    assert arguments["clients"].hash == expected.partition.hash
    cohorts = [arguments["cohort"](0, round, 20) for round in (1, 2, 3)]
    assert np.array_equal(cohorts, expected.cohorts)
    other = build(parse_config(CONFIG | {"seed": 26}))
    assert other["clients"].hash != expected.partition.hash
    own = build(parse_config(CONFIG | {"draws": "own"}))
    assert own["cohort"] == 5 and own["clients"].hash != expected.partition.hash


@pytest.mark.parametrize("flag", [1, "uniform"])
def test_depths_are_those_of_the_seed(flag):
    config = {**HETERO, "algorithm": {**HETERO["algorithm"], "depths": flag}}
    arguments = build(parse_config(config))
    levels = arguments["algorithm"].assign(root_key(25), 20)
    assert np.array_equal(levels + 1, drawn(arguments, flag=flag).depths)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 26},
        {"cohort": 6},
        {"rounds": 1001},
        {"partition": {"name": "dirichlet", "clients": 20, "alpha": 1}},
    ],
)
def test_configurations_share_an_algorithm_only_if_its_draws_are_the_same(change):
    known = {}
    first, other, again = (
        build(parse_config({**HOMO, **settings}), known)["algorithm"]
        for settings in ({}, change, {"eval_every": 1})
    )
    assert first is again
    assert first is not other


@pytest.mark.slow
def test_a_run_sends_the_layers_of_the_listed_masks():
    config = parse_config(HOMO)
    draws = drawn(build(config), keep=0.5)
    result = fl.simulate(**build(config))
    _, _, masks = draws.policy().init(result.layers, 20)
    sent = np.asarray(masks)[0] @ result.layers.params
    assert 0 < sent.sum() < 5 * result.layers.params.sum()
    assert result.history["upload_params"][0] == sent.sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partition": {"name": "shards", "clients": 20}}, "has no partition 'shards'; choose iid"),
        (
            {"partition": {"name": "iid", "clients": 20, "seed": 7}},
            "by the run's seed, 25; remove partition.seed=7",
        ),
        (
            {"algorithm": {**HETERO["algorithm"], "depths": [0.5, 0.5]}},
            "a flag 1 to 5 or 'un",
        ),
        (
            {"algorithm": {**HETERO["algorithm"], "keep": 0.5}},
            "no masks for them; got depths=1",
        ),
        ({"algorithm": {**HOMO["algorithm"], "keep": {"fc1": 0.5}}}, "fedlp_homo with one keep"),
        ({"algorithm": {**HOMO["algorithm"], "download": 0.5}}, "receive, but download=0.5"),
    ],
)
def test_what_the_authors_code_does_not_draw_is_refused(change, message, tmp_path):
    with pytest.raises(fl.FedLPError, match=message):
        run({**CONFIG, **change}, tmp_path / "run")
    assert not (tmp_path / "run").exists()
