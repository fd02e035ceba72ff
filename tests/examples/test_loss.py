"""A loss: cross-entropy plus an L2 penalty on the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from small import Steps, dataset, flat

import fedlp_jax as fl


def with_l2(task, strength):
    """Adds `strength / 2 |params|^2` to the loss that is minimised; metrics stay as they are."""

    def loss(variables, batch, key):
        value, aux = task.loss(variables, batch, key)
        squares = (jnp.sum(jnp.square(x)) for x in jax.tree.leaves(variables["params"]))
        return value + strength / 2 * sum(squares), aux

    return task._replace(loss=loss)


def test_a_penalty_shrinks_the_parameters():
    data = dataset()
    clients = fl.partition.iid(data.train.labels, clients=4)
    task = fl.classification(Steps())
    norms = []
    for strength in (0.0, 1.0):
        algorithm = fl.fedavg(with_l2(task, strength), client_optimizer=optax.sgd(0.1))
        result = fl.simulate(algorithm, data, clients, rounds=3, cohort=4)
        norms.append(np.linalg.norm(flat(result.variables["params"])))
    assert norms[1] < norms[0]
