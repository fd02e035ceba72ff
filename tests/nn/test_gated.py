"""Gradients of some of the parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from small import Steps, flat

import fedlp_jax as fl
from fedlp_jax.nn import gated
from fedlp_jax.types import Batch, Normalize

TASK = fl.classification(Steps(norm=True))
BATCH = Batch(
    jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32),
    jnp.arange(6, dtype=jnp.int32) % 3,
    None,
    Normalize(np.ones((), np.float32), np.zeros((), np.float32)),
)
KEY = jax.random.key(0)
VARIABLES = TASK.init(KEY, BATCH)
LAYERS = sorted(VARIABLES["params"])


def loss(params):
    return TASK.loss({**VARIABLES, "params": params}, BATCH, KEY)


def gates_of(open_layers):
    return {
        name: jax.tree.map(lambda _, gate=gate: gate, VARIABLES["params"][name])
        for name, gate in zip(LAYERS, open_layers, strict=True)
    }


@jax.jit
def some(trained):
    return gated.value_and_grad(
        loss, VARIABLES["params"], gates_of([trained[i] for i in range(len(LAYERS))])
    )


@jax.jit
def everything():
    return jax.value_and_grad(loss, has_aux=True)(VARIABLES["params"])


@pytest.mark.parametrize("seed", range(8))
def test_what_is_trained_has_its_gradient(seed):
    trained = np.random.default_rng(seed).random(len(LAYERS)) < 0.1 + 0.1 * seed
    value, gradient = some(jnp.asarray(trained))
    expected, whole = everything()
    np.testing.assert_allclose(flat(value), flat(expected), rtol=1e-6)
    for name, gate in zip(LAYERS, trained, strict=True):
        if gate:
            np.testing.assert_allclose(
                flat(gradient[name]), flat(whole[name]), rtol=1e-5, atol=1e-7
            )


def products(jaxpr):
    """Matrix products outside conditionals and in each of them, nested calls included."""
    outside, inside = 0, []
    for equation in jaxpr.eqns:
        outside += equation.primitive.name == "dot_general"
        for body in jaxprs_in_params(equation.params):
            count, more = products(body)
            if equation.primitive.name == "cond":
                inside.append(count)
            else:
                outside, inside = outside + count, inside + more
    return outside, [count for count in inside if count]


def test_the_backward_pass_lies_in_conditionals():
    jaxpr = jax.make_jaxpr(lambda t: some.__wrapped__(t))(jnp.ones(len(LAYERS), bool)).jaxpr
    whole, _ = products(jax.make_jaxpr(lambda: everything.__wrapped__())().jaxpr)
    forward, _ = products(jax.make_jaxpr(lambda: loss(VARIABLES["params"]))().jaxpr)
    outside, inside = products(jaxpr)
    assert outside == forward
    assert sum(inside) == whole - forward >= 3


def test_what_is_known_to_be_frozen_is_not_in_the_program():
    gates = gates_of([name == "head3" for name in LAYERS])
    last = jax.jit(lambda params: gated.value_and_grad(loss, params, gates))
    jaxpr = jax.make_jaxpr(last)(VARIABLES["params"]).jaxpr
    whole, _ = products(jax.make_jaxpr(lambda: everything.__wrapped__())().jaxpr)
    outside, inside = products(jaxpr)
    assert outside < whole
    assert not inside
    (_, gradient), (_, expected) = last(VARIABLES["params"]), everything()
    np.testing.assert_allclose(flat(gradient["head3"]), flat(expected["head3"]), rtol=1e-5)
    assert not flat(gradient["hidden1"]).any()


def test_choosing():
    new, old = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}, jnp.zeros(2)
    gates = {"a": True, "b": False, "c": jnp.asarray(False)}
    got = gated.chosen(gates, new, dict.fromkeys("abc", old))
    np.testing.assert_array_equal(flat(got), [1, 1, 0, 0, 0, 0])


def test_the_program_is_the_same_whatever_the_addresses_of_its_gates():
    params = {f"layer{i}": jnp.ones((2, 2)) for i in range(8)}

    def chain(params):
        x = jnp.ones((3, 2))
        for kernel in params.values():
            x = jnp.tanh(x @ kernel)
        return x.sum(), ()

    def text(_):
        def some(params, mask):
            gates = [mask[i] for i in range(8)]
            return gated.value_and_grad(chain, params, dict(zip(params, gates, strict=True)))

        return jax.jit(some).lower(params, jnp.ones(8, bool)).as_text()

    assert len(set(map(text, range(4)))) == 1
