"""evaluate: any model on any split, as a whole or for each client."""

import jax
import numpy as np
import optax
import pytest
from small import Steps, dataset

import fedlp_jax as fl
from fedlp_jax.simulation import evaluation

TASK = fl.classification(Steps(depth=1, norm=True))
DATA = dataset(examples=60)


@pytest.fixture(scope="module")
def result():
    algorithm = fl.fedavg(TASK, client_optimizer=optax.sgd(0.1), batch_size=8)
    clients = fl.partition.iid(DATA.train.labels, clients=4)
    return fl.simulate(algorithm, DATA, clients, rounds=2, cohort=4)


def expected(variables, split, rows):
    batch = fl.types.Batch(split.inputs[rows], split.labels[rows], None, DATA.normalize)
    logits = TASK.outputs(variables, batch)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return float(loss.mean()), float((np.argmax(logits, -1) == batch.labels).mean())


def test_a_split_is_measured_as_in_the_run(result):
    measured = fl.evaluate(TASK, result.variables, DATA)
    row = result.history.rows[-1]
    assert list(measured) == ["loss", "accuracy"]
    assert measured["loss"] == pytest.approx(row["test_loss"], rel=1e-6)
    assert measured["accuracy"] == row["test_accuracy"]


@pytest.mark.parametrize(("split", "batch"), [("test", 3), ("train", 64)])
def test_every_client_is_measured_on_its_own_rows(result, monkeypatch, split, batch):
    monkeypatch.setattr(evaluation, "_batch_size", lambda: batch)
    held = getattr(DATA, split)
    clients = fl.partition.dirichlet(held.labels, clients=3, alpha=0.5, seed=1)
    assert len(set(clients.sizes.tolist())) > 1
    measured = fl.evaluate(TASK, result.variables, DATA, clients, split=split)
    for k in range(3):
        loss, accuracy = expected(result.variables, held, clients.rows(k))
        assert measured["loss"][k] == pytest.approx(loss, rel=1e-5)
        assert measured["accuracy"][k] == pytest.approx(accuracy)


def test_what_cannot_be_measured_is_refused(result):
    clients = fl.partition.iid(DATA.train.labels, clients=4)
    with pytest.raises(fl.FedLPError, match="made for 60 examples but the test split .* has 37"):
        fl.evaluate(TASK, result.variables, DATA, clients)
    with pytest.raises(fl.FedLPError, match="split"):
        fl.evaluate(TASK, result.variables, DATA, split="validation")
    with pytest.raises(fl.FedLPError, match="the model cannot take the inputs"):
        fl.evaluate(TASK, jax.tree.map(lambda x: x[:1], result.variables), DATA)
    with pytest.raises(fl.FedLPError, match="has 3 outputs but the data set has 4 classes"):
        fl.evaluate(TASK, result.variables, dataset(classes=4))
