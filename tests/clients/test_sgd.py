"""What a client optimizer must be where an algorithm is defined for SGD alone."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from small import Steps, dataset

import fedlp_jax as fl
from fedlp_jax.aggregation.divergence import largest
from fedlp_jax.clients.sgd import as_sgd

TASK = fl.classification(Steps(depth=1))


@pytest.mark.parametrize(
    ("optimizer", "rate", "momentum"),
    [
        (optax.sgd(0.1), 0.1, 0.0),
        (optax.sgd(0.5, momentum=0.9), 0.5, 0.9),
        (optax.chain(optax.scale(2.0), optax.sgd(0.1)), 0.2, 0.0),
        (optax.chain(optax.identity(), optax.sgd(1e-4, momentum=0.0)), 1e-4, 0.0),
        (optax.inject_hyperparams(optax.sgd)(learning_rate=1), 1.0, 0.0),
        (optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.5), 0.1, 0.5),
        (optax.apply_if_finite(optax.sgd(0.1), 3), 0.1, 0.0),
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
        optax.chain(optax.clip(30.0), optax.sgd(0.1)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        optax.chain(optax.clip_by_global_norm(50.0), optax.sgd(0.1)),
        optax.chain(optax.adaptive_grad_clip(0.5), optax.sgd(0.1)),
        optax.sgd(optax.piecewise_constant_schedule(0.1, {40: 0.1})),
        optax.sgd(optax.warmup_cosine_decay_schedule(0.1, 0.1, 30, 90)),
        optax.partition({"a": optax.sgd(0.1)}, {"fc1": "a"}),
        optax.partition(
            {"fc1": optax.sgd(0.1)},
            lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, tree),
        ),
        optax.sgd(0.0),
        None,
    ],
)
@pytest.mark.parametrize("make", [fl.scaffold, fl.fednova, partial(fl.fedcm, alpha=0.5)])
def test_others_are_refused(make, optimizer):
    with pytest.raises(fl.FedLPError, match="is defined for plain SGD.* such as fl.fedprox"):
        make(TASK, client_optimizer=optimizer)


def by_name(**optimizers):
    """Plain SGD, but for parameters with one of these names in their paths."""

    def label(path, _):
        return next((n for n in optimizers if n in jax.tree_util.keystr(path)), "rest")

    return optax.partition(
        {"rest": optax.sgd(0.1)} | optimizers,
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    )


def trained(one, rounds=1):
    data = dataset()
    clients = fl.partition.iid(data.train.labels, clients=6, seed=0)
    return fl.simulate(one, data, clients, rounds=rounds, cohort=3).variables["params"]


@pytest.mark.parametrize(
    "other",
    [
        optax.sgd(0.01),
        optax.chain(optax.clip(30.0), optax.sgd(0.1)),
        optax.sgd(optax.piecewise_constant_schedule(0.1, {40: 0.1})),
    ],
    ids=["rate", "clip", "schedule"],
)
@pytest.mark.parametrize("make", [fl.scaffold, fl.fednova, partial(fl.fedcm, alpha=0.5)])
def test_all_parameters_have_one_rate(make, other):
    with pytest.raises(fl.FedLPError, match="one rate for all parameters, 0.1 .*hidden1"):
        trained(make(TASK, client_optimizer=by_name(hidden1=other)))


def test_frozen_parameters_and_heads_of_ones_own_are_right_too():
    frozen = fl.scaffold(TASK, client_optimizer=by_name(hidden1=optax.set_to_zero()))
    start, end = trained(frozen, 0), trained(frozen)
    same = {name: np.array_equal(x["kernel"], end[name]["kernel"]) for name, x in start.items()}
    assert same == {"hidden1": True, "head1": False}
    faster = by_name(head1=optax.sgd(0.5))
    own = trained(fl.scaffold(TASK, personal="head1", client_optimizer=faster))
    assert set(own) == {"hidden1"}


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
        (lambda **s: fl.scaffold(TASK, aggregator="median", **s), "use aggregator='masked_mean'"),
        (lambda **s: fl.fednova(TASK, aggregator="krum", **s), "use aggregator='masked_mean'"),
        (lambda **s: fl.fedcm(TASK, alpha=0.5, aggregator="cohort_mean", **s), "that sent a"),
        (lambda **s: fl.feddyn(TASK, alpha=0.1, aggregator="cohort_mean", **s), "that sent a"),
        (lambda **s: fl.feddyn(TASK, alpha=0.1, clip=0.1, **s), "omit clip"),
        (lambda **s: fl.feddyn(TASK, alpha=0.1, upload=fl.top_k(0.1), **s), "error feedback"),
        (
            lambda **s: fl.feddyn(
                TASK, alpha=0.1, upload=[fl.top_k(0.1, True), fl.quantize(levels=1)], **s
            ),
            "fl.quantize and fl.cast have no error feedback",
        ),
        (
            lambda **s: fl.fedluar(TASK, recycled=1, upload=fl.top_k(0.1, True), **s),
            "use error_feedback=False",
        ),
        (lambda **s: fl.fedldf(TASK, senders=2, clip=0.1, **s), "but clip= changes before"),
        (lambda **s: fl.scaffold(TASK, aggregator=largest(2), **s), "but this algorithm changes"),
        (
            lambda **s: fl.fedavg(TASK, aggregator=largest(2), upload=fl.top_k(0.1, True), **s),
            "but error feedback changes",
        ),
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
