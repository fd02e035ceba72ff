"""A plan changes what a round costs, never what it computes beyond the order of a sum.

On the reference CNN, with its batch normalisation, at every plan of 1, 2 and 4 devices and widths
1, 3 and the whole cohort. One ulp in the weights grows by about ten times a step in float32, so the
exact comparison is in float64, and that in float32 ends after five steps.
"""

import jax
import numpy as np
import optax
import pytest
from small import flat, in_float64

import fedlp_jax as fl

COHORT = 6
PLANS = [(devices, width) for devices in (1, 2, 4) for width in (1, 3, COHORT)]
RNG = np.random.default_rng(0)


def images(examples):
    labels = np.arange(examples) % 4
    noise = RNG.integers(0, 128, (examples, 8, 8, 3))
    return (noise + 32 * labels[:, None, None, None]).astype(np.uint8), labels


DATA = fl.from_arrays(*images(48), *images(10), num_classes=4)
# Uneven sizes: padded batches, a dynamic number of steps, and several rounds of idle slots.
CLIENTS = fl.partition.quantity(DATA.train.labels, clients=8, alpha=2.0, seed=1)
TASK = fl.classification(fl.models.FedLPCNN(num_classes=4))
HOMO = fl.fedlp_homo(TASK, keep=0.5, client_optimizer=optax.adam(1e-3), epochs=1, batch_size=4)
HETERO = fl.fedlp_hetero(
    TASK, depths=[1, 5, 1, 1, 5, 5, 1, 5], client_optimizer=optax.adam(1e-3), batch_size=4
)


def run(algorithm, devices, width, variables, rounds):
    return fl.simulate(
        algorithm,
        DATA,
        CLIENTS,
        rounds=rounds,
        cohort=COHORT,
        seed=3,
        plan=fl.Plan(devices, width),
        variables=variables,
    )


def initial():
    return fl.simulate(HOMO, DATA, CLIENTS, rounds=0, cohort=COHORT, seed=3).variables


@pytest.fixture(scope="module")
def reference():
    """Three rounds in float64, one client after the other on one device."""
    with jax.enable_x64(True):
        return run(HOMO, 1, 1, in_float64(initial()), 3)


@pytest.mark.parametrize(("devices", "width"), PLANS[1:])
def test_every_plan_gives_the_same_model(reference, devices, width):
    with jax.enable_x64(True):
        result = run(HOMO, devices, width, in_float64(initial()), 3)
    assert result.plan == fl.Plan(devices, min(width, -(-COHORT // devices)))
    assert flat(result.variables).dtype == np.float64
    np.testing.assert_allclose(
        flat(result.variables), flat(reference.variables), rtol=1e-8, atol=1e-12
    )
    assert np.array_equal(result.costs.senders, reference.costs.senders)  # masks to the bit
    assert np.array_equal(result.history["test_accuracy"], reference.history["test_accuracy"])


def test_levels_share_their_devices_as_if_alone():
    with jax.enable_x64(True):
        start = in_float64(initial())
        one, other = (run(HETERO, *plan, start, 2) for plan in ((1, 1), (4, 3)))
    np.testing.assert_allclose(flat(one.variables), flat(other.variables), rtol=1e-8, atol=1e-12)


def test_in_float32_a_round_differs_by_less_than_a_hundredth_of_its_update():
    start = initial()
    results = [run(HOMO, *plan, start, 1) for plan in ((1, 1), (1, 3), (2, 1), (4, 2))]
    assert -(-CLIENTS.sizes.max() // 4) <= 5  # steps
    first = flat(results[0].variables)
    update = np.linalg.norm(first - flat(start))
    assert update > 0
    for other in results[1:]:
        assert np.linalg.norm(flat(other.variables) - first) < 1e-2 * update
