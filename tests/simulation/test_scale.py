"""Many clients at once, shallow clients that are cheap, and learning on real data."""

import os

import jax
import numpy as np
import optax
import pytest

import fedlp_jax as fl
from fedlp_jax.accounting.macs import forward_macs
from fedlp_jax.data.batching import example_of
from fedlp_jax.nn.conv import using
from fedlp_jax.types import Batch, Examples, Normalize

WIDE = fl.models.MLP(hidden=(512, 128, 128, 64, 32), num_classes=10)


@pytest.mark.slow
def test_512_clients_train_side_by_side_on_one_device():
    data = fl.load("synthetic", examples=1024, shape=(784,), num_classes=10, seed=0)
    clients = fl.partition.iid(data.train.labels, clients=512, seed=0)
    algorithm = fl.fedlp_homo(
        fl.classification(WIDE), keep=0.5, client_optimizer=optax.sgd(0.1), batch_size=2
    )

    def run(width):
        plan = fl.Plan(devices=1, width=width)
        return fl.simulate(algorithm, data, clients, rounds=1, cohort=512, seed=0, plan=plan)

    together, alone = run(512), run(1)
    assert (together.plan.devices, together.plan.width) == (1, 512)
    assert together.history["clients"].tolist() == [512]
    assert np.array_equal(together.costs.senders, alone.costs.senders)
    for x, y in zip(
        jax.tree.leaves(together.variables), jax.tree.leaves(alone.variables), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def flops(program, *arguments):
    return jax.jit(program).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.slow
def test_a_shallow_client_really_runs_a_shallow_network():
    """FLOP of the compiled training step, and of the whole round, on the reference CNN.

    XLA counts the body of a loop once, so that a round with a loop for each depth has the sum over
    depths of one step's FLOP; padding every depth to the deepest would give five times the last.
    Convolutions are unfolded, which multiplies as often as MACs count; Winograd's tiles save half.
    """
    with using("patches"):
        shallow_networks()


def shallow_networks():
    shape = (16, 16, 3)
    data = fl.load("synthetic", examples=40, shape=shape, num_classes=10, seed=0)
    clients = fl.partition.iid(data.train.labels, clients=10, seed=0)
    task = fl.classification(fl.models.FedLPCNN(num_classes=10))
    normalize = Normalize(np.ones((), np.float32), np.zeros((), np.float32))
    batch = Batch(np.zeros((4, *shape), np.float32), np.zeros(4, np.int32), None, normalize)
    key = jax.random.key(0)
    steps, macs = [], []
    for depth in range(1, 6):
        level = task.at_depth(depth)
        example = example_of(Examples(batch.inputs, batch.labels, normalize))
        variables = level.init(key, example)
        macs.append(sum(forward_macs(level, variables, example).values()))
        steps.append(flops(jax.grad(lambda v, task=level: task.loss(v, batch, key)[0]), variables))
    share, modelled = np.array(steps) / steps[-1], np.array(macs) / macs[-1]
    np.testing.assert_allclose(share, modelled, atol=0.01)
    assert share[0] < 0.3

    hetero = fl.fedlp_hetero(task, depths="uniform", client_optimizer=optax.sgd(0.1), batch_size=4)
    run = fl.Simulation(
        hetero, data, clients, rounds=1, cohort=10, plan=fl.Plan(devices=1, width=1)
    )
    run.compile()
    whole = run.program.round.cost_analysis()["flops"]
    assert sum(steps) < whole < 1.05 * sum(steps)


@pytest.mark.real_data
@pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="TFDS_DATA_DIR is not set")
@pytest.mark.slow
def test_fedavg_and_half_of_its_layers_learn_mnist():
    """FedAvg passes 90% within 20 rounds, and FedLP-Homo(0.5) is within 2 points of it."""
    data = fl.load("mnist")
    clients = fl.partition.iid(data.train.labels, clients=100, seed=0)
    task = fl.classification(WIDE)
    accuracy = {}
    for keep in (1.0, 0.5):
        algorithm = fl.fedlp_homo(
            task,
            keep=keep,
            client_optimizer=optax.sgd(0.01, momentum=0.5),
            epochs=1,
            batch_size=10,
        )
        result = fl.simulate(
            algorithm, data, clients, rounds=20, cohort=10, plan=fl.Plan(devices=2)
        )
        accuracy[keep] = result.history["test_accuracy"][-1]
    assert accuracy[1.0] > 0.9
    assert abs(accuracy[0.5] - accuracy[1.0]) < 0.02
