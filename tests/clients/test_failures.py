"""Faults against a plain account of who was lost and why, and against runs without the lost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Steps, dataset, flat

import fedlp_jax as fl
from fedlp_jax.algorithms import client_round
from fedlp_jax.clients import failures
from fedlp_jax.clients.local_training import LocalWork, examples_seen, local_update
from fedlp_jax.prng import root_key
from fedlp_jax.simulation.cohorts import sample

SEED, CLIENTS, COHORT, CHOSEN, BATCH, EPOCHS, ROUNDS = 4, 12, 5, 9, 4, 2, 6
AVAILABILITY, DROPOUT, CORRUPTION, PROFILE, MASK = 10, 11, 12, 14, 3
DATA = dataset()
PARTS = fl.partition.quantity(DATA.train.labels, clients=CLIENTS, alpha=4.0, seed=1)
TASK = fl.classification(Steps())
LOCAL = {"client_optimizer": optax.sgd(0.1), "epochs": EPOCHS, "batch_size": BATCH}
HOMO = fl.fedlp_homo(TASK, keep=0.5, **LOCAL)
MEAN = fl.fedavg(TASK, aggregator="cohort_mean", weighting="uniform", **LOCAL)
ONE = fl.Plan(devices=1, width=1)
MACHINES = fl.Profile(compute=2e3, download=1e3, upload=5e2, spread=0.6)
EVERYTHING = fl.Faults(
    availability=0.9, dropout=0.15, profile=MACHINES, deadline=8.0, over_selection=1.8
)


def run(algorithm=HOMO, **settings):
    settings = {"rounds": ROUNDS, "cohort": COHORT, "seed": SEED, "plan": ONE} | settings
    return fl.simulate(algorithm, DATA, settings.pop("clients", PARTS), **settings)


def uniform(round, client, purpose, count):
    key = jax.random.key(SEED)
    for part in (round, client, purpose):
        key = jax.random.fold_in(key, part)
    return np.asarray(jax.random.uniform(key, (count,), jnp.float32), np.float64)


def speeds(client):
    key = jax.random.key(SEED)
    for part in (0, client, PROFILE):
        key = jax.random.fold_in(key, part)
    normal = np.asarray(jax.random.normal(key, (3,), jnp.float32), np.float64)
    median = np.array([MACHINES.compute, MACHINES.download, MACHINES.upload])
    return median * np.exp(MACHINES.spread * normal)


# Steps() on 4 features: three hidden layers of 8 and a head of 3 classes.
WEIGHTS = {"head3": (8, 3), "hidden1": (4, 8), "hidden2": (8, 8), "hidden3": (8, 8)}
MACS = sum(a * b for a, b in WEIGHTS.values())
BYTES = np.array([4 * (a * b + b) for a, b in WEIGHTS.values()])


def account(round, chosen):
    """One round of `EVERYTHING`, client by client: what the row of that round should say."""
    events, ids = {}, []
    for k in chosen:
        if uniform(round, k, AVAILABILITY, 1)[0] >= np.float32(EVERYTHING.availability):
            events[k] = ("unavailable", 0.0, 0.0, 0.0)
            continue
        compute, download, upload = speeds(k)
        masks = uniform(round, k, MASK, len(BYTES)) < 0.5
        macs = 3 * MACS * EPOCHS * PARTS.sizes[k]
        begin, train = BYTES.sum() / download, macs / compute
        finish = begin + train + (BYTES @ masks + 1) / upload
        drops, share = uniform(round, k, DROPOUT, 2)
        if drops < np.float32(EVERYTHING.dropout):
            events[k] = ("dropped", begin + share * train, begin, train)
        else:
            events[k] = (
                "late" if finish > EVERYTHING.deadline else "arrived",
                finish,
                begin,
                train,
            )
    ids = sorted((k for k in chosen if events[k][0] == "arrived"), key=lambda k: (events[k][1], k))
    for k in ids[COHORT:]:
        events[k] = ("surplus", *events[k][1:])
    begun = [k for k in chosen if events[k][0] != "unavailable"]
    if len(ids) >= COHORT:
        end = events[ids[COHORT - 1]][1]
    else:
        end = min(EVERYTHING.deadline, max([events[k][1] for k in begun], default=0.0))
    done = {
        k: np.clip((min(events[k][1], end) - events[k][2]) / events[k][3], 0, 1)
        * 3 * MACS * EPOCHS * PARTS.sizes[k]
        for k in begun
    }  # fmt: skip
    heard = sorted(ids[:COHORT])
    masks = [uniform(round, k, MASK, len(BYTES)) < 0.5 for k in heard]
    kinds = [event[0] for event in events.values()]
    return heard, {
        "chosen": len(chosen),
        **{kind: kinds.count(kind) for kind in ("unavailable", "dropped", "late", "surplus")},
        "arrived": len(heard),
        "clients": len(heard),
        "simulated_time": end,
        "train_macs": sum(done.values()),
        "lost_macs": sum(macs for k, macs in done.items() if k not in heard),
        "download_bytes": len(begun) * BYTES.sum(),
        "upload_bytes": sum(BYTES @ m + 1 for m in masks),
    }


@pytest.fixture(scope="module")
def everything():
    return run(faults=EVERYTHING)


def test_rounds_are_as_accounted(everything):
    seen = dict.fromkeys(("unavailable", "dropped", "late", "surplus"), 0)
    for row in everything.history:
        chosen = sample(SEED, row["round"], CLIENTS, CHOSEN)
        _, want = account(row["round"], chosen.tolist())
        for name, value in want.items():
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-9 if value < 1 else 0.6), name
        seen = {kind: count + row[kind] for kind, count in seen.items()}
    assert min(seen.values()) > 0  # every outcome occurred


def test_the_model_is_that_of_those_who_arrived():
    variables = None
    for round in (1, 2):  # one round at a time, since cohorts differ in size
        ids, _ = account(round, sample(SEED, round, CLIENTS, CHOSEN).tolist())
        settings = {"rounds": 1, "cohort": lambda *_, ids=ids: ids, "seed": SEED, "plan": ONE}
        alone = fl.Simulation(HOMO, DATA, PARTS, variables=variables, **settings)
        alone.state = alone.state._replace(round=alone.state.round + round - 1)
        alone.compile()
        alone.read(alone.dispatch(1))
        variables = alone.result().variables
    exposed = run(faults=EVERYTHING, rounds=2)
    np.testing.assert_allclose(flat(exposed.variables), flat(variables), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [fl.Plan(2, 1), fl.Plan(1, 3), fl.Plan(2, 3)])
def test_a_plan_changes_no_outcome(everything, plan):
    other = run(faults=EVERYTHING, plan=plan)
    for one, two in zip(everything.history, other.history, strict=True):
        for name in ("arrived", "late", "surplus", "simulated_time", "upload_bytes", "lost_macs"):
            assert one[name] == pytest.approx(two[name], rel=1e-6), name
    np.testing.assert_allclose(
        flat(everything.variables), flat(other.variables), rtol=1e-4, atol=1e-6
    )


@pytest.mark.slow
def test_faults_that_do_not_happen_change_no_bit():
    plain, exposed = run(), run(faults=fl.Faults(profile=MACHINES))
    assert np.array_equal(flat(plain.variables), flat(exposed.variables))
    assert plain.costs.total == exposed.costs.total
    for one, two in zip(plain.history, exposed.history, strict=True):
        assert all(one[key] == two[key] for key in one if key != "seconds")
    assert "simulated_time" not in plain.history.rows[0]
    assert "simulated_time" not in run(faults=fl.Faults(), rounds=1).history.rows[0]


@pytest.mark.slow
def test_fewer_layers_arrive_sooner():
    faults = fl.Faults(profile=dataclasses.replace(MACHINES, upload=20.0))
    half = run(faults=faults)
    whole = run(fl.fedavg(TASK, **LOCAL), faults=faults)
    assert half.history["simulated_time"].sum() < 0.9 * whole.history["simulated_time"].sum()


def test_a_trace_says_who_is_there():
    trace = np.ones((2, CLIENTS))
    trace[1] = 0  # every second round nobody
    seen = []
    result = run(
        faults=fl.Faults(availability=trace, profile=MACHINES),
        callbacks=[lambda round, row, state: seen.append(flat(state.variables).copy())],
    )
    assert result.history["arrived"].tolist() == [COHORT, 0] * 3
    assert result.history["download_bytes"][1] == result.history["upload_bytes"][1] == 0
    assert result.history["simulated_time"][1] == result.history["train_macs"][1] == 0
    assert result.history.rows[1]["train_loss"] is None
    for i in (1, 3, 5):  # the model stands still, and the run goes on
        assert np.array_equal(seen[i], seen[i - 1])
    assert not np.array_equal(seen[2], seen[1])


def test_who_drops_out_has_downloaded_but_sends_nothing():
    server = optax.adam(0.1)
    algorithm = fl.fedavg(TASK, server_optimizer=server, **LOCAL)
    start = run(algorithm, rounds=0)
    result = run(algorithm, faults=fl.Faults(dropout=1.0, profile=MACHINES), rounds=2)
    assert np.array_equal(flat(start.variables), flat(result.variables))
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: bool((a == b).all()), start.state.optimizer, result.state.optimizer
        )
    )
    assert int(result.state.round) == 2
    assert not bool(result.state.halted)
    assert result.costs.total["upload_bytes"] == 0
    assert result.costs.total["download_bytes"] == 2 * COHORT * BYTES.sum()
    assert result.costs.clients == [0, 0]
    assert (result.history["lost_macs"] == result.history["train_macs"]).all()
    assert (result.history["train_macs"] > 0).all()


# --- corruption ---------------------------------------------------------------------------------


def step(corruption, clients=PARTS, **settings):
    """What one round adds to the model: the mean update of the cohort."""
    faults = None if corruption is None else fl.Faults(corruption=corruption)
    start = flat(run(MEAN, rounds=0).variables)
    result = run(MEAN, rounds=1, faults=faults, clients=clients, **settings)
    return flat(result.variables) - start, result


@pytest.mark.parametrize(("kind", "strength", "factor"), [("sign_flip", None, -1), ("scale", 3, 3)])
@pytest.mark.slow
def test_a_corrupt_update_is_a_multiple(kind, strength, factor):
    clean, _ = step(None)
    corrupt, result = step(fl.Corruption(kind, 1.0, strength))
    np.testing.assert_allclose(corrupt, factor * clean, rtol=1e-3, atol=1e-6)
    assert result.history["corrupt"].tolist() == [COHORT]


@pytest.mark.slow
def test_gaussian_noise_replaces_an_update():
    noise, _ = step(fl.Corruption("gaussian", 1.0, 2.0), cohort=1)
    assert noise.size > 200
    assert np.std(noise) == pytest.approx(2.0, rel=0.15)
    assert abs(np.mean(noise)) < 0.4


@pytest.mark.slow
@pytest.mark.parametrize("own_classes", [False, True])
def test_flipped_labels_are_those_of_flipped_data(own_classes):
    split = DATA.train
    flipped = dataclasses.replace(DATA, train=split._replace(labels=2 - split.labels))
    twin = dataclasses.replace(PARTS, labels=2 - PARTS.labels)
    one = fl.fedavg(TASK, own_classes=own_classes, **LOCAL)
    faults = fl.Faults(corruption=fl.Corruption("label_flip", 1.0))
    corrupt = run(one, rounds=1, faults=faults)
    clean = fl.simulate(one, flipped, twin, rounds=1, cohort=COHORT, seed=SEED, plan=ONE)
    np.testing.assert_allclose(flat(corrupt.variables), flat(clean.variables), rtol=1e-6)


def test_updates_that_are_not_finite_are_left_out_in_silence():
    """Warnings are errors here: that a corrupt client sends NaN is no news."""
    result = run(faults=fl.Faults(corruption=fl.Corruption("nan", 0.3)))
    assert (result.history["clients_left_out"] == result.history["corrupt"]).all()
    assert result.history["corrupt"].sum() > 0
    assert np.isfinite(flat(result.variables)).all()
    nobody, start = run(faults=fl.Faults(corruption=fl.Corruption("nan", 1.0))), run(rounds=0)
    assert np.array_equal(flat(nobody.variables), flat(start.variables))


def test_an_honest_run_that_diverges_still_stops():
    wild = fl.fedavg(TASK, client_optimizer=optax.sgd(1e30), epochs=EPOCHS, batch_size=BATCH)
    with pytest.raises(fl.DivergedError, match="none of the"):
        run(wild, faults=fl.Faults(dropout=0.3))


def test_the_corrupt_are_the_same_clients_or_new_ones_each_round():
    root = jax.random.key(SEED)

    def exposed(**settings):
        faults = fl.Faults(corruption=fl.Corruption("nan", 0.25, **settings))
        return failures.Exposure(faults, root, CLIENTS, COHORT, 3)

    draws = [uniform(0, k, CORRUPTION, 1)[0] for k in range(CLIENTS)]
    assert set(np.flatnonzero(exposed().corrupt)) == set(np.argsort(draws)[:3])
    assert exposed(fixed=False).corrupt.tolist() == [0.25] * CLIENTS
    fresh = run(faults=fl.Faults(corruption=fl.Corruption("scale", 0.5, fixed=False)))
    for row in fresh.history:
        chosen = sample(SEED, row["round"], CLIENTS, COHORT)
        bad = [uniform(row["round"], k, CORRUPTION, 1)[0] < 0.5 for k in chosen.tolist()]
        assert row["corrupt"] == sum(bad)


# --- the rest -----------------------------------------------------------------------------------


@pytest.mark.parametrize("work", [LocalWork(4, 3, None), LocalWork(4, None, 7)])
def test_examples_are_those_of_the_batches(work):
    for size in range(14):
        batches = [min(4, size - i) for i in range(0, size, 4)]
        steps = work.steps or 3 * len(batches)
        want = sum(batches[s % len(batches)] for s in range(steps)) if size else 0
        assert examples_seen(np.int64(size), work) == want


def test_time_to_accuracy_can_be_drawn(everything, tmp_path):
    figure = everything.plot(tmp_path / "time.png", x="simulated_time")
    drawn = figure.axes[0].lines[0].get_xdata()
    assert drawn[-1] == pytest.approx(everything.history["simulated_time"].sum())
    with pytest.raises(fl.FedLPError, match="round 1 has no simulated_time"):
        run(rounds=1).plot(x="simulated_time")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"availability": 1.5}, "availability=1.5 must be a number in"),
        ({"availability": np.ones((3, 5))}, r"availability has shape \[3, 5\]"),
        ({"dropout": [0.1, float("nan")]}, "dropout=nan must be a number in"),
        ({"dropout": "often"}, "dropout='often' is not a number"),
        ({"deadline": 3.0}, "give faults.profile"),
        ({"deadline": -1.0, "profile": MACHINES}, "deadline=-1.0 must be"),
        ({"over_selection": 1.2}, "give faults.profile"),
        ({"over_selection": 9.0, "profile": MACHINES}, "would choose 45 clients"),
        ({"over_selection": 0.5}, "over_selection=0.5 must be"),
        ({"profile": fl.Profile(0.0, 1.0, 1.0)}, "profile.compute=0 must be"),
        ({"profile": fl.Profile(1.0, [1.0, 2.0], 1.0)}, r"profile.download has shape \[2\]"),
        ({"profile": fl.Profile(1.0, 1.0, 1.0, -1.0)}, "profile.spread=-1.0 must be"),
        ({"corruption": fl.Corruption("sign-flip", 0.1)}, "did you mean 'sign_flip'"),
        ({"corruption": fl.Corruption("nan", 2.0)}, "share=2 must be a number in"),
        ({"corruption": fl.Corruption("scale", 0.1, -1.0)}, "strength=-1.0 must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, says):
    with pytest.raises(fl.FedLPError, match=says):
        failures.Exposure(fl.Faults(**settings), root_key(SEED), CLIENTS, COHORT, classes=3)


def test_faults_are_refused_where_they_would_do_nothing():
    with pytest.raises(fl.FedLPError, match="ignores cohort.conditions"):
        run(HOMO._replace(faults=False), faults=fl.Faults())
    with pytest.raises(fl.FedLPError, match="a function says who is in it"):
        run(cohort=lambda *_: [1, 2], faults=dataclasses.replace(EVERYTHING, deadline=None))
    with pytest.raises(fl.FedLPError, match="faults is a dict"):
        run(faults={"dropout": 0.1})


@pytest.mark.parametrize(
    ("plan", "faults", "trips"),
    [(ONE, None, True), (ONE, fl.Faults(dropout=0.3), False)]
    + [(fl.Plan(devices=1, width=3), faults, True) for faults in (None, fl.Faults(dropout=0.3))],
)
def test_only_lost_clients_that_are_alone_skip_their_training(plan, faults, trips, monkeypatch):
    """Where all take the same steps, trip counts are constants of the program."""
    all_trained = []

    def spy(*arguments, all_train, **rest):
        all_trained.append(all_train)
        return local_update(*arguments, all_train=all_train, **rest)

    monkeypatch.setattr(client_round, "local_update", spy)
    even = fl.partition.iid(DATA.train.labels, clients=CLIENTS)
    run(clients=even, faults=faults, plan=plan, rounds=1)
    assert set(all_trained) == {trips}


@pytest.mark.slow
def test_frozen_layers_cost_no_backward_pass():
    """Of a training step, the forward pass is a third of the modelled work."""
    faults = fl.Faults(profile=MACHINES)

    def macs(algorithm):
        return run(algorithm, rounds=1, faults=faults).history["train_macs"][0]

    whole = macs(fl.fedlp_homo(TASK, keep=1.0, **LOCAL))
    assert macs(fl.freeze(TASK, keep=1.0, **LOCAL)) == pytest.approx(whole, rel=1e-6)
    with pytest.warns(RuntimeWarning, match="keep=0 for hidden"):
        last = macs(fl.freeze(TASK, keep={f"hidden{i}": 0.0 for i in (1, 2, 3)}, **LOCAL))
    backward = 2 * MACS - 4 * 8  # nothing flows below the first layer
    assert last == pytest.approx(whole * (1 + 2 * 24 / backward) / 3, abs=0.5)  # a whole number
