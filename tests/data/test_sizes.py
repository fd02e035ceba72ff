from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlp_jax.data import sizes


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


@given(examples=st.integers(0, 10_000), parts=st.integers(1, 300))
def test_even_sizes_differ_by_one_at_most(examples, parts):
    even = sizes.even(examples, parts)
    assert len(even) == parts
    assert even.sum() == examples
    assert even.max() - even.min() <= 1


@given(
    alpha=st.sampled_from([1e-320, 1e-9, 0.05, 0.3, 1.0, 50.0, 1e299]),
    clients=st.integers(1, 50),
    examples=st.integers(0, 1000),
    seed=st.integers(0, 99),
)
def test_drawn_sizes_sum_to_the_examples_for_every_alpha(alpha, clients, examples, seed):
    drawn = sizes.drawn(_rng(seed), alpha, clients, examples)
    assert len(drawn) == clients
    assert drawn.min() >= 0
    assert drawn.sum() == examples


def test_drawn_shares_follow_the_dirichlet_law():
    clients, examples, alpha = 4, 100_000, 2.0
    rng = _rng()
    shares = np.stack([sizes.drawn(rng, alpha, clients, examples) for _ in range(4000)]) / examples
    np.testing.assert_allclose(shares.mean(0), 1 / clients, atol=0.01)
    # Var[p] = (1 - 1/K) / (K (K alpha + 1))
    expected = (1 - 1 / clients) / (clients * (clients * alpha + 1))
    np.testing.assert_allclose(shares.var(0), expected, rtol=0.1)


def test_raised_cuts_only_the_largest_down_to_one_level():
    raised = sizes.raised(np.array([0, 1, 9, 5, 8]), 3)
    assert raised.tolist() == [3, 3, 6, 5, 6]


def test_raised_gives_what_is_spare_to_the_first():
    # 2 are lacking; level 7 frees 2 + 1, so the first large client keeps one more.
    assert sizes.raised(np.array([1, 9, 8]), 3).tolist() == [3, 8, 7]


@given(
    current=st.lists(st.integers(0, 60), min_size=1, max_size=30).filter(sum),
    data=st.data(),
)
def test_raised_keeps_the_sum_and_reaches_the_minimum(current, data):
    current = np.array(current)
    least = data.draw(st.integers(0, int(current.sum()) // len(current)))
    raised = sizes.raised(current, least)
    assert raised.sum() == current.sum()
    assert raised.min() >= least
    if current.min() >= least:
        assert (raised == current).all()
    # Whoever gave is among the largest afterwards, so nobody could have given instead.
    gave = raised < current
    if gave.any():
        assert raised[gave].min() >= raised[~gave & (current > least)].max(initial=0) - 1


@pytest.mark.parametrize("seed", range(3))
def test_moved_changes_no_more_owners_than_needed(seed):
    owner = np.repeat(np.arange(4), [0, 1, 12, 7])
    target = np.array([4, 4, 6, 6])
    moved = sizes.moved(_rng(seed), owner, target)
    assert np.bincount(moved, minlength=4).tolist() == target.tolist()
    assert (moved != owner).sum() == 7
    assert owner.tolist() == np.repeat(np.arange(4), [0, 1, 12, 7]).tolist()


def test_moved_picks_at_random_from_the_givers():
    owner = np.repeat([0, 1], [100, 0])
    target = np.array([50, 50])
    first = [np.flatnonzero(sizes.moved(_rng(seed), owner, target)) for seed in range(2)]
    assert (first[0] != first[1]).any()
    assert first[0].min() < 25 and first[0].max() > 75


def test_moved_draws_nothing_if_nothing_is_lacking():
    rng, owner = _rng(), np.repeat([0, 1], 5)
    assert sizes.moved(rng, owner, np.array([5, 5])) is owner
    assert rng.random() == _rng().random()
