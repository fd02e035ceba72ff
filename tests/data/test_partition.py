from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlp_jax.data import partition
from fedlp_jax.data.partition import Partition
from fedlp_jax.errors import FedLPError

few = settings(max_examples=25, deadline=None)
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
@few
@given(data=st.data())
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


# --- Partition

LABELS = np.array([0, 1, 2, 1, 0, 2])


def _partition() -> Partition:
    return Partition(np.array([4, 0, 1, 5, 3]), np.array([0, 2, 5]), LABELS, 3)


def test_a_partition_hands_out_the_rows_sizes_and_classes_of_its_clients():
    dealt = _partition()
    assert dealt.clients == 2
    assert dealt.rows(0).tolist() == [4, 0]
    assert dealt.rows(1).tolist() == [1, 5, 3]
    assert dealt.sizes.tolist() == [2, 3]
    assert dealt.histogram.tolist() == [[2, 0, 0], [0, 2, 1]]
    assert (dealt.order.dtype, dealt.offset.dtype) == (np.int32, np.int64)
    assert (dealt.sizes.dtype, dealt.histogram.dtype) == (np.int64, np.int64)


def test_a_class_that_nobody_holds_has_a_column():
    dealt = Partition(np.array([0]), np.array([0, 1]), np.array([0, 1]), 5)
    assert dealt.histogram.tolist() == [[1, 0, 0, 0, 0]]


def test_arrays_are_read_only_and_the_callers_stay_writable():
    labels = LABELS.astype(np.int32)
    dealt = Partition(np.array([0], np.int32), np.array([0, 1]), labels, 3)
    with pytest.raises(ValueError, match="read-only"):
        dealt.labels[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        dealt.rows(0)[0] = 1
    labels[0] = 0


def test_the_hash_is_that_of_the_little_endian_bytes():
    parts = struct.pack("<3q5i6i", 0, 2, 5, 4, 0, 1, 5, 3, *LABELS)
    assert _partition().hash == hashlib.sha256(b"partition 2 3 " + parts).hexdigest()


def test_the_hash_sees_every_field():
    order, offset = np.array([4, 0, 1, 5, 3]), np.array([0, 2, 5])
    other = LABELS.copy()
    other[2] = 1  # a label of a row that nobody holds
    hashes = {
        Partition(order, offset, LABELS, 3).hash,
        Partition(order[::-1], offset, LABELS, 3).hash,
        Partition(order, np.array([0, 3, 5]), LABELS, 3).hash,
        Partition(order, offset, other, 3).hash,
        Partition(order, offset, LABELS, 4).hash,
    }
    assert len(hashes) == 5


def test_the_hash_does_not_depend_on_the_types_given():
    wide = Partition(np.array([4, 0], np.int64), [0, 1, 2], LABELS.astype(np.uint8), 3)
    narrow = Partition(np.array([4, 0], np.int16), [0, 1, 2], LABELS.astype(">i4"), 3)
    assert wide.hash == narrow.hash


def test_describe_says_what_there_is():
    assert _partition().describe() == (
        "2 clients with 5 examples of 3 classes; per client 2 to 3 examples (median 2.5) of 1 to 2 "
        "classes (median 1.5)"
    )
    assert repr(_partition()) == f"Partition({_partition().describe()})"


def testby_owner_keeps_the_order_of_a_clients_rows():
    rows = np.array([5, 3, 1, 4], np.int32)
    dealt = partition.by_owner(rows, np.array([1, 0, 1, 0]), 2, LABELS)
    assert dealt.rows(0).tolist() == [3, 4]
    assert dealt.rows(1).tolist() == [5, 1]


def test_by_size_cuts_the_rows_as_they_come():
    dealt = partition._by_size(np.array([5, 3, 1], np.int32), np.array([1, 2]), LABELS)
    assert dealt.rows(0).tolist() == [5]
    assert dealt.rows(1).tolist() == [3, 1]
    assert dealt.num_classes == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"order": [0, 6]}, r"order holds rows 0 to 6, outside the 6 labelled examples"),
        ({"order": [-1, 0]}, r"order holds rows -1 to 0, outside the 6"),
        ({"order": [0.0, 1.0]}, r"order are float64\[2\]; expected integers \[N\]"),
        ({"order": [[0, 1]]}, r"order are int64\[1, 2\]; expected integers"),
        ({"order": [4, 4]}, r"order holds 1 rows more than once \(row 4 2 times\).* repeats=True"),
        ({"num_classes": "3"}, r"num_classes='3' must be a whole number"),
        (
            {"offset": [0, 1]},
            r"offset must go from 0 to the 2 rows .* got 2 entries, \[0\] to \[1\]",
        ),
        ({"offset": [1, 2]}, r"offset must go from 0"),
        ({"offset": [2]}, r"over at least one client"),
        ({"offset": [0, 2, 2]}, r"Client 1 holds 0 examples \(1 of 2 clients hold none\)"),
        ({"offset": [0, 2, 1, 2]}, r"Client 1 holds -1 examples"),
        ({"num_classes": 2}, r"label 2 is out of range for num_classes=2"),
        (
            {"labels": [0, -1]},
            r"labels go from -1 to 0 in 2 examples; expected 0 .. num_classes - 1",
        ),
        ({"labels": [0, 2**31]}, r"go from 0 to 2147483648"),
        ({"labels": []}, r"labels are empty"),
    ],
)
def test_arrays_that_contradict_each_other_are_refused(fields, message):
    good = {"order": [0, 1], "offset": [0, 1, 2], "labels": LABELS, "num_classes": 3}
    Partition(**good)
    with pytest.raises(FedLPError, match=message):
        Partition(**(good | fields))


