"""What a run will take: measured on a small one, and `fedlp plan`."""

import optax
import pytest
import typer.testing
import yaml
from small import DIGITS, dataset

import fedlp_jax as fl
from fedlp_jax import cli
from fedlp_jax.config.build import build
from fedlp_jax.config.loading import parse_config
from fedlp_jax.config.overview import overview, training_macs
from fedlp_jax.execution import plan as plans
from fedlp_jax.execution.plan import Plan
from fedlp_jax.simulation.estimate import _turns, estimate

DATA = dataset()
ARGUMENTS = {
    "algorithm": fl.fedavg(
        fl.classification(fl.models.Logistic(num_classes=3)),
        client_optimizer=optax.sgd(0.1),
        batch_size=4,
    ),
    "data": DATA,
    "clients": fl.partition.iid(DATA.train.labels, clients=6, seed=0),
    "rounds": 7,
    "cohort": 2,
    "plan": Plan(1, 1),
}


@pytest.mark.parametrize(("every", "tests"), [(None, 1), (2, 4), (7, 1), (3, 3)])
def test_the_whole_run_is_its_parts(every, tests):
    found = estimate(ARGUMENTS | {"eval_every": every, "early_stop": None}, seconds=0.01)
    assert (found.rounds, found.tests) == (7, tests) and found.rounds_timed >= 1
    parts = found.compile_seconds + 7 * found.round_seconds + tests * found.test_seconds
    assert found.total_seconds == pytest.approx(parts) and found.round_seconds > 0
    assert found.device_bytes > DATA.train.inputs.nbytes and found.process_bytes > 2**20


@pytest.mark.parametrize(
    ("rounds", "turns", "counts", "calls"),
    [
        ([20.0], 1, [1], 2),  # the first warms up
        ([3.0], 2, [1], 3),  # the second passes the five seconds
        ([1.0], 3, [1], 4),
        ([0.1], 3, [16], 2 + 3 * 16),
        ([20.0, 0.1], 1, [1, 1], 4),
        ([1.0, 0.1], 3, [1, 8], 4 + 3 * 9),
    ],
)
def test_timing_ends_when_the_time_is_over(rounds, turns, counts, calls):
    called = []

    def program(seconds):
        return lambda numbers: called.extend(numbers) or seconds * len(numbers)

    times, found = _turns([program(seconds) for seconds in rounds], 5.0)
    assert (len(times), found, len(called)) == (turns, counts, calls)
    assert times[0] == pytest.approx(rounds)


def test_training_is_counted_in_three_forward_passes_an_example():
    config = parse_config(DIGITS | {"rounds": 5})
    view = overview(config, build(config))
    forward = 64 * 10  # of a logistic regression on 8 x 8 pixels
    assert training_macs(config, view) == pytest.approx(2 * 3 * forward * view.clients.sizes.mean())


def test_the_command_says_what_is_measured_and_what_modelled(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "setup", lambda cpu_devices=None: None)  # jax is in use here
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(DIGITS | {"rounds": 5}))
    words = ["plan", str(tmp_path / "small.yaml"), "--seconds", "0.01", "--rounds", "50"]
    said = typer.testing.CliRunner().invoke(cli.app, words)
    assert said.exit_code == 0, said.output
    for word in ("measured", "modelled", "predicted by XLA", "for 50 rounds", "GMAC"):
        assert word in said.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.yaml"]
    refused = typer.testing.CliRunner().invoke(cli.app, [*words, "--cohort", "50"])
    assert refused.exit_code == 2 and "exceeds the 20 clients" in refused.output


def test_the_command_models_other_numbers_of_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "setup", lambda cpu_devices=None: None)  # jax is in use here
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(DIGITS | {"rounds": 5}))
    words = ["plan", str(tmp_path / "small.yaml"), "--devices", "1,2,8"]

    def run(*more):
        return typer.testing.CliRunner().invoke(cli.app, [*words, *more])

    given = run("--step-seconds", "1e-3", "--bandwidth", "1", "--latency", "100")
    assert given.exit_code == 0, given.output
    for text in ("modelled", "given", "1 GB/s and 100 us", "of 8 the others would idle"):
        assert text in given.stdout
    assert "timing" not in given.output
    rows = {line.split()[0]: line.split() for line in given.stdout.splitlines() if " 0 " in line}
    assert rows["2"][1:7] == rows["8"][1:7]  # only two devices have a client
    assert rows["1"][1:5] == ["4", "0.004", "0", "0"]  # two clients of two steps
    measured = run("--seconds", "0.01")
    assert measured.exit_code == 0 and "besides, measured" in measured.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--devices 0", "--devices '0' must be whole numbers of at least 1"),
        ("--devices 8,-1", "whole numbers of at least 1"),
        ("--devices many", "such as 8,64,256"),
        ("--step-seconds 1", "say how many with --devices 8,64"),
        ("--devices 2 --step-seconds 0", "--step-seconds=0.0 must be a number above 0"),
        ("--devices 2 --bandwidth 0", "--bandwidth=0.0 must be a number above 0"),
    ],
)
def test_the_command_refuses_devices_that_cannot_be(tmp_path, monkeypatch, words, said):
    monkeypatch.setattr(plans, "setup", lambda cpu_devices=None: None)  # jax is in use here
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(DIGITS | {"rounds": 5}))
    refused = typer.testing.CliRunner().invoke(
        cli.app, ["plan", str(tmp_path / "small.yaml"), *words.split()]
    )
    assert refused.exit_code == 2 and said in refused.output
    assert "timing" not in refused.output
