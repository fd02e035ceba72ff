"""The model of the best evaluation is kept, in Python, files and after a resume."""

import numpy as np
import optax
import pytest
from small import DIGITS, Steps, dataset, flat

import fedlp_jax as fl
from fedlp_jax.config.experiment import execute
from fedlp_jax.simulation.early_stop import Watch
from fedlp_jax.simulation.keep_best import Keeper

DATA = dataset()
CLIENTS = fl.partition.iid(DATA.train.labels, clients=4)
ALGORITHM = fl.fedavg(
    fl.classification(Steps(depth=1)), client_optimizer=optax.sgd(0.1), batch_size=8
)


def simulate(rounds=5, **options):
    return fl.simulate(ALGORITHM, DATA, CLIENTS, rounds=rounds, cohort=2, eval_every=1, **options)


def test_the_best_model_is_that_of_its_round(tmp_path):
    rule = fl.KeepBest("test_loss", tmp_path / "best.npz")
    result = simulate(keep_best=rule)
    losses = result.history["test_loss"]
    assert result.best[:3] == ("test_loss", losses.min(), losses.argmin() + 1)
    until = simulate(rounds=result.best.round)
    np.testing.assert_array_equal(flat(result.best.variables), flat(until.state.variables))
    saved = fl.load_variables(tmp_path / "best.npz")
    np.testing.assert_array_equal(flat(saved), flat(result.best.variables))
    assert simulate().best is None


def test_the_first_of_equal_rounds_stays_and_rounds_without_a_test_do_not_count():
    keeper = Keeper(fl.KeepBest())
    for round, value in enumerate([0.2, 0.5, None, 0.5, 0.4], start=1):
        row = {"round": round, "test_accuracy": value}
        keeper.update(row, {"params": {"a": np.float32([round])}})
    assert keeper.best.round == 2 and keeper.best.variables["params"]["a"] == [2]


def test_a_resumed_run_keeps_what_was_better_before(tmp_path):
    path = tmp_path / "best.npz"
    rows = [{"round": r, "test_accuracy": a} for r, a in [(1, 0.5), (2, 0.75), (3, 0.25)]]
    Keeper(fl.KeepBest(path=path)).update(rows[1], {"params": {"a": np.float32([2])}})
    keeper = Keeper(fl.KeepBest(path=path), rows)
    keeper.update({"round": 4, "test_accuracy": 0.7}, {"params": {"a": np.float32([4])}})
    assert keeper.best.round == 2 and keeper.best.variables["params"]["a"] == [2]
    keeper.update({"round": 5, "test_accuracy": 0.8}, {"params": {"a": np.float32([5])}})
    assert keeper.best.round == 5 and fl.load_variables(path)["params"]["a"] == [5]
    assert Keeper(fl.KeepBest(), rows).best == ("test_accuracy", 0.75, 2, None)


def test_a_resumed_run_does_not_take_another_model_for_the_best(tmp_path):
    path = tmp_path / "best.npz"
    rows = [{"round": 1, "test_accuracy": 0.7, "test_loss": 2.0}]
    Keeper(fl.KeepBest(path=path)).update(rows[0], {"params": {"a": np.float32([1])}})
    rows.append({"round": 2, "test_accuracy": 0.6, "test_loss": 1.0})
    for metric, last, round in (("test_loss", 2, 2), ("test_loss", 1, 1)):
        with pytest.warns(UserWarning, match=f"another model than that of round {round}, the best"):
            keeper = Keeper(fl.KeepBest(metric, path), rows[:last])
        assert keeper.best.round == round and keeper.best.variables is None
    keeper.update({"round": 3, "test_loss": 0.5}, {"params": {"a": np.float32([3])}})
    assert Keeper(
        fl.KeepBest("test_loss", path), [*rows, {"round": 3, "test_loss": 0.5}]
    ).best.variables["params"]["a"] == [3]


