"""A run that was interrupted, killed or moved ends as if nothing had happened."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import lives
import numpy as np
import optax
import pytest
import typer.testing
import yaml
from small import Steps, dataset, flat

import fedlp_jax as fl
from fedlp_jax import cli
from fedlp_jax.cli.run import stop_signals
from fedlp_jax.config import experiment, resume
from fedlp_jax.execution import plan as plans
from fedlp_jax.execution import processes
from fedlp_jax.execution.compilation import executable
from fedlp_jax.pruning import masks
from fedlp_jax.reporting.run_directory import RunDirectory, read_metrics
from fedlp_jax.simulation import checkpoint, snapshot

DATA = dataset()
CLIENTS = fl.partition.iid(DATA.train.labels, clients=12, seed=0)
TASK = fl.classification(Steps(depth=2, width=4))
COMMON = {"client_optimizer": optax.sgd(0.1), "steps": 1, "batch_size": 5}


def in_turns():
    """Sends one layer a round, whose number the policy keeps, beside a key that it uses up."""

    def init(layers, clients):
        return {"turn": jnp.zeros((), jnp.int32), "key": jax.random.key(7)}

    def sample(key, state, cohort, round, coverage):
        layers = coverage.shape[1]
        first, second = jax.random.split(state["key"])
        also = jax.random.bernoulli(first, 0.3, (layers,))
        chosen = (jnp.arange(layers) == state["turn"] % layers) | also
        upload = coverage * jnp.broadcast_to(chosen, coverage.shape).astype(jnp.float32)
        return masks.Masks(coverage, upload, upload), {"turn": state["turn"] + 1, "key": second}

    return masks.MaskPolicy(init, sample)


ALGORITHMS = {
    "fedavg with server momentum": lambda: fl.fedavg(
        TASK, server_optimizer=optax.sgd(0.5, momentum=0.9), **COMMON
    ),
    "homo with a policy that remembers": lambda: fl.compose(TASK, policy=in_turns(), **COMMON),
    "hetero with heads that persist": lambda: fl.fedlp_hetero(TASK, depths="uniform", **COMMON),
}


def run(algorithm, clients=CLIENTS, **settings):
    settings = {"rounds": 6, "cohort": 4, "seed": 0, "plan": fl.Plan(2, 1)} | settings
    return fl.simulate(algorithm, DATA, clients, **settings)


def after(rounds):
    """A `stop` that ends a run after so many rounds."""
    asked = []
    return lambda: asked.append(1) or len(asked) > rounds + 1  # once before compiling


def timeless(row):
    return {key: value for key, value in row.items() if key != "seconds"}


def assert_same_run(one, other):
    raw = [
        {path: np.asarray(snapshot.key_data(x)) for path, x in jax.tree.leaves_with_path(r.state)}
        for r in (one, other)
    ]
    assert raw[0].keys() == raw[1].keys()
    for path in raw[0]:
        assert raw[0][path].tobytes() == raw[1][path].tobytes(), path
    assert [*map(timeless, one.history)] == [*map(timeless, other.history)]
    assert one.costs.total == other.costs.total
    for name, array in one.costs.arrays().items():
        assert np.array_equal(array, other.costs.arrays()[name])
    for name in ("padded_share", "imbalance"):
        assert one.readings[name] == other.readings[name]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * n.startswith("hetero")) for n in ALGORITHMS],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name, tmp_path):
    algorithm = ALGORITHMS[name]()
    whole = run(algorithm, eval_every=2)
    saved = fl.Checkpoint(tmp_path / "c", every=2)
    part = run(algorithm, eval_every=2, checkpoint=saved, stop=after(3))
    assert len(part.history) == 3
    assert saved.rounds() == [2, 3]
    assert not np.array_equal(flat(part.variables), flat(whole.variables))
    start = saved.latest()
    data = start.data.tobytes()
    again = run(algorithm, eval_every=2, checkpoint=saved, resume=start)
    assert_same_run(again, whole)
    assert saved.rounds() == [4, 6]
    finished = run(algorithm, eval_every=2, checkpoint=saved, resume=saved.latest())
    assert_same_run(finished, whole)
    assert start.data.tobytes() == data  # a snapshot is not used up


def test_what_a_run_has_is_freed_before_its_successor_is_there():
    """Heads of all clients may take over half of the memory: there is no room for them twice."""
    algorithm = ALGORITHMS["hetero with heads that persist"]()

    def begun():
        return fl.Simulation(algorithm, DATA, CLIENTS, rounds=6, cohort=4, plan=fl.Plan(2, 1))

    taken, other = snapshot.capture(begun()), begun()
    old = jax.tree.leaves((other.state, other.stage.store.stacks))
    assert len(old) > 10
    freed = []
    put = processes.put

    def watched(tree, sharding):
        freed.append(sum(x.is_deleted() for x in old))
        return put(tree, sharding)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "put", watched)
        snapshot.restore(other, taken)
    assert freed == list(range(1, len(freed) + 1))
    names = [name for name in taken.arrays if name.startswith("[")]
    assert freed[-1] == len(names)


def test_numbers_of_numpy_are_as_good(tmp_path):
    one, every, plan = np.int64(1), np.int32(1), fl.Plan(np.int64(2), np.uint8(1))
    saved = fl.Checkpoint(tmp_path / "c", every=every, minutes=np.float32(5), keep=one)
    settings = {"rounds": 2 * one, "eval_every": one, "plan": plan, "cohort": 4 * one}
    part = run(ALGORITHMS["fedavg with server momentum"](), seed=one, checkpoint=saved, **settings)
    whole = run(ALGORITHMS["fedavg with server momentum"](), seed=1, rounds=2, eval_every=1)
    assert_same_run(part, whole)
    assert saved.rounds() == [2] and saved.latest().settings["seed"] == 1


def test_a_resumed_run_takes_the_plan_it_was_begun_with_unless_another_is_given(tmp_path):
    algorithm = ALGORITHMS["fedavg with server momentum"]()
    saved = fl.Checkpoint(tmp_path / "c")
    run(algorithm, checkpoint=saved, stop=after(1))
    resumed = run(algorithm, rounds=1, resume=saved.latest(), plan=None)
    assert (resumed.plan.devices, resumed.plan.width) == (2, 1)
    with pytest.warns(
        UserWarning, match="resumes with 1 devices of width 1, but started with 2 dev"
    ):
        run(algorithm, rounds=1, resume=saved.latest(), plan=fl.Plan(1, 1))


def test_what_a_resumed_run_compiles_is_what_the_uninterrupted_one_compiled(tmp_path, monkeypatch):
    programs = []

    def kept(lowered, devices):
        programs.append(lowered.as_text())
        return executable(lowered, devices)

    monkeypatch.setattr("fedlp_jax.simulation.program.executable", kept)
    algorithm = ALGORITHMS["fedavg with server momentum"]()
    saved = fl.Checkpoint(tmp_path / "c")
    run(algorithm, checkpoint=saved, stop=after(1))
    run(algorithm._replace(), resume=saved.latest())  # another object, or nothing is traced
    assert len(programs) == 4
    assert programs[:2] == programs[2:]


@pytest.mark.parametrize(
    ("algorithm", "settings", "sentence"),
    [
        (fl.fedavg, {"seed": 1}, "checkpoint belongs to another run: seed was 0 and is 1"),
        (fl.fedavg, {"cohort": 3}, "cohort was 4 and is 3"),
        (
            fl.fedavg,
            {"clients": fl.partition.iid(DATA.train.labels, clients=12, seed=1)},
            "partition was .* and is",
        ),
        (
            lambda task, **common: fl.fedlp_homo(task, keep=0.25, **common),
            {},
            r"begun with.policy was \[\[1.0\]\] and is \[\[0.25\]\]",
        ),
        (
            lambda task, **common: fl.fedavg(task, client_schedule=0.5, **common),
            {},
            "begun with.client_scale was 1.0 and is 0.5",
        ),
        (fl.fedavg, {"rounds": 0}, "the checkpoint has 1 rounds, more than the 0 asked for"),
        (
            lambda task, **common: fl.fedavg(task, server_optimizer=optax.adam(1.0), **common),
            {},
            r"another algorithm or model: .*optimizer.*count is nothing in it and int32\[\] in",
        ),
        (
            lambda _, **common: fl.fedavg(fl.classification(Steps(depth=2, width=5)), **common),
            {},
            r"head2.*kernel.* is float32\[4, 3\] in it and float32\[5, 3\] in this run",
        ),
    ],
)
def test_another_run_is_refused_before_anything_is_compiled(
    begun, algorithm, settings, sentence, monkeypatch
):
    monkeypatch.setattr(fl.Simulation, "compile", lambda self: pytest.fail("compiled"))
    with pytest.raises(fl.FedLPError, match=sentence):
        run(algorithm(TASK, **COMMON), resume=begun, **settings)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    saved = fl.Checkpoint(tmp_path_factory.mktemp("begun") / "c")
    run(fl.fedavg(TASK, **COMMON), checkpoint=saved, stop=after(1))
    return saved.latest()


# --- run directories ------------------------------------------------------------------------------

SMALL = {
    "name": "small",
    "data": {"name": "own.npz"},
    "partition": {"name": "iid", "clients": 12},
    "model": {"name": "mlp", "hidden": [8]},
    "algorithm": {
        "name": "fedlp_homo",
        "keep": 0.5,
        "batch_size": 5,
        "client_optimizer": {"name": "sgd", "learning_rate": 0.1},
        "server_optimizer": {"name": "sgd", "learning_rate": 0.5, "momentum": 0.9},
    },
    "rounds": 6,
    "cohort": 4,
    "eval_every": 2,
    "plan": {"devices": 1},
    "checkpoint": {"every": 2},
}


def write_inputs(folder):
    """The configuration and its data, of its own so that no other package need be imported."""
    Path(folder, "small.yaml").write_text(yaml.safe_dump(SMALL))
    parts = {"train": DATA.train, "test": DATA.test}
    arrays = {f"{part}_{k}": v for part in parts for k, v in parts[part]._asdict().items()}
    np.savez(Path(folder, "own.npz"), **arrays)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with inputs, the directory `whole` of an uninterrupted run, and one of a part."""
    folder = tmp_path_factory.mktemp("finished")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        experiment.run("small.yaml", "whole")
        with pytest.raises(KeyboardInterrupt):
            experiment.execute("small.yaml", "part", stop=after(3))
    return folder