@pytest.mark.parametrize("client", [-1, 2])
def test_a_client_that_is_not_there_is_refused(client):
    with pytest.raises(FedLPError, match=f"no client {client}: they count from 0 to 1"):
        _partition().rows(client)


def test_rows_may_repeat_where_that_is_intended():
    dealt = Partition([4, 4], [0, 1, 2], LABELS, 3, repeats=True)
    assert dealt.sizes.tolist() == [1, 1]


# --- sizes


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


@few
@given(examples=st.integers(0, 10_000), parts=st.integers(1, 300))
def test_even_sizes_differ_by_one_at_most(examples, parts):
    even = partition._even_sizes(examples, parts)
    assert len(even) == parts
    assert even.sum() == examples
    assert even.max() - even.min() <= 1


@few
@given(
    alpha=st.sampled_from([1e-320, 1e-9, 0.05, 0.3, 1.0, 50.0, 1e299]),
    clients=st.integers(1, 50),
    examples=st.integers(0, 1000),
    seed=st.integers(0, 99),
)
def test_drawn_sizes_sum_to_the_examples_for_every_alpha(alpha, clients, examples, seed):
    drawn = partition._dirichlet_sizes(_rng(seed), alpha, clients, examples)
    assert len(drawn) == clients
    assert drawn.min() >= 0
    assert drawn.sum() == examples


def test_drawn_shares_follow_the_dirichlet_law():
    clients, examples, alpha = 4, 100_000, 2.0
    rng = _rng()
    shares = (
        np.stack([partition._dirichlet_sizes(rng, alpha, clients, examples) for _ in range(4000)])
        / examples
    )
    np.testing.assert_allclose(shares.mean(0), 1 / clients, atol=0.01)
    # Var[p] = (1 - 1/K) / (K (K alpha + 1))
    expected = (1 - 1 / clients) / (clients * (clients * alpha + 1))
    np.testing.assert_allclose(shares.var(0), expected, rtol=0.1)


def test_raised_cuts_only_the_largest_down_to_one_level():
    raised = partition._raise_sizes(np.array([0, 1, 9, 5, 8]), 3)
    assert raised.tolist() == [3, 3, 6, 5, 6]


def test_raised_gives_what_is_spare_to_the_first():
    # 2 are lacking; level 7 frees 2 + 1, so the first large client keeps one more.
    assert partition._raise_sizes(np.array([1, 9, 8]), 3).tolist() == [3, 8, 7]


