"""A round that does not fit is found before it runs, and computed with fewer clients at once."""

import types

import jax
import numpy as np
import optax
import pytest
from small import Steps, dataset, flat

import fedlp_jax as fl
from fedlp_jax import errors
from fedlp_jax.execution import client_state
from fedlp_jax.execution import plan as plans
from fedlp_jax.simulation import validation as checks

DATA = dataset()
CLIENTS = fl.partition.iid(DATA.train.labels, clients=12, seed=0)
TASK = fl.classification(Steps(depth=1, width=512))
ALGORITHM = fl.fedavg(TASK, client_optimizer=optax.sgd(0.1), steps=1, batch_size=5)


def prepared(plan):
    run = fl.Simulation(ALGORITHM, DATA, CLIENTS, rounds=1, cohort=8, plan=plan)
    run.compile()
    return run


@pytest.fixture(scope="module")
def needs():
    """Bytes of a round by width, as the programs say."""
    return {
        width: plans.needed_bytes(prepared(fl.Plan(1, width)).program.round) for width in (2, 4, 8)
    }


def test_a_program_says_what_it_takes_and_each_client_takes_a_model(needs):
    model = 4 * ((4 + 1) * 512 + (512 + 1) * 3)
    assert needs[4] - needs[2] >= 2 * model
    assert needs[8] - needs[4] >= 4 * model
    assert needs[8] < 8 * 20 * model  # and not much more than gradients and sums of it


def test_an_open_width_is_lowered_and_the_result_is_the_same(needs, monkeypatch):
    monkeypatch.setattr(plans, "_WIDTH", {"cpu": 8})
    plan = fl.Plan(devices=1)
    wide = fl.simulate(ALGORITHM, DATA, CLIENTS, rounds=1, cohort=8, plan=plan)
    assert wide.plan == fl.Plan(1, 8, "device", 1)
    monkeypatch.setattr(plans, "free_bytes", lambda plan: needs[4])
    found = []
    with pytest.warns(UserWarning, match=r"width 8 needs .* free; it runs at width 4, with"):
        narrow = fl.simulate(
            ALGORITHM, DATA, CLIENTS, rounds=1, cohort=8, plan=plan, compiled=found.append
        )
    assert narrow.plan == fl.Plan(1, 4, "device", 1)
    assert found == [narrow.plan]
    np.testing.assert_allclose(flat(narrow.variables), flat(wide.variables), rtol=1e-4, atol=1e-6)


def test_kernels_chosen_by_timing_are_noted(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    for backend, count in (("cpu", 0), ("gpu", 1)):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        with errors.collecting() as said:
            plans.note_other_kernels()
        assert len(said) == count
    assert "Call fl.setup() first" in said[0]
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    with errors.collecting() as said:
        plans.note_other_kernels()
    assert not said and plans.gpu_kernels() == "fixed"


@pytest.mark.parametrize(("kept", "count"), [(None, 1), ("somewhere", 0)])
def test_tuned_kernels_that_are_not_kept_are_noted(monkeypatch, kept, count):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_exclude_nondeterministic_ops=true")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", kept)
    try:
        with errors.collecting() as said:
            plans.note_other_kernels()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert len(said) == count and plans.gpu_kernels() == "tuned"


@pytest.mark.parametrize(
    ("flags", "kernels"),
    [
        ("", None),
        ("--xla_gpu_deterministic_ops=false", None),
        ("--xla_gpu_exclude_nondeterministic_ops=false", None),
        ("--xla_gpu_exclude_nondeterministic_ops", "tuned"),
        ("--xla_gpu_exclude_nondeterministic_ops=true --xla_gpu_deterministic_ops=true", "fixed"),
    ],
)
def test_kernels_are_those_that_the_flags_leave(monkeypatch, flags, kernels):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert plans.gpu_kernels() == kernels


def test_unknown_kernels_are_refused():
    with pytest.raises(fl.FedLPError, match="gpu_kernels 'quick' is unknown.*tuned, fixed"):
        fl.setup(gpu_kernels="quick")


