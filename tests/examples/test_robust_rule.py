"""A robust rule: the coordinate-wise midrange of the clients that sent a layer."""

import jax.numpy as jnp
import numpy as np
import optax
from small import dataset

import fedlp_jax as fl


def midrange(rows, votes, number):
    """Halfway between the smallest and the largest update, coordinate by coordinate.

    Args:
      rows: `f32[C, n]`, the updates of one layer.
      votes: `f32[C]`; 0 = not sent.
      number: setting of the rule; this one has none.
    """
    del number
    sent = (votes > 0)[:, None]  # the rows of the others are zero
    low = jnp.where(sent, rows, jnp.inf).min(axis=0)
    high = jnp.where(sent, rows, -jnp.inf).max(axis=0)
    return (low + high) / 2


def test_clients_that_did_not_send_have_no_say():
    rows = jnp.array([[1.0, 4.0], [3.0, -2.0], [0.0, 0.0]])
    value = midrange(rows, jnp.array([1.0, 2.0, 0.0]), ())
    np.testing.assert_array_equal(value, [2.0, 1.0])


def test_it_is_an_aggregator():
    data = dataset()
    clients = fl.partition.iid(data.train.labels, clients=4)
    algorithm = fl.fedlp_homo(
        fl.classification(fl.models.Logistic(num_classes=3)),
        keep=0.5,
        client_optimizer=optax.sgd(0.1),
        aggregator=fl.robust.by_layer(midrange),
    )
    assert len(fl.simulate(algorithm, data, clients, rounds=1, cohort=4).history) == 1
