"""A mask policy: in every round, each client sends one layer, in turn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from small import Steps, dataset

import fedlp_jax as fl
from fedlp_jax.pruning.masks import MaskPolicy, Masks


def one_layer_in_turn():
    """Client k sends layer (round + k) mod L."""

    def init(layers, clients):
        del layers, clients
        return ()  # numbers that may differ between two runs would be kept here

    def sample(key, state, cohort, round, coverage):
        del key
        layers = coverage.shape[1]  # coverage: f32[C, L], 1 = held
        turn = (round + cohort.client) % layers  # i32[C]
        upload = jax.nn.one_hot(turn, layers, dtype=coverage.dtype) * coverage
        keep = jnp.full_like(coverage, 1 / layers)
        return Masks(download=coverage, upload=upload, keep=keep), state

    def expected(layers, clients):
        del clients
        return np.full((1, len(layers)), 1 / len(layers), np.float32)  # for modelled traffic

    return MaskPolicy(init, sample, expected)


def test_one_layer_in_turn():
    data = dataset()
    algorithm = fl.compose(
        fl.classification(Steps()), client_optimizer=optax.sgd(0.1), policy=one_layer_in_turn()
    )
    clients = fl.partition.iid(data.train.labels, clients=4)
    result = fl.simulate(algorithm, data, clients, rounds=2, cohort=4)  # L = 4 = C
    np.testing.assert_array_equal(result.costs.senders, np.ones((2, 4)))