def test_a_width_that_was_asked_for_is_refused_with_one_that_fits(needs, monkeypatch):
    monkeypatch.setattr(plans, "free_bytes", lambda plan: needs[2])
    with pytest.raises(fl.FedLPError, match=r"a round of width 8 needs .*; width 2 fits, with"):
        prepared(fl.Plan(1, 8))
    assert prepared(fl.Plan(1, 2)).plan.width == 2


def test_a_round_that_fits_at_no_width_is_refused(monkeypatch):
    monkeypatch.setattr(plans, "free_bytes", lambda plan: 1000)
    with pytest.raises(fl.FedLPError, match="one client at a time; use a smaller batch or model"):
        prepared(fl.Plan(1, 4))


def test_what_fits_is_compiled_once_and_so_is_what_nobody_can_measure():
    calls = []

    def compile(plan):
        calls.append(plan)
        return types.SimpleNamespace(memory_analysis=lambda: None)

    plan = fl.Plan(1, 8)
    assert plans.compile_to_fit(compile, plan, width_is_open=True)[1] == plan
    assert calls == [plan]


def test_cpu_devices_share_the_memory_of_the_host():
    alone = plans.free_bytes(fl.Plan(1, 1))
    assert alone > 0
    assert plans.free_bytes(fl.Plan(2, 1)) == pytest.approx(alone / 2, rel=0.2)


def test_an_accelerator_says_itself_what_is_free(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def plan(*stats):
        devices = [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
        return types.SimpleNamespace(mesh=types.SimpleNamespace(local_devices=devices))

    used = {"bytes_limit": 1000, "bytes_in_use": 400}
    assert plans.free_bytes(plan(used, used | {"bytes_in_use": 900})) == 90
    assert plans.free_bytes(plan(None)) is None


def test_heads_that_do_not_fit_are_refused_before_anything_is_drawn(monkeypatch):
    hetero = fl.fedlp_hetero(
        fl.classification(Steps(depth=2, width=512)),
        depths="uniform",
        client_optimizer=optax.sgd(0.1),
        steps=1,
        batch_size=5,
    )
    arguments = (hetero, DATA, CLIENTS)
    run = fl.Simulation(*arguments, rounds=1, cohort=8, plan=fl.Plan(2, 1))
    store = sum(x.nbytes for x in jax.tree.leaves(run.stage.store.stacks))
    # And the rows of a device's 8 slots; then the same from both devices, and its own in a block.
    need = store + (8 + 3 * 8) * 4 * (512 + 1) * 3
    assert run.readings["client_state_bytes"] == need
    assert run.stage.round_bytes == 8 * 4 * (512 + 1) * 3  # the rows, while it is compiled
    # They lie there beside the data and the model.
    model = sum(x.nbytes for x in jax.tree.leaves(run.state.variables))
    beside = DATA.train.nbytes + DATA.test.nbytes + model
    monkeypatch.setattr(client_state, "free_bytes", lambda plan: need + beside)
    fl.Simulation(*arguments, rounds=1, cohort=8, plan=fl.Plan(2, 1))
    monkeypatch.setattr(client_state, "free_bytes", lambda plan: need + beside - 1)
    with pytest.raises(
        fl.FedLPError, match=r"what 12 clients keep between rounds \(head\) is .* MiB, .* 2 dev"
    ):
        fl.Simulation(*arguments, rounds=1, cohort=8, plan=fl.Plan(2, 1))


def test_a_model_has_to_fit_the_smallest_of_the_devices_here(monkeypatch):
    """Those of other processes cannot be asked, and each holds the whole model."""
    sizes = [{"bytes_limit": 3000}, {"bytes_limit": 2000}]
    devices = [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in sizes]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    checks.check_size({"params": np.zeros(166, np.float32)})
    with pytest.raises(fl.FedLPError, match="the model takes 0.0 GiB, a round at least three"):
        checks.check_size({"params": np.zeros(167, np.float32)})
    assert checks._usable_memory(devices=8) == 16_000
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(memory_stats=dict)])
    assert checks._usable_memory(devices=8) == 2**63
