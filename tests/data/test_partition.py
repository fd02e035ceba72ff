from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlp_jax.data import partition
from fedlp_jax.errors import FedLPError

# As many of each class as in CIFAR-10.
CIFAR = np.random.default_rng(7).permutation(np.repeat(np.arange(10), 5000))

SCHEMES = {
    "iid": lambda labels, k, seed: partition.iid(labels, clients=k, seed=seed),
    "quantity": lambda labels, k, seed: partition.quantity(labels, clients=k, alpha=0.5, seed=seed),
    "dirichlet": lambda labels, k, seed: partition.dirichlet(
        labels, clients=k, alpha=0.3, seed=seed, min_size=1
    ),
    "shards": lambda labels, k, seed: partition.shards(labels, clients=k, seed=seed),
    "mixed": lambda labels, k, seed: partition.mixed(labels, clients=k, ratio=0.8, seed=seed),
}


def _labels(draw, examples: int) -> np.ndarray:
    classes = draw(st.integers(1, 7))
    return np.random.default_rng(draw(st.integers(0, 9))).integers(0, classes, examples)


@pytest.mark.parametrize("scheme", SCHEMES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_every_scheme_deals_every_example_once(scheme, data):
    clients = data.draw(st.integers(1, 12))
    labels = _labels(data.draw, data.draw(st.integers(4 * clients, 200)))
    dealt = SCHEMES[scheme](labels, clients, data.draw(st.integers(0, 2**64 - 1)))
    assert dealt.clients == clients
    assert sorted(dealt.order.tolist()) == list(range(len(labels)))
    assert dealt.sizes.min() >= 1
    assert dealt.histogram.sum(axis=0).tolist() == np.bincount(labels).tolist()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_seed_alone_decides(scheme):
    make = SCHEMES[scheme]
    assert make(CIFAR, 100, 3).hash == make(CIFAR.tolist(), 100, 3).hash
    assert make(CIFAR, 100, 3).hash != make(CIFAR, 100, 4).hash


def test_schemes_of_one_seed_do_not_share_their_draws():
    even = partition.iid(CIFAR, clients=100, seed=1)
    same_mix = partition.quantity(CIFAR, clients=100, alpha=1e9, seed=1)
    assert (even.order != same_mix.order).mean() > 0.99


# --- iid


def test_iid_gives_100_clients_500_disjoint_examples_each():
    dealt = partition.iid(CIFAR, clients=100)
    assert dealt.sizes.tolist() == [500] * 100
    assert len(np.unique(dealt.order)) == 50_000
    # Hypergeometric: 50 of each class, standard deviation 6.7.
    np.testing.assert_allclose(dealt.histogram.mean(), 50)
    assert 6.0 < dealt.histogram.std() < 7.4


def test_iid_sizes_differ_by_one_if_the_examples_do_not_divide():
    assert sorted(partition.iid(np.zeros(10, int), clients=4).sizes.tolist()) == [2, 2, 3, 3]


def test_there_may_be_a_million_clients_of_one_example():
    labels = np.random.default_rng(0).integers(0, 10, 1_000_000, dtype=np.int32)
    dealt = partition.iid(labels, clients=1_000_000)
    assert (dealt.sizes == 1).all()
    assert np.bincount(dealt.order).max() == 1
    assert dealt.rows(999_999).shape == (1,)


# --- quantity


def test_quantity_changes_sizes_and_not_the_mix():
    dealt = partition.quantity(CIFAR, clients=100, alpha=0.5, seed=0)
    assert dealt.sizes.std() > 300
    large = dealt.sizes > 300
    shares = dealt.histogram[large] / dealt.sizes[large, None]
    np.testing.assert_allclose(shares, 0.1, atol=0.09)


@pytest.mark.parametrize("least", [1, 7, 500])
def test_quantity_keeps_its_minimum(least):
    dealt = partition.quantity(CIFAR, clients=100, alpha=0.01, min_size=least)
    assert dealt.sizes.min() == least
    assert dealt.sizes.sum() == 50_000


# --- dirichlet


def test_dirichlet_1_uses_every_index_once_with_the_sizes_of_the_official_code():
    deviations = []
    for seed in range(20):
        dealt = partition.dirichlet(CIFAR, clients=100, alpha=1.0, seed=seed, reference=True)
        assert np.bincount(dealt.order).tolist() == [1] * 50_000
        deviations.append(dealt.sizes.std())
    # Ten classes of 5000 times a share of variance (1 - 1/100) / (100 * 101): 156.6.
    assert abs(np.mean(deviations) - 156.6) < 8


def test_dirichlet_reference_is_the_split_of_each_class_in_order():
    labels, clients, seed = CIFAR[:9000], 9, 5
    dealt = partition.dirichlet(labels, clients=clients, alpha=0.7, seed=seed, reference=True)
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, 2], np.uint64)))
    expected: list[list[int]] = [[] for _ in range(clients)]
    for label in range(10):
        of_class = np.flatnonzero(labels == label)
        cuts = np.cumsum(rng.dirichlet([0.7] * clients))[:-1] * len(of_class)
        for client, piece in enumerate(np.split(of_class, cuts.astype(int))):
            expected[client] += piece.tolist()
    assert [dealt.rows(k).tolist() for k in range(clients)] == expected


