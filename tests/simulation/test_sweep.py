"""A sweep: each of its runs is the run alone, and what it takes for several to be one program."""

import gc
import signal
import weakref

import jax
import numpy as np
import optax
import pytest
from small import Steps, dataset, flat, in_float64

import fedlp_jax as fl
from fedlp_jax.errors import collecting, note
from fedlp_jax.execution.plan import LanesPlan
from fedlp_jax.nn import conv
from fedlp_jax.simulation import lanes, sweep
from fedlp_jax.simulation.run import Simulation
from fedlp_jax.simulation.spec import specify
from fedlp_jax.simulation.staging import Stage

DATA = dataset(120)
EVEN = fl.partition.iid(DATA.train.labels, clients=12, seed=0)
TASK = fl.classification(Steps(depth=2))
ONE = fl.Plan(devices=1)
SHARED = {"rounds": 3, "cohort": 4, "eval_every": 2}
SGD = {"client_optimizer": optax.sgd(0.1), "epochs": 2, "batch_size": 4}


@pytest.fixture(autouse=True)
def of_the_package(monkeypatch):
    """`Steps` stands for a model of the package, which cannot read what changes meanwhile."""
    monkeypatch.setattr(Steps, "__module__", "fedlp_jax.nn.models")


def uneven(seed):
    return fl.partition.dirichlet(DATA.train.labels, clients=12, alpha=0.5, seed=seed, min_size=1)


def homo(keep=0.5, rate=0.1, **settings):
    local = {"client_optimizer": optax.sgd(1.0), "epochs": 2, "batch_size": 4}
    return fl.fedlp_homo(TASK, keep=keep, client_schedule=rate, **local | settings)


@pytest.fixture
def programs(monkeypatch):
    """Collects `(runs side by side, lanes of the program)` of each batch."""
    batches = []
    first = lanes.Lanes.__init__

    def recorded(self, runs, program):
        batches.append((len(runs), program.runs))
        first(self, runs, program)

    monkeypatch.setattr(lanes.Lanes, "__init__", recorded)
    return batches


@pytest.fixture
def traced(monkeypatch):
    """Collects the runs whose lanes are traced, in a process that has traced none."""
    runs, first = [], lanes._trace
    lanes._place.cache_clear()
    monkeypatch.setattr(lanes, "_trace", lambda run, *rest: runs.append(run) or first(run, *rest))
    return runs


@pytest.fixture
def lowered(monkeypatch):
    """`lowered(algorithm, ...)` is the program of its lanes, which stands for itself untraced."""
    lanes._place.cache_clear()
    make = lanes.LanesProgram
    monkeypatch.setattr(
        lanes, "_trace", lambda run, runs, plan, *_: make(plan, runs, object(), None, {}, 0.0, ())
    )

    def lower(algorithm, runs=2, cohort=4, clients=EVEN):
        run = Simulation(algorithm, DATA, clients, rounds=1, cohort=cohort, plan=ONE)
        return lanes._lower(run, runs, LanesPlan(**vars(run.plan), groups=1)).program.round

    yield lower
    lanes._place.cache_clear()


def alone(run, algorithm, clients, **settings):
    return fl.simulate(algorithm, DATA, clients, seed=run.seed, plan=ONE, **SHARED | settings)


def assert_same_run(run, other, rtol=1e-5):
    """Masks, cohorts and counts to the bit; losses and parameters up to the order of sums."""
    assert len(run.history) == len(other.history)
    for mine, yours in zip(run.history, other.history, strict=True):
        assert mine.keys() == yours.keys()
        for key, value in yours.items():
            if key != "seconds":
                rough = key.endswith("_loss") and value is not None
                assert mine[key] == (pytest.approx(value, rel=rtol) if rough else value), key
    for column in ("client", "round", "kept", "outcome", "examples"):
        np.testing.assert_array_equal(run.clients[column], other.clients[column])
    np.testing.assert_array_equal(run.costs.senders, other.costs.senders)
    np.testing.assert_allclose(
        flat(run.state.variables), flat(other.state.variables), rtol=rtol, atol=rtol * 1e-1
    )