@few
@given(
    current=st.lists(st.integers(0, 60), min_size=1, max_size=30).filter(sum),
    data=st.data(),
)
def test_raised_keeps_the_sum_and_reaches_the_minimum(current, data):
    current = np.array(current)
    least = data.draw(st.integers(0, int(current.sum()) // len(current)))
    raised = partition._raise_sizes(current, least)
    assert raised.sum() == current.sum()
    assert raised.min() >= least
    if current.min() >= least:
        assert (raised == current).all()
    # Whoever gave is among the largest afterwards, so nobody could have given instead.
    gave = raised < current
    if gave.any():
        assert raised[gave].min() >= raised[~gave & (current > least)].max(initial=0) - 1


@pytest.mark.parametrize("seed", range(3))
def test_reassign_changes_no_more_owners_than_needed(seed):
    owner = np.repeat(np.arange(4), [0, 1, 12, 7])
    target = np.array([4, 4, 6, 6])
    moved = partition._reassign(_rng(seed), owner, target)
    assert np.bincount(moved, minlength=4).tolist() == target.tolist()
    assert (moved != owner).sum() == 7
    assert owner.tolist() == np.repeat(np.arange(4), [0, 1, 12, 7]).tolist()


def test_reassign_picks_at_random_from_the_givers():
    owner = np.repeat([0, 1], [100, 0])
    target = np.array([50, 50])
    first = [np.flatnonzero(partition._reassign(_rng(seed), owner, target)) for seed in range(2)]
    assert (first[0] != first[1]).any()
    assert first[0].min() < 25 and first[0].max() > 75


def test_reassign_draws_nothing_if_nothing_is_lacking():
    rng, owner = _rng(), np.repeat([0, 1], 5)
    assert partition._reassign(rng, owner, np.array([5, 5])) is owner
    assert rng.random() == _rng().random()


# --- refusals


def test_labels_may_be_a_column():
    assert partition.iid(CIFAR[:, None], clients=9).hash == partition.iid(CIFAR, clients=9).hash


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda y: partition.iid(y, clients=0), "clients=0 must be a whole number of at least 1"),
        (lambda y: partition.iid(y, clients=-3), "clients=-3 must be a whole number"),
        (lambda y: partition.iid(y, clients=2.0), "clients=2.0 must be a whole number"),
        (lambda y: partition.iid(y, clients=True), "clients=True must be a whole number"),
        (lambda y: partition.iid(y, clients=13), "13 clients cannot share 12 .* to 12 or fewer"),
        (
            lambda y: partition.iid(y, clients=2, seed=-1),
            "seed=-1 must be a whole number of at least 0",
        ),
        (
            lambda y: partition.iid(y, clients=2, seed=2**64),
            r"seed=18446744073709551616 must be below 2\*\*64",
        ),
        (lambda y: partition.iid(y, clients=2, seed=0.5), "seed=0.5 must be a whole number"),
        (
            lambda y: partition.dirichlet(y / 2, clients=2, alpha=1),
            r"labels are float64\[12\]; .* \.astype\(int\) if",
        ),
        (
            lambda y: partition.dirichlet(y[None], clients=2, alpha=1),
            r"labels are int64\[1, 12\]; expected integers \[N\]",
        ),
        (
            lambda y: partition.iid(y - 1, clients=2),
            "labels go from -1 to 1 in 12 examples; .* 'no label'",
        ),
        (lambda y: partition.iid([], clients=1), "labels are empty"),
        (lambda y: partition.iid(np.array(["a"] * 12), clients=2), "number them with numpy.unique"),
        (
            lambda y: partition.shards(np.eye(12, dtype=int), clients=2),
            "one-hot array, take .argmax",
        ),
        (lambda y: partition.dirichlet(y, clients=2, alpha=0), "alpha=0 must be .* about"),
        (lambda y: partition.dirichlet(y, clients=2, alpha=-1.0), "alpha=-1.0 must be"),
        (lambda y: partition.dirichlet(y, clients=2, alpha=np.nan), "alpha=nan must be"),
        (lambda y: partition.dirichlet(y, clients=2, alpha=np.inf), "alpha=inf must be"),
        (lambda y: partition.dirichlet(y, clients=2, alpha="1"), "alpha='1' must be"),
        (
            lambda y: partition.dirichlet(y, clients=6, alpha=1.0, min_size=3),
            "min_size=3 for 6 clients needs more than the 12 examples; lower min_size to 2 or "
            "clients to 4",
        ),
        (
            lambda y: partition.dirichlet(y, clients=2, alpha=1.0, min_size=0),
            "min_size=0 must be a whole number of at least 1",
        ),
        (
            lambda y: partition.dirichlet(y, clients=12, alpha=0.01),
            r"dirichlet with alpha=0.01 left \d+ of 12 clients .* min_size=1, .* a larger alpha",
        ),
        (lambda y: partition.quantity(y, clients=3, alpha=0.0), "alpha=0.0 must be"),
        (
            lambda y: partition.quantity(y, clients=3, alpha=1.0, min_size=5),
            "needs more than the 12",
        ),
        (lambda y: partition.shards(y, clients=7), "7 clients x 2 shards need more than the 12"),
        (
            lambda y: partition.shards(y, clients=2, shards_per_client=0),
            "shards_per_client=0 must be a whole number",
        ),
        (
            lambda y: partition.mixed(y, clients=2, ratio=1.1),
            r"ratio=1.1 must be a number in \[0, 1\]",
        ),
        (lambda y: partition.mixed(y, clients=2, ratio=np.nan), "ratio=nan must be a number in"),
        (
            lambda y: partition.mixed(y, clients=6, ratio=0.5),
            "ratio=0.5 leaves 6 examples for the 12 shards of 6 clients",
        ),
        (
            lambda y: partition.mixed(y, clients=6, ratio=0.0, reference=True),
            "leaves shards of 0 examples in the official scheme",
        ),
        (lambda y: partition.natural(y, clients=[1, 2]), r"int64\[2\]; expected .* of the 12"),
        (
            lambda y: partition.natural(y, clients=y.astype(np.uint64) + 2**63),
            "has more than 63 bits",
        ),
        (lambda y: partition.natural(y, clients=y / 2), "Client ids are float64"),
        (lambda y: partition.natural(y, clients=[None] * 12), "Client ids are object"),
    ],
)
def test_what_cannot_be_dealt_is_refused_in_a_sentence(make, message):
    with pytest.raises(FedLPError, match=message):
        make(np.arange(12) % 3)


