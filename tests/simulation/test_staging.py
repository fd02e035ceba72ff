"""Data on the host: each device is sent the rows of its own clients, and nothing else changes."""

import re

import jax
import numpy as np
import optax
import pytest
from small import Steps, dataset, flat

import fedlp_jax as fl
from fedlp_jax.execution import plan as plans
from fedlp_jax.execution.plan import Plan
from fedlp_jax.execution.scheduling import lay_out, most_clients, slots_per_device
from fedlp_jax.simulation import staging
from fedlp_jax.simulation.cohorts import CohortBuilder, sample

DATA = dataset(120)
LABELS = DATA.train.labels
EVEN = fl.partition.iid(LABELS, clients=12, seed=0)
UNEVEN = fl.partition.dirichlet(LABELS, clients=12, alpha=0.1, seed=0, min_size=1)
LOCAL = {"client_optimizer": optax.adam(1e-2), "epochs": 2, "batch_size": 4}
HOMO = fl.fedlp_homo(fl.classification(Steps(depth=2, norm=True)), keep=0.5, **LOCAL)
HETERO = fl.fedlp_hetero(fl.classification(Steps()), depths="uniform", heads="persist", **LOCAL)
FAULTS = fl.Faults(dropout=0.2, corruption=fl.Corruption("label_flip", share=0.3))
CASES = {
    "even clients": (HOMO, EVEN, None),
    "uneven clients": (HOMO, UNEVEN, None),
    "submodels and heads of their own": (HETERO, UNEVEN, None),
    "faults": (HOMO, UNEVEN, FAULTS),
    "robust": (fl.fedlp_homo(HOMO.task, keep=0.5, aggregator="median", **LOCAL), UNEVEN, None),
}


def run(case, plan, **settings):
    algorithm, clients, faults = case
    settings = {"rounds": 3, "cohort": 7, "seed": 1, "faults": faults} | settings
    return fl.simulate(algorithm, DATA, clients, plan=plan, **settings)


def table():
    """Two telling cases are fast, the rest slow."""
    for name, case in CASES.items():
        for devices, width in ((1, 1), (2, 1), (4, 2)):
            fast = (name, devices) in (("uneven clients", 2), ("faults", 2))
            marks = () if fast else pytest.mark.slow
            yield pytest.param(case, devices, width, marks=marks, id=f"{name}-{devices}-{width}")


@pytest.mark.parametrize(("case", "devices", "width"), list(table()))
@pytest.mark.slow
def test_the_bits_are_those_of_data_on_the_device(case, devices, width):
    if case is not CASES["uneven clients"] and devices != 2:
        width = 3 - width
    one, other = (run(case, Plan(devices, width, place)) for place in ("device", "host"))
    assert one.plan.data == "device" and other.plan.data == "host"
    np.testing.assert_array_equal(flat(one.state.variables), flat(other.state.variables))
    for key in dict.fromkeys(key for row in one.history for key in row):
        if not key.endswith("seconds"):
            np.testing.assert_array_equal(one.history[key], other.history[key], err_msg=key)


