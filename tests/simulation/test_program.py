"""Several rounds in one call: the bits of rounds called one by one, and no boundary is crossed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Steps, dataset, flat

import fedlp_jax as fl
from fedlp_jax.execution.plan import Plan

DATA = dataset(120)
EVEN = fl.partition.iid(DATA.train.labels, clients=12, seed=0)
UNEVEN = fl.partition.dirichlet(DATA.train.labels, clients=12, alpha=0.1, seed=0, min_size=1)
LOCAL = {"client_optimizer": optax.adam(1e-2), "epochs": 2, "batch_size": 4}
TASK = fl.classification(Steps(depth=2, norm=True))
HOMO = fl.fedlp_homo(TASK, keep=0.5, **LOCAL)
SHARED = fl.fedlp_hetero(fl.classification(Steps()), depths="uniform", heads="shared", **LOCAL)
KEPT = fl.fedlp_hetero(fl.classification(Steps()), depths="uniform", heads="persist", **LOCAL)
FAULTS = fl.Faults(dropout=0.2, corruption=fl.Corruption("label_flip", share=0.3))
SERVER = fl.fedlp_homo(TASK, keep=0.5, server_optimizer=optax.adam(1e-2), **LOCAL)
CASES = {
    "even clients": (HOMO, EVEN, None),
    "uneven clients": (HOMO, UNEVEN, None),
    "submodels": (SHARED, UNEVEN, None),
    "faults": (HOMO, UNEVEN, FAULTS),
    "a server optimizer": (SERVER, UNEVEN, None),
}


def run(case, plan, **settings):
    algorithm, clients, faults = case
    settings = {"rounds": 11, "cohort": 6, "seed": 1, "faults": faults, "eval_every": 4} | settings
    return fl.simulate(algorithm, DATA, clients, plan=plan, **settings)


def calls_of(monkeypatch):
    """Records the rounds of every call."""
    calls = []
    dispatch = fl.Simulation.dispatch

    def recorded(run, round, count=1):
        calls.append(list(range(round, round + count)))
        return dispatch(run, round, count)

    monkeypatch.setattr(fl.Simulation, "dispatch", recorded)
    return calls


def assert_equal(one, other):
    np.testing.assert_array_equal(flat(one.state.variables), flat(other.state.variables))
    assert len(one.history) == len(other.history)
    for mine, yours in zip(one.history, other.history, strict=True):
        assert {k: v for k, v in mine.items() if k != "seconds"} == {
            k: v for k, v in yours.items() if k != "seconds"
        }
    np.testing.assert_array_equal(one.costs.senders, other.costs.senders)


def table():
    """Two telling cases are fast, the rest slow."""
    for name, case in CASES.items():
        for devices, width in ((1, 1), (2, 2)):
            fast = (name, devices) in (("even clients", 1), ("uneven clients", 2))
            marks = () if fast else pytest.mark.slow
            yield pytest.param(case, devices, width, marks=marks, id=f"{name}-{devices}-{width}")


@pytest.mark.parametrize(("case", "devices", "width"), list(table()))
@pytest.mark.slow
def test_the_bits_are_those_of_rounds_one_by_one(case, devices, width, monkeypatch):
    monkeypatch.setattr("fedlp_jax.simulation.run._DISPATCH_SECONDS", 1e6)  # on a busy machine too
    calls = calls_of(monkeypatch)
    several = run(case, Plan(devices, width, rounds_at_once=3))
    assert calls[0] == [1] and max(map(len, calls)) == 3
    one = run(case, Plan(devices, width))
    assert (several.plan.rounds_at_once, one.plan.rounds_at_once) == (3, 1)
    assert several.readings["padded_share"] == one.readings["padded_share"]
    assert_equal(several, one)


def test_no_call_goes_beyond_a_test_a_checkpoint_or_the_end(monkeypatch, tmp_path):
    monkeypatch.setattr("fedlp_jax.simulation.run._DISPATCH_SECONDS", 1e6)
    calls = calls_of(monkeypatch)
    plan = Plan(1, 1, rounds_at_once=8)
    whole = run(CASES["even clients"], plan, rounds=19, eval_every=7)
    # The first is alone; another is dispatched before it is read.
    assert calls == [[1], [2], [3, 4, 5, 6, 7], list(range(8, 15)), list(range(15, 20))]
    assert whole.history.rounds("test_accuracy").tolist() == [7, 14, 19]
    calls.clear()
    saved = fl.Checkpoint(tmp_path / "saved", every=5)
    run(CASES["even clients"], plan, rounds=12, eval_every=7, checkpoint=saved)
    assert [call[-1] for call in calls] == [1, 2, 5, 7, 10, 12]
    rest = run(CASES["even clients"], None, rounds=19, eval_every=7, resume=saved.latest())
    assert rest.plan.rounds_at_once == 8
    np.testing.assert_array_equal(flat(whole.state.variables), flat(rest.state.variables))


def test_with_callbacks_every_round_is_a_call_of_its_own(monkeypatch):
    calls, seen = calls_of(monkeypatch), []
    case, plan = CASES["even clients"], Plan(2, 1, rounds_at_once=4)
    watched = run(case, plan, callbacks=[lambda r, row, state: seen.append(int(state.round))])
    assert seen == list(range(1, 12)) == [call[0] for call in calls]
    assert {len(call) for call in calls} == {1}
    assert_equal(watched, run(case, plan))


def test_long_rounds_are_not_put_together(monkeypatch):
    monkeypatch.setattr("fedlp_jax.simulation.run._DISPATCH_SECONDS", 1e-9)
    calls = calls_of(monkeypatch)
    run(CASES["even clients"], Plan(1, 1, rounds_at_once=4), rounds=5)
    assert {len(call) for call in calls} == {1}


def test_runs_side_by_side_fill_a_call_together():
    plan = Plan(1, 1, rounds_at_once=8)
    one = fl.Simulation(HOMO, DATA, EVEN, rounds=20, cohort=2, plan=plan)
    one.history.rows.append({"round": 1, "seconds": 0.1})  # its share of a round of all
    assert [one.at_once(2, lanes) for lanes in (1, 2, 5, 50)] == [5, 2, 1, 1]


def test_a_stop_ends_the_run_between_calls():
    asked = []
    result = run(
        CASES["even clients"],
        Plan(1, 1, rounds_at_once=4),
        rounds=100,
        stop=lambda: len(asked) > 4 or asked.append(1),
    )
    assert 4 < len(result.history) < 20
    assert int(result.state.round) == len(result.history)


def test_the_seconds_of_a_call_are_shared_by_its_rounds(monkeypatch):
    monkeypatch.setattr("fedlp_jax.simulation.run._DISPATCH_SECONDS", 1e6)
    result = run(CASES["even clients"], Plan(1, 1, rounds_at_once=8), rounds=10, eval_every=None)
    seconds = result.history["seconds"]
    assert (seconds[2:] == seconds[2]).all() and (seconds > 0).all()
    assert seconds.sum() <= result.readings["run_seconds"]


@pytest.mark.parametrize(
    ("algorithm", "data"), [(KEPT, None), (HOMO, "host")], ids=["kept heads", "data on the host"]
)
@pytest.mark.slow
def test_rounds_that_need_the_host_are_called_one_by_one(algorithm, data):
    case = (algorithm, UNEVEN, None)
    several = run(case, Plan(2, 1, data, rounds_at_once=4), rounds=3)
    assert several.plan.rounds_at_once == 1
    assert_equal(several, run(case, Plan(2, 1, data), rounds=3))


@pytest.mark.slow
def test_a_run_that_diverges_in_a_call_stands_where_it_did(monkeypatch):
    monkeypatch.setattr("fedlp_jax.simulation.run._DISPATCH_SECONDS", 1e6)
    # The rate is traced: it becomes infinite in round 5, in the middle of a call.
    algorithm = fl.fedavg(
        TASK,
        client_optimizer=optax.sgd(0.1),
        client_schedule=lambda r: jnp.where(r < 5, 1.0, jnp.inf),
        batch_size=4,
    )
    ends = []
    for at_once in (1, 8):
        with pytest.raises(fl.DivergedError, match=r"round 5: .* is as after round 4") as error:
            run((algorithm, EVEN, None), Plan(1, 1, rounds_at_once=at_once), eval_every=None)
        ends.append(error.value)
    assert str(ends[0]) == str(ends[1])
    assert_equal(ends[0].result, ends[1].result)


@pytest.mark.slow
def test_a_call_has_one_reduction_a_round_and_gathers_nothing():
    prepared = fl.Simulation(
        SHARED, DATA, UNEVEN, rounds=1, cohort=8, plan=Plan(4, 2, rounds_at_once=4)
    )
    prepared.compile()
    text = prepared.program.round.as_text()
    assert len(re.findall(r"= .*\ball-reduce\(", text)) == 1  # in the loop
    for word in ("all-gather(", "all-to-all(", "collective-permute("):
        assert word not in text
    state = jax.tree.leaves(prepared.state)
    assert text.count("may-alias") + text.count("must-alias") >= len(state) - 3


def test_numbers_of_rounds_are_checked():
    with pytest.raises(fl.FedLPError, match="plan.rounds_at_once=0 must be a whole number"):
        run(CASES["even clients"], Plan(rounds_at_once=0), rounds=0)
