"""Next token, regression and several labels: numbers, refusals, and that they learn."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedlp_jax as fl
from fedlp_jax.data.dataset import IDENTITY
from fedlp_jax.types import Batch

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
TOKENS = 5


class Bigram(nn.Module):
    """The logits of the next token are a row of a table."""

    @nn.compact
    def __call__(self, x):
        table = self.param("table", nn.initializers.normal(1), (TOKENS, TOKENS), jnp.float32)
        return jax.nn.one_hot(x, TOKENS) @ table


class Linear(nn.Module):
    outputs: int
    squeeze: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.outputs)(x)
        return x[:, 0] if self.squeeze else x


def measured(task, inputs, labels, valid=None):
    """Outputs, and means of `loss` and `evaluate`, which agree; also the scalar that is trained."""
    batch = Batch(jnp.asarray(inputs), jnp.asarray(labels), valid, IDENTITY)

    @jax.jit
    def run(key):
        variables = task.init(key, batch)
        scalar, aux = task.loss(variables, batch, key)
        return scalar, aux.metrics, task.evaluate(variables, batch), task.outputs(variables, batch)

    scalar, trained, tested, outputs = run(KEY)
    assert set(trained) == set(tested) == set(task.metrics)
    means = {name: float(total / weight) for name, (total, weight) in tested.items()}
    for name, (total, weight) in trained.items():
        np.testing.assert_allclose(total / weight, means[name], rtol=1e-6)
    np.testing.assert_allclose(scalar, means["loss"], rtol=1e-6)
    return means, np.asarray(outputs, np.float64), {n: float(m.weight) for n, m in tested.items()}


@pytest.mark.parametrize("padding", [None, 0, -100])
def test_next_token_is_the_mean_over_tokens_that_count(padding):
    inputs = RNG.integers(0, TOKENS, (4, 6)).astype(np.int32)
    labels = RNG.integers(0, TOKENS, (4, 6)).astype(np.int32)
    labels[1, 4:] = -100 if padding == -100 else 0
    valid = np.array([True, True, True, False])
    means, logits, weights = measured(
        fl.next_token(Bigram(), padding=padding), inputs, labels, jnp.asarray(valid)
    )
    counts = (labels != padding) & valid[:, None]
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(means["loss"], -chosen[counts].mean(), rtol=1e-5)
    hits = (logits.argmax(-1) == labels)[counts]
    np.testing.assert_allclose(means["accuracy"], hits.mean(), rtol=1e-6)
    assert weights == {"loss": counts.sum(), "accuracy": counts.sum()}


def test_a_batch_of_padding_alone_moves_nothing():
    task = fl.next_token(Bigram(), padding=0)
    batch = Batch(jnp.ones((2, 3), jnp.int32), jnp.zeros((2, 3), jnp.int32), None, IDENTITY)
    variables = task.init(KEY, batch)
    loss, gradient = jax.value_and_grad(lambda v: task.loss(v, batch, KEY)[0])(variables)
    assert loss == 0
    assert not gradient["params"]["table"].any()


@pytest.mark.parametrize(
    ("module", "shape"), [(Linear(1), ()), (Linear(1, squeeze=True), ()), (Linear(3), (3,))]
)
def test_regression_is_the_mean_of_squares(module, shape):
    inputs = RNG.normal(size=(5, 2)).astype(np.float32)
    labels = RNG.normal(size=(5, *shape)).astype(np.float32)
    valid = np.array([True, False, True, True, True])
    means, outputs, weights = measured(fl.regression(module), inputs, labels, jnp.asarray(valid))
    error = (outputs.reshape(labels.shape) - labels)[valid]
    np.testing.assert_allclose(means["loss"], np.square(error).mean(), rtol=1e-5)
    np.testing.assert_allclose(means["absolute_error"], np.abs(error).mean(), rtol=1e-5)
    assert weights["loss"] == error.size


def test_several_labels_are_binary_decisions():
    inputs = RNG.normal(size=(6, 2)).astype(np.float32)
    labels = RNG.integers(0, 2, (6, 3)).astype(np.int32)
    means, logits, weights = measured(fl.multi_label(Linear(3)), inputs, labels)
    positive = 1 / (1 + np.exp(-logits))
    loss = -np.log(np.where(labels == 1, positive, 1 - positive))
    np.testing.assert_allclose(means["loss"], loss.mean(), rtol=1e-5)
    np.testing.assert_allclose(means["accuracy"], ((logits > 0) == labels).mean(), rtol=1e-6)
    assert weights == {"loss": 18, "accuracy": 18}


def batch_of(inputs, labels):
    """One zero row of these shapes, `(shape, dtype)` each."""
    arrays = (jnp.zeros((1, *shape), dtype) for shape, dtype in (inputs, labels))
    return Batch(*arrays, None, IDENTITY)


I32, F32 = jnp.int32, jnp.float32
WINDOW = ((6,), I32)


@pytest.mark.parametrize(
    ("task", "outputs", "inputs", "labels", "classes", "message"),
    [
        ("next_token", (1, 6, 9), ((6,), F32), WINDOW, 9, r"inputs are float32\['N', 6\]"),
        ("next_token", (1, 6, 9), WINDOW, ((), I32), 9, r"the targets int32\['N'\]; make the"),
        ("next_token", (1, 6, 9), WINDOW, ((5,), I32), 9, r"targets int32\['N', 5\]"),
        ("next_token", (1, 9), WINDOW, WINDOW, 9, r"\[1, 9\] .* must be \[batch, 6, classes\]"),
        ("next_token", (1, 6, 8), WINDOW, WINDOW, 9, "8 outputs but the data set has 9 tokens"),
        ("regression", (1, 2), ((4,), F32), ((), F32), 0, r"\[1, 2\] for a batch of one, but the"),
        ("regression", (1,), ((4,), F32), ((1,), F32), 0, r"targets are float32\['N', 1\]; give"),
        ("multi_label", (1, 3), ((4,), F32), ((), I32), 2, r"they are int32\['N'\]; make"),
        ("multi_label", (1, 3), ((4,), F32), ((3,), I32), 4, "that go up to 3; make the data"),
        ("multi_label", (1, 2), ((4,), F32), ((3,), I32), 2, "3 labels; give the model"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(task, outputs, inputs, labels, classes, message):
    check = getattr(fl, task)(Bigram()).check
    with pytest.raises(fl.FedLPError, match=message):
        check(outputs, batch_of(inputs, labels), classes)


def test_padding_is_one_token():
    with pytest.raises(fl.FedLPError, match="padding=0.5 must be a whole number"):
        fl.next_token(Bigram(), padding=0.5)


def examples(kind, count):
    """Examples that a linear model, or a table of the next token, fits."""
    rng = np.random.default_rng(count)
    if kind == "next_token":
        tokens = (rng.integers(0, TOKENS, (count, 1)) + np.arange(7)) % TOKENS
        return tokens[:, :-1], tokens[:, 1:]
    inputs = rng.normal(size=(count, 3)).astype(np.float32)
    scores = inputs @ np.array([[1.0, -2], [0.5, 1], [-1, 0]], np.float32)
    return inputs, scores if kind == "regression" else (scores > 0).astype(int)


@pytest.mark.parametrize("kind", ["next_token", "regression", "multi_label"])
def test_each_task_learns_from_several_clients(kind):
    data = fl.from_arrays(*examples(kind, 50), *examples(kind, 30), targets="values")
    clients = fl.partition.quantity(data.train.labels, clients=6, alpha=1.0, seed=0, min_size=2)
    module = Bigram() if kind == "next_token" else Linear(2)
    algorithm = fl.fedlp_homo(
        getattr(fl, kind)(module), keep=0.9, client_optimizer=optax.sgd(0.5), epochs=2, batch_size=4
    )
    run = functools.partial(fl.simulate, algorithm, data, clients, rounds=8, cohort=3, seed=0)
    result = run(eval_every=1, plan=fl.Plan(devices=1, width=1))
    loss = result.history["test_loss"]
    assert loss[-1] < 0.6 * loss[0]
    assert set(result.history.rows[-1]) >= {f"test_{name}" for name in algorithm.task.metrics}
