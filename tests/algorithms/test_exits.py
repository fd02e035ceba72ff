"""Exits of InclusiveFL and DepthFL; their rounds are in test_family.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Steps, dataset, flat

import fedlp_jax as fl
from fedlp_jax.accounting.macs import forward_macs
from fedlp_jax.data.batching import example_of
from fedlp_jax.tasks.flax_adapter import network
from fedlp_jax.tasks.supervised import supervised
from fedlp_jax.types import Examples

DATA = dataset()
CLIENTS = 9
POPULATION = fl.partition.iid(DATA.train.labels, clients=CLIENTS)
TASK = fl.classification(Steps())
EXAMPLE = example_of(Examples(DATA.train.inputs, DATA.train.labels, DATA.normalize))
LOCAL = {"client_optimizer": optax.sgd(0.125), "batch_size": 4}


def test_exits_update_the_statistics_they_share_once():
    task = fl.classification(Steps(norm=True))
    made = fl.depthfl(task, depths="uniform", **LOCAL)
    variables = made.init(jax.random.key(0), EXAMPLE, CLIENTS, None).variables
    batch = EXAMPLE._replace(inputs=DATA.train.inputs[:5], labels=DATA.train.labels[:5])
    level = made.levels(variables, EXAMPLE)[2]
    value, aux = level.task.loss(variables, batch, jax.random.key(1))
    parts = [task.at_depth(d).loss(variables, batch, jax.random.key(1)) for d in (1, 2, 3)]
    np.testing.assert_allclose(value, sum(loss for loss, _ in parts), rtol=1e-6)
    np.testing.assert_array_equal(flat(aux.statistics), flat(parts[2][1].statistics))
    np.testing.assert_array_equal(flat(aux.metrics), flat(parts[2][1].metrics))


def test_layers_that_exits_share_count_once():
    made = fl.depthfl(TASK, depths="uniform", **LOCAL)
    variables = made.init(jax.random.key(0), EXAMPLE, CLIENTS, None).variables
    levels = made.levels(variables, EXAMPLE)
    macs = [sum(forward_macs(x.task, variables, EXAMPLE).values()) for x in levels]
    hidden, head = np.array([4 * 8, 8 * 8, 8 * 8]), 8 * 3
    np.testing.assert_array_equal(macs, hidden.cumsum() + head * np.arange(1, 4))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(fl.FedLPError, match="consistency=-1 must be a number"):
        fl.depthfl(TASK, depths=1, consistency=-1, **LOCAL)
    with pytest.raises(fl.FedLPError, match="ramp=3 raises consistency, which is 0"):
        fl.depthfl(TASK, depths=1, ramp=3, **LOCAL)
    for alpha in (0.0, 0.1):  # it sets these itself, and leaves out nothing in silence
        with pytest.raises(TypeError, match="submodels"):
            fl.depthfl(TASK, depths=1, alpha=alpha, submodels=fl.submodel.whole(), **LOCAL)
    with pytest.raises(fl.FedLPError, match="this model has no depths"):
        made = fl.depthfl(fl.classification(fl.models.Logistic()), depths=1, **LOCAL)
        fl.simulate(made, DATA, POPULATION, rounds=1, cohort=2)


def test_consistency_needs_classes_and_not_whole_numbers():
    made = fl.depthfl(fl.regression(Steps(classes=1)), depths=1, consistency=1, **LOCAL)
    example = EXAMPLE._replace(labels=jnp.zeros(1, jnp.int32))
    with pytest.raises(fl.FedLPError, match="use fl.classification, .* or consistency=0"):
        made.task.check((1, 1), example, 0)


def test_consistency_takes_a_task_of_ones_own_that_heeds_classes():
    own = supervised(network(Steps()), lambda out, batch: {}, lambda *arguments: None, ("loss",))
    made = fl.depthfl(own._replace(heeds_classes=True), depths=1, consistency=1, **LOCAL)
    made.task.check((1, 3), EXAMPLE, 3)
    made = fl.depthfl(own, depths=1, consistency=1, **LOCAL)
    with pytest.raises(fl.FedLPError, match="of your own with heeds_classes"):
        made.task.check((1, 3), EXAMPLE, 3)
