"""The search for the fastest plan, on made-up times; and `fedlp tune`, on real ones."""

import dataclasses
import itertools
import math
import types

import jax
import optax
import pytest
from small import dataset
from typer.testing import CliRunner

import fedlp_jax as fl
from fedlp_jax import cli
from fedlp_jax.execution import plan as plans
from fedlp_jax.execution.plan import Plan
from fedlp_jax.simulation import tuning
from fedlp_jax.simulation.tuning import Rounds

DATA = dataset()
ARGUMENTS = {
    "algorithm": fl.fedavg(
        fl.classification(fl.models.Logistic(num_classes=3)),
        client_optimizer=optax.sgd(0.1),
        batch_size=4,
    ),
    "data": DATA,
    "clients": fl.partition.iid(DATA.train.labels, clients=40, seed=0),
    "rounds": 7,
    "cohort": 32,
    "plan": Plan(1, 2),  # to be ignored
}


class Fake:
    """Prepares plans whose rounds take the seconds that a function says."""

    def __init__(self, seconds):
        self.seconds, self.rounds, self.plans = seconds, [], []

    def __call__(self, *, plan, **arguments):
        assert set(arguments) == {"algorithm", "data", "clients", "cohort"}
        self.plans.append(plan)

        def once(rounds):
            self.rounds.append(list(rounds))
            return self.seconds(plan) * len(rounds)

        return once


def found(seconds, budget=1000.0):
    fake = Fake(seconds)
    result = tuning.tune(ARGUMENTS, budget, prepare=fake)
    assert len(set(map(dataclasses.astuple, fake.plans))) == len(fake.plans)
    return result, fake


def grid():
    return [Plan(d, w) for d in (4, 2, 1) for w in range(1, 32 // d + 1)]


# Four devices on two cores; a round has a part that grows with neither.
LANDSCAPES = {
    "a loop is best": lambda p: 0.1 + (1 + 0.1 * p.width) / min(p.devices, 2),
    "side by side is best": lambda p: 0.1 + (1 + 8 / p.width) / p.devices,
    "a valley": lambda p: (1 + abs(math.log2(p.width / 4))) / p.devices,
    "fewer devices": lambda p: p.devices * (1 + 2 / p.width),
    "one device, one client": lambda p: p.devices * p.width,
    "two are slower than one and four": lambda p: {1: 1.0, 2: 1.3, 3: 1.2}.get(p.width, 0.7),
}


@pytest.mark.parametrize("seconds", LANDSCAPES.values(), ids=LANDSCAPES)
def test_the_plan_found_is_within_a_tenth_of_the_best_by_hand(seconds):
    result, fake = found(seconds)
    assert seconds(result.best) <= 1.1 * min(map(seconds, grid()))
    assert len(fake.plans) < 0.6 * len(grid())
    assert result.trials[0].plan == Plan(4, 1, "device", 1)  # the default
    assert {plan.data for plan in fake.plans} == {"device"}
    assert not result.left_out


def test_every_plan_has_the_same_rounds_and_each_is_measured_beside_the_best():
    result, fake = found(lambda plan: 0.01 / plan.width)
    assert {tuple(r) for r in fake.rounds} == {(1,), tuple(range(1, 21))}
    rivals = [trial.best_so_far for trial in result.trials]
    assert rivals == sorted(rivals, reverse=True)
    for trial in result.trials:
        assert trial.seconds == pytest.approx(0.01 / trial.plan.width)
    assert result.best.width == 32 // result.best.devices


def test_data_that_does_not_fit_the_devices_is_left_on_the_host(monkeypatch):
    sizes = [sum(x.nbytes for x in split) for split in (DATA.train, DATA.test)]
    monkeypatch.setattr("fedlp_jax.execution.plan.free_bytes", lambda plan: sum(sizes) - 1)
    _, fake = found(lambda plan: 1.0)
    assert {plan.data for plan in fake.plans} == {"host"}


def test_chance_does_not_choose():
    wobble = itertools.cycle([0.99, 1.0, 0.98])
    result, _ = found(lambda plan: next(wobble))
    assert result.best == result.trials[0].plan
    assert tuning.describe(result) == (
        "The default plan is the fastest: devices 4, width 1, data device, rounds_at_once 1."
    )


def test_the_plan_found_is_described_beside_the_default():
    result, _ = found(lambda plan: 1.0 / plan.devices / plan.width)
    assert tuning.describe(result) == (
        "The fastest plan: devices 4, width 8, data device, rounds_at_once 1, where the default is "
        "devices 4, width 1, data device, rounds_at_once 1."
    )


def test_no_plan_is_begun_when_time_is_over(monkeypatch):
    clock = itertools.count(step=10.0)
    time = types.SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr(tuning, "time", time)
    result, fake = found(lambda plan: 1.0 / plan.width, budget=25.0)
    assert len(fake.plans) == len(result.trials) == 3
    assert [plan.width for plan in fake.plans] == [1, 2, 4]
    assert [(p.devices, p.width) for p in result.left_out] == [(4, 8), (2, 4), (1, 4)]
    assert result.best not in result.left_out
    clock = itertools.count(step=1e6)
    assert len(found(lambda plan: 1.0, budget=1.0)[0].trials) == 2  # the default and one other


def test_a_plan_is_left_out_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tuning.time, "monotonic", lambda: now[0])

    def seconds(plan):
        now[0] += 1.0
        return 0.1 / (plan.width or 1)

    result, _ = found(seconds, budget=20.0)
    left_out = list(map(dataclasses.astuple, result.left_out))
    assert left_out
    assert len(set(left_out)) == len(left_out)
    assert not {dataclasses.astuple(trial.plan) for trial in result.trials} & set(left_out)


@pytest.mark.parametrize("kind", [fl.FedLPError, jax.errors.JaxRuntimeError])
def test_a_plan_that_cannot_run_is_told_and_passed_over(kind):
    said = []

    def seconds(plan):
        if plan.width > 4:
            raise kind("a round needs 3 GiB")
        return 1 / plan.width

    result = tuning.tune(ARGUMENTS, 100, said.append, Fake(seconds))
    assert said == result.trials
    assert result.best.width == 4
    assert {t.error for t in said if t.plan.width > 4} == {"a round needs 3 GiB"}
    assert all(math.isinf(t.ratio) for t in said if t.error)


def test_a_default_that_cannot_run_is_an_error():
    def seconds(plan):
        raise fl.FedLPError("no")

    with pytest.raises(fl.FedLPError, match="no"):
        found(seconds)


@pytest.mark.parametrize("budget", [0, -1.0, math.nan, math.inf, "long", True])
def test_a_bad_budget_is_refused(budget):
    with pytest.raises(fl.FedLPError, match="seconds=.* must be a number above 0"):
        tuning.tune(ARGUMENTS, budget)


def test_real_rounds_are_timed_and_run_one_behind_the_other():
    rounds = Rounds(**{k: v for k, v in ARGUMENTS.items() if k != "rounds"})
    assert rounds([1, 2, 3]) > 0 and rounds() > 0
    assert rounds.run.history["round"].tolist() == [1, 2, 3, 1]
    assert rounds.compile_seconds > 0
    arguments = {k: v for k, v in ARGUMENTS.items() if k != "rounds"}
    several = Rounds(**arguments | {"plan": Plan(1, 2, rounds_at_once=2)})
    assert several([1, 2, 3]) > 0 and several() > 0
    assert several.run.history["round"].tolist() == [1, 2, 3, 1]


CONFIG = """\
data: {name: digits}
partition: {name: iid, clients: 100}  # each has 14
model: {name: logistic}
algorithm: {name: fedavg, batch_size: 5, client_optimizer: {name: sgd, learning_rate: 0.1}}
rounds: 3
cohort: 4
plan:
  devices: 1  # as it was
"""


def test_rounds_start_from_the_first_model_each_time():
    once = Rounds(
        **{k: v for k, v in ARGUMENTS.items() if k not in ("rounds", "plan")}, plan=Plan(2, 1)
    )
    once(range(1, 4))
    once(range(1, 4))
    losses = [row["train_loss"] for row in once.run.history.rows]
    assert losses[:3] == losses[3:]
    assert len(set(losses[:3])) == 3


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "setup", lambda cpu_devices=None: None)  # jax is in use here
    monkeypatch.setattr("fedlp_jax.execution.compilation.keep_programs", lambda: None)
    file = tmp_path / "mine.yaml"
    file.write_text(CONFIG)
    return file, lambda *words: CliRunner().invoke(cli.app, ["tune", str(file), *words])


