"""What a round is on accelerators, shown on its program lowered for them, without having one."""

import dataclasses
import re

import jax
import numpy as np
import optax
import pytest
from small import Steps, dataset

import fedlp_jax as fl
from benchmarks import parts
from benchmarks.workloads import WORKLOADS
from fedlp_jax.simulation.program import rounds_of


@pytest.fixture(scope="module")
def traced():
    """A round of the reference CNN on four devices, traced once."""
    data = fl.load("synthetic", examples=64, shape=(32, 32, 3), num_classes=10, seed=0)
    clients = fl.partition.iid(data.train.labels, clients=16, seed=0)
    task = fl.classification(fl.models.FedLPCNN(num_classes=10))
    algorithm = fl.fedlp_homo(task, keep=0.5, client_optimizer=optax.adam(1e-3), batch_size=2)
    plan = fl.Plan(devices=4, width=4)
    run = fl.Simulation(algorithm, data, clients, rounds=1, cohort=16, plan=plan)
    return rounds_of(algorithm, run.plan).trace(*run.round_shapes(run.plan))


@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
def test_a_round_is_products_and_one_reduction(traced, platform):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.convolution" not in text  # vmapped over kernels it would be a grouped one
    assert (
        text.count("stablehlo.dot_general") >= 8 * 3 - 1
    )  # the first layer needs no input gradient
    assert text.count("stablehlo.all_reduce") == 1
    for word in ("all_gather", "all_to_all", "collective_permute", "infeed", "outfeed", "callback"):
        assert word not in text
    donated = text.count("tf.aliasing_output") + text.count("jax.buffer_donor")
    assert donated > 40  # the server's state is updated in place


# What an accelerator runs: loops whose bounds are constants.


@pytest.fixture
def accelerator(monkeypatch):
    """Plans as on an accelerator."""
    monkeypatch.setattr(fl.Plan, "known_trip_counts", True)


def loops(text):
    """For each loop of a StableHLO program, whether a constant bounds it."""
    found = []
    for condition in re.findall(r"stablehlo\.while.*?\n\s*cond \{\n(.*?)\n\s*\} do \{", text, re.S):
        constants = set(re.findall(r"(%\w+) = stablehlo\.constant dense<-?\d+>", condition))
        bounds = re.findall(r"stablehlo\.compare\s+LT, %\w+, (%\w+)", condition)
        found.append(len(bounds) == 1 and bounds[0] in constants)
    assert len(found) == text.count("stablehlo.while")
    return found


def program(algorithm, data, clients, plan, cohort, **settings):
    """A round lowered for cuda."""
    run = fl.Simulation(algorithm, data, clients, rounds=4, cohort=cohort, plan=plan, **settings)
    traced = rounds_of(algorithm, run.plan).trace(*run.round_shapes(run.plan))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture(scope="module")
def uneven():
    data = fl.load("synthetic", examples=400, shape=(8, 8, 1), num_classes=10, seed=0)
    return data, fl.partition.dirichlet(
        data.train.labels, clients=20, alpha=0.1, seed=0, min_size=1
    )


def small(**settings):
    task = fl.classification(fl.models.MLP(num_classes=10, hidden=(16,)))
    return fl.fedlp_homo(
        task, keep=0.5, client_optimizer=optax.sgd(0.1, 0.9), batch_size=8, **settings
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["W1", "W2", "W3", "W4"])
def test_loops_of_the_workloads_have_constant_bounds(accelerator, name):
    workload = dataclasses.replace(WORKLOADS[name], data="synthetic")
    workload = dataclasses.replace(workload, clients=workload.cohort)
    data = parts.dataset(workload)
    clients = parts.partition(workload, data)
    text = program(parts.algorithm(workload), data, clients, fl.Plan(width=128), workload.cohort)
    assert loops(text) and all(loops(text))


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("work", [{"epochs": 2}, {"steps": 7}])
@pytest.mark.parametrize("faults", [None, fl.Faults(dropout=0.3)])
def test_loops_of_uneven_and_lost_clients_have_constant_bounds(
    accelerator, uneven, width, work, faults
):
    plan = fl.Plan(devices=2, width=width, rounds_at_once=2)
    text = program(small(**work), *uneven, plan, 10, faults=faults)
    assert loops(text) and all(loops(text))


@pytest.mark.slow
def test_loops_of_levels_have_constant_bounds(accelerator):
    data = dataset()
    clients = fl.partition.quantity(data.train.labels, clients=8, alpha=1.0, seed=0, min_size=1)
    task = fl.classification(Steps())
    algorithm = fl.fedlp_hetero(
        task, depths="uniform", client_optimizer=optax.sgd(0.1), batch_size=2
    )
    text = program(algorithm, data, clients, fl.Plan(width=4), 8)
    assert loops(text) and all(loops(text))


def test_levels_side_by_side_share_their_loops(accelerator):
    data = dataset()
    clients = fl.partition.iid(data.train.labels, clients=12, seed=0)
    algorithm = fl.fedlp_hetero(
        fl.classification(Steps(depth=2)),
        depths="uniform",
        heads="shared",
        client_optimizer=optax.sgd(0.1),
        batch_size=5,
    )
    text = program(algorithm, data, clients, fl.Plan(1, 4, levels="side_by_side"), 8)
    assert text.count("stablehlo.dot_general") > 10  # of both levels
    assert loops(text) == 4 * [True]  # chunks, epochs, steps; and one that finds a bucket


def test_the_check_finds_a_bound_that_the_device_computes(uneven):
    text = program(small(epochs=2), *uneven, fl.Plan(devices=2, width=4), 10)
    assert not all(loops(text))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "work", "faults"),
    [
        (4, {"epochs": 2}, None),
        (4, {"steps": 7}, None),
        (1, {"epochs": 1}, fl.Faults(dropout=0.3)),
        (16, {"steps": 7}, fl.Faults(dropout=0.3)),
    ],
)
def test_constant_bounds_change_no_result(monkeypatch, uneven, width, work, faults):
    plan = fl.Plan(devices=2, width=width, rounds_at_once=2)
    results = []
    with jax.enable_x64(True):
        for known in (False, True):
            monkeypatch.setattr(fl.Plan, "known_trip_counts", known)
            settings = {"cohort": 10, "plan": plan, "faults": faults, "variables": float64(uneven)}
            results.append(fl.simulate(small(**work), *uneven, rounds=3, **settings))
    ours, theirs = results
    for name in ("upload_bytes", "train_accuracy"):
        np.testing.assert_array_equal(ours.history[name], theirs.history[name])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-12),
        ours.variables,
        theirs.variables,
    )


def float64(uneven):
    first = fl.simulate(small(), *uneven, rounds=0, cohort=1).variables
    return jax.tree.map(lambda x: np.asarray(x, np.float64), first)
