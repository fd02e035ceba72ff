"""Slots and chunks: every client once, on any plan, and one reduction a round."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Steps, dataset, round_arguments

import fedlp_jax as fl
from fedlp_jax.execution.map_clients import Level, map_sum
from fedlp_jax.execution.plan import Plan, resolve
from fedlp_jax.execution.scheduling import (
    lay_out,
    size_buckets,
    slots_per_device,
    with_even_chunks,
)


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("width", [1, 3])
def test_every_client_has_one_slot_in_its_level(devices, width):
    rng = np.random.default_rng(devices)
    steps, level = rng.integers(1, 50, 23), rng.integers(0, 3, 23)
    layout = lay_out(steps, level, [1.0, 2.0, 4.0], Plan(devices, width))
    member = layout.member.reshape(devices, -1)
    assert sorted(member[member >= 0]) == list(range(23))
    for d in range(devices):
        for g in range(3):
            here = member[d, layout.segment[d, g] : layout.segment[d, g + 1]]
            assert (level[here] == g).all()
            assert (np.diff(steps[here]) <= 0).all()  # longest first
        assert (member[d, layout.segment[d, -1] :] == -1).all()
    assert 0 <= layout.padded_share < 1
    if width == 1:
        assert layout.padded_share == 0


def test_heavy_clients_are_spread_by_modelled_work():
    steps = np.array([100, 1, 1, 1, 1, 96])
    layout = lay_out(steps, np.zeros(6, int), [1.0], Plan(2, 1))
    loads = [steps[m[m >= 0]].sum() for m in layout.member.reshape(2, -1)]
    assert loads == [100, 100]
    assert layout.imbalance == 1.0
    # A level that costs ten times as much counts for ten.
    layout = lay_out(np.full(4, 5), np.array([1, 0, 0, 0]), [1.0, 10.0], Plan(2, 1))
    assert sorted((layout.member.reshape(2, -1) >= 0).sum(axis=1)) == [1, 3]


def test_slots_leave_room_for_uneven_clients():
    assert slots_per_device(10, 1) == 10
    assert slots_per_device(10, 4) == 6
    assert slots_per_device(1, 1) == 1


@pytest.mark.parametrize("plan", [Plan(1, 1), Plan(1, 3), Plan(2, 1), Plan(4, 3), Plan(1, 64)])
def test_map_sum_runs_each_client_at_its_level(plan):
    """Levels multiply by 1 and 10; idle lanes and empty slots must not reach the sum."""
    clients = np.arange(1, 12)
    level = clients % 2
    layout = lay_out(clients, level, [1.0, 1.0], plan)
    value = np.where(layout.member >= 0, clients[layout.member], -1000).astype(np.int32)

    def make(factor):
        def run(shared, x, own, active, bounds):
            counted = jnp.where(active, x * factor + shared, 0)
            return counted, {"out": x * factor}, own + x

        return Level(run, lambda x: x.max(), lambda shared, total: total)

    before = np.arange(len(value), dtype=np.int32)
    total, outputs, own = jax.jit(
        lambda v, s, k: map_sum([make(1), make(10)], jnp.int32(7), v, s, plan, client_state=k)
    )(jnp.asarray(value), jnp.asarray(layout.segment), jnp.asarray(before))
    assert int(total) == (clients * np.where(level, 10, 1)).sum() + 7 * len(clients)
    ran = layout.member >= 0
    expected = np.where(ran, value * np.where(value % 2, 10, 1), 0)
    np.testing.assert_array_equal(np.asarray(outputs["out"]), expected)
    np.testing.assert_array_equal(np.asarray(own), before + np.where(ran, value, 0))


@pytest.mark.parametrize("width", [1, 3])
def test_a_level_is_traced_once_for_its_shapes_and_its_loop(width):
    traced = []

    def run(shared, x, own, active, bounds):
        traced.append(x.shape)
        return jnp.where(active, x, 0), x, own

    level = Level(run, lambda x: x.max(), lambda shared, total: total)
    layout = lay_out(np.arange(1, 7), np.zeros(6, int), [1.0], Plan(2, width))
    jax.jit(lambda v, s: map_sum([level], (), v, s, Plan(2, width))).trace(
        jnp.asarray(layout.member), jnp.asarray(layout.segment)
    )
    assert traced == [()]


def test_plans_are_completed_for_the_machine():
    # One stream of clients per device, one client at a time.
    assert resolve(None, 10) == Plan(4, 1, None, 1)
    assert resolve(Plan(width=99), 10) == Plan(4, 3, None, 1)
    assert resolve(Plan(devices=4), 2) == Plan(2, 1, None, 1)


def test_a_width_that_is_chosen_leaves_few_lanes_idle(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def width(cohort, assigned, given=None):
        plan = resolve(Plan(devices=1, width=given), cohort)
        return with_even_chunks(plan, cohort, np.asarray(assigned)).width

    one = np.zeros(1000, np.int32)
    cohorts = (1, 128, 129, 200, 1000)
    assert [width(c, one) for c in cohorts] == [1, 128, 65, 100, 125]
    fifths = np.repeat(np.arange(5), 200)
    assert [width(c, fifths) for c in (3, 100, 1000)] == [1, 20, 100]
    assert width(100, np.repeat([0, 1], [900, 100])) == 90
    given = resolve(Plan(devices=1, width=128), 200)
    assert given.width == 128  # which simulations leave as it is

    task = fl.classification(Steps())
    data = dataset()
    clients = fl.partition.iid(data.train.labels, clients=12)
    local = {"client_optimizer": optax.sgd(0.1), "batch_size": 2}
    hetero = fl.fedlp_hetero(task, depths=[1, 2, 3] * 4, heads="shared", **local)
    for plan, wide in ((Plan(devices=1), 4), (Plan(devices=1, width=12), 12)):
        run = fl.Simulation(hetero, data, clients, rounds=1, cohort=12, plan=plan)
        assert run.plan.width == wide


@pytest.mark.parametrize("width", [2, 5])
def test_no_write_of_a_chunk_waits_for_another(width):
    """Scattered to places that may repeat, lanes would be written one by one where bits count."""
    run = fl.Simulation(
        fl.fedavg(fl.classification(Steps()), client_optimizer=optax.sgd(0.1), batch_size=2),
        dataset(),
        fl.partition.iid(dataset().train.labels, clients=12),
        rounds=1,
        cohort=7,
        plan=Plan(1, width),
    )
    program = jax.make_jaxpr(lambda *a: run.algorithm.round(*a, run.plan))
    jaxpr = str(program(*round_arguments(run)))
    unique = re.findall(r" scatter\[[^\]]*unique_indices=(\w+)", jaxpr)
    assert len(unique) == jaxpr.count(" scatter[") > 5
    assert set(unique) == {"True"}


@pytest.mark.parametrize("devices", [1, 2, 5])
def test_clients_go_to_the_first_of_the_least_busy_devices_with_room(devices):
    rng = np.random.default_rng(devices)
    for ties in (1, 3, 40):
        steps = rng.integers(1, ties + 1, 23)
        layout = lay_out(steps, np.zeros(23, np.int32), [1.0], Plan(devices, 1))
        room = slots_per_device(23, devices)
        load, members = [0] * devices, [[] for _ in range(devices)]
        for i in sorted(range(23), key=lambda i: (-steps[i], i)):
            d = min((d for d in range(devices) if len(members[d]) < room), key=lambda d: load[d])
            load[d] += int(steps[i])
            members[d].append(i)
        for d, row in enumerate(layout.member.reshape(devices, -1)):
            assert row[row >= 0].tolist() == members[d]  # longest first, then by id


@pytest.mark.parametrize(
    ("given", "kernels", "flag"),
    [
        (None, "tuned", "--xla_gpu_exclude_nondeterministic_ops=true"),
        (None, "fixed", "--xla_gpu_deterministic_ops=true"),
        ("--xla_gpu_deterministic_ops=false", "tuned", "--xla_gpu_deterministic_ops=false"),
    ],
)
def test_setup_asks_for_gpus_that_repeat_unless_told_otherwise(given, kernels, flag):
    code = f"import os, fedlp_jax as fl; fl.setup(2, gpu_kernels={kernels!r}); "
    code += "print(os.environ['XLA_FLAGS']); import jax; "
    code += "print(jax.numpy.ones(3).sum(), len(jax.devices()))"
    environ = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environ |= {} if given is None else {"XLA_FLAGS": given}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environ, text=True, capture_output=True, check=True
    )
    flags, result = run.stdout.splitlines()
    assert [one for one in flags.split() if "determin" in one] == [flag]
    assert result == "3.0 2"


def test_setup_after_the_first_operation_says_so():
    jnp.zeros(1).block_until_ready()
    before = os.environ.get("XLA_FLAGS", "")
    with pytest.raises(fl.FedLPError, match="jax is already in use"):
        fl.setup(cpu_devices=3)
    assert os.environ.get("XLA_FLAGS", "") == before


@pytest.mark.slow
def test_a_round_is_one_reduction_over_the_mesh_and_gathers_nothing():
    data = dataset()
    clients = fl.partition.iid(data.train.labels, clients=12)
    algorithm = fl.fedlp_hetero(
        fl.classification(Steps(norm=True)),
        depths="uniform",
        heads="shared",
        client_optimizer=optax.adam(1e-3),
        batch_size=2,
    )
    run = fl.Simulation(algorithm, data, clients, rounds=1, cohort=8, plan=Plan(4, 2))
    run.compile()
    text = run.program.round.as_text()
    reductions = [line for line in text.splitlines() if re.search(r"= .*\ball-reduce\(", line)]
    assert len(reductions) == 1, reductions
    assert "all-gather(" not in text
    program = jax.make_jaxpr(lambda *a: algorithm.round(*a, run.plan))
    jaxpr = str(program(*round_arguments(run)))
    assert len(re.findall(r"\bpsum\w*\[", jaxpr)) == 1


def test_buckets_hold_as_many_clients_each_and_those_of_equal_work_are_one():
    sizes = np.array([5, 40, 1, 12, 33, 8, 9, 2])
    assert size_buckets(sizes, sizes) == (2, 8, 12, 40)
    assert size_buckets(sizes, -(-sizes // 10)) == (8, 12, 40)  # batches of 10
    assert size_buckets(sizes, np.full(8, 7)) == (40,)  # steps in place of epochs
    assert size_buckets(np.array([6, 6]), np.array([1, 1])) == (6,)


def test_the_padded_share_counts_the_steps_of_the_bucket():
    steps = np.array([4, 3, 1])
    layout = lay_out(steps, np.zeros(3, int), [1.0], Plan(1, 1), bounds=np.array([2, 4]))
    assert layout.padded_share == 1 - 8 / (4 + 4 + 2)
