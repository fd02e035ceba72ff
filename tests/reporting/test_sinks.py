"""Sinks receive the rows of a run, and one that fails does not end it."""

import sys

import optax
import pytest
from small import DIGITS, Steps, dataset

import fedlp_jax as fl
from fedlp_jax.config.experiment import run
from fedlp_jax.reporting.sinks import Sink, numbers, opened

DATA = dataset()
CLIENTS = fl.partition.iid(DATA.train.labels, clients=4)
ALGORITHM = fl.fedavg(
    fl.classification(Steps(depth=1)), client_optimizer=optax.sgd(0.1), batch_size=8
)
CONFIG = DIGITS | {"name": "sinks", "rounds": 3}


def recorder(heard):
    def hear(word):
        return lambda argument: heard.append((word, argument))

    return Sink("recorder", hear("row"), hear("begin"), hear("end"))


def simulate(rounds=2, **options):
    return fl.simulate(ALGORITHM, DATA, CLIENTS, rounds=rounds, cohort=2, **options)


def test_a_sink_hears_the_beginning_every_row_and_the_end():
    heard = []
    result = simulate(sinks=[recorder(heard)])
    assert [word for word, _ in heard] == ["begin", "row", "row", "end"]
    assert heard[0][1] == {
        "data": "arrays", "clients": 4, "cohort": 2, "rounds": 2, "seed": 0, "parameters": 67,
    }  # fmt: skip
    assert [row for word, row in heard if word == "row"] == result.history.rows
    assert heard[-1] == ("end", "done")


@pytest.mark.parametrize("function", ["begin", "write", "end"])
def test_a_sink_that_fails_costs_a_warning_and_no_round(function):
    def fail(argument):
        raise OSError("disk full")

    heard = []
    broken = Sink("broken", lambda row: None)._replace(**{function: fail})
    with pytest.warns(UserWarning, match="the sink 'broken' failed .* OSError: disk full"):
        result = simulate(sinks=[broken, recorder(heard)])
    assert len(result.history) == 2 and len(heard) == 4


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "interrupted"), (RuntimeError, "failed")]
)
def test_the_end_says_how_a_run_ended(error, status):
    heard = []
    with pytest.raises(error), opened([recorder(heard)], {}):
        raise error
    assert heard[-1] == ("end", status)


def test_numbers_are_what_a_dashboard_can_draw():
    row = {"round": 3, "test_accuracy": None, "train_loss": 0.5, "clients": 2, "kind": "x"}
    assert numbers(row) == {"train_loss": 0.5, "clients": 2.0}


def test_a_missing_package_is_named_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(fl.FedLPError, match=r"needs tensorboardX: pip install 'fedlp-jax\[tens"):
        fl.sinks.tensorboard(tmp_path)
    with pytest.raises(fl.FedLPError, match="needs tensorboardX"):
        run(CONFIG | {"sinks": [{"name": "tensorboard"}]}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_an_event_file_in_the_run_directory(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the extra 'tensorboard'")
    run(CONFIG | {"sinks": [{"name": "tensorboard"}]}, tmp_path / "run")
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"train_loss" in content and b"upload_bytes" in content and b"logistic" in content


def test_wandb_writes_a_run_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra 'wandb'")
    monkeypatch.chdir(tmp_path)
    result = simulate(sinks=[fl.sinks.wandb("fedlp", "a run", mode="offline")])
    assert len(result.history) == 2
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
