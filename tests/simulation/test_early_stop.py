"""EarlyStop: a run ends at a target or without progress, and so does one that is resumed."""

import json

import optax
import pytest
from small import DIGITS, Steps, dataset

import fedlp_jax as fl
from fedlp_jax.config.experiment import run
from fedlp_jax.config.loading import parse_config
from fedlp_jax.config.resume import finished_rounds
from fedlp_jax.simulation.early_stop import Watch

DATA = dataset()
CLIENTS = fl.partition.iid(DATA.train.labels, clients=4)
ALGORITHM = fl.fedavg(
    fl.classification(Steps(depth=1)), client_optimizer=optax.sgd(0.5), batch_size=8
)
CONFIG = DIGITS | {"rounds": 50, "eval_every": 1, "early_stop": {"target": 0.5}}


def watched(rule, values, key="test_accuracy"):
    """The number of rows after which a rule stops a run of these values."""
    watch = Watch(rule)
    for round, value in enumerate(values, start=1):
        watch.update({"round": round, key: value} if value is not None else {"round": round})
        if watch.reason is not None:
            return round
    return None


@pytest.mark.parametrize(
    ("rule", "values", "stops"),
    [
        ({"target": 0.8}, [0.5, 0.79, 0.8, 0.9], 3),
        ({"target": 0.8}, [0.5, None, 0.79], None),
        ({"patience": 2}, [0.5, 0.6, 0.6, None, 0.55], 5),
        ({"patience": 2}, [0.5, 0.4, 0.6, 0.5, 0.7], None),
        ({"patience": 2, "min_delta": 0.05}, [0.5, 0.54, 0.549], 3),
        ({"patience": 1, "target": 0.9}, [0.5, 0.6, 0.95], 3),
    ],
)
def test_rules_look_at_rows_with_the_metric_alone(rule, values, stops):
    assert watched(fl.EarlyStop(**rule), values) == stops
    if "min_delta" not in rule and "target" not in rule:  # a loss is better when smaller
        loss = fl.EarlyStop(**rule, metric="train_loss")
        assert watched(loss, [None if v is None else -v for v in values], "train_loss") == stops


def test_smaller_errors_are_better_and_nan_is_no_progress():
    rule = fl.EarlyStop(target=0.4, patience=2, metric="test_absolute_error")
    assert watched(rule, [0.6, 0.5, 0.4, 0.3], rule.metric) == 3
    assert watched(rule, [0.6, 0.5, float("nan"), 0.5], rule.metric) == 4


def test_a_metric_that_no_row_has_costs_a_warning():
    watch = Watch(fl.EarlyStop(target=1, metric="train_los"))
    with pytest.warns(UserWarning, match="no row has early_stop.metric='train_los'; did you mean"):
        watch.update({"round": 1, "train_loss": 0.5})
    watch.update({"round": 2, "train_loss": 0.4})  # says it once
    assert not watch.stops


def test_a_run_ends_and_says_why():
    rule = fl.EarlyStop(target=0.6)
    result = fl.simulate(
        ALGORITHM, DATA, CLIENTS, rounds=40, cohort=4, eval_every=1, early_stop=rule
    )
    accuracy = result.history["test_accuracy"]
    first = int((accuracy >= 0.6).argmax())
    assert accuracy[first] >= 0.6 and len(accuracy) <= first + 2 < 40  # the device runs ahead
    assert result.stopped.endswith(f"in round {first + 1} (target 0.6)")
    whole = fl.simulate(ALGORITHM, DATA, CLIENTS, rounds=2, cohort=4, eval_every=1)
    assert whole.stopped is None


def test_rules_that_make_no_sense_are_refused():
    for rule, message in (
        ({}, "needs a target, a patience, or both"),
        ({"patience": 0}, "early_stop.patience=0 must be a whole number of at least 1"),
        ({"target": float("nan")}, "early_stop.target=nan"),
        ({"target": 1, "min_delta": -1}, "early_stop.min_delta=-1"),
    ):
        with pytest.raises(fl.FedLPError, match=message):
            fl.EarlyStop(**rule)


@pytest.mark.slow
def test_a_stopped_run_is_done_and_goes_on_with_a_higher_target(tmp_path):
    result = run(CONFIG, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "done" and summary["rounds"] == len(result.history) < 50
    assert summary["stopped"].startswith("test_accuracy reached 0.")
    higher = CONFIG | {"early_stop": {"target": 0.8}}
    assert finished_rounds(parse_config(CONFIG), tmp_path / "run") == summary["rounds"]
    assert finished_rounds(parse_config(higher), tmp_path / "run") == 0
    further = run(higher, tmp_path / "run", resume=True)
    assert len(further.history) > summary["rounds"] and "target 0.8" in further.stopped