@pytest.mark.slow
def test_seeds_keeps_and_rates_are_lanes_of_one_program(programs, monkeypatch):
    laid_out, first = [], Stage._cohort
    monkeypatch.setattr(
        Stage, "_cohort", lambda self, round: laid_out.append(round) or first(self, round)
    )
    algorithms = {"few": homo(0.2), "slow": homo(0.8, rate=0.01)}
    done = fl.sweep(algorithms, DATA, EVEN, seeds=[0, 7, 8], **SHARED)
    assert programs == [(6, 8)]  # four devices have two lanes each
    assert laid_out == [1, 1, 1, 2, 2, 2, 3, 3, 3]  # once for each seed
    labels = [(run.label, run.seed) for run in done.runs]
    assert labels == [(label, seed) for label in algorithms for seed in (0, 7, 8)]
    for run in done.runs[2:4]:
        assert_same_run(run, alone(run, algorithms[run.label], EVEN))


@pytest.mark.slow
def test_each_seed_may_have_a_partition_of_its_own(programs):
    done = fl.sweep(homo(), DATA, uneven, seeds=3, **SHARED)
    assert programs == [(3, 3)]
    assert len({uneven(seed).sizes.max() for seed in range(3)}) > 1
    for run in done.runs:
        assert_same_run(run, alone(run, homo(), uneven(run.seed)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "work", [{"epochs": 2}, {"epochs": None, "steps": 4}], ids=["epochs", "steps"]
)
def test_runs_whose_clients_take_as_many_steps(work, programs):
    near = fl.partition.iid(DATA.train.labels, clients=11, seed=0)
    assert set(near.sizes) == {10, 11}  # in batches of 4
    done = fl.sweep(homo(**work), DATA, near, seeds=2, **SHARED)
    assert programs == [(2, 2)]
    assert_same_run(done.runs[1], alone(done.runs[1], homo(**work), near))


@pytest.mark.slow
def test_three_rounds_in_float64_are_those_of_the_run_alone():
    with jax.enable_x64(True):
        first = fl.simulate(homo(), DATA, EVEN, rounds=0, cohort=4).variables
        given = {"variables": in_float64(first)}
        for run in fl.sweep(homo(), DATA, uneven, seeds=2, **SHARED, **given).runs:
            assert flat(run.variables).dtype == np.float64
            assert_same_run(run, alone(run, homo(), uneven(run.seed), **given), rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": fl.scaffold(TASK, **SGD)},
        {
            "algorithm": fl.fedlp_hetero(
                TASK, depths="uniform", heads="persist", client_optimizer=optax.sgd(0.1)
            ),
            "at_once": 3,
        },
        {"algorithm": fl.freeze(TASK, keep=0.5, **SGD)},
        {"algorithm": fl.fedpart(TASK, full_rounds=1, group_rounds=1, **SGD)},
        {"algorithm": fl.heterofl(TASK, widths=[1.0, 0.5], keep=0.5, **SGD), "at_once": 3},
        {"algorithm": homo(aggregator="median")},
        {"algorithm": homo(server_optimizer=optax.adam(0.01))},
        {"algorithm": homo(), "faults": fl.Faults(dropout=0.3)},
        {"algorithm": homo(), "plan": fl.Plan(rounds_at_once=3), "rounds": 5},
        {"algorithm": homo(), "plan": fl.Plan(width=2, devices=2)},
        {"algorithm": homo(), "cohort": lambda seed, round, clients: range(round), "max_cohort": 4},
    ],
    ids=[
        "client state",
        "submodels",
        "frozen",
        "turns",
        "widths",
        "stacked",
        "server",
        "faults",
        "rounds",
        "width",
        "cohorts",
    ],
)
def test_whatever_a_run_has_it_has_in_a_lane(settings, programs):
    settings = SHARED | settings
    algorithm, at_once = settings.pop("algorithm"), settings.pop("at_once", None)
    done = fl.sweep(algorithm, DATA, uneven, seeds=3, at_once=at_once, **settings)
    assert [runs for runs, _ in programs] == [3]
    plan = fl.Plan(**vars(settings.pop("plan", fl.Plan())) | {"devices": 1})
    for run in done.runs:
        other = fl.simulate(algorithm, DATA, uneven(run.seed), seed=run.seed, plan=plan, **settings)
        assert_same_run(run, other, rtol=1e-4)


