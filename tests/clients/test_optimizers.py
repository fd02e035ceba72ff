"""Optimizers that cannot train here: refused in a sentence, or warned of."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fedlp_jax.clients.optimizers import check_optimizer, warn_of_restarts
from fedlp_jax.errors import FedLPError

PARAMS = {
    "dense": {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.float32)},
    "bias": jax.ShapeDtypeStruct((2,), jnp.float32),
}


def transform(update, state=lambda params: ()):
    return optax.GradientTransformation(state, update)


def test_most_of_optax_is_accepted_without_a_word():
    for optimizer in (
        optax.sgd(0.1, momentum=0.9),
        optax.adamw(0.1),
        optax.chain(optax.clip_by_global_norm(1.0), optax.lamb(0.1)),
        optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
        optax.apply_if_finite(optax.sgd(0.1), 3),
        optax.partition(
            {"a": optax.sgd(0.1), "b": optax.set_to_zero()}, {"dense": "a", "bias": "b"}
        ),
        optax.contrib.schedule_free_sgd(0.1),
        optax.contrib.muon(0.1),
    ):
        for role in ("client", "server"):
            check_optimizer(role, optimizer, PARAMS)
        warn_of_restarts(optimizer, PARAMS, np.array([1, 1]))
    check_optimizer("client", optax.polyak_sgd(), PARAMS)  # takes the loss, which clients have


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            optax.chain(optax.clip(1.0), optax.lookahead(optax.sgd(0.1), 5, 0.5)),
            "lookahead needs parameters of its own kind, optax.LookaheadParams, but gets the tree",
        ),
        (
            optax.masked(optax.sgd(0.1), {"other": True}),
            "masked cannot take the tree of this model",
        ),
        (
            optax.contrib.differentially_private_aggregate(1.0, 1.0, 0),
            "needs the gradient of every single example .*fl.Privacy",
        ),
        (
            transform(lambda grads, state, params: ({"all": grads}, state)),
            r"updates of another structure.*\['all'\]\['bias'\] is nothing and becomes \[2\]",
        ),
        (
            transform(lambda g, s, p: (g, s + 1.0), lambda params: jnp.zeros((), jnp.int32)),
            r"returns a state of another structure.* is int32\[\] and becomes float32\[\]",
        ),
        (optax.lbfgs(), "optimizer needs more than it is given .*value_fn"),
    ],
)
def test_another_structure_is_refused_in_a_sentence(role, optimizer, message):
    with pytest.raises(FedLPError, match=f"(?s){role}.*{message}"):
        check_optimizer(role, optimizer, PARAMS)


NEVER = r"in the {} local steps of a round it moves no parameter, so nothing is ever learnt"


@pytest.mark.parametrize(
    ("optimizer", "steps", "message"),
    [
        (optax.MultiSteps(optax.sgd(0.1), 4), [1, 3], NEVER.format(3)),
        (optax.MultiSteps(optax.sgd(0.1), 4), [0, 3, 4], "few examples take only 3 steps"),
        (optax.chain(optax.sgd(0.1), optax.apply_every(2)), [1], NEVER.format(1)),
        (optax.adam(optax.linear_schedule(0.0, 0.1, 9)), [1], NEVER.format(1)),
        (optax.adam(optax.linear_schedule(0.0, 0.1, 9)), [5], "starts again after at most 5 steps"),
        (
            optax.inject_hyperparams(optax.sgd)(optax.cosine_decay_schedule(0.1, 9)),
            [5],
            "For one that goes on, pass client_schedule=",
        ),
        (optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)), [5], "draw the same ones"),
    ],
)
def test_what_a_new_optimizer_in_each_round_cannot_do_is_warned_of(optimizer, steps, message):
    with pytest.warns(UserWarning, match=message) as said:
        warn_of_restarts(optimizer, PARAMS, np.array(steps))
    assert len(said) == 1


def test_collecting_gradients_within_a_round_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_restarts(optax.MultiSteps(optax.sgd(0.1), 4), PARAMS, np.array([4, 9]))


def test_the_name_is_that_of_the_function_that_made_the_transform():
    def odd():
        return transform(lambda grads, state, params: (1 / 0, state))

    with pytest.raises(FedLPError, match=re.escape("client_optimizer: ")) as refused:
        check_optimizer("client", odd(), PARAMS)
    assert "ZeroDivisionError: division by zero" in str(refused.value)