@pytest.fixture
def inside(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(finished, tmp_path / "here"))
    monkeypatch.setattr(plans, "setup", lambda cpu_devices=None: None)  # jax is in use here


def fedlp(*words):
    return typer.testing.CliRunner().invoke(cli.app, list(words), prog_name="fedlp")


def assert_same_directory(one, other):
    assert [*map(timeless, read_metrics(one))] == [*map(timeless, read_metrics(other))]
    first, second = (json.loads(Path(path, "summary.json").read_text()) for path in (one, other))
    for summary in (first, second):
        readings = summary.pop("readings")
        summary["padded"] = readings["padded_share"], readings["imbalance"]
        summary["final"].pop("seconds")
        del summary["warnings"]  # of what happened to this run
    assert first == second
    with np.load(Path(one, "clients.npz")) as table, np.load(Path(other, "clients.npz")) as same:
        jax.tree.map(np.testing.assert_array_equal, dict(table), dict(same))
    models = fl.load_variables(one), fl.load_variables(other)
    jax.tree.map(np.testing.assert_array_equal, *models)


def test_an_interrupted_run_says_how_to_go_on_and_does(inside):
    summary = json.loads(Path("part/summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("interrupted", 3)
    with Path("part/metrics.jsonl").open("a") as metrics:  # of a run that was killed later
        metrics.write('{"round": 4, "train_loss": 1.0}\n{"round": 5, "tra')
    said = fedlp("run", "part", "--resume")
    assert said.exit_code == 0, said.output
    assert "compiling round 4 of 6 rounds" in said.stderr
    assert_same_directory("part", "whole")
    assert sorted(os.listdir("part")) == sorted(os.listdir("whole"))


def test_the_notes_of_an_interruption(inside):
    with pytest.raises(KeyboardInterrupt) as error:
        experiment.execute("small.yaml", "again", stop=after(2))
    assert error.value.__notes__ == [
        "again holds the first 2 rounds.",
        "Resume with: fedlp run again --resume",
    ]
    with pytest.raises(KeyboardInterrupt) as error:
        experiment.execute("small.yaml", "never", stop=lambda: True)
    assert error.value.__notes__ == ["Nothing was written."]
    assert not Path("never").exists()


def test_a_finished_run_says_so_and_stays_as_it_is(inside):
    before = {p: p.read_bytes() for p in Path("whole").rglob("*") if p.is_file()}
    for words in (("whole",), ("small.yaml", "--out", "whole"), ("whole", "--rounds", "3")):
        said = fedlp("run", *words, "--resume")
        assert said.exit_code == 0, said.output
        assert "whole is finished: its 6 rounds are done." in said.stdout
    assert {p: p.read_bytes() for p in Path("whole").rglob("*") if p.is_file()} == before


def test_a_finished_run_can_be_made_longer(inside):
    longer = ("--rounds", "8", "--eval_every", "2")
    assert fedlp("run", "whole", "--resume", *longer).exit_code == 0
    assert fedlp("run", "small.yaml", "--out", "new", *longer).exit_code == 0
    assert_same_directory("whole", "new")


def test_another_config_is_refused_with_the_fields_that_differ(inside):
    before = {p: p.read_bytes() for p in Path("part").rglob("*") if p.is_file()}
    other = ("--seed", "1", "--algorithm.keep", "0.7", "--name", "x", "--checkpoint.keep", "1")
    said = fedlp("run", "small.yaml", "--out", "part", "--resume", *other)
    assert said.exit_code == 2
    assert "seed was 0 and is 1; algorithm.keep was 0.5 and is 0.7. Resume" in said.stderr
    assert {p: p.read_bytes() for p in Path("part").rglob("*") if p.is_file()} == before
    Path("part/config.yaml").unlink()  # then the checkpoint knows
    said = fedlp("run", "small.yaml", "--out", "part", "--resume", *other)
    assert said.exit_code == 2
    assert "part/checkpoints/3 belongs to another run: seed was 0 and is 1; alg" in said.stderr


@pytest.fixture
def of_before(inside):
    """`part` as a version without `faults` and `algorithm.weight_decay` would have left it."""
    config = yaml.safe_load(Path("part/config.yaml").read_text())
    facts = json.loads(Path("part/checkpoints/3/facts/metadata").read_text())
    for settings in (config, facts["settings"]):
        assert settings.pop("faults") is None
        assert settings["algorithm"]["client_optimizer"].pop("weight_decay") == 0
    del facts["sha256"]
    facts["sha256"] = checkpoint.digest(checkpoint._json(facts))
    Path("part/config.yaml").write_text(yaml.safe_dump(config))
    Path("part/checkpoints/3/facts/metadata").write_text(json.dumps(facts))


def test_a_field_that_is_newer_than_the_run_counts_as_its_default(of_before):
    said = fedlp("run", "small.yaml", "--out", "part", "--resume")
    assert said.exit_code == 0, said.output
    assert "compiling round 4 of 6 rounds" in said.stderr
    assert_same_directory("part", "whole")


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("algorithm.client_optimizer.weight_decay", "0.1", "weight_decay was not set and is 0.1"),
        ("faults", "{}", "faults.dropout was not set and is 0"),
    ],
)
def test_a_newer_field_with_another_value_is_refused(of_before, field, value, sentence):
    Path("part/config.yaml").unlink()
    said = fedlp("run", "small.yaml", "--out", "part", "--resume", f"--{field}", value)
    assert said.exit_code == 2
    assert sentence in said.stderr


