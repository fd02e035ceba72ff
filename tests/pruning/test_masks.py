"""Mask policies: frequencies, independence of order, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlp_jax import FedLPError
from fedlp_jax.pruning.layers import LayerTable, layer_table
from fedlp_jax.pruning.masks import (
    Feedback,
    bernoulli,
    fixed,
    freeze,
    full,
    in_turn,
    lazy,
    only,
    receive,
    recycling,
)
from fedlp_jax.types import NO_TERMS, Cohort, Terms

LAYERS = LayerTable(
    ("a", "b", "c", "d"), {}, params=np.array([1, 2, 3, 4]), statistics=np.zeros(4, np.int64)
)
KEY = jax.random.key(0)


def cohort(ids):
    ids = jnp.asarray(ids, jnp.int32)
    zero = jnp.zeros_like(ids)
    return Cohort(ids, zero, zero, zero.reshape(-1, 1), jnp.zeros((1, 2), jnp.int32))


def draw(policy, ids, round=1, coverage=None, clients=1000):
    coverage = jnp.ones((len(ids), len(LAYERS))) if coverage is None else coverage
    state = policy.init(LAYERS, clients)
    return policy.sample(KEY, state, cohort(ids), jnp.int32(round), coverage)[0]


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
    ids = cohort(range(slots))
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


PARAMS = {
    "a": {"bias": jnp.zeros(2), "kernel": jnp.full((1, 2), 3.0)},
    "b": {"kernel": jnp.full((1, 4), 1.0)},
    "c": {"kernel": jnp.full((1, 1), 1.0)},
    "norm": {"scale": jnp.ones(3)},
}
MOVES = {
    "a": {"bias": jnp.full(2, 3.0), "kernel": jnp.zeros((1, 2))},
    "b": {"kernel": jnp.full((1, 4), 0.5)},
    "c": {"kernel": jnp.full((1, 1), 0.25)},
    "norm": {"scale": jnp.full(3, 1e-3)},
}  # of 1, 1/2, 1/4 and 1/1000 of their layers


def feedback(senders=(1, 1, 1, 1), ids=(0, 4, 7), counted=True, rule="by_module", **more):
    """What a policy learns of a round in which the layers moved by `MOVES`."""
    return Feedback(
        PARAMS,
        MOVES,
        jnp.asarray(senders, jnp.float32),
        jnp.asarray(ids, jnp.int32),
        jnp.broadcast_to(jnp.asarray(counted), (len(ids),)),
        **{"extras": NO_TERMS, "round": jnp.int32(1)} | more,
        layers=layer_table({"params": PARAMS}, rule),
    )


def recycled(policy, senders, rule="by_module"):
    """The policy's state after a round, and the layers."""
    seen = feedback(senders, rule=rule)
    return policy.learn(policy.init(seen.layers, 9), seen), seen.layers


def resting(policy, state, table, rounds=1):
    """`bool[R, L]`, the layers that nobody sends in each round."""
    ones = jnp.ones((3, len(table)))

    def masks(round):
        return policy.sample(KEY, state, cohort([0, 4, 7]), round, ones)[0]

    drawn = jax.vmap(masks)(jnp.arange(rounds, dtype=jnp.int32))
    assert (drawn.upload == drawn.upload[:, :1]).all() and drawn.download.all()
    return np.asarray(drawn.upload[:, 0] == 0)


def test_layers_rest_in_proportion_to_how_little_they_move():
    policy = recycling(1)
    state, table = recycled(policy, [1, 1, 1, 1])
    rests = resting(policy, state, table, rounds=4000)
    expected = np.array([1, 2, 4, 0]) / 7  # a norm, which moved least, never rests
    error = 4 * np.sqrt(expected * (1 - expected) / len(rests))
    np.testing.assert_array_less(np.abs(np.mean(rests, axis=0) - expected), error + 1e-9)


def test_layers_that_have_not_moved_are_sent():
    policy = recycling(2)
    state, table = recycled(policy, [0, 5, 0, 5])
    assert resting(policy, state, table).tolist() == [[False, True, False, False]]
    assert not resting(policy, policy.init(table, 9), table).any()


def test_tensors_of_one_dimension_are_sent():
    policy = recycling(2)
    state, table = recycled(policy, [1] * 5, "by_tensor")
    assert table.names == ("a/bias", "a/kernel", "b/kernel", "c/kernel", "norm/scale")
    # The kernel of a did not move.
    assert resting(policy, state, table).tolist() == [[False, False, True, True, False]]
    np.testing.assert_allclose(policy.expected(table, 9), [[1, 1 / 3, 1 / 3, 1 / 3, 1]], rtol=1e-6)


def test_resting_layers_leave_some_to_send():
    table = layer_table({"params": PARAMS})
    with pytest.raises(FedLPError, match="recycled=3 leaves nothing to send of the 3 .* most 2"):
        recycling(3).init(table, 9)
    with pytest.raises(FedLPError, match="recycled=-1"):
        recycling(-1)


