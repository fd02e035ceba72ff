"""One client's training against a plain loop of optax steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Steps, dataset, flat, in_float64

import fedlp_jax as fl
from fedlp_jax.clients.local_training import (
    Client,
    LocalWork,
    check_work,
    local_steps,
    local_update,
    loop_bounds,
)
from fedlp_jax.data.batching import shuffled_rows
from fedlp_jax.prng import Purpose, client_key
from fedlp_jax.types import Batch, Examples, Normalize

DATA = dataset()
EXAMPLES = Examples(
    jnp.asarray(DATA.train.inputs),
    jnp.asarray(DATA.train.labels, jnp.int32),
    Normalize(np.float32(1), np.float32(0)),
)
TASK = fl.classification(Steps(depth=1, norm=True))
ROOT, ROUND = jax.random.key(1), jnp.int32(3)
M = 12


def one(size, client=5):
    rows = np.zeros(M, np.int32)
    rows[:size] = np.arange(30, 30 + size)
    return Client(jnp.int32(client), jnp.int32(size), jnp.asarray(rows))


def train(size, work, optimizer, alone=True, even_size=None, scale=None):
    example = Batch(EXAMPLES.inputs[:1], EXAMPLES.labels[:1], None, EXAMPLES.normalize)
    variables = TASK.init(ROOT, example)
    if jax.config.jax_enable_x64:
        variables = in_float64(variables)
    update = local_update(TASK, optimizer, work, even_size, alone, all_train=True)
    client = one(size)
    bounds = loop_bounds(client.size, work)
    run = jax.jit(lambda v: update(v, EXAMPLES, client, bounds, ROOT, ROUND, scale))
    return variables, *run(variables)


def plain_loop(variables, size, work, optimizer):
    """The same, step by step from Python, with short batches in place of padded ones."""
    params, stats = variables["params"], variables["batch_stats"]
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
    shuffle = client_key(ROOT, ROUND, 5, Purpose.SHUFFLE)
    train_key = client_key(ROOT, ROUND, 5, Purpose.TRAIN)
    steps, epoch, number = work.steps or 10**9, 0, 0

    @jax.jit
    def step(params, stats, state, batch, key):
        gradient, aux = jax.grad(
            lambda p: TASK.loss({"params": p, "batch_stats": stats}, batch, key), has_aux=True
        )(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params, aux.statistics["batch_stats"], state

    while epoch < (work.epochs or 10**9) and number < steps:
        client = one(size)
        order = shuffled_rows(
            jax.random.fold_in(shuffle, epoch), client.rows, client.size, work.batch_size
        )
        for first in range(0, size, work.batch_size):
            if number == steps:
                break
            rows = order[first : min(first + work.batch_size, size)]
            batch = Batch(EXAMPLES.inputs[rows], EXAMPLES.labels[rows], None, EXAMPLES.normalize)
            key = jax.random.fold_in(train_key, number)
            params, stats, state = step(params, stats, state, batch, key)
            number += 1
        epoch += 1
    return {"params": params, "batch_stats": stats}, number


@pytest.mark.parametrize(
    "work",
    [LocalWork(4, epochs=2), LocalWork(4, None, steps=7), LocalWork(4, None, steps=2)],
)
# With the usual eps of 1e-8 Adam would make whole steps of rounding errors, since a bias before a
# normalisation has no gradient but those.
@pytest.mark.parametrize(
    "make", [lambda: optax.sgd(0.1, momentum=0.9), lambda: optax.adam(0.01, eps=1e-4)]
)
@pytest.mark.parametrize("size", [12, 10])
def test_training_equals_a_loop_of_optax_steps(work, make, size):
    with jax.enable_x64(True):  # in float32 Adam turns rounding errors into steps
        variables, new, metrics = train(size, work, make())
        expected, steps = plain_loop(variables, size, work, make())
        error = np.linalg.norm(flat(new) - flat(expected))
        assert error < 1e-9 * np.linalg.norm(flat(new) - flat(variables))
        assert flat(new).dtype == np.float64
    assert int(metrics.steps) == steps == int(local_steps(np.int64(size), work))


def test_masks_that_even_clients_do_not_need_change_nothing():
    work = LocalWork(4, epochs=2)
    _, plain, _ = train(12, work, optax.sgd(0.1))
    _, even, _ = train(12, work, optax.sgd(0.1), even_size=12)
    _, chosen, _ = train(12, work, optax.sgd(0.1), alone=False)
    np.testing.assert_allclose(flat(plain), flat(even), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(flat(plain), flat(chosen), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("work", [LocalWork(4, epochs=2), LocalWork(4, steps=5)])
def test_trip_counts_are_constants_for_clients_of_one_size(work):
    """An accelerator then runs the loop without asking the host after each step."""

    def trips(even_size, all_train=True):
        update = local_update(
            TASK, optax.sgd(0.1), work, even_size, alone=False, all_train=all_train
        )
        variables = TASK.init(ROOT, example)
        bounds = loop_bounds(jnp.int32(8), work)
        run = jax.jit(lambda v, client, b: update(v, EXAMPLES, client, b, ROOT, ROUND, None))
        text = run.lower(variables, one(8), bounds).compile().as_text()
        loops = [line for line in text.splitlines() if "= (" in line and " while(" in line]
        return len(loops), sum("known_trip_count" in line for line in loops)

    example = Batch(EXAMPLES.inputs[:1], EXAMPLES.labels[:1], None, EXAMPLES.normalize)
    loops, known = trips(even_size=8)
    unknown = loops - known
    assert unknown == (0 if work.steps is None else 1)  # 5 steps are 2, 2 and 1 in an epoch
    loops, known = trips(even_size=8, all_train=False)
    assert loops - known == unknown + (2 if work.steps is None else 1)


def test_a_scale_of_a_unit_rate_is_the_rate():
    work = LocalWork(4, epochs=1)
    _, scaled, _ = train(12, work, optax.adam(1.0), scale=jnp.float32(0.01))
    _, direct, _ = train(12, work, optax.adam(0.01))
    assert np.array_equal(flat(scaled), flat(direct))


def test_metrics_count_every_example_once_an_epoch():
    _, _, metrics = train(10, LocalWork(4, epochs=3), optax.sgd(0.0))
    assert {name: float(mean.weight) for name, mean in metrics.means.items()} == {
        "loss": 30,
        "accuracy": 30,
    }
    assert int(metrics.steps) == 9
    assert float(metrics.means["loss"].total) > 0


def test_shuffles_are_permutations_that_do_not_depend_on_padding():
    key = jax.random.key(0)
    short = np.asarray(shuffled_rows(key, jnp.arange(7, dtype=jnp.int32), jnp.int32(7), 4))
    padded = np.concatenate([np.arange(7), np.zeros(5)]).astype(np.int32)
    long = np.asarray(shuffled_rows(key, jnp.asarray(padded), jnp.int32(7), 4))
    assert short.shape == (8,)
    assert sorted(short[:7]) == list(range(7))
    assert np.array_equal(short[:7], long[:7])


def test_bounds_cover_every_client_and_are_exact_for_one():
    work = LocalWork(4, None, steps=7)
    one_client = loop_bounds(jnp.int32(10), work)
    assert [int(x) for x in one_client] == [3, 7, 3, 3]
    many = loop_bounds(jnp.asarray([10, 4, 1], jnp.int32), work)
    assert [int(x) for x in many] == [7, 7, 3, 1]


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (LocalWork(4, None, None), "give either epochs or steps"),
        (LocalWork(4, 1, 1), "give either epochs or steps"),
        (LocalWork(0, 1), "batch_size=0"),
        (LocalWork(4, 1.5), "epochs=1.5"),
        (LocalWork(4, None, True), "steps=True"),
    ],
)
def test_impossible_work_is_refused(work, message):
    with pytest.raises(fl.FedLPError, match=message):
        check_work(work)


def test_an_optimizer_may_ask_for_the_loss():
    _, new, _ = train(12, LocalWork(4, epochs=1), optax.polyak_sgd(max_learning_rate=0.1))
    _, plain, _ = train(12, LocalWork(4, epochs=1), optax.sgd(0.1))
    np.testing.assert_allclose(flat(new), flat(plain), rtol=1e-5)  # the loss allows longer steps
    with pytest.raises(fl.FedLPError, match=r"client's optimizer needs .*value, grad\).*value_fn"):
        train(12, LocalWork(4, epochs=1), optax.lbfgs())
