"""An algorithm: FedProx (Li et al., arXiv:1812.06127), as a transform of the client optimizer."""

import jax
import numpy as np
import optax
from small import Steps, dataset, flat

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


def test_fedprox_keeps_clients_near_the_server():
    data = dataset()
    clients = fl.partition.iid(data.train.labels, clients=4)
    task, sgd = fl.classification(Steps()), optax.sgd(0.1)

    def trained(algorithm):
        return flat(fl.simulate(algorithm, data, clients, rounds=1, cohort=4).variables)

    fedavg = trained(fl.fedavg(task, client_optimizer=sgd, epochs=5, batch_size=5))
    free, near = (
        trained(fedprox(task, mu=mu, client_optimizer=sgd, epochs=5, batch_size=5))
        for mu in (0.0, 5.0)
    )
    start = trained(fl.fedavg(task, client_optimizer=optax.sgd(0.0)))
    np.testing.assert_allclose(free, fedavg, rtol=1e-5, atol=1e-6)
    assert np.linalg.norm(near - start) < 0.7 * np.linalg.norm(fedavg - start)
