"""Masked means against the equations, written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlp_jax.aggregation.means import cohort_mean, inverse_probability, masked_mean
from fedlp_jax.aggregation.reducer import Received, UploadInfo
from fedlp_jax.pruning.layers import layer_table

RNG = np.random.default_rng(0)
CLIENTS = 6
SHAPES = {
    "params": {"a": {"w": (3, 2)}, "b": {"w": (4,)}, "c": {"w": (2,)}},
    "batch_stats": {"a": {"mean": (2,)}, "b": {"mean": (4,)}},
}
UPDATES = jax.tree.map(
    lambda shape: jnp.asarray(RNG.normal(size=(CLIENTS, *shape)), jnp.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
)
LAYERS = layer_table(jax.tree.map(lambda x: x[0], UPDATES))
WEIGHT = np.array([3, 1, 2, 5, 1, 4], np.float32)
MASK = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0]], np.float32)
KEEP = RNG.uniform(0.2, 1, size=(CLIENTS, 3)).astype(np.float32)
COUNTED = np.array([1, 1, 1, 0, 1, 1], bool)


def run(reducer, updates=UPDATES, counted=COUNTED):
    terms = [
        reducer.prepare(
            jax.tree.map(lambda x, k=k: x[k], updates),
            UploadInfo(*(jnp.asarray(x[k]) for x in (WEIGHT, MASK, KEEP))),
            jnp.asarray(counted[k]),
            LAYERS,
        )
        for k in range(CLIENTS)
    ]
    return aggregate(reducer, jax.tree.map(lambda *x: sum(x[1:], x[0]), *terms), LAYERS)


def aggregate(reducer, total, layers):
    """The update; a mean reads nothing but the sums."""
    received = Received(total, None, None, None)
    return reducer.reduce(received, reducer.init({}), layers, None).update


def mean(collection, layer, leaf, factor, divisor):
    """sum_k factor_k update_k / divisor, over the clients that count."""
    updates = np.asarray(UPDATES[collection][layer][leaf])
    factor = np.where(COUNTED, factor, 0)
    shaped = factor.reshape(-1, *[1] * (updates.ndim - 1))
    return (shaped * np.where(COUNTED.reshape(shaped.shape), updates, 0)).sum(axis=0) / divisor


def weights(layer):
    return WEIGHT * MASK[:, layer]


def test_masked_mean():
    update = run(masked_mean())
    for layer, name in enumerate("ab"):
        expected = mean("params", name, "w", weights(layer), weights(layer)[COUNTED].sum())
        np.testing.assert_allclose(update["params"][name]["w"], expected, rtol=1e-5)


def test_cohort_mean_shrinks_with_the_share_that_sent():
    update = run(cohort_mean())
    expected = mean("params", "b", "w", weights(1), WEIGHT[COUNTED].sum())
    np.testing.assert_allclose(update["params"]["b"]["w"], expected, rtol=1e-5)


def test_inverse_probability_reweighs_parameters_but_not_statistics():
    update = run(inverse_probability())
    expected = mean("params", "a", "w", weights(0) / KEEP[:, 0], WEIGHT[COUNTED].sum())
    np.testing.assert_allclose(update["params"]["a"]["w"], expected, rtol=1e-5)
    plain = mean("batch_stats", "a", "mean", weights(0), weights(0)[COUNTED].sum())
    np.testing.assert_allclose(update["batch_stats"]["a"]["mean"], plain, rtol=1e-5)


@pytest.mark.parametrize("make", [masked_mean, cohort_mean, inverse_probability])
def test_a_layer_nobody_sent_has_the_update_zero(make):
    assert not np.asarray(run(make())["params"]["c"]["w"]).any()


@pytest.mark.parametrize("make", [masked_mean, cohort_mean, inverse_probability])
def test_what_does_not_count_cannot_poison(make):
    poisoned = jax.tree.map(lambda x: x.at[3].set(jnp.nan), UPDATES)
    clean, other = run(make()), run(make(), poisoned)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), clean, other))


def test_inverse_probability_is_unbiased():
    """E[update] over all 2^C masks of one layer is the mean over the whole cohort."""
    reducer = inverse_probability()
    update = {"params": {"a": {"w": jnp.asarray(UPDATES["params"]["a"]["w"])}}}
    table = layer_table({"params": {"a": {"w": jnp.zeros((3, 2))}}})
    keep = KEEP[:, 0]
    expectation = 0.0
    for pattern in range(2**CLIENTS):
        mask = np.array([(pattern >> k) & 1 for k in range(CLIENTS)], np.float32)
        probability = np.prod(np.where(mask, keep, 1 - keep))
        uploads = UploadInfo(
            jnp.asarray(WEIGHT), jnp.asarray(mask)[:, None], jnp.asarray(keep)[:, None]
        )
        terms = jax.vmap(lambda u, i: reducer.prepare(u, i, jnp.array(True), table))(
            update, uploads
        )
        total = jax.tree.map(lambda x: x.sum(axis=0), terms)
        expectation += probability * np.asarray(
            aggregate(reducer, total, table)["params"]["a"]["w"], np.float64
        )
    whole = np.einsum("k,kij->ij", WEIGHT, np.asarray(update["params"]["a"]["w"])) / WEIGHT.sum()
    np.testing.assert_allclose(expectation, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("make", [masked_mean, cohort_mean, inverse_probability])
def test_short_floats_are_summed_in_float32(make, dtype):
    """A thousand clients alike have the mean of one; of 70,000 examples each, float16 has none."""
    reducer, one = make(), jnp.ones((), jnp.float32)
    table = layer_table({"params": {"a": jnp.zeros(2)}, "batch_stats": {"a": jnp.zeros(2)}})
    update = {k: {"a": jnp.asarray([0.5, -2.0], dtype)} for k in ("params", "batch_stats")}

    def term(weight):
        return reducer.prepare(
            update, UploadInfo(weight * one, one[None], one[None]), one > 0, table
        )

    def add(_, total):
        return jax.tree.map(jnp.add, total, term(7e4))

    total = jax.lax.fori_loop(0, 1000, add, term(0.0))
    for mean in jax.tree.leaves(aggregate(reducer, total, table)):
        np.testing.assert_allclose(mean, [0.5, -2.0], rtol=1e-5)