def test_nan_is_never_best_and_smaller_errors_are():
    values = [float("nan"), 0.5, float("nan"), 0.4, 0.6]
    rows = [{"round": r, "test_absolute_error": v} for r, v in enumerate(values, start=1)]
    assert Keeper(fl.KeepBest("test_absolute_error"), rows).best.round == 4
    names, line = fl.compare({"one": rows}, metric="test_absolute_error").to_csv().splitlines()
    table = dict(zip(names.split(","), line.split(","), strict=True))
    assert table["best test absolute error"] == "0.4"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"keep_best": "test_accuracy"}, r"of type str; give fl\.KeepBest\("),
        ({"early_stop": 0.9}, r"early_stop=0\.9 is of type float; give fl\.EarlyStop"),
        ({"profile": "1-1"}, r"profile='1-1' is of type str; give fl\.Trace"),
        ({"checkpoint": "folder"}, "is of type str; give fl.Checkpoint"),
        ({"plan": 2}, "plan=2 is of type int; give fl.Plan"),
        ({"keep_best": fl.KeepBest("test_acuracy")}, "not measured; did you mean 'test_accuracy'"),
        (
            {"early_stop": fl.EarlyStop(0.9, metric="test_f1")},
            r"early_stop.metric='test_f1' is not measured.* measure test_accuracy, test_loss\.",
        ),
    ],
)
def test_what_no_run_can_follow_is_refused_before_anything_compiles(options, sentence):
    with pytest.raises(fl.FedLPError, match=sentence):
        simulate(compiled=lambda plan: pytest.fail("compiled"), **options)


@pytest.mark.parametrize(
    "rule", [{"early_stop": fl.EarlyStop(patience=1)}, {"keep_best": fl.KeepBest()}]
)
def test_a_rule_without_a_metric_needs_an_accuracy_or_a_loss(rule):
    task = fl.classification(Steps(depth=1))

    def evaluate(variables, batch):
        return {"brier": task.evaluate(variables, batch)["loss"]}

    made = fl.fedavg(
        task._replace(evaluate=evaluate), client_optimizer=optax.sgd(0.1), batch_size=8
    )
    with pytest.raises(fl.FedLPError, match=r"no metric, .*metric, one of test_brier\."):
        fl.simulate(made, DATA, CLIENTS, rounds=1, cohort=2, **rule)


def test_the_metrics_of_a_rule_are_those_of_the_algorithm():
    settings = {"client_optimizer": optax.sgd(0.1), "batch_size": 8}
    task = fl.classification(Steps(depth=1))
    personal = fl.fedper(task, head="head1", **settings)
    with pytest.raises(fl.FedLPError, match="did you mean 'test_accuracy_personal'"):
        fl.simulate(
            personal, DATA, CLIENTS, rounds=1, cohort=2, keep_best=fl.KeepBest("test_accuracy")
        )


@pytest.mark.parametrize("metric", ["test_accuracy_personal", "test_loss"])
def test_without_a_metric_rules_take_the_one_that_stands_for_the_run(metric):
    sign = -1 if metric == "test_loss" else 1
    rows = [{"round": r, metric: sign * v} for r, v in [(1, 0.2), (2, 0.6), (3, 0.4)]]
    rows.insert(1, {"round": 1, "train_loss": 0.1})
    assert Keeper(fl.KeepBest(), rows).best[:3] == (metric, sign * 0.6, 2)
    assert Watch(fl.EarlyStop(patience=1), rows).reason.startswith(f"{metric} has not beaten")
    assert f"best {metric.replace('_', ' ')}" in fl.compare({"one": rows}).header


def test_a_file_asks_for_it_and_the_run_directory_has_it(tmp_path):
    config = DIGITS | {"rounds": 3, "eval_every": 1, "keep_best": {"metric": "test_loss"}}
    done = execute(config, tmp_path / "out")
    assert done.summary["best"]["round"] == done.result.best.round
    saved = fl.load_variables(tmp_path / "out/best.npz")
    np.testing.assert_array_equal(flat(saved), flat(done.result.best.variables))


@pytest.mark.parametrize("metric", ["train_loss", "", 3])
def test_a_metric_that_is_not_tested_is_refused(metric):
    with pytest.raises(fl.FedLPError, match="must be a metric of evaluations"):
        fl.KeepBest(metric)


def test_a_run_is_readable_without_its_arrays():
    result = simulate(rounds=2, keep_best=fl.KeepBest())
    accuracy = result.history["test_accuracy"]
    assert repr(result) == (
        f"Result(2 rounds, test accuracy {accuracy[-1]:.4f} in round 2, "
        f"best {accuracy.max():.4f} in round {accuracy.argmax() + 1}, 0.001076 MB up, "
        "0.001072 MB down, 67 parameters in 2 layers)"
    )
    assert repr(result.history).startswith("History(rounds 1 to 2: round, train_loss, ")
    assert repr(result.costs) == "Ledger(2 rounds of 2 layers: 0.001076 MB up, 0.001072 MB down)"
    assert repr(result.clients).startswith("ClientHistory(4 rows: round, client, ")
    assert repr(result.state) == "ServerState(after round 2, 67 numbers in variables)"
    assert repr(simulate(rounds=0).history) == "History(no rounds)"
