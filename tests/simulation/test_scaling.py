"""Rounds on other numbers of devices: the model, and the reduction that it counts."""

import re

import jax
import numpy as np
import optax
import pytest
from small import Steps, dataset

import fedlp_jax as fl
from fedlp_jax.execution.plan import LanesPlan, Plan
from fedlp_jax.simulation.estimate import measure_pace, pace_between
from fedlp_jax.simulation.lanes import compile_lanes
from fedlp_jax.simulation.scaling import Link, Pace, Scaling, load, reduction_seconds

DATA = dataset()
EVEN = fl.partition.iid(DATA.train.labels, clients=12, seed=0)
TASK = fl.classification(Steps(norm=True))
LOCAL = {"client_optimizer": optax.sgd(0.1), "batch_size": 5}
SMALL = fl.fedavg(fl.classification(fl.models.Logistic(num_classes=3)), **LOCAL)
PACE, LINK = Pace(step=1e-3, fixed=5e-4), Link(bandwidth=1e6, latency=1e-5)


def simulation(cohort=8, devices=1, algorithm=None, clients=EVEN):
    algorithm = algorithm or fl.fedlp_homo(TASK, keep=0.5, **LOCAL)
    plan = Plan(devices, 1)
    return fl.Simulation(algorithm, DATA, clients, rounds=1, cohort=cohort, plan=plan)


def test_a_reduction_of_devices_takes_messages_and_bytes():
    assert reduction_seconds(1, 10**6, LINK) == 0
    assert reduction_seconds(2, 10**6, LINK) == pytest.approx(2e-5 + 1)
    assert reduction_seconds(5, 10**6, LINK) == pytest.approx(6e-5 + 2 * 4 / 5)
    assert reduction_seconds(256, 10**6, Link(1e12, 0.0)) == pytest.approx(2e-6 * 255 / 256)


@pytest.mark.parametrize(
    ("seconds", "steps", "pace"),
    [
        ([11.0, 3.0], [10, 2], Pace(1.0, 1.0)),
        ([10.0], [5], Pace(2.0)),
        ([10.0, 10.0], [5, 5], Pace(2.0)),  # no longer than the other
        ([10.0, 0.5], [10, 2], Pace(1.0)),  # noise: a round cannot take less than nothing
        ([1.0, 2.0], [10, 2], Pace(0.1)),
    ],
)
def test_a_pace_is_the_line_through_two_lengths_of_rounds(seconds, steps, pace):
    assert pace_between(seconds, steps) == pytest.approx(pace)


def test_a_round_is_the_busiest_device_and_one_reduction():
    model = Scaling(simulation(), PACE, LINK)  # 8 clients of 5 examples: a step each
    four, many = model(4), model(64)
    assert (four.idle, four.steps, four.uneven) == (0, 2, 0)
    reduction = reduction_seconds(4, model.reduced_bytes, LINK)
    assert four.seconds == pytest.approx(5e-4 + 2e-3 + reduction)
    assert four.limit == "reduction"
    assert (many.idle, many.steps) == (56, 1)
    assert many.uneven == pytest.approx(1e-3 * (1 - 8 / 64))
    assert many.seconds == pytest.approx(model(8).seconds)


def test_more_devices_pay_until_the_cohort_the_reduction_or_the_rest_decides():
    run, quick, slow = simulation(), Link(1e12, 0.0), Link(1e5, 0.0)
    by_cohort = Scaling(run, Pace(1e-3), quick)
    assert (by_cohort.worthwhile(), by_cohort(16).limit) == (8, "cohort")
    by_reduction = Scaling(run, Pace(1e-3), slow)
    assert (by_reduction.worthwhile(), by_reduction(2).limit) == (1, "reduction")
    by_rest = Scaling(run, Pace(1e-3, 1e-2), quick)
    assert (by_rest.worthwhile(), by_rest(8).limit) == (4, "fixed part")


def test_a_shallow_step_counts_its_share_of_a_deep_one():
    algorithm = fl.fedlp_hetero(TASK, depths="uniform", **LOCAL)
    run = simulation(12, algorithm=algorithm)
    busiest, total = load(run, 1, 1)
    assert busiest == pytest.approx(total) and 4 < total < 12
    assert load(run, 12, 1) == pytest.approx((1, total))


@pytest.mark.parametrize("devices", [2, 4])
def test_the_compiled_round_reduces_once_the_bytes_that_are_modelled(devices):
    run = simulation(devices=devices, algorithm=SMALL)
    run.compile()
    text = run.program.round.as_text()
    sizes = re.findall(r"= f32\[(\d+)\]\S* all-reduce(?:-start)?\(", text)
    assert len(sizes) == len(re.findall(r"= .*\ball-reduce(?:-start)?\(", text)) == 1
    model = Scaling(run, PACE)
    assert model.reduced_bytes == 4 * int(sizes[0])
    parameters = sum(x.size for x in jax.tree.leaves(run.state.variables))
    assert parameters <= int(sizes[0]) < parameters + 50  # and what layers weigh


def test_runs_on_devices_of_their_own_reduce_nothing():
    run = simulation(algorithm=SMALL)
    (program,) = compile_lanes([(run, 4, LanesPlan(1, 1, "device", 1, groups=4))])
    (groups,) = re.findall(r"all-reduce\(.*replica_groups=(\S+),", program.round.as_text())
    assert groups == "{{0},{1},{2},{3}}"  # each device with itself


def test_a_pace_is_measured_on_all_devices_of_the_plan():
    run = simulation(devices=2, algorithm=SMALL)
    arguments = {
        "algorithm": run.algorithm,
        "data": DATA,
        "clients": EVEN,
        "rounds": 3,
        "cohort": 8,
        "plan": Plan(2, 1),
    }
    pace, measured = measure_pace(arguments, seconds=0.01)
    assert pace.step > 0 and pace.fixed >= 0
    assert (measured.plan.devices, measured.size) == (2, 8)


def test_a_robust_rule_exchanges_more_than_is_modelled():
    rule = fl.fedavg(TASK, aggregator="median", **LOCAL)
    assert not Scaling(simulation(algorithm=rule), PACE).complete
    assert Scaling(simulation(algorithm=SMALL), PACE).complete


def test_what_cannot_be_modelled_is_refused():
    run = simulation()
    for pace, link, said in [
        (Pace(0.0), LINK, "pace.step=0.0 must be a number above 0"),
        (PACE, Link(0.0), "link.bandwidth=0.0 must be a number above 0"),
        (PACE, Link(1.0, -1.0), "link.latency=-1.0 must be a number of at least 0"),
    ]:
        with pytest.raises(fl.FedLPError, match=said):
            Scaling(run, pace, link)
    with pytest.raises(fl.FedLPError, match="devices=0 must be a whole number of at least 1"):
        Scaling(run, PACE)(0)


def test_uneven_clients_are_dealt_to_the_least_busy_device():
    owner = np.repeat([0, 1, 2, 3], [30, 10, 10, 10])
    run = simulation(4, clients=fl.partition.natural(DATA.train.labels, clients=owner))
    assert [load(run, devices, 1)[0] for devices in (1, 2, 4)] == [12, 6, 6]