def test_dirichlet_reference_uses_the_first_1000_examples_per_client():
    dealt = partition.dirichlet(CIFAR, clients=10, alpha=1.0, reference=True)
    assert sorted(dealt.order.tolist()) == list(range(10_000))
    whole = partition.dirichlet(CIFAR, clients=10, alpha=1.0)
    assert len(whole.order) == 50_000


def test_dirichlet_mixes_a_class_before_it_is_cut():
    dealt = partition.dirichlet(np.zeros(10_000, int), clients=2, alpha=100.0)
    assert 4000 < np.mean(dealt.rows(0)) < 6000


def test_a_smaller_alpha_leaves_fewer_classes_to_a_client():
    def classes(alpha: float) -> float:
        dealt = partition.dirichlet(CIFAR, clients=100, alpha=alpha, min_size=1)
        return np.median((dealt.histogram > 5).sum(axis=1))

    assert classes(0.05) < 4 < 7 < classes(1.0) <= classes(100.0) == 10


def test_min_size_moves_no_more_than_it_must():
    arguments = {"clients": 100, "alpha": 0.05, "seed": 0}
    with pytest.raises(FedLPError) as refusal:
        partition.dirichlet(CIFAR, **arguments)
    assert "of 100 clients without examples. Pass min_size=1" in str(refusal.value)
    dealt = partition.dirichlet(CIFAR, **arguments, min_size=20)
    assert dealt.sizes.min() == 20
    even = {"clients": 100, "alpha": 1.0, "seed": 0}
    free, bound = (partition.dirichlet(CIFAR, **even, min_size=least) for least in (None, 2))
    assert free.hash == bound.hash


def test_min_size_can_be_all_there_is():
    dealt = partition.dirichlet(CIFAR, clients=100, alpha=0.1, min_size=500)
    assert dealt.sizes.tolist() == [500] * 100


# --- shards


def test_shards_are_pure_and_equal():
    dealt = partition.shards(CIFAR, clients=100)
    assert dealt.sizes.tolist() == [500] * 100
    # 250 divides 5000, so no shard spans two classes.
    assert (dealt.histogram > 0).sum(axis=1).max() == 2
    assert set(np.unique(dealt.histogram)) == {0, 250, 500}


def test_shards_across_a_border_add_one_class_each():
    labels = np.repeat(np.arange(10), 33)
    dealt = partition.shards(labels, clients=7, shards_per_client=3)
    assert (dealt.histogram > 0).sum(axis=1).max() <= 6
    assert sorted(dealt.order.tolist()) == list(range(330))


def test_more_shards_bring_more_classes():
    few, many = (partition.shards(CIFAR, clients=100, shards_per_client=s) for s in (1, 10))
    assert (few.histogram > 0).sum(axis=1).max() == 1
    assert (many.histogram > 0).sum(axis=1).mean() > 5


# --- mixed


def test_mixed_reference_has_the_numbers_of_the_official_code():
    dealt = partition.mixed(CIFAR, clients=100, ratio=0.95, seed=0, reference=True)
    assert dealt.sizes.tolist() == [501] * 100
    dealt_at_random = np.stack([dealt.rows(k)[:25] for k in range(100)])
    assert sorted(dealt_at_random.ravel().tolist()) == list(range(2500))
    # 210 shards of 238 over the first 49,980 images, of which 200 are dealt.
    in_shards = np.stack([dealt.rows(k)[25:] for k in range(100)])
    assert in_shards.shape == (100, 476)
    assert len(np.unique(in_shards)) == 200 * 238
    assert in_shards.max() < 49_980
    shard_of = np.empty(49_980, int)
    shard_of[np.argsort(CIFAR[:49_980], kind="stable")] = np.arange(49_980) // 238
    dealt_shards = np.sort(shard_of[in_shards], axis=1).reshape(100, 2, 238)
    assert (dealt_shards == dealt_shards[..., :1]).all()
    # Images may occur twice: once at random, once in a shard.
    assert len(np.unique(dealt.order)) < len(dealt.order) == 50_100


def test_mixed_reference_concentrates_a_client_on_few_classes():
    dealt = partition.mixed(CIFAR, clients=100, reference=True)
    top = np.sort(dealt.histogram, axis=1)[:, -4:].sum(axis=1) / 501
    assert top.min() > 0.95


def test_mixed_uses_every_example_once_and_keeps_its_ratio():
    dealt = partition.mixed(CIFAR, clients=100, ratio=0.95)
    assert sorted(dealt.order.tolist()) == list(range(50_000))
    assert dealt.sizes.max() - dealt.sizes.min() <= 3
    top = np.sort(dealt.histogram, axis=1)[:, -4:].sum(axis=1) / dealt.sizes
    assert top.min() > 0.95


