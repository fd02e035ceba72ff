"""FedLDF against the clients of FedAvg, one at a time."""

import jax
import numpy as np
import optax
import pytest
from small import Steps, dataset, in_float64

import fedlp_jax as fl

DATA = dataset()
CLIENTS = fl.partition.dirichlet(DATA.train.labels, clients=6, alpha=1.0, seed=1, min_size=2)
TASK = fl.classification(Steps(depth=1))
COMMON = {"client_optimizer": optax.sgd(0.1), "batch_size": 4}
LAYERS = ("head1", "hidden1")
CHOSEN = [0, 2, 3, 5]


@pytest.fixture(scope="module")
def start():
    shape = fl.simulate(fl.fedavg(TASK, **COMMON), DATA, CLIENTS, rounds=0, cohort=1)
    with jax.enable_x64(True):
        return in_float64(shape.variables)


def run(made, start, ids, plan=(2, 2)):
    with jax.enable_x64(True):
        return fl.simulate(
            made,
            DATA,
            CLIENTS,
            rounds=1,
            cohort=lambda *_: ids,
            variables=start,
            plan=fl.Plan(*plan),
        )


def layer(variables, name):
    parts = variables["params"][name]
    return np.concatenate([np.asarray(parts[p], np.float64).ravel() for p in ("kernel", "bias")])


@pytest.fixture(scope="module")
def moves(start):
    """How far each client moves each layer."""
    made = fl.fedavg(TASK, **COMMON)
    ends = {k: run(made, start, [k], (1, 1)).state.variables for k in CHOSEN}
    return {n: {k: layer(x, n) - layer(start, n) for k, x in ends.items()} for n in LAYERS}


def test_the_clients_that_moved_a_layer_most_send_it(start, moves):
    result = run(fl.fedldf(TASK, senders=2, **COMMON), start, CHOSEN)
    chosen = set()
    for name in LAYERS:
        largest = sorted(CHOSEN, key=lambda k: -np.linalg.norm(moves[name][k]))[:2]
        weights = CLIENTS.sizes[largest]
        mean = np.average([moves[name][k] for k in largest], axis=0, weights=weights)
        got = layer(result.state.variables, name) - layer(start, name)
        np.testing.assert_allclose(got, mean, rtol=1e-9, atol=1e-12)
        kept = result.clients["kept"][:, result.layers.names.index(name)]
        assert set(np.asarray(CHOSEN)[kept]) == set(largest)
        chosen.add(tuple(largest))
    assert result.costs.total["upload_params"] == 2 * result.layers.params.sum()
    # Of each client the mask and a number for each of two layers.
    reports = len(CHOSEN) * (1 + 2 * 4)
    assert result.costs.total["upload_bytes"] == 2 * 4 * result.layers.params.sum() + reports


@pytest.mark.slow
def test_all_clients_are_fedavg_and_plans_do_not_matter(start):
    everybody = run(fl.fedldf(TASK, senders=4, **COMMON), start, CHOSEN)
    average = run(fl.fedavg(TASK, **COMMON), start, CHOSEN)
    other = run(fl.fedldf(TASK, senders=4, **COMMON), start, CHOSEN[::-1], (1, 1))
    for name in LAYERS:
        got = layer(everybody.state.variables, name)
        for same in (average, other):
            np.testing.assert_allclose(layer(same.state.variables, name), got, rtol=1e-9)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(fl.FedLPError, match="clients of a layer=0"):
        fl.fedldf(TASK, senders=0, **COMMON)
    with pytest.raises(fl.FedLPError, match="omit upload, or use fl.fedlp_q"):
        fl.fedldf(TASK, senders=1, upload=fl.quantize(levels=3), **COMMON)