@pytest.mark.slow
def test_the_command_writes_the_plan_it_found(command):
    file, invoke = command
    done = invoke("--seconds", "0.001")
    assert done.exit_code == 0, done.output
    assert "Written to" in done.output and "not measured" in done.output
    assert file.read_text().startswith(CONFIG.split("  devices: 1")[0])
    assert "# as it was" in file.read_text()
    plan = fl.load_config(file).plan
    assert plan.devices and plan.width and plan.data and plan.rounds_at_once


@pytest.mark.slow
def test_a_dry_run_and_other_fields_leave_the_file(command):
    file, invoke = command
    done = invoke("--seconds", "0.001", "--dry-run", "--cohort", "8")
    assert done.exit_code == 0, done.output
    assert "is unchanged" in done.output
    assert file.read_text() == CONFIG
    file.chmod(0o444)
    assert invoke("--seconds", "0.001", "--dry-run").exit_code == 0


def test_what_cannot_be_written_is_refused_before_anything_is_measured(command, monkeypatch):
    file, invoke = command
    monkeypatch.setattr(tuning, "tune", None)
    file.chmod(0o444)
    done = invoke()
    assert done.exit_code == 2 and "read-only" in done.output
    file.chmod(0o644)
    assert invoke("--seconds", "0", "--dry-run").exit_code != 0
    assert file.read_text() == CONFIG


def test_bad_input_is_a_sentence(command):
    _, invoke = command
    for words, said in (
        (("--seconds", "-3"), "seconds=-3.0 must be a number above 0"),
        (("--rounds_", "3"), "rounds_"),
        (("--cohort", "1000"), "exceeds the 100 clients"),
    ):
        done = invoke(*words)
        assert done.exit_code == 2 and said in done.output, done.output