@pytest.mark.slow
def test_another_structure_is_another_group(programs):
    algorithms = {"sgd": homo(), "momentum": homo(client_optimizer=optax.sgd(1.0, 0.9))}
    done = fl.sweep(algorithms, DATA, EVEN, seeds=2, **SHARED)
    assert programs == [(2, 2), (2, 2)]
    for run in done.runs:
        assert_same_run(run, alone(run, algorithms[run.label], EVEN))


def test_lanes_of_an_equal_program_are_traced_once(lowered):
    others = fl.partition.iid(DATA.train.labels, clients=12, seed=1)
    assert lowered(homo(0.2)) is lowered(homo(0.9, rate=0.3), clients=others)


def test_lanes_of_another_program_are_traced(lowered):
    programs = [
        lowered(homo()),
        lowered(homo(client_optimizer=optax.sgd(0.5))),
        lowered(homo(), runs=3),
        lowered(homo(), cohort=5),
        lowered(homo(), clients=uneven(0)),
    ]
    with jax.default_matmul_precision("bfloat16"):
        programs.append(lowered(homo()))
    with jax.enable_x64(True):
        programs.append(lowered(homo()))
    with conv.using("direct"):
        programs.append(lowered(homo()))
    assert len(set(programs)) == len(programs)
    assert lowered(homo()) is programs[0]


def test_lanes_that_call_a_function_of_the_user_are_traced_each_time(lowered):
    schedule = optax.constant_schedule(0.1)
    assert lowered(homo(rate=schedule)) is lowered(homo(rate=schedule))
    schedule = lambda round: 0.1  # noqa: E731
    assert lowered(homo(rate=schedule)) is not lowered(homo(rate=schedule))


def test_what_is_kept_of_lanes_holds_no_run(traced):
    run = Simulation(homo(), DATA, EVEN, rounds=1, cohort=4, plan=ONE)
    lanes._lower(run, 2, LanesPlan(**vars(run.plan), groups=1))
    assert traced == [run] and lanes._place.cache_info().currsize == 1
    held = run, run.state.round, run.stage.train.inputs, run.algorithm.round
    held = [weakref.ref(x) for x in held]
    traced.clear()
    del run
    gc.collect()
    assert [x() for x in held] == [None] * 4


def test_runs_of_one_seed_and_partition_are_laid_out_once():
    def layout(algorithm, clients=EVEN, **settings):
        settings = {"rounds": 1, "cohort": 4, "plan": ONE} | settings
        return lanes._layout_of(Simulation(algorithm, DATA, clients, **settings))

    other = fl.partition.iid(DATA.train.labels, clients=12, seed=1)
    assert layout(homo(0.2)) == layout(homo(0.8, rate=0.01))
    layouts = [
        layout(homo()),
        layout(homo(), seed=1),
        layout(homo(), other),
        layout(homo(), cohort=3),
        layout(homo(epochs=1)),
        layout(homo()._replace(cohort_rounds=2)),
    ]
    assert len(set(layouts)) == len(layouts)
    for own in (
        {"cohort": lambda seed, round, clients: [0, 1]},
        {"faults": fl.Faults(dropout=0.5)},
    ):
        assert layout(homo(), **own) != layout(homo(), **own)


def test_an_algorithm_is_checked_once_for_a_partition_and_warns_in_each_run():
    checked = []

    def check(model, sizes):
        checked.append(sizes)
        note(["odd"])

    algorithm = homo()._replace(check=check)
    said, fit = [], None
    for clients in (EVEN, EVEN, uneven(0)):
        with collecting() as of_run:
            fit = specify(algorithm, DATA, clients, cohort=4, plan=ONE, fit=fit)
        said.append(of_run)
    assert [len(sizes) for sizes in checked] == [12, 12]
    assert said == [["odd"]] * 3


@pytest.mark.slow
def test_a_second_sweep_traces_nothing_and_gives_the_same(traced):
    first, second = (fl.sweep({"a": homo(0.5)}, DATA, EVEN, seeds=2, **SHARED) for _ in range(2))
    assert len(traced) == 1
    for run, other in zip(second.runs, first.runs, strict=True):
        assert_same_run(run, other, rtol=0)
    (other, _) = fl.sweep({"b": homo(0.2, rate=0.01)}, DATA, EVEN, seeds=2, **SHARED).runs
    assert len(traced) == 1
    assert_same_run(other, alone(other, homo(0.2, rate=0.01), EVEN))


