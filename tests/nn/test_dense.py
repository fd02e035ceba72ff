"""Dense layers: outer products give the right gradient, in any flax module."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import fedlp_jax as fl
from fedlp_jax.nn import dense

NUMBERS = (((1,), (0,)), ((), ()))


def arrays(rows, dtype=jnp.float64):
    rng = np.random.default_rng(0)
    shapes = ((rows, 7), (7, 5), (rows, 5))
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def gradients(product, x, kernel, dy):
    y, back = jax.vjp(lambda x, k: product(x, k, NUMBERS), x, kernel)
    return y, *back(dy)


@pytest.mark.parametrize("rows", [1, 10, 16])
def test_value_and_gradients_are_those_of_lax(rows):
    with jax.enable_x64(True):
        x, kernel, dy = arrays(rows)
        ours = gradients(dense.dot_general, x, kernel, dy)
        theirs = gradients(lax.dot_general, x, kernel, dy)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


def products(rows):
    """dot_generals of a forward and a backward pass."""
    x, kernel, dy = arrays(rows, jnp.float32)
    traced = jax.make_jaxpr(lambda *a: gradients(dense.dot_general, *a))(x, kernel, dy)
    return str(traced).count("dot_general[")


def test_only_few_rows_have_outer_products(monkeypatch):
    assert products(16) == 2  # forward, and the gradient of x
    assert products(17) == 3
    monkeypatch.setattr(dense, "_ROWS", {})  # as on an accelerator
    assert products(10) == 3


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_short_floats_and_batches_of_nothing_are_laxs(rows, dtype):
    ours = gradients(dense.dot_general, *arrays(rows, dtype))
    theirs = gradients(lax.dot_general, *arrays(rows, dtype))
    tolerance = 1e-6 if dtype == jnp.float32 else 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), rtol=tolerance, atol=tolerance
        )


def test_what_is_no_plain_layer_is_laxs():
    x = jnp.ones((2, 3, 4), jnp.float32)
    kernel = jnp.ones((2, 4, 5), jnp.float32)
    batched = (((2,), (1,)), ((0,), (0,)))
    assert dense.dot_general(x, kernel, batched).shape == (2, 3, 5)
    short = dense.dot_general(
        x[0], kernel[0], NUMBERS, preferred_element_type=jnp.dtype(jnp.bfloat16)
    )
    assert short.dtype == jnp.bfloat16


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(9)(x.reshape(x.shape[0], -1))))


class Nnx(nnx.Module):
    def __init__(self, *, rngs):
        self.one, self.two = nnx.Linear(64, 9, rngs=rngs), nnx.Linear(9, 10, rngs=rngs)

    def __call__(self, x):
        return self.two(nnx.relu(self.one(x.reshape(x.shape[0], -1))))


@pytest.mark.parametrize("module", [Linen(), Nnx], ids=["linen", "nnx"])
@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_users_module_takes_it_and_learns_the_same(module, side_by_side, monkeypatch):
    task = fl.classification(module)
    rng = np.random.default_rng(0)
    identity = fl.types.Normalize(np.float32(1), np.float32(0))

    def gradient():
        def loss(params):
            return task.loss({"params": params}, batch, jax.random.key(0))[0]

        step = jax.grad(loss)
        return jax.jit(jax.vmap(step) if side_by_side else step)(params)

    with jax.enable_x64(True):
        labels = jnp.arange(10, dtype=jnp.int32)
        inputs = jnp.asarray(rng.normal(size=(10, 8, 8, 1)))
        batch = fl.types.Batch(inputs, labels, None, identity)
        shapes = jax.eval_shape(task.init, jax.random.key(0), batch)["params"]
        lead = (3,) if side_by_side else ()
        params = jax.tree.map(lambda t: jnp.asarray(rng.normal(size=(*lead, *t.shape))), shapes)
        calls = []
        plain = dense.outer
        monkeypatch.setattr(dense, "outer", lambda *a: calls.append(1) or plain(*a))
        ours = gradient()
        assert len(calls) == 2
        monkeypatch.setattr(dense, "_ROWS", {})
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(gradient()), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_the_input_of_a_first_layer_gets_no_gradient():
    x, kernel = jnp.ones((2, 3)), jnp.ones((3, 4))
    first = jax.make_jaxpr(jax.grad(lambda k: dense.outer(x, k).sum()))(kernel)
    later = jax.make_jaxpr(jax.grad(lambda k: dense.outer(x * k[0, 0], k).sum()))(kernel)
    assert [str(jaxpr).count("dot_general") for jaxpr in (first, later)] == [1, 2]


def test_a_kernel_is_stepped_in_place():
    """It was copied in each step, as nothing said that its step comes after its last use."""
    rng = np.random.default_rng(0)
    kernels = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((64, 96), (96, 32), (32, 8))]
    x = jnp.asarray(rng.normal(size=(4, 64)), jnp.float32)

    def loss(kernels):
        y = x
        for kernel in kernels:
            y = jax.nn.relu(dense.outer(y, kernel))
        return jnp.square(y).sum()

    def train(kernels):
        def step(_, kernels):
            gradients = jax.grad(loss)(kernels)
            return [k - 1e-3 * g for k, g in zip(kernels, gradients, strict=True)]

        return jax.lax.fori_loop(0, 10, step, kernels)

    text = jax.jit(train, donate_argnums=0).lower(kernels).compile().as_text()
    assert not re.findall(r"= f32\[(?:64,96|96,32|32,8)\]\S* copy\(", text)


def test_an_input_that_is_not_finite_changes_no_gradient_but_its_own():
    x = jnp.asarray([[jnp.inf, 1.0], [1.0, 1.0]])
    kernel, dy = -jnp.ones((2, 3)), jnp.ones((2, 3))
    _, transpose = jax.vjp(dense.outer, x, kernel)
    dx, d_kernel = transpose(dy.at[0].set(jnp.inf))
    assert np.isneginf(dx[0]).all() and np.isfinite(dx[1]).all()
    np.testing.assert_array_equal(d_kernel, np.full((2, 3), np.inf))
