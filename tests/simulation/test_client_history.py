"""What a run knows of each client: who took part, its numbers, and what became of it."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from small import Steps, dataset

import fedlp_jax as fl
from fedlp_jax.simulation.client_history import OUTCOMES, ClientHistory

DATA = dataset()
CLIENTS = fl.partition.quantity(DATA.train.labels, clients=12, alpha=3.0, seed=0)
TASK = fl.classification(Steps())
COMMON = {"client_optimizer": optax.sgd(0.1), "epochs": 2, "batch_size": 4}


def run(algorithm, **settings):
    settings = {"rounds": 3, "cohort": 5, "plan": fl.Plan(2, 1)} | settings
    return fl.simulate(algorithm, settings.pop("data", DATA), CLIENTS, **settings)


@pytest.fixture(scope="module")
def homo():
    return run(fl.fedlp_homo(TASK, keep=0.5, **COMMON))


def test_there_is_a_row_for_each_client_of_each_round(homo):
    clients = homo.clients
    assert len(clients) == 15 and clients["round"].tolist() == [1] * 5 + [2] * 5 + [3] * 5
    ids = clients["client"].reshape(3, 5)
    assert (np.diff(ids, axis=1) > 0).all()
    assert np.array_equal(clients["examples"], CLIENTS.sizes[clients["client"]])
    assert set(clients["outcome"]) == {"arrived"} and not clients["corrupt"].any()
    shapes = {key: column.shape for key, column in clients.columns().items()}
    assert shapes.pop("layers") == (len(homo.layers),)
    assert shapes.pop("kept") == (15, len(homo.layers)) and set(shapes.values()) == {(15,)}


def test_the_rows_of_a_round_add_up_to_its_row(homo):
    for round in (1, 2, 3):
        here = homo.clients["round"] == round
        seen = homo.clients["examples"][here]  # both epochs show all of them
        for name in ("loss", "accuracy"):
            mean = np.average(homo.clients[name][here], weights=seen)
            assert mean == pytest.approx(homo.history[f"train_{name}"][round - 1], rel=1e-5)
        senders = homo.clients["kept"][here].sum(axis=0)
        assert senders.tolist() == homo.costs.senders[round - 1].tolist()


def test_a_plan_changes_no_row(homo):
    other = run(fl.fedlp_homo(TASK, keep=0.5, **COMMON), plan=fl.Plan(1, 4)).clients
    for key, column in homo.clients.columns().items():
        if key in ("loss", "accuracy"):
            np.testing.assert_allclose(column, other[key], rtol=1e-4)
        else:
            assert np.array_equal(column, other.columns()[key]), key


@pytest.mark.slow
def test_levels_are_those_of_the_submodels():
    result = run(fl.fedlp_hetero(TASK, depths="uniform", **COMMON), rounds=1)
    level, kept = result.clients["level"], result.clients["kept"]
    shallow = kept[:, result.layers.names.index("hidden3")]
    assert len(set(level)) > 1 and np.array_equal(shallow, level == 2)


def test_what_became_of_a_client_is_said_and_the_lost_have_no_numbers():
    faults = fl.Faults(availability=0.7, dropout=0.3, corruption=fl.Corruption("sign_flip", 0.3))
    result = run(fl.fedavg(TASK, **COMMON), rounds=4, cohort=10, faults=faults)
    outcome, arrived = result.clients["outcome"], result.clients["outcome"] == "arrived"
    for name in ("unavailable", "dropped", "arrived"):
        counts = [int((outcome[result.clients["round"] == r] == name).sum()) for r in (1, 2, 3, 4)]
        assert counts == result.history[name].tolist() and sum(counts) > 0
    assert (result.clients["corrupt"] & arrived).sum() == result.history["corrupt"].sum()
    assert np.isnan(result.clients["loss"][~arrived]).all()
    assert np.isfinite(result.clients["loss"][arrived]).all()
    assert not result.clients["kept"][~arrived].any()


@pytest.mark.filterwarnings("ignore:round 1")
def test_a_client_that_is_not_finite_is_left_out():
    inputs = DATA.train.inputs.copy()
    inputs[CLIENTS.rows(3)] = 3e38
    data = fl.from_arrays(inputs, DATA.train.labels, *DATA.test)
    algorithm = fl.fedavg(fl.classification(nn.Dense(3)), **COMMON)
    clients = run(algorithm, rounds=1, cohort=12, data=data).clients
    assert clients["client"][clients["outcome"] == "left_out"].tolist() == [3]


def test_it_survives_a_resume(tmp_path, homo):
    saved = fl.Checkpoint(tmp_path, every=1)
    algorithm = fl.fedlp_homo(TASK, keep=0.5, **COMMON)
    run(algorithm, rounds=2, checkpoint=saved)
    resumed = run(algorithm, checkpoint=saved, resume=saved.latest()).clients
    for key, column in resumed.columns().items():
        assert np.array_equal(column, homo.clients.columns()[key]), key


def test_quantiles_and_latest_values(homo):
    clients = homo.clients
    table = clients.quantiles("loss", [0, 0.5, 1])
    for row, part in zip(table, np.split(clients["loss"], 3), strict=True):
        np.testing.assert_allclose(row, [part.min(), np.median(part), part.max()], rtol=1e-6)
    assert clients.quantiles("examples").shape == (3, 5)
    assert clients.quantiles("accuracy", 0.9).shape == (3, 1)
    latest = clients.latest("accuracy")
    never = np.setdiff1d(np.arange(12), clients["client"])
    assert np.array_equal(np.flatnonzero(np.isnan(latest)), never)
    last = clients["client"] == clients["client"][-1]
    assert latest[clients["client"][-1]] == clients["accuracy"][last][-1]


def test_a_round_without_numbers_has_no_quantiles(homo):
    faults = fl.Faults(availability=0.05)
    clients = run(fl.fedavg(TASK, **COMMON), faults=faults, cohort=1, rounds=4).clients
    nobody = clients["outcome"] != "arrived"
    assert nobody.any() and np.array_equal(np.isnan(clients.quantiles("loss")[:, 0]), nobody)


def test_what_is_no_column_is_refused(homo):
    with pytest.raises(KeyError, match="no 'acuracy'; there are: round, client, level, examples"):
        homo.clients["acuracy"]
    with pytest.raises(fl.FedLPError, match="'outcome' has no quantiles; columns of numbers are"):
        homo.clients.quantiles("outcome")
    with pytest.raises(fl.FedLPError, match=r"q=1.5 must be a number in \[0, 1\]"):
        homo.clients.quantiles("loss", [0.5, 1.5])


def test_it_is_small(homo):
    assert homo.clients.arrays()["rows"].nbytes == 15 * (14 + 1 + 2 * 4)
    empty = ClientHistory()
    assert len(empty) == 0 and empty["outcome"].shape == (0,) and empty.quantiles("loss").size == 0
    assert OUTCOMES[:2] == ("arrived", "unavailable")
    assert jax.tree.leaves(empty.columns()["kept"].shape) == [0, 0]