def test_clients_receive_layers_at_a_rate_once_they_have_a_model():
    policy, ones = receive(0.25, bernoulli(0.5)), jnp.ones((1000, len(LAYERS)))
    state, clients = policy.init(LAYERS, 1000), cohort(np.arange(1000))
    first, state = policy.sample(KEY, state, clients, jnp.int32(1), ones)
    assert first.download.all()
    np.testing.assert_array_equal(first.upload, draw(bernoulli(0.5), np.arange(1000)).upload)
    odd = jnp.arange(1000) % 2 == 1  # the others are lost
    state = policy.learn(state, feedback(ids=np.arange(1000), counted=odd))
    second = np.asarray(policy.sample(KEY, state, clients, jnp.int32(2), ones)[0].download)
    assert second[::2].all()
    assert abs(second[1::2].mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 2000)
    np.testing.assert_allclose(policy.received(LAYERS, 1000), 0.25)


def test_an_empty_slot_is_no_client():
    policy = receive(0.0, full())
    state = policy.learn(policy.init(LAYERS, 4), feedback(ids=(2, -1)))
    masks = policy.sample(KEY, state, cohort(range(4)), jnp.int32(2), jnp.ones((4, 4)))[0]
    assert masks.download.all(axis=1).tolist() == [True, True, False, True]
    with pytest.raises(FedLPError, match=r"the rate of received layers=1.5"):
        receive(1.5, full())


def test_policies_that_withhold_a_layer_from_kept_models_are_refused():
    """A client would train on a layer that it never received."""
    for make in (lambda: fixed("fc2", receive(1.0, full())), lambda: fixed("fc2", lazy(2))):
        with pytest.raises(FedLPError, match="'fc2'.* never sends a layer to the clients"):
            make()
    turns = in_turn(full_rounds=1, group_rounds=1, download="group")
    for policy in (fixed("fc2", full()), turns, only("fc1"), lazy(2), receive(0.5, full())):
        with pytest.raises(FedLPError, match=r"receive\(1.0, .* such as masks.bernoulli"):
            receive(1.0, policy)
    receive(1.0, freeze(in_turn(full_rounds=1, group_rounds=1)))


def spread_of(spread, moved):
    """Extras from which `spread` is left of each layer, `moved` being |mean of the updates|^2."""
    squares = {
        layer: {name: jnp.float32(spread[layer] + moved[layer]) / len(parts) for name in parts}
        for layer, parts in PARAMS.items()
    }
    return Terms({}, {"squares": squares})


MOVED = {"a": 18.0, "b": 1.0, "c": 0.0625, "norm": 3e-6}


def test_layers_in_which_clients_agree_become_lazy():
    """Of 4, 4 and 1 parameters; norms do not count. The numbers are n_l d_l."""
    spread = {"a": 3.2, "b": 5.0, "c": 1.2, "norm": 9.0}  # d_l: .8, 1.25 and 1.2
    senders, extras = (3, 3, 3, 3), spread_of(spread, MOVED)
    policy, chosen = lazy(2), []
    state = policy.init(feedback().layers, 9)
    for round in range(1, 6):
        seen = feedback(senders, extras=extras, round=jnp.int32(round), ids=(0, 4, 7))
        masks, state = policy.sample(KEY, state, cohort([0, 4, 8]), seen.round, jnp.ones((3, 4)))
        chosen.append(state[1].tolist())
        resting = ~np.asarray(state[1] if round % 2 else np.zeros(4, bool))
        np.testing.assert_array_equal(masks.upload, np.broadcast_to(resting, (3, 4)))
        # In the second round of a block, clients 0 and 4 have trained lazy layers; 8 is new.
        own = ~np.asarray(state[1] if round % 2 == 0 else np.zeros(4, bool))
        np.testing.assert_array_equal(masks.download, [own, own, np.ones(4, bool)])
        state = policy.learn(state, seen)
    # a and c: 4.4 of 9.4 exceeds b's 4 of 9. Then theirs is over two rounds: 2.2 of 7.2 does not.
    none, two, three = [False] * 4, [True, False, True, False], [True, True, True, False]
    assert chosen == [none, none, two, two, three]
    with pytest.raises(FedLPError, match="interval=0"):
        lazy(0)
    with pytest.raises(FedLPError, match="use fl.fedlama"):
        policy.learn(state, feedback())


@pytest.mark.parametrize(("senders", "scale"), [(1, 1.0), (3, 1e-7), (3, 0.0)])
def test_rounding_makes_no_layer_lazy(senders, scale):
    """With one sender, or clients that agree, the mean of squares is the square of the mean."""
    spread = {layer: scale * moved for layer, moved in MOVED.items()}
    extras = spread_of(spread, MOVED)
    seen = feedback((senders,) * 4, extras=extras, round=jnp.int32(2))
    policy = lazy(2)
    rounds, rests, last = policy.init(seen.layers, 9)
    rests = rests.at[1].set(True)
    _, after, last = policy.learn((rounds, rests, last), seen)
    np.testing.assert_array_equal(after, rests)
    assert last.tolist() == [2, 0, 0, 0, 2, 0, 0, 2, 0]