@pytest.mark.slow
def test_a_group_of_one_is_the_program_of_today(programs):
    (run,) = fl.sweep(homo(), DATA, EVEN, seeds=[5], plan=fl.Plan(devices=2), **SHARED).runs
    other = fl.simulate(homo(), DATA, EVEN, seed=5, plan=fl.Plan(devices=2), **SHARED)
    assert not programs
    np.testing.assert_array_equal(flat(run.state.variables), flat(other.state.variables))


@pytest.mark.slow
def test_at_most_so_many_at_once(programs):
    done = fl.sweep(homo(), DATA, EVEN, seeds=5, at_once=2, plan=fl.Plan(devices=1), **SHARED)
    assert programs == [(2, 2), (2, 2), (1, 2)]
    assert [run.seed for run in done.runs] == [0, 1, 2, 3, 4]
    assert_same_run(done.runs[-1], alone(done.runs[-1], homo(), EVEN))


@pytest.mark.slow
def test_as_many_runs_side_by_side_as_fit_the_memory(programs, monkeypatch):
    needs = iter([3900, 1900])  # of four runs, and then of two
    monkeypatch.setattr(lanes, "needed_bytes", lambda program: next(needs))
    monkeypatch.setattr(lanes, "_held_bytes", lambda shapes, plan: 100)
    monkeypatch.setattr(lanes, "free_bytes", lambda plan: 2000)
    done = fl.sweep(homo(), DATA, EVEN, seeds=4, plan=fl.Plan(devices=1), **SHARED)
    assert programs == [(2, 2), (2, 2)]
    assert_same_run(done.runs[3], alone(done.runs[3], homo(), EVEN))
    monkeypatch.setattr(lanes, "needed_bytes", lambda program: 4000)
    with pytest.raises(fl.FedLPError, match="a round of one run on each of 2 group"):
        fl.sweep(homo(), DATA, EVEN, seeds=2, plan=fl.Plan(devices=2), **SHARED)


@pytest.mark.slow
def test_a_run_that_diverges_ends_alone():
    algorithms = {"good": homo(rate=0.1), "bad": homo(rate=1e30)}
    good, bad = fl.sweep(algorithms, DATA, EVEN, seeds=1, **SHARED | {"rounds": 6}).runs
    assert_same_run(good, alone(good, algorithms["good"], EVEN, rounds=6))
    assert bad.stopped.startswith(f"round {len(bad.history)}: ")
    assert len(bad.history) < 6 and np.isfinite(flat(bad.variables)).all()
    with pytest.raises(fl.DivergedError) as diverged:
        alone(bad, algorithms["bad"], EVEN, rounds=6)
    assert_same_run(bad, diverged.value.result)


@pytest.mark.slow
def test_each_run_stops_early_by_itself():
    stop = fl.EarlyStop(metric="train_loss", target=1.0)
    settings = SHARED | {"rounds": 12, "early_stop": stop}
    done = fl.sweep({"0.1": homo(), "0.01": homo(rate=0.02)}, DATA, EVEN, seeds=2, **settings)
    lengths = [len(run.history) for run in done.runs]
    assert len(set(lengths)) > 1
    for run in done.runs:
        other = alone(run, homo(rate=0.1 if run.label == "0.1" else 0.02), EVEN, **settings)
        assert run.stopped == other.stopped
        assert_same_run(run, other)


@pytest.mark.slow
def test_the_end_of_a_run_is_known_while_others_go_on(programs):
    stop = fl.EarlyStop(metric="train_loss", target=100.0)
    settings = SHARED | {"data": DATA, "clients": EVEN, "cohort": 4, "rounds": 12, "seed": 0}
    events, runs = [], {"good": (0.1, None), "stops": (0.1, stop), "diverges": (1e30, None)}

    def point(label, rate, early_stop):
        own = {"algorithm": homo(rate=rate), "plan": fl.Plan(rounds_at_once=1)}
        return sweep.Point(
            label,
            settings | own | {"early_stop": early_stop},
            log=lambda row: events.append((label, row["round"])),
            ended=lambda result, error: events.append((label, "ended")),
        )

    results = sweep.run_points([point(label, *one) for label, one in runs.items()], at_once=3)
    assert programs == [(3, 3)]
    for label, result in zip(runs, results, strict=True):
        assert events.count((label, "ended")) == 1
        if label != "good":
            assert len(result.history) < 4
            assert events.index((label, "ended")) < events.index(("good", 6))
    assert events[-1] == ("good", "ended")


