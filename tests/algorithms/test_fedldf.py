"""What FedLDF refuses, and which clients it chooses among those that arrive."""

import numpy as np
import optax
import pytest
from small import Steps, dataset

import fedlp_jax as fl

DATA = dataset()
CLIENTS = fl.partition.dirichlet(DATA.train.labels, clients=6, alpha=1.0, seed=1, min_size=2)
TASK = fl.classification(Steps(depth=1))
COMMON = {"client_optimizer": optax.sgd(0.1), "batch_size": 4}


def test_of_fewer_clients_than_senders_all_that_arrive_send():
    made = fl.fedldf(TASK, senders=3, **COMMON)
    run = {"rounds": 2, "cohort": 5, "faults": fl.Faults(dropout=0.5), "plan": fl.Plan(1, 1)}
    result = fl.simulate(made, DATA, CLIENTS, seed=1, **run)
    arrived = np.array(result.history["arrived"])
    assert arrived.min() < 3 <= arrived.max()
    expected = np.minimum(arrived, 3)
    np.testing.assert_array_equal(np.stack(result.costs.senders), np.stack([expected] * 2, axis=1))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(fl.FedLPError, match="clients of a layer=0"):
        fl.fedldf(TASK, senders=0, **COMMON)
    with pytest.raises(fl.FedLPError, match="omit upload, or use fl.fedlp_q"):
        fl.fedldf(TASK, senders=1, upload=fl.quantize(levels=3), **COMMON)
    made = fl.fedldf(TASK, senders=4, **COMMON)
    with pytest.raises(
        fl.FedLPError, match="senders=4 exceeds the 3 clients of a server step; lower"
    ):
        fl.Simulation(made, DATA, CLIENTS, rounds=1, cohort=3)
