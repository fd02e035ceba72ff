"""A plan changes what a round costs, never what it computes beyond the order of a sum.

On the reference CNN, with its batch normalisation, at every plan of 1, 2 and 4 devices and widths
1, 3 and the whole cohort. One ulp in the weights grows by about ten times a step in float32, so the
exact comparison is in float64, and that in float32 ends after five steps. (Smaller images would
leave batch normalisation a handful of elements, and rounding errors grow faster there.)
"""

import jax
import numpy as np
import optax
import pytest
from small import Steps, dataset, flat, in_float64

import fedlp_jax as fl

COHORT = 6
PLANS = [(d, w) for d in (1, 2, 4) for w in (1, 2, 3, COHORT) if (d, w) != (1, 1)]
RNG = np.random.default_rng(0)


def images(examples):
    labels = np.arange(examples) % 4
    noise = RNG.integers(0, 128, (examples, 16, 16, 3))
    return (noise + 32 * labels[:, None, None, None]).astype(np.uint8), labels


DATA = fl.from_arrays(*images(96), *images(10), num_classes=4)
# Uneven sizes: padded batches, a dynamic number of steps, and several rounds of idle slots.
CLIENTS = fl.partition.quantity(DATA.train.labels, clients=8, alpha=4.0, seed=1)
TASK = fl.classification(fl.models.FedLPCNN(num_classes=4))
HOMO = fl.fedlp_homo(TASK, keep=0.5, client_optimizer=optax.adam(1e-3), epochs=1, batch_size=8)


def run(algorithm, plan, variables, rounds, data=DATA, clients=CLIENTS):
    return fl.simulate(
        algorithm,
        data,
        clients,
        rounds=rounds,
        cohort=COHORT,
        seed=3,
        plan=fl.Plan(*plan),
        variables=variables,
    )


def apart(one, other):
    """The largest difference of two models, as a share of the largest entry of its tensor.

    A bias before a normalisation has no gradient, and holds nothing but rounding errors.
    """
    pairs = zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (one, other)), strict=True)
    return max(np.abs(x - y).max() / max(np.abs(x).max(), 1e-6) for x, y in pairs)


def initial():
    return fl.simulate(HOMO, DATA, CLIENTS, rounds=0, cohort=COHORT, seed=3).variables


@pytest.fixture(scope="module")
def reference():
    """Three rounds in float64, one client after the other on one device."""
    with jax.enable_x64(True):
        return run(HOMO, (1, 1), in_float64(initial()), 3)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "width"), PLANS)
def test_every_plan_gives_the_same_model(reference, devices, width):
    with jax.enable_x64(True):
        result = run(HOMO, (devices, width), in_float64(initial()), 3)
    assert result.plan.devices == devices
    assert result.plan.width == min(width, -(-COHORT // devices))
    assert flat(result.variables).dtype == np.float64
    assert apart(reference.variables, result.variables) < 1e-8
    assert np.array_equal(result.costs.senders, reference.costs.senders)  # masks to the bit
    assert np.array_equal(result.history["test_accuracy"], reference.history["test_accuracy"])


@pytest.mark.slow
def test_levels_share_their_devices_as_if_alone():
    data = dataset()
    clients = fl.partition.quantity(data.train.labels, clients=12, alpha=2.0, seed=1)
    algorithm = fl.fedlp_hetero(
        fl.classification(Steps()),
        depths="uniform",
        client_optimizer=optax.sgd(0.1),
        epochs=2,
        batch_size=4,
    )
    with jax.enable_x64(True):
        start = run(algorithm, (1, 1), None, 0, data, clients).variables
        one, *others = (
            run(algorithm, plan, in_float64(start), 3, data, clients).variables
            for plan in ((1, 1), (1, 6), (4, 1), (2, 2))
        )
    assert max(apart(one, other) for other in others) < 1e-8


@pytest.mark.slow
def test_in_float32_a_round_differs_by_less_than_a_hundredth_of_its_update():
    assert -(-CLIENTS.sizes.max() // 8) <= 5  # steps
    start = initial()
    one, other = (flat(run(HOMO, plan, start, 1).variables) for plan in ((1, 1), (2, 3)))
    update = np.linalg.norm(one - flat(start))
    assert 0 < np.linalg.norm(other - one) < 1e-2 * update


def sentences(count):
    """Windows of tokens that count up, padded at the end, and the tokens one later."""
    tokens = 1 + (RNG.integers(0, 6, (count, 1)) + np.arange(7)) % 6
    tokens[np.arange(7) > RNG.integers(4, 8, (count, 1))] = 0
    return tokens[:, :-1], tokens[:, 1:]


LANGUAGE = {
    "transformer": (fl.models.Transformer(7, width=8, depth=2, heads=2, length=6), fl.fedlp_hetero),
    "char_lstm": (fl.models.CharLSTM(7, embedding=3, hidden=4), fl.fedlp_homo),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LANGUAGE)
def test_every_plan_gives_the_same_language_model(name):
    """With uneven clients; the Transformer at two depths."""
    module, scheme = LANGUAGE[name]
    settings = {"depths": "uniform"} if scheme is fl.fedlp_hetero else {}
    algorithm = scheme(
        fl.next_token(module, padding=0),
        keep=0.5,
        client_optimizer=optax.adam(1e-2),
        epochs=1,
        batch_size=4,
        **settings,
    )
    data = fl.from_arrays(*sentences(60), *sentences(20), num_classes=7, targets="values")
    clients = fl.partition.quantity(data.train.labels, clients=8, alpha=4.0, seed=1)
    variables = run(algorithm, (1, 1), None, 0, data, clients).variables
    with jax.enable_x64(True):
        variables = in_float64(variables)
        one, other = (
            run(algorithm, plan, variables, 3, data, clients) for plan in [(1, 1), (2, 3)]
        )
    assert flat(one.variables).dtype == np.float64
    assert apart(one.variables, other.variables) < 1e-8
    assert apart(variables, one.variables) > 1e-3
    np.testing.assert_allclose(one.history["test_loss"], other.history["test_loss"], rtol=1e-8)