@pytest.mark.slow
def test_ctrl_c_ends_all_runs_after_the_round_in_flight():
    def log(label, seed, row):
        if row["round"] == 2 and seed == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.warns(UserWarning, match="interrupted by Ctrl-C after .* rounds of 2 runs"):
        done = fl.sweep(homo(), DATA, EVEN, seeds=2, log=log, **SHARED | {"rounds": 50})
    lengths = {len(run.history) for run in done.runs}
    assert len(lengths) == 1 and 2 <= lengths.pop() <= 4
    for run in done.runs:
        other = alone(run, homo(), EVEN, rounds=len(run.history))
        np.testing.assert_allclose(flat(run.variables), flat(other.variables), atol=1e-6)


@pytest.mark.slow
def test_the_frame_and_the_table_say_which_run(monkeypatch):
    rows = []
    done = fl.sweep(
        {"half": homo(), "all": homo(1.0)},
        DATA,
        EVEN,
        seeds=2,
        log=lambda label, seed, row: rows.append((label, seed, row["round"])),
        **SHARED,
    )
    assert done.table().runs == {"half": 2, "all": 2}
    wanted = [
        (label, seed, 1 + i) for label in ("half", "all") for seed in (0, 1) for i in range(3)
    ]
    assert sorted(rows) == sorted(wanted)
    frame = done.to_frame()
    assert list(zip(frame["label"], frame["seed"], frame["round"], strict=True)) == wanted


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"algorithms": []}, "a sweep needs algorithms, such as .*, but there is none"),
        ({"algorithms": {"a": TASK}}, "among them is none"),
        ({"seeds": 0}, r"seeds=0 must be a whole number of at least 1\."),
        ({"seeds": [1, 1]}, r"seeds=\[1, 1\] must be different numbers"),
        ({"seeds": [-1]}, r"seed=-1 must be a whole number of at least 0\."),
        ({"at_once": 0}, "at_once=0 must be a whole number of at least 1"),
        ({"cohort": 13}, "cohort=13 exceeds the 12 clients"),
        ({"plan": fl.Plan(devices=100)}, "plan.devices=100 but jax sees"),
        ({"plan": fl.Plan(devices=0)}, "plan.devices=0 must be a whole number of at least 1"),
    ],
)
def test_a_sweep_that_cannot_be(arguments, sentence):
    arguments = {"algorithms": homo(), "seeds": 2} | SHARED | arguments
    with pytest.raises(fl.FedLPError, match=sentence):
        fl.sweep(data=DATA, clients=EVEN, **arguments)


@pytest.mark.slow
def test_runs_with_data_on_the_host_follow_each_other(programs):
    with pytest.warns(
        UserWarning, match="runs follow each other, because the data lie on the host"
    ):
        done = fl.sweep(homo(), DATA, EVEN, seeds=2, plan=fl.Plan(1, data="host"), **SHARED)
    assert not programs
    assert_same_run(done.runs[1], alone(done.runs[1], homo(), EVEN))


@pytest.mark.slow
def test_runs_whose_clients_keep_layers_follow_each_other(programs):
    algorithm = fl.fedper(TASK, head="head2", **SGD)
    reason = "runs follow each other, because clients are tested with layers of their own"
    with pytest.warns(UserWarning, match=reason):
        done = fl.sweep(algorithm, DATA, EVEN, seeds=2, plan=fl.Plan(1), **SHARED)
    assert not programs
    assert_same_run(done.runs[1], alone(done.runs[1], algorithm, EVEN))


def test_on_a_cpu_large_models_follow_each_other(programs, monkeypatch):
    monkeypatch.setattr(sweep, "_CPU_MACS", 10)
    done = fl.sweep(homo(), DATA, EVEN, seeds=2, plan=fl.Plan(1), **SHARED)
    assert not programs
    assert len(done.runs) == 2