def test_a_saved_partition_is_read_back(tmp_path):
    labels = np.arange(60) % 3
    split = partition.dirichlet(labels, clients=4, alpha=0.5, seed=1)
    split.save(tmp_path / "split.json")
    again = partition.from_file(labels, path=tmp_path / "split.json")
    assert again.hash == split.hash


def test_a_split_by_file_keeps_the_order_of_the_file(tmp_path):
    labels = np.arange(6) % 2
    (tmp_path / "split.json").write_text('{"zoe": [4, 1], "ann": [0]}')
    split = partition.from_file(labels, path=tmp_path / "split.json")
    assert [split.rows(k).tolist() for k in range(2)] == [[4, 1], [0]]
    np.save(tmp_path / "client.npy", np.array([7, 7, 3, 3, 3, 7]))
    split = partition.from_file(labels, path=tmp_path / "client.npy")
    assert [split.rows(k).tolist() for k in range(2)] == [[2, 3, 4], [0, 1, 5]]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[[0, 1], [1]]", "rows more than once"),
        ("[[0, 9]]", "outside the 6 labelled examples"),
        ("[[0.5]]", "expected integers"),
        ("[[0], []]", "holds 0 examples"),
        ("[]", "holds no client"),
        ("3", "expected a list of rows for each client"),
        ("{", "cannot be read as a split"),
        ("[" * 100_000, "cannot be read as a split"),
    ],
)
def test_a_bad_split_is_refused(tmp_path, content, sentence):
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(FedLPError, match=sentence):
        partition.from_file(np.arange(6) % 2, path=tmp_path / "split.json")


def test_a_missing_split_and_a_bad_name_are_refused(tmp_path):
    with pytest.raises(FedLPError, match="there is no file"):
        partition.from_file(np.arange(6) % 2, path=tmp_path / "split.json")
    with pytest.raises(FedLPError, match=r"name a \.json file"):
        partition.iid(np.arange(6) % 2, clients=2).save(tmp_path / "split.npz")


@few
@given(data=st.data())
def test_other_examples_are_dealt_as_the_training_examples_are(data):
    clients = data.draw(st.integers(1, 9))
    train = _labels(data.draw, 60)
    made = partition.dirichlet(train, clients=clients, alpha=0.5, seed=1, min_size=1)
    test = np.random.default_rng(data.draw(st.integers(0, 9))).integers(0, 8, 90)
    order, offset = partition.dealt_alike(made, test)
    assert len(offset) == clients + 1
    taught = np.flatnonzero(np.isin(test, train))  # of classes that somebody holds
    np.testing.assert_array_equal(np.sort(order), taught)
    for k in range(clients):
        got = np.bincount(test[order[offset[k] : offset[k + 1]]], minlength=8)
        for label in range(made.num_classes):
            held = made.histogram[:, label]
            fair = (test == label).sum() * held[k] / max(held.sum(), 1)
            assert abs(got[label] - fair) < 1


def test_examples_without_classes_are_dealt_by_size():
    made = partition.quantity(np.zeros(50, int), clients=4, alpha=1.0)
    _, offset = partition.dealt_alike(made, np.linspace(0, 1, 100, dtype=np.float32))
    np.testing.assert_array_equal(np.diff(offset), 2 * made.sizes)
