import json

import jax
import numpy as np
import optax
import pytest
from small import HOMO

import fedlp_jax as fl
from fedlp_jax.config import experiment
from fedlp_jax.config.build import build
from fedlp_jax.config.loading import load_config, parse_config
from fedlp_jax.errors import FedLPError
from fedlp_jax.reporting.run_directory import read_metrics
from fedlp_jax.reporting.sinks import Sink

SMALL = HOMO | {
    "name": "small",
    "algorithm": HOMO["algorithm"] | {"batch_size": 16, "layers": "by_tensor"},
}


def small(**changes):
    raw = json.loads(json.dumps(SMALL))
    for field, value in changes.items():
        section = raw
        *path, leaf = field.split("__")
        for part in path:
            section = section[part]
        section[leaf] = value
    return parse_config(raw)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One finished run: its directory and its result."""
    path = tmp_path_factory.mktemp("done") / "out"
    return path, experiment.run(small(), path)


def test_a_run_writes_its_directory(done):
    path, result = done
    rows = read_metrics(path)
    assert [row["round"] for row in rows] == [1, 2]
    needed = {"round", "train_loss", "seconds"} | {
        f"{way}_{what}" for way in ("upload", "download") for what in ("params", "bytes")
    }
    assert all(needed <= row.keys() for row in rows)
    assert "test_accuracy" not in rows[0] and "test_accuracy" in rows[1]
    summary = json.loads((path / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["final"] == rows[-1]
    assert summary["total"]["upload_bytes"] == sum(row["upload_bytes"] for row in rows)
    assert summary["fedavg"]["upload_params"] == 2 * 4 * 650
    assert summary["partition"]["clients"] == 20
    assert summary["readings"]["total_seconds"] > 0
    pictures = {p.name for p in (path / "plots").iterdir()}
    assert pictures == {
        "partition.png",
        "accuracy_by_round.png",
        "accuracy_by_upload_megabytes.png",
    }
    assert len(result.history) == 2


def test_the_table_of_clients_is_written(done):
    path, result = done
    with np.load(path / "clients.npz") as table:
        same(dict(table), result.clients.columns())
        assert table["round"].tolist() == [1] * 4 + [2] * 4
        assert table["kept"].sum() == np.sum(result.costs.senders) and len(table["layers"]) == 2


def test_the_summary_has_the_warnings(done, tmp_path):
    path, result = done
    assert result.warnings == json.loads((path / "summary.json").read_text())["warnings"] == []
    bits = np.tile(np.array([[0], [1]], np.uint8), (6, 1))
    names = ("train_inputs", "train_labels", "test_inputs", "test_labels")
    np.savez(tmp_path / "bits.npz", **dict(zip(names, (bits, bits[:, 0]) * 2, strict=True)))
    settings = small(data__name=str(tmp_path / "bits.npz"), partition__clients=4, rounds=1)
    with pytest.warns(UserWarning, match="taken for pixels"):
        result = experiment.run(settings, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["warnings"] == result.warnings
    assert "taken for pixels" in result.warnings[0]


def test_the_written_config_runs_to_the_same_numbers(done, tmp_path):
    path, first = done
    second = experiment.run(path / "config.yaml", tmp_path / "again")
    same(first.variables, second.variables)
    written = load_config(path / "config.yaml")
    assert written.plan.devices == first.plan.devices
    assert written.plan.width == first.plan.width
    assert written.name == "small"


def test_the_same_fedavg_costs_what_a_fedavg_run_costs(done, tmp_path):
    raw = json.loads(json.dumps(SMALL))
    del raw["algorithm"]["keep"]
    raw["algorithm"]["name"] = "fedavg"
    experiment.run(raw, tmp_path / "fedavg")
    modelled = json.loads((done[0] / "summary.json").read_text())["fedavg"]
    ledger = json.loads((tmp_path / "fedavg" / "summary.json").read_text())["total"]
    assert modelled == ledger


def test_a_fedavg_with_faults_would_have_lost_as_many(tmp_path):
    faults = {"dropout": 0.5, "availability": 0.7}
    raw = small().model_dump(exclude_unset=True) | {"faults": faults, "rounds": 4}
    raw["algorithm"] = raw["algorithm"] | {"keep": 1.0}
    result = experiment.run(raw, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["fedavg"] == summary["total"]
    down, up = (summary["total"][f"{way}_params"] for way in ("download", "upload"))
    assert down > up and sum(result.history["unavailable"]) > 0


def test_no_rounds_write_a_directory_too(tmp_path):
    experiment.run(small(rounds=0), tmp_path / "out")
    assert read_metrics(tmp_path / "out") == []
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["rounds"] == 0


def test_a_config_is_the_same_run_as_the_call_it_stands_for(done):
    by_hand = fl.fedlp_homo(
        fl.classification(fl.models.Logistic(num_classes=10)),
        keep=0.5,
        batch_size=16,
        layers="by_tensor",
        client_optimizer=optax.sgd(0.1),
    )
    data = fl.load("digits")
    clients = fl.partition.iid(data.train.labels, clients=20, seed=0)
    plan = fl.Plan(devices=1)
    result = fl.simulate(by_hand, data, clients, rounds=2, cohort=4, seed=0, plan=plan)
    same(result.variables, done[1].variables)  # bit for bit, though the rate is an argument there


@pytest.mark.parametrize(
    "partition",
    [
        {"name": "iid", "clients": 20},
        {"name": "dirichlet", "clients": 20, "alpha": 1.0, "min_size": 5},
        {"name": "shards", "clients": 20, "shards_per_client": 3},
        {"name": "mixed", "clients": 20, "ratio": 0.5},
        {"name": "quantity", "clients": 20, "alpha": 2.0},
    ],
)
def test_every_partition_is_built(partition):
    clients = build(small(partition=partition))["clients"]
    assert clients.clients == 20
    assert clients.sizes.min() >= 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data__name": "digit"}, "digits"),
        ({"partition__clients": 5000}, "5,?000"),
        ({"model": {"name": "mnist_cnn"}}, "MNISTCNN needs images"),
        ({"algorithm__keep": [0.5, 0.5, 0.5]}, "keep has shape"),
        ({"algorithm__keep": {"nobody": 0.5}}, "unknown layers"),
        ({"plan": {"devices": 99}}, "plan.devices=99"),
        ({"data__options": {"colour": "red"}}, "has no option 'colour'"),
    ],
)
def test_bad_input_found_late_still_writes_nothing(tmp_path, changes, sentence):
    with pytest.raises(FedLPError, match=sentence):
        experiment.run(small(**changes), tmp_path / "a" / "out")
    assert list(tmp_path.iterdir()) == []


def test_bad_input_overwrites_nothing(done):
    path, _ = done
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(FedLPError, match="already holds a run"):
        experiment.run(small(seed=1), path)
    with pytest.raises(FedLPError, match="keep has shape"):
        experiment.run(small(algorithm__keep=[0.5] * 3), path, overwrite=True)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_a_diverged_run_keeps_the_rounds_before(tmp_path):
    config = small(
        rounds=40,
        algorithm__client_optimizer={"name": "sgd", "learning_rate": 1e30, "weight_decay": 1.0},
    )
    with pytest.raises(fl.DivergedError, match="finite update") as error:
        experiment.run(config, tmp_path / "out")
    assert any(str(tmp_path / "out") in note for note in error.value.__notes__)
    rows = read_metrics(tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["status"] == "diverged"
    assert 1 <= summary["rounds"] == len(rows) < 40
    model = fl.load_variables(tmp_path / "out")
    same(model, error.value.result.state.variables)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(model))


def test_the_model_that_is_written_is_the_one_that_was_trained(done):
    path, result = done
    again = fl.load_variables(path)
    same(again, result.state.variables)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(again))
    arguments = build(small(seed=1))
    wanted = fl.simulate(**arguments, variables=result.state.variables)
    found = fl.simulate(**arguments, variables=again)
    same(found.state.variables, wanted.state.variables)


@pytest.mark.slow
def test_a_model_with_shared_heads_and_statistics_is_written_whole(tmp_path):
    config = small(
        data={"name": "synthetic", "options": {"examples": 80, "shape": [8, 8, 3]}},
        model={"name": "fedlp_cnn"},
        algorithm={
            "name": "fedlp_hetero",
            "depths": "uniform",
            "heads": "shared",
            "client_optimizer": {"name": "sgd", "learning_rate": 0.1},
        },
        rounds=0,
    )
    result = experiment.run(config, tmp_path / "out")
    variables = fl.load_variables(tmp_path / "out")
    assert set(variables) == {"params", "batch_stats"}
    assert "exit1_fc1" in variables["params"]
    same(variables, result.state.variables)
    arguments = build(config) | {"seed": 1}
    same(fl.simulate(**arguments, variables=variables).state.variables, variables)


def test_a_diverged_run_leaves_its_last_good_model(tmp_path, monkeypatch):
    good = experiment.run(small(rounds=1), tmp_path / "good")

    def diverges(*, log, **arguments):
        log(good.history.rows[0])
        raise fl.DivergedError("nobody is left.", good)

    monkeypatch.setattr(experiment, "simulate", diverges)
    with pytest.raises(fl.DivergedError):
        experiment.run(small(), tmp_path / "out")
    same(fl.load_variables(tmp_path / "out"), good.state.variables)


@pytest.mark.parametrize("rounds", [0, 1])
def test_an_interrupted_run_keeps_the_rounds_before(tmp_path, monkeypatch, rounds):
    def interrupted(*, log, **arguments):
        log({"round": 1, "upload_bytes": 1, "train_loss": 1.0})
        raise KeyboardInterrupt

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "simulate", interrupted)
    if rounds == 0:  # while the first one is being written
        monkeypatch.setattr(experiment.RunDirectory, "append", interrupt)
    with pytest.raises(KeyboardInterrupt) as error:
        experiment.run(small(), tmp_path / "out")
    assert error.value.__notes__ == [f"{tmp_path / 'out'} holds the first {rounds} rounds."]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["status"] == "interrupted"
    assert len(read_metrics(tmp_path / "out")) == rounds


def test_a_run_of_a_file_has_callbacks_and_sinks_too(tmp_path):
    told, rows = [], []
    fl.run(
        small(),
        tmp_path / "out",
        callbacks=[lambda round, row, state: told.append((round, int(state.round)))],
        sinks=[Sink("rows", rows.append)],
    )
    assert told == [(1, 1), (2, 2)] and [row["round"] for row in rows] == [1, 2]
