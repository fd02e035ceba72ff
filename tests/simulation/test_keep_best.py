"""The model of the best evaluation is kept, in Python, files and after a resume."""

import numpy as np
import optax
import pytest
from small import DIGITS, Steps, dataset, flat

import fedlp_jax as fl
from fedlp_jax.config.experiment import execute
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
    fl.save_variables(path, {"params": {"a": np.float32([2])}})
    keeper = Keeper(fl.KeepBest(path=path), rows)
    keeper.update({"round": 4, "test_accuracy": 0.7}, {"params": {"a": np.float32([4])}})
    assert keeper.best.round == 2 and keeper.best.variables["params"]["a"] == [2]
    keeper.update({"round": 5, "test_accuracy": 0.8}, {"params": {"a": np.float32([5])}})
    assert keeper.best.round == 5 and fl.load_variables(path)["params"]["a"] == [5]
    assert Keeper(fl.KeepBest(), rows).best == ("test_accuracy", 0.75, 2, None)


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