@pytest.mark.parametrize(
    "summary",
    ['{"status": "done", "rounds": "6"}', '{"status": "done", "rounds": [6]}', "[1]", "[" * 99_999],
    ids=["text", "list", "other", "deep"],
)
def test_a_summary_of_another_form_ends_in_no_traceback(inside, summary):
    Path("whole/summary.json").write_text(summary)
    config = experiment.load_config("whole/config.yaml")
    assert resume.finished_rounds(config, Path("whole")) in (0, 6)


@pytest.mark.filterwarnings("always")
def test_without_a_checkpoint_a_run_starts_at_its_first_round(inside):
    shutil.rmtree("part/checkpoints")
    said = fedlp("run", "part", "--resume")
    assert said.exit_code == 0, said.output
    assert "part has no checkpoint, so the run starts from its first round" in said.stderr
    assert_same_directory("part", "whole")
    assert fedlp("run", "small.yaml", "--out", "fresh", "--resume").exit_code == 0
    assert_same_directory("fresh", "whole")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("small.yaml", "--resume"), "--resume needs the directory of the run, as in"),
        (
            ("part", "--resume", "--out", "part"),
            "already names the directory part; omit --out",
        ),
        ((".", "--resume"), ". has no config.yaml, so no run finished a round there"),
        (("part", "--resume", "--overwrite"), "is resumed needs its directory, and is not over"),
        (("small.yaml", "--out", "part"), "continue that run with --resume"),
        (("part", "--resume", "--checkpoint.keep", "0"), "checkpoint.keep=0 must be a whole"),
    ],
)
def test_what_cannot_be_resumed(inside, words, sentence):
    said = fedlp("run", *words)
    assert said.exit_code == 2
    assert sentence in said.stderr


