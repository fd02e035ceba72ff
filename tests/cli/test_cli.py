import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import typer.testing
import yaml
from small import HOMO

from fedlp_jax import DivergedError, FedLPError, cli
from fedlp_jax.config import experiment
from fedlp_jax.config.loading import split_words
from fedlp_jax.config.schema import ALGORITHMS
from fedlp_jax.execution import plan as plans
from fedlp_jax.execution.plan import Plan
from fedlp_jax.reporting import plots
from fedlp_jax.reporting.run_directory import read_metrics
from fedlp_jax.simulation import tuning


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plans, "setup", lambda cpu_devices=None: None)  # jax is in use here
    Path("small.yaml").write_text(yaml.safe_dump(HOMO))


def fedlp(*words):
    """The command, in this process."""
    return typer.testing.CliRunner().invoke(cli.app, list(words), prog_name="fedlp")


def command(*words):
    """The command, as a process of its own."""
    # A parent that ignores Ctrl-C, such as a script's background job, would hand that down.
    restore = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{restore}; from fedlp_jax.cli import main; main()"
    source = str(Path(cli.__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", program, *words],
        env={**os.environ, "PYTHONPATH": source},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_package_runs_as_the_command():
    script = ["-c", "from fedlp_jax.cli import main; main()"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    for words, code in (["--help"], 0), (["simulate"], 2):
        command, module = (
            subprocess.run(
                [sys.executable, *start, *words], env=environment, capture_output=True, text=True
            )
            for start in (script, ["-m", "fedlp_jax"])
        )
        assert module.returncode == code
        assert (module.stdout, module.stderr) == (command.stdout, command.stderr)


# the words of a command line


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        ("c.yaml", {}),
        ("c.yaml --algorithm.keep 0.7", {"algorithm.keep": 0.7}),
        ("c.yaml --algorithm.keep=0.7", {"algorithm.keep": 0.7}),
        ("--algorithm.keep 0.7 c.yaml", {"algorithm.keep": 0.7}),
        ("c.yaml --model.hidden [64,32]", {"model.hidden": [64, 32]}),
        ("c.yaml --plan.width null", {"plan.width": None}),
        ("c.yaml --a.b -1", {"a.b": -1}),
        ("c.yaml --a.b 1e-3", {"a.b": 0.001}),
        ("c.yaml --a.b uniform", {"a.b": "uniform"}),
        ("c.yaml --a.b 1 --a.b 2", {"a.b": 2}),
        ("c.yaml --name=12", {"name": "12"}),
    ],
)
def test_any_field_takes_a_yaml_value(words, overrides):
    assert split_words(words.split()) == ("c.yaml", overrides)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["c.yaml", "--algorithm.keep"], "--algorithm.keep needs a value"),
        (["c.yaml", "--a.b", "--c.d", "1"], "--a.b needs a value"),
        (["c.yaml", "--a.b", "[1"], "is not valid YAML"),
        (["c.yaml", "d.yaml"], "give one configuration, not 2"),
        (["--a.b", "c.yaml"], "give one configuration, not 0"),
    ],
)
def test_refuses_words_it_cannot_split(words, sentence):
    with pytest.raises(FedLPError) as error:
        split_words(words)
    assert sentence in str(error.value)


# what is done


