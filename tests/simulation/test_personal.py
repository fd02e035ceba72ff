"""Layers that stay with their clients: how a run tests them, and what it leaves."""

import jax
import numpy as np
import optax
import pytest
from small import Steps, dataset, flat

import fedlp_jax as fl
from fedlp_jax.data.partition import dealt_alike
from fedlp_jax.simulation.personal import client_batches

TASK = fl.classification(Steps(depth=1, norm=True))
DATA = dataset()
CLIENTS = fl.partition.dirichlet(DATA.train.labels, clients=9, alpha=1.0, seed=1, min_size=2)
SGD = optax.sgd(0.1)
RUN = {"cohort": 4, "plan": fl.Plan(devices=2, width=2)}


def run(rounds=3, personal="head|norm", **settings):
    made = fl.fedavg(TASK, client_optimizer=SGD, personal=personal, batch_size=4)
    return fl.simulate(made, DATA, CLIENTS, rounds=rounds, **RUN | settings)


@pytest.fixture(scope="module")
def result():
    return run(eval_every=2)


def answers(models):
    """Whether each client is right about each test example, `bool[K, N]`."""
    inputs, labels = DATA.test.inputs, DATA.test.labels
    batch = fl.types.Batch(inputs, labels, None, DATA.normalize)
    return np.stack([np.argmax(TASK.outputs(m, batch), -1) == labels for m in models])


def test_each_test_example_is_answered_by_its_client(result):
    order, offset = dealt_alike(CLIENTS, DATA.test.labels)
    owner = np.repeat(np.arange(9), np.diff(offset))
    right = answers(result.models)[owner, order]
    assert result.history["test_accuracy_personal"][-1] == pytest.approx(right.mean())
    assert list(result.history.rounds("test_accuracy_personal")) == [2, 3]
    assert "test_accuracy" not in result.history.keys()  # noqa: SIM118, it has no `in`
    measured = fl.evaluate(TASK, result.models, DATA, CLIENTS)["accuracy"]
    counts = np.bincount(owner, right, minlength=9), np.bincount(owner, minlength=9)
    assert 0 in counts[1]  # a client without test examples
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(measured, counts[0] / counts[1])


def test_models_are_measured_on_all_examples_and_on_their_own(result):
    right = answers(result.models)
    measured = fl.evaluate(TASK, result.models, DATA)["accuracy"]
    np.testing.assert_allclose(measured, right.mean(axis=1))
    assert len(set(measured.tolist())) > 1
    own = fl.partition.iid(DATA.test.labels, clients=9)
    measured = fl.evaluate(TASK, result.models, DATA, own)["accuracy"]
    np.testing.assert_allclose(measured, [right[k, own.rows(k)].mean() for k in range(9)])


def test_only_what_is_shared_travels(result):
    assert result.layers.names == ("hidden1",)
    assert set(result.variables["params"]) == {"hidden1"}
    assert result.costs.total["upload_params"] == 3 * 4 * (4 * 8 + 8)
    chosen = set(result.clients["client"].tolist())
    idle = [k for k in range(9) if k not in chosen]
    assert idle  # they have what all begin with
    start = run(rounds=0, personal="head|norm").models
    for k in range(9):
        unchanged = np.array_equal(
            flat(start[k]["params"]["head1"]), flat(result.models[k]["params"]["head1"])
        )
        assert unchanged == (k in idle)
    assert np.array_equal(flat(start[0]), flat(start[8]))


def test_a_run_begins_with_a_whole_model_that_it_is_given():
    whole = fl.simulate(fl.fedavg(TASK, client_optimizer=SGD), DATA, CLIENTS, rounds=0, **RUN)
    trained = jax.tree.map(lambda x: x + 1, whole.variables)
    given = run(rounds=0, variables=trained)
    assert np.array_equal(flat(given.models[7]), flat(trained))
    with pytest.raises(fl.FedLPError, match="hidden1.* has shape"):
        run(rounds=0, variables=jax.tree.map(lambda x: x[:1], trained))


def test_models_that_cannot_be_measured_are_refused(result):
    few = fl.partition.iid(DATA.test.labels, clients=4)
    with pytest.raises(fl.FedLPError, match="has 4 clients, but there are the models of 9"):
        fl.evaluate(TASK, result.models, DATA, few)
    other = fl.partition.iid(np.arange(9) % 3, clients=9)
    with pytest.raises(fl.FedLPError, match="was not made for the 37 labels of the test split"):
        fl.evaluate(TASK, result.models, DATA, other)
    with pytest.raises(fl.FedLPError, match="no client 9: they count from 0 to 8"):
        result.models[9]
    lacks = "lack head1/bias, head1/kernel, norm1/bias, norm1/scale of the model; .* result.models"
    with pytest.raises(fl.FedLPError, match=lacks):
        fl.evaluate(TASK, result.variables, DATA)


def test_batches_hold_every_row_once_in_the_slots_of_its_level():
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 12, 20)
    offset = np.concatenate([[0], np.cumsum(sizes)])
    order = rng.permutation(int(offset[-1])).astype(np.int32)
    assigned, place = rng.integers(0, 3, 20), np.arange(20)
    batches = client_batches(order, offset, assigned, place, levels=3, devices=3, batch_size=5)
    slots, seen = len(batches.client) // 3, []
    for device, bounds in enumerate(batches.segment):
        for level in range(3):
            for slot in range(*(device * slots + bounds[level : level + 2])):
                client, size = batches.client[slot], batches.size[slot]
                assert assigned[client] == level
                assert batches.place[slot] == client
                assert 1 <= size <= 5
                mine = order[offset[client] : offset[client + 1]]
                assert set(batches.rows[slot, :size]) <= set(mine)
                seen.extend(batches.rows[slot, :size])
    np.testing.assert_array_equal(np.sort(seen), np.arange(offset[-1]))


@pytest.mark.slow
def test_depths_with_personal_layers_are_tested_at_their_own_depth():
    task = fl.classification(Steps(norm=True))
    made = fl.fedlp_hetero(
        task, depths=[0.4, 0.3, 0.3], client_optimizer=SGD, personal="norm", batch_size=4
    )
    result = fl.simulate(made, DATA, CLIENTS, rounds=2, **RUN)
    order, offset = dealt_alike(CLIENTS, DATA.test.labels)
    right = []
    for k in range(9):
        rows = order[offset[k] : offset[k + 1]]
        held, level = DATA.test, result.models.levels[result.models.assigned[k]]
        batch = fl.types.Batch(held.inputs[rows], held.labels[rows], None, DATA.normalize)
        outputs = level.task.outputs(result.models[k], batch) if len(rows) else np.zeros((0, 3))
        right.extend(np.argmax(outputs, -1) == held.labels[rows])
    assert len(set(result.models.assigned.tolist())) == 3
    assert result.history["test_accuracy_personal"][-1] == pytest.approx(np.mean(right))