def test_overwriting_a_run_leaves_no_checkpoint_of_it(inside):
    said = fedlp("run", "small.yaml", "--out", "part", "--overwrite", "--checkpoint.every", "5")
    assert said.exit_code == 0, said.output
    assert sorted(os.listdir("part/checkpoints")) == ["5", "6"]


def test_a_full_disk_names_the_file_and_the_run_can_go_on(inside, monkeypatch):
    check = RunDirectory._check_place

    def full(self):
        check(self)
        if self._metrics is not None and len(read_metrics(self.path)) >= 4:
            self._metrics.close()
            self._metrics = open("/dev/full", "w", buffering=1)  # noqa: SIM115

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "_check_place", full)
        said = fedlp("run", "part", "--resume")
    assert said.exit_code == 1
    assert "fedlp: the run failed: [Errno 28] No space left on device: 'part/me" in said.stderr
    assert "fedlp: Resume with: fedlp run part --resume" in said.stderr
    assert fedlp("run", "part", "--resume").exit_code == 0
    assert_same_directory("part", "whole")


@pytest.mark.parametrize("way", ["--resume", "--overwrite"])
def test_a_run_that_is_alive_is_neither_resumed_nor_overwritten(inside, way):
    alive = RunDirectory("part", "small", resume=True)
    before = {p: p.read_bytes() for p in Path("part").rglob("*") if p.is_file()}
    said = fedlp("run", "small.yaml", "--out", "part", way)
    assert said.exit_code == 2
    assert "another run is writing in part; wait until it ends" in said.stderr
    assert {p: p.read_bytes() for p in Path("part").rglob("*") if p.is_file()} == before
    alive.close()


