"""The ledger against counts by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Steps, dataset

import fedlp_jax as fl
from fedlp_jax.accounting.ledger import Ledger, backward_macs, forward_macs
from fedlp_jax.nn import conv
from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.types import Batch, Normalize

LAYERS = LayerTable(
    tuple("abcdefghi"),  # nine layers: two bytes of mask
    {},
    params=np.arange(1, 10),
    statistics=np.array([0, 2, 0, 0, 0, 0, 0, 0, 0]),
)


def test_sums_follow_the_masks():
    ledger = Ledger(LAYERS, clients=5)
    upload = np.zeros((2, 9))
    upload[0, 1], upload[1, 1], upload[1, 8] = 1, 1, 1
    row = ledger.add(np.array([4, 2]), upload, np.ones((2, 9)))
    assert row["upload_params"] == 2 + 2 + 9
    assert row["download_params"] == 2 * 45
    assert row["upload_bytes"] == 4 * (4 + 4 + 9) + 2 * 2
    assert row["download_bytes"] == 4 * 2 * 47
    assert ledger.client_upload_bytes.tolist() == [0, 0, 4 * 13 + 2, 0, 4 * 4 + 2]
    ledger.add(np.array([4, 2]), upload, np.ones((2, 9)))
    assert ledger.total == {name: 2 * value for name, value in row.items()}
    assert ledger.layer_upload_params.tolist() == [0, 8, 0, 0, 0, 0, 0, 0, 18]


def test_an_empty_ledger_has_totals():
    assert set(Ledger(LAYERS, 5).total.values()) == {0}


def test_a_run_books_what_its_masks_say():
    data = dataset()
    clients = fl.partition.iid(data.train.labels, clients=12)
    common = {"client_optimizer": optax.sgd(0.1), "batch_size": 5}
    task = fl.classification(Steps(norm=True))
    fedavg = fl.simulate(fl.fedavg(task, **common), data, clients, rounds=2, cohort=4)
    params = sum(x.size for x in jax.tree.leaves(fedavg.variables["params"]))
    stats = sum(x.size for x in jax.tree.leaves(fedavg.variables["batch_stats"]))
    assert fedavg.costs.total["upload_params"] == 2 * 4 * params
    assert fedavg.costs.total["download_bytes"] == 2 * 4 * 4 * (params + stats)
    assert fedavg.costs.total["upload_bytes"] == 2 * 4 * (4 * (params + stats) + 1)
    # Depth 1 shares its first layer and norm with the server, and no head.
    depths = np.ones(12, int)
    hetero = fl.simulate(
        fl.fedlp_hetero(task, depths=depths, **common), data, clients, rounds=1, cohort=4
    )
    shared = 4 * 8 + 8 + 2 * 8
    assert hetero.costs.total["upload_params"] == 4 * shared
    assert hetero.costs.total["download_bytes"] == 4 * 4 * (shared + 2 * 8)


class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.relu(x))
        x = nn.Conv(6, (3, 3), strides=2, feature_group_count=2, name="grouped")(x)
        return nn.Dense(5, name="fc")(x.reshape(x.shape[0], -1))


def test_macs_by_hand():
    task = fl.classification(Mixed())
    example = Batch(
        jnp.zeros((1, 8, 8, 4)), jnp.zeros(1, jnp.int32), None, Normalize(np.ones(()), np.zeros(()))
    )
    variables = task.init(jax.random.key(0), example)
    macs = forward_macs(task, variables, example)
    assert macs == {
        "conv": 8 * 8 * 8 * (3 * 3 * 4),
        "norm": 4 * 8 * 8 * 8,
        "grouped": 4 * 4 * 6 * (3 * 3 * 4),
        "fc": 4 * 4 * 6 * 5,
    }
    four = Batch(*[jnp.repeat(x, 4, axis=0) for x in example[:2]], None, example.normalize)
    assert forward_macs(task, variables, four) == macs


def test_a_shallow_client_really_runs_a_shallow_network():
    """FLOPs of the compiled round: a cohort of depth-1 clients is given no layer of depth 3."""
    data = dataset(features=64)
    clients = fl.partition.iid(data.train.labels, clients=12)
    task = fl.classification(Steps(width=64))
    example = Batch(
        jnp.zeros((1, 64)), jnp.zeros(1, jnp.int32), None, Normalize(np.ones(()), np.zeros(()))
    )

    def flops(depth):
        algorithm = fl.fedavg(task.at_depth(depth), client_optimizer=optax.sgd(0.1), batch_size=5)
        run = fl.Simulation(algorithm, data, clients, rounds=1, cohort=4, plan=fl.Plan(1, 1))
        run.compile()
        return run.round_program.cost_analysis()["flops"]

    def macs(depth):
        sub = task.at_depth(depth)
        return sum(forward_macs(sub, sub.init(jax.random.key(0), example), example).values())

    assert macs(1) == 64 * 64 + 64 * 3
    assert macs(3) == 3 * 64 * 64 + 64 * 3
    assert flops(1) / flops(3) == pytest.approx(macs(1) / macs(3), rel=0.3)


class Scanned(nn.Module):
    """Five dense layers as one that is scanned, and a choice of two that nobody makes."""

    @nn.compact
    def __call__(self, x, train):
        del train

        class Cell(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return nn.Dense(4, name="cell")(x), None

        scan = nn.scan(Cell, {"params": 0}, split_rngs={"params": True}, length=5)
        return scan(name="scan")(x, None)[0]


class Strided(nn.Module):
    """A convolution of stride 2, and its transpose."""

    @nn.compact
    def __call__(self, x, train):
        del train
        x = nn.Conv(6, (3, 3), strides=2, name="down")(x)
        x = nn.ConvTranspose(5, (2, 2), strides=(2, 2), name="up")(x)
        return x.reshape(x.shape[0], -1)


def counted(module, shape):
    task = fl.classification(module)
    batch = Batch(
        jnp.zeros((1, *shape)), jnp.zeros(1, jnp.int32), None, Normalize(np.ones(()), np.zeros(()))
    )
    variables = jax.eval_shape(task.init, jax.random.key(0), batch)
    macs = forward_macs(task, variables, batch)
    return sum(macs.values()), backward_macs(task, variables, batch)


def test_a_scanned_layer_counts_as_often_as_it_is_run():
    assert counted(Scanned(), (4,))[0] == 5 * 4 * 4


def test_zeros_that_are_put_between_count_for_nothing():
    down, up = 4 * 4 * 6 * 9 * 2, 4 * 4 * 6 * 4 * 5  # results x filter
    forward, backward = counted(Strided(), (8, 8, 2))
    assert forward == down + up
    assert backward == 2 * up + down  # the first layer's inputs need no gradient


def test_counting_leaves_no_trace_in_a_record():
    task = fl.classification(Strided())
    one = np.ones(()), np.zeros(())
    batch = Batch(jnp.zeros((1, 8, 8, 2)), jnp.zeros(1, jnp.int32), None, Normalize(*one))
    variables = jax.eval_shape(task.init, jax.random.key(0), batch)
    with conv.recording() as found:
        assert forward_macs(task, variables, batch) and backward_macs(task, variables, batch)
    assert found == {}