def test_runs_and_says_where_and_at_what_cost():
    said = fedlp("run", "small.yaml", "--algorithm.layers", "by_tensor")
    assert said.exit_code == 0, said.output
    assert "runs/small-1" in said.stdout
    assert "of FedAvg's" in said.stdout
    stages = ("loading digits", "preparing data and model", "compiling the first of 2 rounds of a")
    for line, stage in zip(said.stderr.splitlines()[:3], stages, strict=True):
        assert line.startswith(f"small: {stage}")
    assert "round 2/2" in said.stderr
    assert len(read_metrics("runs/small-1")) == 2
    written = yaml.safe_load(Path("runs/small-1/config.yaml").read_text())
    assert written["algorithm"]["layers"] == "by_tensor"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("small.yaml", "--roundz", "3"), "did you mean 'rounds'?"),
        (("small.yaml", "--algorithm.kep", "3"), "did you mean 'keep'?"),
        (("small.yaml", "--rounds", "-3"), "rounds: must be greater than or equal to 0 (got -3)."),
        (("small.yaml", "--cohort", "50"), "exceeds the 20 clients"),
        (("smal.yaml",), "smal.yaml does not exist; did you mean 'small.yaml'?"),
        (("small.yaml", "--data.name", "synthetic", "--data.options.shape", "8"), "shape must be"),
        (
            ("small.yaml", "--data.name", "mnist", "--data.options.image", "2020-01-01"),
            "image must be text, got datetime.date(2020, 1, 1).",
        ),
        (("small.yaml", "--data.name", "digitz"), "digits"),
        (("small.yaml", "--model.name", "mnist_cnn"), "MNISTCNN needs images"),
    ],
)
def test_bad_input_is_one_sentence_exit_2_and_nothing_written(words, sentence):
    before = sorted(Path().rglob("*"))
    said = fedlp("run", *words)
    assert said.exit_code == 2
    assert sentence in said.stderr
    assert said.stderr.strip().splitlines()[-1].startswith("fedlp: ")
    assert "Traceback" not in said.output
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("normalize", ["0.5", "[1, 2, 3]"])
def test_a_bad_normalisation_is_bad_input(normalize):
    arrays = {"inputs": np.full((40, 4), 255, np.uint8), "labels": np.arange(40) % 2}
    np.savez(
        "own.npz", **{f"{part}_{k}": v for part in ("train", "test") for k, v in arrays.items()}
    )
    own = ["--data.name", "own.npz", "--data.options.normalize", normalize]
    said = fedlp("run", "small.yaml", *own)
    assert said.exit_code == 2
    assert "expected a pair (gain, shift)" in said.stderr
    assert "Traceback" not in said.output


@pytest.mark.filterwarnings("always")
def test_plots_that_cannot_be_written_cost_a_warning_only(monkeypatch):
    def fail(*_, **__):
        raise FedLPError("The picture cannot be written: no space.")

    monkeypatch.setattr(plots, "curves", fail)
    said = fedlp("run", "small.yaml")
    assert said.exit_code == 0
    assert "warning: The plots in runs/small-1/plots are incomplete" in said.stderr
    assert "cannot be written: no space" in said.stderr
    assert "of FedAvg's" in said.stdout


def test_a_directory_that_cannot_be_written_is_refused_before_anything_is_built(monkeypatch):
    def forbidden(self, content):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(experiment, "build", None)
    monkeypatch.setattr(Path, "write_bytes", forbidden)
    said = fedlp("run", "small.yaml", "--out", "out")
    assert said.exit_code == 2
    assert "nothing can be written to" in said.stderr and "Permission denied" in said.stderr
    assert not list(Path("out").glob("*.jsonl"))


def test_a_second_run_in_the_same_directory_is_refused():
    Path("out").mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        Path("out", name).write_text("earlier")
    said = fedlp("run", "small.yaml", "--out", "out")
    assert said.exit_code == 2
    assert "out already holds a run" in said.stderr
    assert Path("out/metrics.jsonl").read_text() == "earlier"


@pytest.mark.parametrize(
    ("error", "code", "sentences"),
    [
        (DivergedError("nobody is left.", None), 1, ["the run failed: nobody is left."]),
        (RuntimeError("out of memory"), 1, ["the run failed: out of memory"]),
        (OSError(28, "No space left on device"), 1, ["No space left on device"]),
        (KeyboardInterrupt(), 130, ["interrupted.", "runs/x-1 holds the first 3 rounds."]),
        (FedLPError("one.\ntwo."), 2, ["fedlp: one.", "fedlp: two."]),
    ],
)
def test_exit_codes(monkeypatch, error, code, sentences):
    def fail(*_, **__):
        raise error

    error.add_note("runs/x-1 holds the first 3 rounds.")
    monkeypatch.setattr(experiment, "execute", fail)
    said = fedlp("run", "small.yaml")
    assert said.exit_code == code
    assert all(sentence in said.stderr for sentence in sentences)
    assert ("runs/x-1" in said.stderr) == (code != 2)


def test_a_bug_is_one_line_and_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(experiment, "execute", lambda *_, **__: {}["missing"])
    said = fedlp("run", "small.yaml")
    assert said.exit_code == 1
    assert said.stderr == (
        "fedlp: the run failed: KeyError: 'missing'. The option --debug shows where.\n"
    )
    said = fedlp("--debug", "run", "small.yaml")
    assert said.exit_code == 1
    assert "Traceback" in said.stderr and "KeyError: 'missing'" in said.stderr


def test_an_output_that_nobody_reads_does_not_end_a_run(monkeypatch):
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        output = cli._Output(stream)
        os.close(reader)
        for _ in range(3):
            print("a round", file=output, flush=True)
        assert not output.isatty()


def test_a_path_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    said = fedlp("run", "~/small.yaml", "--rounds", "0", "--out=~/x")
    assert said.exit_code == 0, said.output
    assert (tmp_path / "x" / "config.yaml").is_file()