def test_a_longer_run_that_is_interrupted_is_no_longer_finished(inside):
    before = {name: Path("whole", name).read_bytes() for name in ("metrics.jsonl", "summary.json")}
    shutil.rmtree("whole/checkpoints")  # as a short run has none
    config = experiment.load_config("whole/config.yaml", {"rounds": 9})
    with (
        pytest.warns(UserWarning, match="no checkpoint"),
        pytest.raises(KeyboardInterrupt) as error,
    ):
        experiment.execute(config, "whole", resume=True, stop=after(1))
    assert error.value.__notes__[0] == "whole holds the first 1 rounds."
    summary = json.loads(Path("whole/summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("interrupted", 1)
    assert len(read_metrics("whole")) == 1
    assert resume.finished_rounds(config, Path("whole")) == 0
    # What was finished is not lost before the longer run has ended.
    assert {name: Path("whole/earlier", name).read_bytes() for name in before} == before
    assert Path("whole/variables.npz").is_file()
    experiment.execute(config, "whole", resume=True)
    assert len(read_metrics("whole")) == 9 and not Path("whole/earlier").exists()


def test_data_may_move_but_not_change(inside):
    os.mkdir("elsewhere")
    os.rename("own.npz", "elsewhere/mine.npz")
    moved = ("run", "part", "--resume", "--data.name")
    with np.load("elsewhere/mine.npz") as arrays:
        for key in ("train_inputs", "test_inputs", "test_labels"):
            other = arrays[key].copy()
            other[0] = other[1] + (arrays[key].dtype.kind == "f")
            np.savez("other.npz", **(dict(arrays) | {key: other}))
            said = fedlp(*moved, "other.npz")
            assert said.exit_code == 2, key
            assert re.search("another run: data was [0-9a-f]{64} and is [0-9a-f]{64}", said.stderr)
    assert fedlp(*moved, "elsewhere/mine.npz").exit_code == 0
    assert_same_directory("part", "whole")


# --- signals --------------------------------------------------------------------------------------


def signalled(*numbers):
    """A process that listens and does nothing else; its exit code and what it said."""
    code = (
        "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from fedlp_jax.cli.run import stop_signals\n"
        "with stop_signals() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while not stop(): time.sleep(0.01)\n"
        "    print('asked', flush=True)\n"
        f"    time.sleep({30 if len(numbers) > 1 else 0})\n"
        "print('ended')"
    )
    source = str(Path(cli.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": source}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    for number, expected in zip(numbers, ("ready", "asked"), strict=False):
        assert process.stdout.readline().strip() == expected
        process.send_signal(number)
        time.sleep(1.1)  # a second signal within a second is the same one
    started = time.monotonic()
    out, errors = process.communicate(timeout=100)
    return process.returncode, out, errors, time.monotonic() - started


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks(number):
    code, out, errors, _ = signalled(number)
    assert (code, out) == (0, "asked\nended\n")
    assert "again: at once" in errors


def test_the_second_signal_ends_at_once_whatever_is_going_on():
    code, out, errors, seconds = signalled(signal.SIGTERM, signal.SIGINT)
    assert (code, out) == (130, "")
    assert "stopped at once" in errors
    assert seconds < 25


def test_signals_are_left_as_they_were():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with stop_signals() as stop:
        assert signal.getsignal(signal.SIGTERM) is not before[1]
        assert not stop()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_signals():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, ignored)


# --- killed ---------------------------------------------------------------------------------------


def resume_words(every):
    return ("run", "small.yaml", "--out", "out", "--resume", "--checkpoint.every", str(every))


def wait(process):
    process.join(300)
    assert process.exitcode is not None, "still running after 300 s"
    return process.exitcode


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_many_moments_ends_as_if_it_had_not_been(tmp_path, kills):
    write_inputs(tmp_path)
    rounds = ("--rounds", str(50 * kills))
    assert wait(lives.start(tmp_path, "run", "small.yaml", "--out", "whole", *rounds)) == 0
    saved = fl.Checkpoint(tmp_path / "out" / "checkpoints")
    chance = random.Random(0)
    found = [0]
    for kill in range(kills):
        life = lives.start(tmp_path, *resume_words(2), *rounds)
        if kill % 4:  # the others while they start
            until(lambda: max(saved.rounds(), default=0) > found[-1], life, tmp_path)
        life.join(chance.uniform(0.0, 0.2))
        assert life.exitcode is None, (tmp_path / "said.txt").read_text()
        life.kill()
        assert wait(life) == -signal.SIGKILL
        found.append(max(saved.rounds(), default=0))
    assert wait(lives.start(tmp_path, *resume_words(1000), *rounds)) == 0
    assert found == sorted(found)
    assert len(set(found)) > kills / 2
    assert_same_directory(tmp_path / "out", tmp_path / "whole")


def until(true, life, folder):
    deadline = time.monotonic() + 300
    while not true():
        assert life.exitcode is None, (folder / "said.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_round_in_flight(tmp_path, number):
    write_inputs(tmp_path)
    life = lives.start(tmp_path, *resume_words(10**9), "--rounds", "1000000")
    until((tmp_path / "out" / "metrics.jsonl").exists, life, tmp_path)
    os.kill(life.pid, number)
    assert wait(life) == 130
    said = (tmp_path / "said.txt").read_text()
    assert "Traceback" not in said
    assert "fedlp: interrupted." in said
    assert "fedlp: Resume with: fedlp run out --resume" in said
    done = len(read_metrics(tmp_path / "out"))
    assert fl.Checkpoint(tmp_path / "out" / "checkpoints").rounds() == [done]
    assert not (tmp_path / "out" / ".lock").exists()
