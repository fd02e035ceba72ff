"""A loss: cross-entropy plus an L2 penalty on the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Steps, flat

import fedlp_jax as fl
from fedlp_jax.types import Batch, Normalize


def with_l2(task, strength):
    """Adds `strength / 2 |params|^2` to the loss that is minimised; metrics stay as they are."""

    def loss(variables, batch, key):
        value, aux = task.loss(variables, batch, key)
        squares = (jnp.sum(jnp.square(x)) for x in jax.tree.leaves(variables["params"]))
        return value + strength / 2 * sum(squares), aux

    return task._replace(loss=loss)


def test_the_penalty_is_added_to_the_loss():
    plain, key = fl.classification(Steps()), jax.random.key(0)
    penalised = with_l2(plain, strength=0.1)
    one = Normalize(np.ones(()), np.zeros(()))
    batch = Batch(jnp.ones((2, 4)), jnp.array([0, 1], jnp.int32), None, one)
    variables = plain.init(key, batch)
    difference = penalised.loss(variables, batch, key)[0] - plain.loss(variables, batch, key)[0]
    assert difference == pytest.approx(0.05 * np.square(flat(variables["params"])).sum(), rel=1e-4)
    fl.fedavg(penalised, client_optimizer=optax.sgd(0.1))  # any algorithm takes the task
