"""Arrivals at an asynchronous server: a deterministic queue on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import dataset, flat

import fedlp_jax as fl
from fedlp_jax.aggregation.divergence import largest
from fedlp_jax.clients.asynchrony import asynchrony
from fedlp_jax.simulation.arrivals import Arrivals
from fedlp_jax.simulation.cohorts import Cohorts
from fedlp_jax.simulation.validation import check_faults

PROFILE = fl.Profile(1e6, 1e5, 1e5)


def queue(seconds, buffer=1, flight=2, most=16, seed=0):
    clients = len(seconds)
    rule = asynchrony(PROFILE, buffer, most, "constant")
    arrivals = Arrivals(rule, Cohorts(flight, clients, seed), clients, seed)
    arrivals.begin(np.asarray(seconds, np.float64), 10.0 ** np.arange(clients))
    return arrivals


def test_everybody_in_flight_arrives_together_where_all_are_alike():
    arrivals = queue([2.0] * 5, buffer=5, flight=5)
    for round in (1, 2, 3):
        assert arrivals.members(round).tolist() == [0, 1, 2, 3, 4]
        row = arrivals.row(round)
        assert row == {
            "simulated_time": 2.0,
            "train_macs": 11111,
            "lost_macs": 0,
            "staleness_mean": 0.0,
            "staleness_max": 0,
            "discarded": 0,
        }


def test_a_slow_client_is_behind_by_what_the_fast_ones_did_meanwhile():
    arrivals = queue([1.0, 3.5], flight=2)  # both are always in flight
    found = [(arrivals.members(r).tolist(), arrivals.row(r)["staleness_max"]) for r in range(1, 6)]
    assert found == [([0], 0), ([0], 0), ([0], 0), ([1], 3), ([0], 1)]
    assert arrivals.staleness(4, np.asarray([1, -1])).tolist() == [3, 0]
    assert [arrivals.row(r)["simulated_time"] for r in range(1, 6)] == [1, 1, 1, 0.5, 0.5]


def test_what_is_too_old_is_discarded_and_its_client_begins_anew():
    arrivals = queue([1.0, 3.5], most=2)
    assert [arrivals.members(r).tolist() for r in range(1, 6)] == [[0]] * 5
    rows = [arrivals.row(r) for r in range(1, 6)]
    assert [row["discarded"] for row in rows] == [0, 0, 0, 1, 0]
    assert [(row["train_macs"], row["lost_macs"]) for row in rows] == [
        *[(1, 0)] * 3, (11, 10), (1, 0),
    ]  # fmt: skip


def test_arrivals_follow_from_the_seed_whatever_is_asked_first():
    seconds = np.random.default_rng(0).uniform(1, 5, 30)
    one, other = (queue(seconds, buffer=3, flight=8, seed=7) for _ in range(2))
    last = other.members(20).tolist()
    assert [one.members(r).tolist() for r in range(1, 21)][-1] == last
    assert all(len(set(one.members(r).tolist())) == 3 for r in range(1, 21))
    different = queue(seconds, buffer=3, flight=8, seed=8)
    assert [one.members(r).tolist() for r in (1, 2)] != [
        different.members(r).tolist() for r in (1, 2)
    ]


def test_a_buffer_of_more_than_fly_is_refused():
    with pytest.raises(fl.FedLPError, match="buffer=3 exceeds the 2 clients in flight"):
        queue([1.0] * 5, buffer=3, flight=2)
    rule = asynchrony(PROFILE, 1, 1, "constant")
    with pytest.raises(fl.FedLPError, match="cohort is a function"):
        Arrivals(rule, Cohorts(lambda seed, round, clients: [0], 5, 0), 5, 0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"profile": None}, "without a profile nothing takes time"),
        ({"buffer": 0}, "buffer"),
        ({"max_staleness": -1}, "max_staleness"),
        ({"exponent": -1.0}, "exponent"),
        ({"discount": "sudden"}, "discount"),
        ({"privacy": fl.Privacy(1.0, 1.0), "aggregator": "cohort_mean"}, "privacy needs clients"),
    ],
    ids=["profile", "buffer", "staleness", "exponent", "discount", "privacy"],
)
def test_settings_that_make_no_sense_are_refused(settings, sentence):
    task = fl.classification(fl.models.Logistic())
    settings = {"profile": PROFILE, "buffer": 2, "client_optimizer": optax.sgd(0.1)} | settings
    with pytest.raises(fl.FedLPError, match=sentence):
        fl.fedbuff(task, **settings)


def test_faults_are_refused():
    task = fl.classification(fl.models.Logistic())
    one = fl.fedbuff(task, buffer=2, profile=PROFILE, client_optimizer=optax.sgd(0.1))
    with pytest.raises(fl.FedLPError, match="this one does not wait"):
        check_faults(one, fl.Faults(dropout=0.1), 4)


@pytest.mark.slow
def test_neutral_settings_are_synchronous():
    """Alike clients that all fill one buffer are FedAvg; FedAsync one by one is sequential."""
    data = fl.load("synthetic", examples=120, shape=(4,), num_classes=3, seed=0)
    clients = fl.partition.iid(data.train.labels, clients=6, seed=0)
    task = fl.classification(fl.models.Logistic(num_classes=3))
    common = {"client_optimizer": optax.sgd(0.1), "batch_size": 10}
    run = {"rounds": 3, "seed": 1, "plan": fl.Plan(1, 1)}
    plain = fl.fedavg(task, weighting="uniform", **common)
    faults = fl.Faults(profile=PROFILE)
    waits = fl.simulate(plain, data, clients, cohort=6, faults=faults, **run)
    buffered = fl.fedbuff(task, buffer=6, profile=PROFILE, **common)
    result = fl.simulate(buffered, data, clients, cohort=6, **run)
    np.testing.assert_array_equal(flat(result.variables), flat(waits.variables))
    times = [row["simulated_time"] for row in result.history.rows]
    np.testing.assert_allclose(times, waits.history["simulated_time"], rtol=1e-6)
    assert (result.history["train_macs"] == waits.history["train_macs"]).all()

    alone = fl.fedasync(task, alpha=1.0, profile=PROFILE, weighting="uniform", **common)
    one_by_one = fl.simulate(alone, data, clients, cohort=1, **run)
    order = queue([1.0] * 6, flight=1, seed=1)
    sequential = fl.simulate(
        plain, data, clients, cohort=lambda seed, round, clients: order.members(round), **run
    )
    np.testing.assert_array_equal(flat(one_by_one.variables), flat(sequential.variables))
    assert one_by_one.readings["version_bytes"] == 17 * 4 * 15
    assert jax.tree.leaves(one_by_one.state.algorithm.ring)[0].shape[0] == 17


def test_the_mixing_rate_is_refused_by_its_name():
    task = fl.classification(fl.models.Logistic())
    with pytest.raises(fl.FedLPError, match="alpha=2 must be a number in"):
        fl.fedasync(task, alpha=2, profile=PROFILE, client_optimizer=optax.sgd(0.1))


def test_a_server_cannot_ask_more_clients_than_arrive_together():
    data = fl.load("digits")
    clients = fl.partition.iid(data.train.labels, clients=20, seed=0)
    one = fl.fedbuff(
        fl.classification(fl.models.Logistic()),
        buffer=2,
        profile=PROFILE,
        client_optimizer=optax.sgd(0.1),
        aggregator=largest(3),
    )
    with pytest.raises(
        fl.FedLPError, match="exceeds the 2 clients of a server step.* raise buffer"
    ):
        fl.Simulation(one, data, clients, rounds=1, cohort=4)


# Client 0 takes 1 second and client 1 takes 2.6: who arrives, and the version it began with.
ORDER = [(0, 0), (0, 1), (1, 0), (0, 2), (0, 4), (0, 5), (1, 3)]


def by_hand(data, clients, mixes, sent, kept, rate):
    """The model after the arrivals of `ORDER`, from the definition; x is [bias, kernel] in a row.

    Each client takes one SGD step on all of its examples, in softmax regression. `rate` is a
    function of the version with which it began.
    """
    versions, residual = [np.zeros(15)], {0: 0.0, 1: 0.0}
    for client, begun in ORDER:
        received, current = versions[begun], versions[-1]
        rows = clients.rows(client)
        inputs, labels = data.train.inputs[rows].astype(np.float64), data.train.labels[rows]
        logits = inputs @ received[3:].reshape(4, 3) + received[:3]
        error = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        error[np.arange(len(rows)), labels] -= 1
        gradient = np.concatenate([error.sum(axis=0), (inputs.T @ error).ravel()]) / len(rows)
        whole = -rate(begun) * gradient + residual[client]
        update = sent(whole)
        residual[client] = kept * (whole - update)
        s = 1 / np.sqrt(len(versions) - begun)  # of age len(versions) - 1 - begun
        x = current + s * update
        if mixes:
            x = (1 - 0.625 * s) * current + 0.625 * s * (received + update)
        versions.append(x)
    return versions[-1]


def check_by_hand(mixes, settings, sent, kept=0, rate=lambda begun: 0.5, width=1):
    data = dataset(60)
    clients = fl.partition.iid(data.train.labels, clients=2, seed=0)
    task = fl.classification(fl.models.Logistic(num_classes=3))
    common = {
        "client_optimizer": optax.sgd(0.5),
        "batch_size": 60,
        "profile": fl.Profile(np.array([2.6e3, 1e3]), 1e12, 1e12),
    }
    one = fl.fedbuff(task, buffer=1, **common, **settings)
    if mixes:
        one = fl.fedasync(task, alpha=0.625, **common, **settings)
    with jax.enable_x64(True):
        start = {"params": {"fc": {"bias": jnp.zeros(3), "kernel": jnp.zeros((4, 3))}}}
        result = fl.simulate(
            one, data, clients, rounds=7, cohort=2, variables=start, plan=fl.Plan(1, width)
        )
    assert result.history["staleness_max"].tolist() == [0, 0, 2, 1, 0, 0, 3]
    expected = by_hand(data, clients, mixes, sent, kept, rate)
    np.testing.assert_allclose(flat(result.variables), expected, rtol=1e-9, atol=1e-12)


def largest_two(vector):
    return np.where(np.abs(vector) >= np.sort(np.abs(vector))[-2], vector, 0.0)


def shortened(vector):
    return vector * min(1.0, 0.0625 / np.linalg.norm(vector))


@pytest.mark.parametrize("mixes", [False, True], ids=["fedbuff", "fedasync"])
@pytest.mark.parametrize(
    ("settings", "sent", "kept"),
    [
        ({"clip": 0.0625}, shortened, 0),
        ({"upload": fl.top_k(2 / 15), "clip": 0.0625}, lambda u: shortened(largest_two(u)), 0),
        ({"upload": fl.top_k(2 / 15, error_feedback=True)}, largest_two, 1),
    ],
    ids=["clip", "top_k", "error_feedback"],
)
def test_a_late_client_compresses_its_own_update(mixes, settings, sent, kept):
    """It cannot know how late it will be, nor the model that the server has by then."""
    check_by_hand(mixes, settings, sent, kept)


@pytest.mark.parametrize("width", [1, 2])
def test_a_late_client_trains_at_the_rate_of_the_round_in_which_it_began(width):
    schedule = {"client_schedule": lambda round: jnp.where(round > 3, 0.25, 1.0)}
    check_by_hand(
        False, schedule, lambda u: u, rate=lambda begun: 0.125 if begun >= 3 else 0.5, width=width
    )
