"""What XLA's CPU backend keeps in memory, and the order it keeps."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlp_jax.nn.xla import materialize, order_after

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(8, 64)), jnp.float32)
DY = jnp.asarray(RNG.normal(size=(8, 32)), jnp.float32)
KERNEL = jnp.zeros((64, 32))


def step(order):
    """Of a kernel, by outer products of the rows of something cheap."""

    def f(x, dy, kernel):
        y = x * 2 + 1
        y = y if order is None else materialize(y, order)
        return kernel - sum(a[:, None] * b[None, :] for a, b in zip(y, dy, strict=True))

    return f


def readers_of_x(order):
    """The fusions of the compiled step that read x itself."""
    text = jax.jit(step(order)).lower(X, DY, KERNEL).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    (x,) = re.findall(r"%([\w.-]+) = f32\[8,64\]\S* parameter\(0\)", entry)
    return re.findall(rf"= (f32\[[\d,]*\])\S* \w+\([^)]*%{re.escape(x)}[,)]", entry)


def test_what_is_materialized_in_another_order_is_computed_once():
    assert readers_of_x(None) == ["f32[64,32]"]  # within the step, for each of its 64 x 32 numbers
    assert readers_of_x((1, 0)) == ["f32[8,64]"]


@pytest.mark.parametrize("order", [None, (0, 2, 1), (2, 0, 1)])
def test_materialize_changes_no_number_and_no_gradient(order):
    x = jnp.asarray(RNG.normal(size=(3, 4, 5)), jnp.float32)
    np.testing.assert_array_equal(np.asarray(jax.jit(lambda x: materialize(x, order))(x)), x)
    gradient = jax.jit(jax.grad(lambda x: jnp.sin(materialize(x, order)).sum()))(x)
    np.testing.assert_allclose(np.asarray(gradient), np.cos(x), rtol=1e-6)
    many = jax.jit(jax.vmap(lambda x: materialize(x, order)))(jnp.stack([x, -x]))
    np.testing.assert_array_equal(np.asarray(many), np.stack([x, -x]))


@pytest.mark.parametrize("first", [1.0, -np.inf, np.inf, np.nan])
def test_order_after_changes_no_number(first):
    found = jax.jit(order_after)(jnp.full((2, 2), first, jnp.float32), X)
    np.testing.assert_array_equal(np.asarray(found), X)


def test_order_after_is_an_order_that_xla_keeps():
    """Were the condition folded, the second result would not depend on the first argument."""
    text = jax.jit(order_after).lower(X, DY).compile().as_text()
    assert re.search(r"compare\([^)]*\), direction=LT", text)
