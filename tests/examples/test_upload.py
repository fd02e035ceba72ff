"""An upload of signs: one bit a value, and the layer's mean magnitude as a float."""

import jax.numpy as jnp
import numpy as np
import optax
from small import Steps, dataset

import fedlp_jax as fl
from fedlp_jax.aggregation.uploads import Message, Upload


def signs():
    """`mean |u| sign(u)` of a layer's update u."""

    def apply(key, message, sent, state):
        size = jnp.abs(message.values).mean()
        values = jnp.where(message.values < 0, -size, size)
        bits = jnp.minimum(message.bits, 1)  # what an upload before this dropped stays dropped
        return Message(values, bits, message.other_bits + 32), state

    def bits(n, value_bits, present):
        return 1, present, 32

    return Upload(apply, bits)


def test_a_round_moves_by_signs_and_books_their_bits():
    data = dataset()
    clients = fl.partition.iid(data.train.labels, clients=3)
    settings = {"client_optimizer": optax.sgd(0.1), "batch_size": 60}
    task = fl.classification(Steps(depth=1))
    algorithm = fl.fedavg(task, upload=signs(), **settings)
    start = fl.simulate(algorithm, data, clients, rounds=0, cohort=1).variables
    result = fl.simulate(algorithm, data, clients, rounds=1, cohort=1, variables=start)
    moved = result.variables["params"]["hidden1"]["kernel"] - start["params"]["hidden1"]["kernel"]
    np.testing.assert_allclose(np.abs(moved), np.abs(moved).mean(), rtol=1e-4)
    bits = result.layers.params.sum() + 32 * len(result.layers)
    mask_bytes = -(-len(result.layers) // 8)
    assert result.history["upload_bytes"][0] == -(-bits // 8) + mask_bytes
