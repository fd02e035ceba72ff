"""Several processes are one machine: the same numbers, the same end, the same refusals."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import crowd
import jax
import lives
import numpy as np
import optax
import pytest
import typer.testing
import yaml
from small import Steps, dataset, flat, in_float64

import fedlp_jax as fl
from fedlp_jax import FedLPError, cli
from fedlp_jax.data.batching import example_of
from fedlp_jax.execution import processes
from fedlp_jax.execution.plan import resolve
from fedlp_jax.reporting.run_directory import read_metrics
from fedlp_jax.simulation.staging import on_host

PLAN = fl.Plan(devices=4, width=2, rounds_at_once=3)


# the same numbers


def exact():
    """Three rounds in float64, with batch statistics."""
    task = fl.classification(Steps(depth=1, width=4, norm=True))
    optimizer = optax.sgd(0.1, momentum=0.9)
    with jax.enable_x64(True):
        algorithm = fl.fedlp_homo(task, keep=0.5, client_optimizer=optimizer, batch_size=2)
        data = dataset()
        example = example_of(on_host(data.train, data.normalize))
        start = algorithm.init(jax.random.key(0), example, 12, None)
        return simulated(algorithm, rounds=3, variables=in_float64(start.variables))


def private():
    """Heads of clients' own, sums over columns instead of clients, lost clients, data sent."""
    task = fl.classification(Steps(depth=2, width=4))
    algorithm = fl.fedlp_hetero(
        task,
        depths="uniform",
        heads="persist",
        aggregator="median",
        client_optimizer=optax.sgd(0.1),
        batch_size=2,
    )
    plan = dataclasses.replace(PLAN, data="host")
    return simulated(algorithm, rounds=2, faults=fl.Faults(dropout=0.3), plan=plan)


def chosen():
    """Clients that the server chooses among those of all processes."""
    task = fl.classification(Steps(depth=1, width=4))
    algorithm = fl.fedldf(task, senders=3, client_optimizer=optax.sgd(0.1), batch_size=2)
    return simulated(algorithm, rounds=2)


def simulated(algorithm, plan=PLAN, **settings):
    data = dataset()
    clients = fl.partition.iid(data.train.labels, clients=12)
    return fl.simulate(algorithm, data, clients, cohort=8, plan=plan, **settings)


RUNS = {"exact": exact, "private": private, "chosen": chosen}


def noted(names):
    """What a process saw of the runs, in a file of its own."""
    found = {}
    for name in names:
        result = RUNS[name]()
        found |= {f"{name} ledger {k}": v for k, v in result.costs.arrays().items()}
        found[f"{name} variables"] = flat(result.variables)
        found[f"{name} plan"] = np.asarray([result.plan.devices, result.plan.width])
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]
        found[f"{name} rows"] = np.asarray(json.dumps(rows))
    np.savez(f"{processes.index()}.npz", **found)


@pytest.fixture(scope="module")
def alone():
    return {name: run() for name, run in RUNS.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "names"), [(2, [*RUNS]), (4, ["exact"])])
def test_processes_have_the_numbers_of_one(number, names, alone, tmp_path):
    codes = crowd.ended(crowd.call(tmp_path, number, noted, names))
    said = tmp_path / "said.txt"
    assert codes == [0] * number, said.read_text() if said.exists() else codes
    each = [dict(np.load(tmp_path / f"{i}.npz")) for i in range(number)]
    for other in each[1:]:
        for name, value in each[0].items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)
    found = each[0]
    for name in names:
        expected = alone[name]
        assert tuple(found[f"{name} plan"]) == (4, 2)
        for key, value in expected.costs.arrays().items():
            np.testing.assert_array_equal(found[f"{name} ledger {key}"], value)
        rows = json.loads(str(found[f"{name} rows"]))
        for row, own in zip(expected.history, rows, strict=True):
            assert own == {k: about(row[k]) for k in row if k != "seconds"}
        rtol = 1e-8 if name == "exact" else 1e-3
        np.testing.assert_allclose(
            found[f"{name} variables"], flat(expected.variables), rtol=rtol, atol=rtol / 100
        )


