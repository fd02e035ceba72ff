"""Mask policies that learn: who is drawn, who rests, and what the next round makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import cohort_of

from fedlp_jax import FedLPError
from fedlp_jax.pruning.layers import layer_table
from fedlp_jax.pruning.learning import lazy, receive, recycling
from fedlp_jax.pruning.masks import bernoulli, fixed, freeze, full, in_turn, only
from fedlp_jax.pruning.policy import Feedback
from fedlp_jax.types import NO_TERMS, Terms

KEY = jax.random.key(0)
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
LAYERS = layer_table({"params": PARAMS})


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
        return policy.sample(KEY, state, cohort_of([0, 4, 7]), round, ones)[0]

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
    with pytest.raises(FedLPError, match="recycled=3 leaves nothing to send of the 3 .* most 2"):
        recycling(3).init(LAYERS, 9)
    with pytest.raises(FedLPError, match="recycled=-1"):
        recycling(-1)


def test_clients_receive_layers_at_a_rate_once_they_have_a_model():
    uploads, ones = bernoulli(0.5), jnp.ones((1000, len(LAYERS)))
    policy, clients = receive(0.25, uploads), cohort_of(np.arange(1000))
    state = policy.init(LAYERS, 1000)
    first, state = policy.sample(KEY, state, clients, jnp.int32(1), ones)
    assert first.download.all()
    alone = uploads.sample(KEY, uploads.init(LAYERS, 1000), clients, jnp.int32(1), ones)[0]
    np.testing.assert_array_equal(first.upload, alone.upload)
    odd = jnp.arange(1000) % 2 == 1  # the others are lost
    state = policy.learn(state, feedback(ids=np.arange(1000), counted=odd))
    second = np.asarray(policy.sample(KEY, state, clients, jnp.int32(2), ones)[0].download)
    assert second[::2].all()
    assert abs(second[1::2].mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 2000)
    np.testing.assert_allclose(policy.received(LAYERS, 1000), 0.25)


def test_an_empty_slot_is_no_client():
    policy = receive(0.0, full())
    state = policy.learn(policy.init(LAYERS, 4), feedback(ids=(2, -1)))
    masks = policy.sample(KEY, state, cohort_of(range(4)), jnp.int32(2), jnp.ones((4, 4)))[0]
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
    state = policy.init(LAYERS, 9)
    for round in range(1, 6):
        seen = feedback(senders, extras=extras, round=jnp.int32(round), ids=(0, 4, 7))
        masks, state = policy.sample(KEY, state, cohort_of([0, 4, 8]), seen.round, jnp.ones((3, 4)))
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