def test_help_shows_examples():
    said = fedlp("run", "--help")
    assert said.exit_code == 0
    assert "fedlp run configs/quickstart.yaml" in said.stdout
    assert "--algorithm.keep 0.7" in said.stdout


def test_a_misspelt_command_gets_a_suggestion():
    said = fedlp("rnu", "small.yaml")
    assert said.exit_code == 2
    assert "'run'" in said.stderr


def test_algorithms_are_listed_with_a_line_each_and_told_in_full():
    listed = fedlp("algorithms")
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert names == list(ALGORITHMS) and all(
        len(line.split()) > 4 for line in listed.stdout.splitlines()
    )
    one = fedlp("algorithms", "scaffold").stdout
    assert "Algorithm 1" in one or "SCAFFOLD" in one
    fields = [line.split() for line in one.splitlines()]
    for start in (
        "client_optimizer (required)",
        "batch_size 32",
        "weighting uniform",  # its own default
        "layers by_module what",  # the behaviour's
        "upload none compression of",
    ):
        words = start.split()
        assert words in [line[: len(words)] for line in fields], start
    for name, start in {
        "fedbuff": ["profile", "(required)"],
        "fjord": ["per_batch", "true"],
    }.items():
        assert start in [line.split()[:2] for line in fedlp("algorithms", name).stdout.splitlines()]
    unknown = fedlp("algorithms", "scafold")
    assert unknown.exit_code == 2 and "did you mean 'scaffold'?" in unknown.output


def test_version():
    said = fedlp("--version")
    assert said.exit_code == 0
    assert said.stdout.split()[0] == "fedlp-jax"


def test_info_shows_the_machine():
    said = fedlp("info")
    assert said.exit_code == 0
    assert "jax" in said.stdout and "devices" in said.stdout


def test_info_shows_what_a_config_amounts_to():
    said = fedlp("info", "small.yaml", "--algorithm.keep", "0.25")
    assert said.exit_code == 0, said.output
    assert "keep: 0.25" in said.stdout
    assert "20, 4 per round" in said.stdout
    assert "650" in said.stdout  # parameters of the one layer
    assert "25.0% of FedAvg's" in said.stdout


@pytest.mark.slow
def test_the_real_command_uses_all_cores_and_keeps_the_rounds_when_interrupted():
    Path("small.yaml").write_text(yaml.safe_dump(HOMO | {"plan": {}, "rounds": 1_000_000}))
    process = command("run", "small.yaml", "--out", "out")
    deadline = time.monotonic() + 300
    while not Path("out/metrics.jsonl").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "fedlp: interrupted." in errors
    assert "fedlp: out holds the first" in errors
    assert "fedlp: Resume with: fedlp run out --resume" in errors
    assert len(read_metrics("out")) >= 1
    assert json.loads(Path("out/summary.json").read_text())["status"] == "interrupted"
    cores = min(len(os.sched_getaffinity(0)), HOMO["cohort"])
    assert yaml.safe_load(Path("out/config.yaml").read_text())["plan"]["devices"] == cores


def test_tune_writes_the_plan_it_chose_and_keeps_the_comments(monkeypatch):
    def measure(arguments, seconds, report):
        trial = tuning.Trial(Plan(1, 2), 0.5, 0.5, 1.0)
        report(trial)
        return tuning.Tuning(trial.plan, [trial], [Plan(1, 8)])

    monkeypatch.setattr(tuning, "tune", measure)
    text = "# mine\n" + yaml.safe_dump(HOMO | {"plan": {"devices": 1, "width": 1}})
    Path("small.yaml").write_text(text)
    said = fedlp("tune", "small.yaml", "--dry-run")
    assert said.exit_code == 0, said.output
    assert "small.yaml is unchanged." in said.stdout and Path("small.yaml").read_text() == text
    said = fedlp("tune", "small.yaml")
    assert said.exit_code == 0, said.output
    assert "Written to small.yaml." in said.stdout and "not measured" in said.stderr
    assert Path("small.yaml").read_text() == text.replace("width: 1", "width: 2")
    monkeypatch.setattr(os, "access", lambda *_: False)
    said = fedlp("tune", "small.yaml")
    assert said.exit_code == 2 and "is read-only" in said.stderr


def test_reproduce_counts_costs():
    said = fedlp("reproduce", "paper", "--costs", "--json", "--rows", "homo-0.5")
    assert said.exit_code == 0, said.output
    (row,) = json.loads(said.stdout)
    assert row["id"] == "homo-0.5" and row["comm_difference"] == 0