@pytest.mark.parametrize("clients", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_each_device_is_sent_the_rows_of_its_own_clients(clients):
    prepared = fl.Simulation(HOMO, DATA, clients, rounds=1, cohort=7, plan=Plan(2, 2, "host"))
    shapes = set()
    for round in range(1, 6):
        staged = prepared.stage(round)
        inputs, labels = np.asarray(staged.examples.inputs), np.asarray(staged.examples.labels)
        room = len(labels) // 2
        assert prepared.stage.round_bytes == 2 * room * (4 * 4 + 4)  # and those of the next
        assert {s.data.shape for s in staged.examples.inputs.addressable_shards} == {(room, 4)}
        assert staged.examples.normalize.gain.sharding.is_fully_replicated
        slots = slots_per_device(7, 2)
        for slot, client in enumerate(staged.hosts[0].client):
            here = staged.hosts[0].rows[slot, : staged.hosts[0].size[slot]]
            assert (here // room == slot // slots).all()  # on the device that runs the client
            rows = clients.rows(client) if client >= 0 else []
            np.testing.assert_array_equal(inputs[here], DATA.train.inputs[rows])
            np.testing.assert_array_equal(labels[here], LABELS[rows])
        assert np.count_nonzero(inputs.any(axis=1)) == staged.hosts[0].size.sum()  # and none else
        shapes.add(str(jax.tree.map(np.shape, (staged.examples, staged.cohorts))))
    assert len(shapes) == 1
    if clients is EVEN:
        assert room == 4 * 10  # no more than its share of 7 clients of 10


def test_no_cohort_needs_more_room_than_there_is():
    rng = np.random.default_rng(0)
    for trial in range(60):
        clients, devices = int(rng.integers(5, 30)), int(rng.integers(1, 5))
        cohort = int(rng.integers(1, clients + 1))
        sizes = rng.integers(1, 2 + 30 * (trial % 3), clients)
        level, cost = rng.integers(0, 2, clients), [1.0, float(rng.integers(1, 4))]
        labels = np.zeros(sizes.sum(), np.int64)
        partition = fl.partition.natural(labels, clients=np.repeat(np.arange(clients), sizes))
        plan = Plan(devices, 1)
        builder = CohortBuilder(partition, level, lambda n: n, cost, plan)
        for round in range(5):
            built, _ = builder.build(sample(trial, round, clients, cohort))
            size = np.asarray(built.size).reshape(devices, -1)
            work = sizes * np.array(cost)[level]
            assert (size > 0).sum(axis=1).max() <= most_clients(
                cohort, devices, work.min() / work.max()
            )
            assert size.sum(axis=1).max() <= builder.most_rows(cohort)


def test_clients_that_are_alike_get_their_even_share():
    for cohort in range(1, 40):
        for devices in range(1, 6):
            layout = lay_out(np.full(cohort, 3), np.zeros(cohort, int), [1.0], Plan(devices, 1))
            counts = (layout.member.reshape(devices, -1) >= 0).sum(axis=1)
            assert counts.max() == most_clients(cohort, devices, 1.0) == -(-cohort // devices)
            assert most_clients(cohort, devices, 0.0) == slots_per_device(cohort, devices)


@pytest.mark.slow
def test_a_round_is_still_one_reduction_and_nothing_is_gathered():
    run = fl.Simulation(HETERO, DATA, UNEVEN, rounds=1, cohort=7, plan=Plan(4, 2, "host"))
    run.compile()
    text = run.program.round.as_text()
    assert len(re.findall(r"= .*\ball-reduce\(", text)) == 1
    for word in ("all-gather(", "all-to-all(", "collective-permute("):
        assert word not in text


def test_a_million_clients_are_staged_as_quickly_as_a_thousand():
    labels = np.zeros(10**6, np.int64)
    inputs = np.zeros((10**6, 1), np.uint8)
    data = fl.from_arrays(inputs, labels, inputs[:5], labels[:5], num_classes=2, normalize=(1, 0))
    clients = fl.partition.iid(labels, clients=10**6, seed=0)
    task = fl.classification(fl.models.Logistic(num_classes=2))
    algorithm = fl.fedavg(task, client_optimizer=optax.sgd(0.1), batch_size=1)
    run = fl.Simulation(algorithm, data, clients, rounds=1, cohort=10, plan=Plan(2, 1, "host"))
    staged = run.stage(1)
    assert staged.examples.inputs.shape == (10, 1)
    assert isinstance(run.stage.train.inputs, np.ndarray)


def test_the_place_is_chosen_by_the_memory(monkeypatch):
    train, test = (sum(x.nbytes for x in split) for split in (DATA.train, DATA.test))
    case = CASES["uneven clients"]

    def place(free, wanted=None):
        monkeypatch.setattr(plans, "free_bytes", lambda plan: free)
        return plans.with_place(Plan(2, 1, wanted), train, test).data

    assert place(None) == "device"  # where nobody says what is free
    assert place(train + test) == "device"
    assert place(train + test - 1) == "host"
    assert place(10**9, "host") == "host"
    with pytest.raises(
        fl.FedLPError, match=r"the data take .* on each of 2 device.*plan.data to host"
    ):
        place(train, "device")
    with pytest.raises(fl.FedLPError, match="the test split takes"):
        place(test - 1, "host")
    monkeypatch.setattr(plans, "free_bytes", lambda plan: train)
    with pytest.raises(fl.FedLPError, match="plan.data to host"):
        run(case, Plan(2, 1, "device"), rounds=0)
    assert run(case, Plan(2, 1), rounds=0).plan.data == "host"


def test_what_is_sent_ahead_counts_as_memory(monkeypatch):
    prepared = fl.Simulation(HOMO, DATA, UNEVEN, rounds=1, cohort=7, plan=Plan(1, 1, "host"))
    prepared.compile()
    need = plans.needed_bytes(prepared.program.round)
    monkeypatch.setattr(plans, "free_bytes", lambda plan: need + prepared.stage.round_bytes)
    fl.Simulation(HOMO, DATA, UNEVEN, rounds=1, cohort=7, plan=Plan(1, 1, "host")).compile()
    monkeypatch.setattr(plans, "free_bytes", lambda plan: need + prepared.stage.round_bytes - 1)
    again = fl.Simulation(HOMO, DATA, UNEVEN, rounds=1, cohort=7, plan=Plan(1, 1, "host"))
    with pytest.raises(fl.FedLPError, match="a smaller batch or model"):
        again.compile()


def test_an_unknown_place_is_refused():
    with pytest.raises(fl.FedLPError, match="plan.data 'hosts' is unknown; did you mean 'host'"):
        run(CASES["even clients"], Plan(data="hosts"), rounds=0)


@pytest.mark.slow
def test_a_run_goes_on_with_its_data_elsewhere(tmp_path):
    case = CASES["uneven clients"]
    whole = run(case, Plan(2, 1, "device"), rounds=4)
    saved = fl.Checkpoint(tmp_path / "saved", every=1)
    run(case, Plan(2, 1, "host"), rounds=2, checkpoint=saved)
    assert saved.latest().plan.data == "host"
    rest = run(case, Plan(2, 1, "device"), rounds=4, resume=saved.latest())
    np.testing.assert_array_equal(flat(rest.variables), flat(whole.variables))


def test_rows_are_cut_by_device():
    labels = np.arange(12) % 2
    partition = fl.partition.natural(labels, clients=np.repeat([0, 1, 2], [3, 4, 5]))
    builder = CohortBuilder(partition, np.zeros(3, int), lambda n: n, [1.0], Plan(2, 1))
    cohort, _ = builder.build(np.arange(3))
    own, rows = staging.own_rows(cohort, 2, 8)
    assert sorted(np.concatenate(own).tolist()) == list(range(12))
    assert [len(part) for part in own] == [5, 7]
    assert rows.max() == 8 + 6 and rows.dtype == np.int32
