"""Draws depend on (seed, round, client, purpose, step) and on nothing in the environment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import Steps, cohort_of, dataset, flat

import fedlp_jax as fl
from fedlp_jax.data.batching import example_of
from fedlp_jax.prng import root_key
from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.types import Examples

LAYERS = LayerTable(("a", "b"), {}, params=np.array([1, 2]), statistics=np.zeros(2, np.int64))


def masks(clients):
    """Upload masks of clients, all drawn at once."""
    policy = fl.masks.bernoulli(0.5)
    coverage = jnp.ones((len(clients), 2))
    state = policy.init(LAYERS, 100)
    return np.asarray(
        policy.sample(root_key(7), state, cohort_of(clients), jnp.int32(1), coverage)[0].upload
    )


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_the_default_kind_of_key_changes_no_draw(kind):
    """An rbg key draws other numbers when it is vmapped, so a plan would change the masks."""
    data = dataset()
    example = example_of(Examples(data.train.inputs, data.train.labels, data.normalize))
    task = fl.classification(Steps())
    expected, variables = masks(range(50)), task.init(root_key(7), example)
    with jax.default_prng_impl(kind):
        assert np.array_equal(masks(range(50)), expected)
        assert np.array_equal(np.concatenate([masks([k]) for k in range(50)]), expected)
        assert np.array_equal(flat(task.init(root_key(7), example)), flat(variables))
