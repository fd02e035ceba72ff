"""The server's step: what moves, and above all what must not."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlp_jax.aggregation.server import server_step
from fedlp_jax.errors import FedLPError
from fedlp_jax.pruning.layers import layer_table

VARIABLES = {
    "params": {"a": {"w": jnp.array([1.0, -2.0])}, "b": {"w": jnp.array([0.5, 3.0])}},
    "batch_stats": {"a": {"var": jnp.array([1.0])}},
}
UPDATE = {
    "params": {"a": {"w": jnp.array([0.25, 0.5])}, "b": {"w": jnp.array([0.0, 0.0])}},
    "batch_stats": {"a": {"var": jnp.array([-0.5])}},
}
LAYERS = layer_table(VARIABLES)
SENT_A = jnp.array([True, False])


def step(optimizer, state=None, gate=SENT_A):
    state = optimizer.init(VARIABLES["params"]) if state is None else state
    return server_step(optimizer, state, VARIABLES, UPDATE, gate, LAYERS)


def test_sgd_of_one_adds_the_update():
    new, _ = step(optax.sgd(1.0))
    np.testing.assert_array_equal(new["params"]["a"]["w"], [1.25, -1.5])
    np.testing.assert_array_equal(new["batch_stats"]["a"]["var"], [0.5])


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(1.0, momentum=0.9),
        optax.adam(0.1),
        optax.yogi(0.1),
        optax.adagrad(0.1),
        optax.adamw(0.1, weight_decay=0.3),
    ],
)
def test_a_layer_nobody_sent_keeps_its_bits_and_its_optimizer_state(optimizer):
    state = optimizer.init(VARIABLES["params"])
    # A state that would move layer b: built by a round in which it was sent.
    moving = {"params": {"a": UPDATE["params"]["a"], "b": {"w": jnp.array([9.0, -9.0])}}}
    _, state = server_step(
        optimizer, state, VARIABLES, {**UPDATE, **moving}, jnp.array([True, True]), LAYERS
    )
    new, after = step(optimizer, state)
    assert (new["params"]["b"]["w"] == VARIABLES["params"]["b"]["w"]).all()
    assert not (new["params"]["a"]["w"] == VARIABLES["params"]["a"]["w"]).any()
    held = [
        np.array_equal(x["b"]["w"], y["b"]["w"])
        for x, y in zip(_param_trees(state), _param_trees(after), strict=True)
    ]
    assert held and all(held)


def _param_trees(state):
    """Sub-trees of an optimizer state that look like the parameters."""
    if isinstance(state, dict) and set(state) == {"a", "b"}:
        return [state]
    if isinstance(state, tuple):
        return [tree for part in state for tree in _param_trees(part)]
    return []


def test_momentum_follows_the_equation():
    """v = beta v + d; x = x + v, with d the aggregate."""
    optimizer = optax.sgd(1.0, momentum=0.5)
    new, state = step(optimizer)
    again, _ = server_step(optimizer, state, new, UPDATE, SENT_A, LAYERS)
    d = np.array([0.25, 0.5])
    np.testing.assert_allclose(again["params"]["a"]["w"], [1.0, -2.0] + d + (0.5 * d + d))


def test_statistics_take_the_plain_update_whatever_the_optimizer():
    new, _ = step(optax.adam(10.0))
    np.testing.assert_array_equal(new["batch_stats"]["a"]["var"], [0.5])


@pytest.mark.parametrize("optimizer", [optax.polyak_sgd(0.1), optax.lbfgs()])
def test_an_optimizer_that_needs_a_loss_is_refused_with_a_way_out(optimizer):
    with pytest.raises(FedLPError, match=r"server's optimizer needs .*'value'.*optax\.sgd"):
        step(optimizer)
