"""What a client optimizer must be where an algorithm is defined for SGD alone."""

from functools import partial

import optax
import pytest
from small import Steps

import fedlp_jax as fl
from fedlp_jax.clients.sgd import as_sgd

TASK = fl.classification(Steps(depth=1))


@pytest.mark.parametrize(
    ("optimizer", "rate", "momentum"),
    [
        (optax.sgd(0.1), 0.1, 0.0),
        (optax.sgd(0.5, momentum=0.9), 0.5, 0.9),
        (optax.chain(optax.scale(2.0), optax.sgd(0.1)), 0.2, 0.0),
        (optax.chain(optax.identity(), optax.sgd(1e-4, momentum=0.0)), 1e-4, 0.0),
    ],
)
def test_its_numbers_are_found(optimizer, rate, momentum):
    found = as_sgd(optimizer, "fednova", momentum=True)
    assert found == pytest.approx((rate, momentum), rel=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(1e-3),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
        optax.sgd(optax.linear_schedule(0.1, 0.0, 10)),
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)),
        optax.chain(optax.clip(1.0), optax.sgd(0.1)),
        optax.sgd(0.0),
    ],
    ids=["adam", "nesterov", "schedule", "decay", "clip", "rate 0"],
)
@pytest.mark.parametrize("make", [fl.scaffold, fl.fednova, partial(fl.fedcm, alpha=0.5)])
def test_others_are_refused(make, optimizer):
    with pytest.raises(fl.FedLPError, match="is defined for plain SGD.* such as fl.fedprox"):
        make(TASK, client_optimizer=optimizer)


def test_scaffold_refuses_momentum():
    with pytest.raises(fl.FedLPError, match=r"give optax.sgd\(rate\), without"):
        fl.scaffold(TASK, client_optimizer=optax.sgd(0.1, momentum=0.9))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda **s: fl.scaffold(TASK, weighting="examples", **s), "scaffold's weighting"),
        (lambda **s: fl.feddyn(TASK, alpha=0.1, weighting="examples", **s), "feddyn's weighting"),
        (lambda **s: fl.feddyn(TASK, alpha=-1, **s), "alpha=-1 must be a number of at least 0"),
        (lambda **s: fl.fedcm(TASK, alpha=0, **s), r"alpha=0 must be a number in \(0, 1\]"),
        (lambda **s: fl.fedexp(TASK, epsilon=0, **s), "epsilon=0 must be a number above 0"),
        (lambda **s: fl.fedprox(TASK, mu=-1, **s), "mu=-1 must be a number of at least 0"),
        (lambda **s: fl.fedadam(TASK, tau=0, **s), "tau=0 must be a number above 0"),
        (lambda **s: fl.fedavgm(TASK, beta=1, **s), r"beta=1 must be a number in \[0, 1\)"),
        (
            lambda **s: fl.scaffold(
                TASK, privacy=fl.Privacy(1.0, 1.0), aggregator="cohort_mean", **s
            ),
            "privacy covers the update alone",
        ),
    ],
)
def test_refuses_other_settings_in_a_sentence(call, words):
    with pytest.raises(fl.FedLPError, match=words):
        call(client_optimizer=optax.sgd(0.1))
