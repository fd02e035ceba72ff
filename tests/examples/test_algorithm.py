"""An algorithm: FedProx (Li et al., arXiv:1812.06127), as a transform of the client optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from small import dataset

import fedlp_jax as fl


def proximal(mu):
    """Adds `mu (x - x_0)` to the gradient; x_0 is the model that the client received.

    A client's optimizer is initialised at that model, so it is this transform's state.
    """

    def update(gradient, received, params):
        pulled = jax.tree.map(lambda g, x, x0: g + mu * (x - x0), gradient, params, received)
        return pulled, received

    return optax.GradientTransformation(init=lambda params: params, update=update)


def fedprox(task, *, mu, client_optimizer, **settings):
    """FedAvg in which clients minimise `f_k(x) + mu / 2 |x - x_0|^2`."""
    optimizer = optax.chain(proximal(mu), client_optimizer)
    return fl.compose(task, client_optimizer=optimizer, **settings)


def test_the_pull_is_towards_the_model_received():
    transform = proximal(mu=2.0)
    pulled, _ = transform.update(jnp.array([1.0]), transform.init(jnp.array([3.0])), jnp.ones(1))
    np.testing.assert_array_equal(pulled, [1.0 + 2.0 * (1.0 - 3.0)])


def test_fedprox_trains():
    data = dataset()
    clients = fl.partition.iid(data.train.labels, clients=4)
    task = fl.classification(fl.models.Logistic(num_classes=3))
    algorithm = fedprox(task, mu=0.1, client_optimizer=optax.sgd(0.1), epochs=5)
    loss = fl.simulate(algorithm, data, clients, rounds=10, cohort=4).history["train_loss"]
    assert loss[-1] < 0.8 * loss[0]
