"""Mask policies: frequencies, independence of order, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import cohort_of

from fedlp_jax import FedLPError
from fedlp_jax.pruning.layers import LayerTable, layer_table
from fedlp_jax.pruning.masks import bernoulli, fixed, freeze, full, in_turn, only

LAYERS = LayerTable(
    ("a", "b", "c", "d"), {}, params=np.array([1, 2, 3, 4]), statistics=np.zeros(4, np.int64)
)
KEY = jax.random.key(0)


def draw(policy, ids, round=1, coverage=None, clients=1000):
    coverage = jnp.ones((len(ids), len(LAYERS))) if coverage is None else coverage
    state = policy.init(LAYERS, clients)
    return policy.sample(KEY, state, cohort_of(ids), jnp.int32(round), coverage)[0]


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_frequency_is_keep(keep):
    upload = np.asarray(draw(bernoulli(keep), np.arange(1000)).upload)
    sigma = np.sqrt(keep * (1 - keep) / upload.size)
    assert abs(upload.mean() - keep) < 4 * sigma


def test_full_and_none():
    assert draw(full(), range(50)).upload.all()
    assert draw(bernoulli(1), range(50)).upload.all()
    assert not draw(bernoulli(0), range(50)).upload.any()


def test_a_draw_depends_on_round_and_client_only():
    ids = np.array([3, 14, 15, 92])
    one = np.asarray(draw(bernoulli(0.5), ids).upload)
    other = np.asarray(draw(bernoulli(0.5), ids[::-1]).upload)
    assert np.array_equal(one, other[::-1])
    assert not np.array_equal(one, np.asarray(draw(bernoulli(0.5), ids, round=2).upload))


def test_layers_and_clients_are_independent():
    upload = np.asarray(draw(bernoulli(0.5), np.arange(1000)).upload)
    correlation = np.corrcoef(upload.T) - np.eye(4)
    assert np.abs(correlation).max() < 4 / np.sqrt(1000)


def test_nobody_sends_a_layer_with_probability_one_minus_keep_to_the_cohort():
    """(1 - .1)^10 = .349 for ten clients at keep .1."""
    upload = np.asarray(draw(bernoulli(0.1), np.arange(1000)).upload).reshape(100, 10, 4)
    unsent = (upload.sum(axis=1) == 0).mean()
    assert abs(unsent - 0.9**10) < 4 * np.sqrt(0.349 * 0.651 / 400)


@pytest.mark.filterwarnings("ignore:keep=0 for")
def test_per_layer_per_client_and_by_name():
    per_layer = np.asarray(draw(bernoulli([0.0, 1.0, 0.0, 1.0]), range(30)).upload)
    assert (per_layer == [0, 1, 0, 1]).all()
    by_name = np.asarray(draw(bernoulli({"b": 0.0}), range(30)).upload)
    assert (by_name == [1, 0, 1, 1]).all()
    keep = np.tile([0.0, 1.0], 15)
    per_client = np.asarray(draw(bernoulli(keep), range(30), clients=30).upload)
    assert (per_client == keep[:, None]).all()
    matrix = np.zeros((30, 4))
    matrix[5, 2] = 1
    assert (np.asarray(draw(bernoulli(matrix), range(30), clients=30).upload) == matrix).all()


def test_a_layer_that_nobody_ever_sends_is_warned_of():
    with pytest.warns(RuntimeWarning, match=r"keep=0 for b: .* keeps its first values"):
        bernoulli({"b": 0}).init(LAYERS, 9)
    for keep in (0, {"b": 0.1}, np.array([[0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])):
        bernoulli(keep).init(LAYERS, 2)  # nothing at all is sent, or each layer by somebody


@pytest.mark.parametrize(
    ("keep", "rates"),
    [
        (0.3, [[0.3]]),
        ({"c": 0.5}, [[1, 1, 0.5, 1]]),
        ([0.1, 0.2, 0.3], [[0.1], [0.2], [0.3]]),
        (lambda round: jnp.where(round < 2, 0.9, 0.5), [[0.9]]),
    ],
)
def test_expected_rates_are_those_of_the_draws(keep, rates):
    expected = bernoulli(keep).expected(LAYERS, 3)
    np.testing.assert_allclose(expected, rates, rtol=1e-6)
    probability = draw(bernoulli(keep), range(3), clients=3).keep
    np.testing.assert_allclose(np.broadcast_to(expected, (3, 4)), probability, rtol=1e-6)


def test_schedule_follows_the_round():
    policy = bernoulli(lambda round: jnp.where(round < 3, 1.0, 0.0))
    assert draw(policy, range(9), round=2).upload.all()
    assert not draw(policy, range(9), round=3).upload.any()


def test_only_what_a_client_holds_is_sent_or_received():
    coverage = jnp.asarray([[1.0, 1.0, 0.0, 0.0]] * 9)
    masks = draw(full(), range(9), coverage=coverage)
    assert np.array_equal(masks.upload, coverage)
    assert np.array_equal(masks.download, coverage)


def test_only_named_layers_travel():
    coverage = jnp.asarray([[1.0, 1.0, 0.0, 1.0]] * 3)
    masks = draw(only("a", "c"), range(3), coverage=coverage)
    for mask in (masks.upload, masks.download):
        assert np.array_equal(mask, [[1, 0, 0, 0]] * 3)
    assert only("a", "c").expected(LAYERS, 3).tolist() == [[1, 0, 1, 0]]
    with pytest.raises(FedLPError, match="masks.only names e; name some of the layers a, b, c, d"):
        only("e").init(LAYERS, 3)
    with pytest.raises(FedLPError, match="masks.only names nothing"):
        only().init(LAYERS, 3)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (1.5, r"keep=1.5 must be a number in \[0, 1\]"),
        (-0.1, "keep=-0.1 must be"),
        (float("nan"), "keep=nan must be"),
        ([0.5, 2.0, 0.5, 0.5], "keep=2 must be"),
        ([0.5] * 7, r"shape \[7\]; give one number, one per client \(K=1000\)"),
        ({"nope": 0.5}, "unknown layers .'nope'.; the layers are a, b, c, d"),
        ("half", "not a number"),
    ],
)
def test_refusals(keep, message):
    with pytest.raises(FedLPError, match=message):
        bernoulli(keep).init(LAYERS, 1000)


def test_as_many_clients_as_layers_must_be_told_apart():
    with pytest.raises(FedLPError, match="K equals L"):
        bernoulli([0.1, 0.2, 0.3, 0.4]).init(LAYERS, 4)
    assert bernoulli([[0.1], [0.2], [0.3], [0.4]]).init(LAYERS, 4).shape == (4, 1)


def test_frozen_layers_are_those_that_are_not_sent():
    ids = np.arange(50)
    masks, plain = draw(freeze(bernoulli(0.5)), ids), draw(bernoulli(0.5), ids)
    np.testing.assert_array_equal(masks.upload, plain.upload)
    np.testing.assert_array_equal(masks.train, plain.upload)
    np.testing.assert_array_equal(masks.download, plain.download)
    assert plain.train is None


NET = layer_table(
    {"params": {n: {"kernel": jnp.ones(2), "bias": jnp.ones(1)} for n in ("conv", "fc1", "fc2")}}
)


def of_net(policy, round=1, slots=5):
    state = policy.init(NET, 9)
    ids = cohort_of(range(slots))
    return policy.sample(KEY, state, ids, jnp.int32(round), jnp.ones((slots, 3)))[0]


def test_a_fixed_layer_neither_moves_nor_travels():
    policy = fixed("fc2", bernoulli({"fc1": 0.5}))
    masks = of_net(policy)
    moves = np.broadcast_to([1, 1, 0], (5, 3))
    np.testing.assert_array_equal(masks.train, moves)
    np.testing.assert_array_equal(masks.download, moves)
    np.testing.assert_array_equal(masks.upload[:, ::2], moves[:, ::2])
    np.testing.assert_array_equal(policy.expected(NET, 9), [[1, 0.5, 0]])
    frozen = of_net(fixed("fc2", freeze(bernoulli(0.5))))
    np.testing.assert_array_equal(frozen.train, frozen.upload)


def test_groups_take_turns():
    policy = in_turn([["conv"], ["fc1", "fc2"]], full_rounds=2, group_rounds=2)
    turns = [np.asarray(of_net(policy, round).train[3]).tolist() for round in range(1, 9)]
    everything, first, second = [1, 1, 1], [1, 0, 0], [0, 1, 1]
    assert turns == [*[everything] * 2, *[first] * 2, *[second] * 2, *[everything] * 2]
    masks = of_net(policy, round=3)
    np.testing.assert_array_equal(masks.upload, masks.train)
    np.testing.assert_array_equal(masks.download, np.ones((5, 3)))
    group = of_net(in_turn(full_rounds=0, group_rounds=1, download="group"), round=2)
    np.testing.assert_array_equal(group.download, np.broadcast_to([0, 1, 0], (5, 3)))
    np.testing.assert_allclose(policy.expected(NET, 9), [[4 / 6] * 3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fixed("head", full()), "'head' matches none of the layers conv, fc1, fc2"),
        (lambda: fixed(".", full()), "matches all of the layers"),
        (lambda: fixed("fc2/bias", full()), "a part of the layer fc2 only"),
        (lambda: fixed("(", full()), "is not a regular expression"),
        (lambda: in_turn([["conv"], ["fc1"]]), "leave out fc2; put each of the layers conv"),
        (lambda: in_turn([["conv", "fc1", "fc2", "x"]]), "name x"),
        (lambda: in_turn(["fc1", "fc2"]), "must be lists of layer names"),
        (lambda: in_turn([1, 2]), "must be lists of layer names"),
        (lambda: in_turn(full_rounds=-1), "full_rounds"),
        (lambda: in_turn(group_rounds=0), "group_rounds"),
        (lambda: in_turn(download="nothing"), "download"),
    ],
)
def test_what_is_trained_is_checked(make, message):
    with pytest.raises(FedLPError, match=message):
        make().init(NET, 9)
