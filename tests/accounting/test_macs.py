"""MACs against counts by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Steps, dataset

import fedlp_jax as fl
from fedlp_jax.accounting.macs import (
    backward_blocks,
    backward_macs,
    forward_macs,
    relative_work,
)
from fedlp_jax.nn import conv
from fedlp_jax.pruning.layers import layer_table
from fedlp_jax.types import Batch, Normalize


def one_row(shape):
    return Batch(
        jnp.zeros((1, *shape)), jnp.zeros(1, jnp.int32), None, Normalize(np.ones(()), np.zeros(()))
    )


class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.relu(x))
        x = nn.Conv(6, (3, 3), strides=2, feature_group_count=2, name="grouped")(x)
        return nn.Dense(5, name="fc")(x.reshape(x.shape[0], -1))


def test_macs_by_hand():
    task = fl.classification(Mixed())
    example = one_row((8, 8, 4))
    variables = jax.eval_shape(task.init, jax.random.key(0), example)
    macs = forward_macs(task, variables, example)
    assert macs == {
        "conv": 8 * 8 * 8 * (3 * 3 * 4),
        "norm": 4 * 8 * 8 * 8,
        "grouped": 4 * 4 * 6 * (3 * 3 * 4),
        "fc": 4 * 4 * 6 * 5,
    }
    four = Batch(*[jnp.repeat(x, 4, axis=0) for x in example[:2]], None, example.normalize)
    assert forward_macs(task, variables, four) == macs


def test_the_backward_pass_is_cut_by_the_layers_that_need_it():
    task, example = fl.classification(Steps(depth=2)), one_row((4,))
    variables = jax.eval_shape(task.init, jax.random.key(0), example)
    table = layer_table(variables)
    assert table.names == ("head2", "hidden1", "hidden2")
    head, first, second = (frozenset([i]) for i in range(3))
    blocks = dict(backward_blocks(task, variables, example, table))
    assert {needed: macs for needed, macs in blocks.items() if macs} == {
        head: 8 * 3,
        first | second: 8 * 3,  # through the head
        second: 8 * 8,
        first: 8 * 8 + 4 * 8,  # through the second layer; nothing flows below the first
    }
    assert sum(blocks.values()) == backward_macs(task, variables, example)
    private = layer_table({"params": {"hidden1": variables["params"]["hidden1"]}})
    blocks = dict(backward_blocks(task, variables, example, private))
    assert blocks[frozenset()] == 8 * 3 + 8 * 3 + 8 * 8
    assert blocks[frozenset([0])] == 8 * 8 + 4 * 8


@pytest.mark.slow
def test_a_shallow_client_really_runs_a_shallow_network():
    """FLOPs of the compiled round: clients of depth 1 compute no layer of depth 3."""
    data = dataset(features=64)
    clients = fl.partition.iid(data.train.labels, clients=12)
    task = fl.classification(Steps(width=64))
    example = one_row((64,))

    def flops(depth):
        algorithm = fl.fedavg(task.at_depth(depth), client_optimizer=optax.sgd(0.1), batch_size=5)
        run = fl.Simulation(algorithm, data, clients, rounds=1, cohort=4, plan=fl.Plan(1, 1))
        run.compile()
        return run.program.round.cost_analysis()["flops"]

    def macs(depth):
        sub = task.at_depth(depth)
        return sum(forward_macs(sub, sub.init(jax.random.key(0), example), example).values())

    assert macs(1) == 64 * 64 + 64 * 3
    assert macs(3) == 3 * 64 * 64 + 64 * 3
    assert flops(1) / flops(3) == pytest.approx(macs(1) / macs(3), rel=0.3)


class Scanned(nn.Module):
    """One dense layer, scanned five times."""

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
    batch = one_row(shape)
    variables = jax.eval_shape(task.init, jax.random.key(0), batch)
    macs = forward_macs(task, variables, batch)
    return sum(macs.values()), backward_macs(task, variables, batch)


def test_a_scanned_layer_counts_once_per_trip():
    assert counted(Scanned(), (4,))[0] == 5 * 4 * 4


def test_inserted_zeros_do_not_count():
    down, up = 4 * 4 * 6 * 9 * 2, 4 * 4 * 6 * 4 * 5  # results x filter
    forward, backward = counted(Strided(), (8, 8, 2))
    assert forward == down + up
    assert backward == 2 * up + down  # the first layer's inputs need no gradient


def test_counting_stays_out_of_a_recording():
    task = fl.classification(Strided())
    batch = one_row((8, 8, 2))
    variables = jax.eval_shape(task.init, jax.random.key(0), batch)
    with conv.recording() as lowerings:
        assert forward_macs(task, variables, batch) and backward_macs(task, variables, batch)
    assert lowerings == {}


def test_work_of_levels_is_their_forward_macs():
    task, key, example = fl.classification(Steps(width=64)), jax.random.key(0), one_row((64,))
    levels = [task.at_depth(depth) for depth in (1, 3)]
    assert relative_work(levels, key, example) == [64 * 64 + 64 * 3, 3 * 64 * 64 + 64 * 3]
    assert relative_work(levels[:1], key, example) == [1.0]
