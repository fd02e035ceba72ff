"""Sampling in O(C), and the arrays of a round."""

import time

import jax
import numpy as np
import optax
import pytest

import fedlp_jax as fl
from fedlp_jax.execution.plan import Plan
from fedlp_jax.simulation.cohorts import CohortBuilder, Cohorts, cohort_size, sample
from fedlp_jax.simulation.validation import warn_of_first_block


def test_a_sample_is_sorted_distinct_and_a_function_of_seed_and_round():
    ids = sample(seed=3, round=5, clients=100, cohort=10)
    assert len(set(ids)) == 10
    assert (np.diff(ids) > 0).all()
    assert ids[0] >= 0
    assert ids[-1] < 100
    assert np.array_equal(ids, sample(3, 5, 100, 10))
    assert not np.array_equal(ids, sample(3, 6, 100, 10))
    assert not np.array_equal(ids, sample(4, 5, 100, 10))
    assert np.array_equal(sample(0, 1, 7, 7), np.arange(7))


def test_a_cohort_stays_for_some_rounds():
    cohorts = Cohorts(4, 50, seed=3, rounds=3)
    drawn = [cohorts.members(round).tolist() for round in range(1, 8)]
    firsts = [sample(3, round, 50, 4).tolist() for round in (1, 4, 7)]
    assert drawn == 3 * firsts[:1] + 3 * firsts[1:2] + firsts[2:]
    assert len(cohorts.enlarged(6).members(3)) == 6
    assert (cohorts.enlarged(6).members(3) == sample(3, 1, 50, 6)).all()


def test_a_run_of_one_block_is_warned_of():
    task, sgd = fl.classification(fl.models.Logistic()), {"client_optimizer": optax.sgd(1.0)}
    algorithm = fl.fedlama(task, interval=3, **sgd)
    with pytest.warns(UserWarning, match="rounds=3 end within the first block of 3 rounds"):
        warn_of_first_block(algorithm, 3)
    for rounds in (0, 4):  # a warning is an error
        warn_of_first_block(algorithm, rounds)
    warn_of_first_block(fl.fedavg(task, **sgd), 1)


def test_a_cohort_draws_nothing_that_a_partition_has_drawn():
    """Both have Philox under the run's seed, and must not draw the same numbers from it."""
    for round in range(1, 6):
        cohort = sample(seed=0, round=round, clients=1000, cohort=1000 // 2)
        for purpose in range(8):
            rng = np.random.Generator(np.random.Philox(key=[0, purpose]))
            tops = np.arange(500, 1000)
            chosen = set()
            for top, pick in zip(tops.tolist(), rng.integers(0, tops + 1).tolist(), strict=True):
                chosen.add(top if pick in chosen else pick)
            assert sorted(chosen) != cohort.tolist()


def test_every_client_and_every_pair_is_as_likely():
    draws = np.stack([sample(0, r, 6, 3) for r in range(1, 4001)])
    single = np.bincount(draws.ravel(), minlength=6) / 4000
    assert np.abs(single - 1 / 2).max() < 4 * np.sqrt(0.25 / 4000)
    pairs = [((draws == a).any(1) & (draws == b).any(1)).mean() for a in range(6) for b in range(a)]
    assert np.abs(np.array(pairs) - 1 / 5).max() < 4 * np.sqrt(0.16 / 4000)


def test_sampling_costs_what_the_cohort_costs():
    def seconds(clients):
        readings = []
        for _ in range(5):  # of this process alone, whatever else the machine does
            start = time.process_time()
            for r in range(1, 51):
                sample(0, r, clients, 100)
            readings.append(time.process_time() - start)
        return min(readings)

    seconds(1000)
    assert seconds(10**9) < 5 * seconds(1000)  # a permutation would need minutes and 8 GB


@pytest.mark.parametrize(
    ("rule", "size"),
    [(7, 7), (0.1, 10), (0.001, 1), (1.0, 100), (100, 100), (0.29, 29), (np.float32(0.57), 57)],
)
def test_sizes(rule, size):
    assert cohort_size(rule, 100) == size


def test_slots_hold_each_clients_own_rows():
    labels = np.random.default_rng(0).integers(0, 3, 200)
    clients = fl.partition.dirichlet(labels, clients=20, alpha=0.5, seed=0, min_size=1)
    assigned = np.arange(20, dtype=np.int32) % 2
    builder = CohortBuilder(clients, assigned, lambda n: -(-n // 4), [1.0, 3.0], Plan(2, 2))
    ids = sample(0, 1, 20, 9)
    cohort, _ = builder.build(ids)
    assert sorted(cohort.client[cohort.client >= 0]) == ids.tolist()
    assert cohort.even_size is None
    shapes = jax.tree.map(np.shape, cohort)
    for slot, client in enumerate(cohort.client):
        size = cohort.size[slot]
        if client < 0:
            assert size == 0
            continue
        assert size == clients.sizes[client]
        assert cohort.level[slot] == assigned[client]
        np.testing.assert_array_equal(cohort.rows[slot, :size], clients.rows(client))
    other, _ = builder.build(sample(0, 2, 20, 9))
    assert shapes == jax.tree.map(np.shape, other)


def test_clients_of_one_size_are_known_to_be():
    clients = fl.partition.iid(np.zeros(60, np.int64), clients=12)
    builder = CohortBuilder(clients, np.zeros(12, np.int32), lambda n: n, [1.0], Plan(1, 1))
    assert builder.build(np.arange(3))[0].even_size == 5


@pytest.mark.parametrize(
    ("batch", "widest", "like"), [(4, 7, 7), (4, 8, 8), (4, 9, None), (2, 7, None), (4, None, None)]
)
def test_clients_that_take_as_many_steps_are_known_to_in_a_sweep(batch, widest, like):
    clients = fl.partition.iid(np.zeros(80, np.int64), clients=12)
    assert set(clients.sizes) == {6, 7}
    builder = CohortBuilder(
        clients,
        np.zeros(12, np.int32),
        lambda n: 2 * -(-n // batch),
        [1.0],
        Plan(1, 1),
        None,
        widest,
    )
    assert builder.build(np.arange(3))[0].like_size == like