def about(value):
    return pytest.approx(value, rel=1e-5) if isinstance(value, float) else value


# the same end


CONFIG = {
    "data": {
        "name": "synthetic",
        "options": {"examples": 60, "shape": [4, 4, 1], "num_classes": 3},
    },
    "partition": {"name": "iid", "clients": 8},
    "model": {"name": "logistic"},
    "algorithm": {
        "name": "fedlp_homo",
        "keep": 0.5,
        "client_optimizer": {"name": "sgd", "learning_rate": 0.1},
    },
    "rounds": 100000,
    "cohort": 4,
    "plan": {"devices": 2},
    "checkpoint": {"every": 1},
}


def rounds_done(folder):
    file = folder / "out" / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def wait_for(folder, rounds, children):
    deadline = time.monotonic() + 120
    while rounds_done(folder) < rounds:
        assert time.monotonic() < deadline, (folder / "said.txt").read_text()
        assert all(child.is_alive() for child in children), (folder / "said.txt").read_text()
        time.sleep(0.05)


@pytest.mark.slow
def test_processes_end_together_and_any_number_goes_on(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    said = tmp_path / "said.txt"

    killed = crowd.fedlp(tmp_path, 2, "run", "c.yaml", "--out", "out")
    wait_for(tmp_path, 3, killed)
    os.kill(killed[1].pid, signal.SIGKILL)
    began = time.monotonic()
    assert crowd.ended(killed, seconds=60) == [1, -signal.SIGKILL], said.read_text()
    assert time.monotonic() - began < 60
    assert "fedlp: the run failed: another of the 2 processes ended" in said.read_text()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["status"] == "failed"

    asked = crowd.fedlp(tmp_path, 2, "run", "out", "--resume")
    wait_for(tmp_path, rounds_done(tmp_path) + 3, asked)
    os.kill(asked[1].pid, signal.SIGTERM)  # the other learns of it
    assert crowd.ended(asked, seconds=60) == [130, 130], said.read_text()
    done = rounds_done(tmp_path)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["status"] == "interrupted"
    assert (tmp_path / "out" / "checkpoints" / str(done)).is_dir()  # the last round is saved

    last = lives.start(tmp_path, "run", "out", "--resume", "--rounds", str(done + 2))
    assert crowd.ended([last]) == [0], said.read_text()
    rows = read_metrics(tmp_path / "out")
    assert [row["round"] for row in rows] == list(range(1, done + 3))
    once = fl.run(CONFIG | {"rounds": done + 2}, tmp_path / "once")
    for row, own in zip(once.history, rows, strict=True):
        assert own == {k: about(row[k]) for k in row if k != "seconds"} | {
            "seconds": own["seconds"]
        }


# the same refusals


def test_what_is_not_the_same_everywhere_is_refused_everywhere(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    words = ("run", "c.yaml", "--out", "out")
    keep = ((), ("--algorithm.keep", "0.7"))
    codes = crowd.ended(crowd.fedlp(tmp_path, 2, *words, each=keep))
    said = (tmp_path / "said.txt").read_text()
    assert codes == [2, 2], said
    sentence = (
        "process 1 of 2 has another configuration than process 0: algorithm.keep is 0.7, not 0.5."
    )
    assert said.count(sentence) == 2, said
    assert not (tmp_path / "out").exists()


def test_what_the_first_process_of_a_cluster_refuses_all_refuse(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").touch()
    children = crowd.slurm(tmp_path, 2, "run", "c.yaml", "--out", "out")
    codes = crowd.ended(children)
    said = (tmp_path / "said.txt").read_text()
    assert codes == [2, 2], said
    assert said.count("out already holds a run") == 2, said
    assert "fedlp: process 0: out already holds a run" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--coordinator 10.0.0.1:1", "needs num_processes and process_id too"),
        ("--coordinator 10.0.0.1:1 --num-processes 2", "needs process_id too"),
        (
            "--coordinator 10.0.0.1:1 --num-processes 2 --process-id 2",
            "processes count from 0 to 1",
        ),
        ("--coordinator 10.0.0.1:1 --num-processes 0 --process-id 0", "must be at least 1"),
        ("--coordinator 10.0.0.1 --num-processes 2 --process-id 0", "must be HOST:PORT"),
        ("--coordinator a:99999 --num-processes 2 --process-id 0", "must be HOST:PORT"),
        ("--num-processes 2 --process-id 0", "need a coordinator"),
        ("--distributed --process-id 0", "omit it"),
        ("--coordinator 10.0.0.1:1 --num-processes 2 --process-id 0", "jax is already in use"),
        ("--distributed", "jax is already in use"),
    ],
)
def test_impossible_places_are_refused_at_once(words, sentence):
    jax.devices()
    said = typer.testing.CliRunner().invoke(cli.app, ["run", "c.yaml", *words.split()])
    assert said.exit_code == 2, said.output
    assert sentence in said.stderr.replace("\n", " ")
    assert "Traceback" not in said.stderr


def test_waiting_in_vain_ends_with_a_sentence():
    program = "import fedlp_jax as fl; fl.connect('127.0.0.1:%d', 3, 0, seconds=1)"
    words = [sys.executable, "-c", program % crowd.free_port()]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "after 1 s not all 3 processes are connected" in done.stderr
    assert "the same number of processes" in done.stderr


def test_a_plans_devices_are_those_of_all_processes(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "devices", lambda number=None: jax.devices()[:number])
    assert resolve(None, 9) == fl.Plan(4, 1, None, 1)
    assert resolve(None, 3) == fl.Plan(2, 1, None, 1)  # no process has more devices than another
    with pytest.raises(FedLPError, match=r"plan.devices=3 counts .* make it a multiple of 2"):
        resolve(fl.Plan(devices=3), 9)
    with pytest.raises(FedLPError, match="a cohort of 1 has no client for each of 2 processes"):
        resolve(None, 1)


def refused_in_turn():
    """What this process of two catches, and what it receives in between."""
    caught = []
    for refusing in (1, 0):
        try:
            with processes.together(), processes.together():
                if processes.index() == refusing:
                    raise FedLPError(f"no, says {refusing}")
        except FedLPError as error:
            caught.append(str(error).removeprefix(f"process {refusing}: "))
        caught += processes.gather(f"word {processes.index()}" * 1000 * processes.index())
    caught.append(processes.least(processes.index() + 3))
    caught.append(processes.least(processes.index() or None))
    stopped = processes.stop_together(lambda: processes.index() == 1, fl.Plan(2).mesh)
    caught += [stopped(), stopped(), stopped()]
    pathlib.Path(f"{processes.index()}.json").write_text(json.dumps(caught))


def test_processes_refuse_and_stop_together_and_can_continue(tmp_path):
    codes = crowd.ended(crowd.call(tmp_path, 2, refused_in_turn))
    said = tmp_path / "said.txt"
    assert codes == [0, 0], said.read_text() if said.exists() else codes
    each = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    words = ["", "word 1" * 1000]
    votes = [False, True, True]
    assert each == 2 * [["no, says 1", *words, "no, says 0", *words, 3, None, *votes]]


def test_a_single_process_waits_for_nobody():
    assert processes.gather("word") == ["word"]
    assert processes.least(None) is None and processes.least(3) == 3
    assert processes.is_first() and processes.stop_together(lambda: True, fl.Plan(1).mesh)()
    processes.agree("settings", {"a": 1})
    with pytest.raises(FedLPError, match="^no$"), processes.together():
        raise FedLPError("no")