@pytest.mark.parametrize(("ratio", "classes"), [(0.0, 10), (1.0, 4)])
def test_the_ends_of_mixed_are_iid_and_shards(ratio, classes):
    dealt = partition.mixed(CIFAR, clients=100, ratio=ratio)
    held = (dealt.histogram > 0).sum(axis=1)
    assert held.max() <= classes
    assert held.min() >= (10 if ratio == 0 else 1)


# --- natural


@pytest.mark.parametrize(
    "ids",
    [[7, -2, 7, 30, -2], ["b", "a", "b", "c", "a"], np.array(["b", "a", "b", "c", "a"], object)],
)
def test_natural_clients_come_in_the_order_of_their_ids(ids):
    dealt = partition.natural([0, 1, 2, 0, 1], clients=ids)
    assert [dealt.rows(k).tolist() for k in range(3)] == [[1, 4], [0, 2], [3]]


# --- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda y: partition.iid(y, clients=0), "clients must be a positive integer, got 0"),
        (lambda y: partition.iid(y, clients=-3), "clients must be a positive integer, got -3"),
        (lambda y: partition.iid(y, clients=2.0), "clients must be a positive integer, got 2.0"),
        (lambda y: partition.iid(y, clients=True), "clients must be a positive integer, got True"),
        (lambda y: partition.iid(y, clients=13), "13 clients cannot share 12 .* to 12 or fewer"),
        (lambda y: partition.iid(y, clients=2, seed=-1), "seed must be an integer in .* got -1"),
        (lambda y: partition.iid(y, clients=2, seed=2**64), "seed must be an integer"),
        (lambda y: partition.iid(y, clients=2, seed=0.5), "seed must be an integer .* got 0.5"),
        (lambda y: partition.iid(y / 2, clients=2), "labels must be .* integers, got float64"),
        (lambda y: partition.iid(y[None], clients=2), r"one-dimensional .* got int64\[1, 12\]"),
        (lambda y: partition.iid(y - 1, clients=2), "12 labels go from -1 to 1"),
        (lambda y: partition.iid([], clients=1), "labels are empty"),
        (lambda y: partition.dirichlet(y, clients=2, alpha=0), "alpha must be .* got 0; about"),
        (lambda y: partition.dirichlet(y, clients=2, alpha=-1.0), "alpha must be .* got -1.0"),
        (lambda y: partition.dirichlet(y, clients=2, alpha=np.nan), "alpha must be .* got nan"),
        (lambda y: partition.dirichlet(y, clients=2, alpha=np.inf), "alpha must be .* got inf"),
        (lambda y: partition.dirichlet(y, clients=2, alpha="1"), "alpha must be .* got '1'"),
        (
            lambda y: partition.dirichlet(y, clients=6, alpha=1.0, min_size=3),
            "min_size=3 for 6 clients needs 18 examples, but there are 12; lower min_size to 2 or "
            "clients to 4",
        ),
        (
            lambda y: partition.dirichlet(y, clients=2, alpha=1.0, min_size=0),
            "min_size must be a positive integer, got 0",
        ),
        (
            lambda y: partition.dirichlet(y, clients=12, alpha=0.01),
            r"dirichlet with alpha=0.01 left \d+ of 12 clients .* min_size=1, .* a larger alpha",
        ),
        (lambda y: partition.quantity(y, clients=3, alpha=0.0), "alpha must be"),
        (lambda y: partition.quantity(y, clients=3, alpha=1.0, min_size=5), "needs 15 examples"),
        (lambda y: partition.shards(y, clients=7), "7 clients x 2 shards need 14 examples, .* 12"),
        (
            lambda y: partition.shards(y, clients=2, shards_per_client=0),
            "shards_per_client must be a positive integer, got 0",
        ),
        (lambda y: partition.mixed(y, clients=2, ratio=1.1), "between 0 and 1; got 1.1"),
        (lambda y: partition.mixed(y, clients=2, ratio=np.nan), "between 0 and 1; got nan"),
        (
            lambda y: partition.mixed(y, clients=6, ratio=0.5),
            "ratio=0.5 leaves 6 examples for the 12 shards of 6 clients",
        ),
        (
            lambda y: partition.mixed(y, clients=6, ratio=0.0, reference=True),
            "leaves shards of 0 examples in the official scheme",
        ),
        (lambda y: partition.natural(y, clients=[1, 2]), r"int64\[2\]; expected .* of the 12"),
        (lambda y: partition.natural(y, clients=y / 2), "Client ids are float64"),
        (lambda y: partition.natural(y, clients=[None] * 12), "Client ids are object"),
    ],
)
def test_what_cannot_be_dealt_is_refused_in_a_sentence(make, message):
    with pytest.raises(FedLPError, match=message):
        make(np.arange(12) % 3)
