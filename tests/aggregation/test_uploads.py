"""Compression of updates: what the server decodes, and the bits that it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Steps

import fedlp_jax as fl
from fedlp_jax.aggregation.uploads import elias, expected_bits, plain_message

N = 300
X = np.random.default_rng(0).normal(size=N).astype(np.float32)
SENT = jnp.asarray(True)


def sent(upload, x=X, key=0, state=(), arrives=SENT):
    """The values, the bits and the new state of one message."""
    with jax.numpy_dtype_promotion("standard"):
        message, state = upload.apply(
            jax.random.key(key), plain_message(jnp.asarray(x)), arrives, state
        )
    return np.asarray(message.values), int(message.bits.sum() + message.other_bits), state


def encoded(values, norm, levels):
    """The message of `quantize`, bit by bit."""
    bits = f"{int(np.float32(norm).view(np.uint32)):032b}" + elias(levels)
    for level in np.rint(values / norm * levels).astype(int):
        bits += elias(abs(level) + 1) + ("" if level == 0 else "01"[int(level < 0)])
    return bits


def decoded(bits, count):
    """The values of such a message."""

    def number(at):  # Elias omega
        value = 1
        while bits[at] == "1":
            value, at = int(bits[at : at + value + 1], 2), at + value + 1
        return value, at + 1

    norm = np.uint32(int(bits[:32], 2)).view(np.float32)
    levels, at = number(32)
    values = []
    for _ in range(count):
        level, at = number(at)
        sign = 1
        if level > 1:
            sign, at = (-1 if bits[at] == "1" else 1), at + 1
        values.append(sign * norm * (level - 1) / levels)
    assert at == len(bits)
    return np.array(values)


def test_elias_codes_are_those_of_the_literature():
    codes = {1: "0", 2: "100", 3: "110", 4: "101000", 7: "101110", 8: "1110000", 16: "10100100000"}
    assert {number: elias(number) for number in codes} == codes


@pytest.mark.parametrize("levels", [1, 3, 15, 255])
def test_a_quantised_message_has_as_many_bits_as_its_code(levels):
    values, bits, _ = sent(fl.quantize(levels))
    code = encoded(values, np.linalg.norm(X), levels)
    assert bits == len(code)
    np.testing.assert_allclose(decoded(code, N), values, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("levels", [1, 4])
def test_quantisation_is_unbiased_and_its_variance_bounded(levels):
    draws = 2000
    keys = jax.random.split(jax.random.key(1), draws)
    upload, message = fl.quantize(levels), plain_message(jnp.asarray(X))
    with jax.numpy_dtype_promotion("standard"):
        values = jax.vmap(lambda k: upload.apply(k, message, SENT, ())[0].values)(keys)
    values, norm = np.asarray(values, np.float64), np.linalg.norm(X)
    error = np.abs(values.mean(axis=0) - X)
    assert (error <= 5 * values.std(axis=0) / np.sqrt(draws) + 1e-6).all()
    variance = ((values - X) ** 2).sum(axis=1).mean()
    assert variance <= min(N / levels**2, np.sqrt(N) / levels) * norm**2


def test_nothing_is_coded_as_nothing():
    values, bits, _ = sent(fl.quantize(3), np.zeros(5, np.float32))
    assert not values.any()
    assert bits == 32 + len(elias(3)) + 5


def test_top_k_sends_the_largest_with_their_places():
    values, bits, _ = sent(fl.top_k(0.1))
    largest = np.argsort(-np.abs(X))[:30]
    assert set(np.flatnonzero(values)) == set(largest)
    np.testing.assert_array_equal(values[largest], X[largest])
    assert bits == 30 * (32 + 9)


@pytest.mark.parametrize(("share", "n", "count"), [(0.07, 100, 7), (0.071, 100, 8), (1e-9, 5, 1)])
def test_top_k_counts_entries_without_errors_of_rounding(share, n, count):
    upload = fl.top_k(share)
    assert np.count_nonzero(sent(upload, X[:n])[0]) == count
    assert expected_bits(upload, n) == count * (32 + int(np.ceil(np.log2(n))))


def test_error_feedback_loses_nothing():
    upload = fl.top_k(0.1, error_feedback=True)
    state, received = upload.init(N, np.dtype(np.float32)), np.zeros(N)
    for turn in range(5):
        arrives = turn != 2  # a layer that is not sent is kept whole
        values, _, state = sent(upload, state=state, arrives=jnp.asarray(arrives))
        received += values * arrives
    np.testing.assert_allclose(received + np.asarray(state), 5 * X, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 16), ("float16", 16), ("int8", 8)])
def test_casts_round_to_the_nearest(dtype, bits):
    values, count, _ = sent(fl.cast(dtype))
    error = np.abs(values - X)
    if dtype == "int8":
        assert (error <= np.abs(X).max() / 254 * 1.001).all()
    else:
        assert (error <= np.abs(X) * 2.0 ** -(8 if dtype == "bfloat16" else 11)).all()
    assert count == bits * N + 32 * (dtype == "int8")


def test_a_chain_codes_only_what_is_left():
    values, bits, _ = sent(fl.chain(fl.top_k(0.1), fl.quantize(15)))
    assert np.count_nonzero(values) <= 30
    largest = np.argsort(-np.abs(X))[:30]
    code = encoded(values[largest], np.linalg.norm(X[largest]), 15)
    assert bits == len(code) + 30 * 9


@pytest.mark.parametrize(
    "upload",
    [fl.top_k(0.1), fl.cast("int8"), fl.quantize(15), fl.chain(fl.top_k(0.3), fl.quantize(4))],
)
def test_expected_bits_are_near_those_of_normal_updates(upload):
    assert sent(upload)[1] == pytest.approx(expected_bits(upload, N), rel=0.15)


def make(**settings):
    return fl.fedavg(fl.classification(Steps()), client_optimizer=optax.sgd(0.1), **settings)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fl.quantize(0), "levels=0 must be a whole number in"),
        (lambda: fl.quantize(2**20), "levels=1048576 must be a whole number in"),
        (lambda: fl.top_k(0), "share=0 must be a number in"),
        (lambda: fl.cast("float8"), "dtype 'float8' is unknown; did you mean 'float16'?"),
        (lambda: fl.chain(), "chain takes uploads"),
        (lambda: make(upload=8), "upload=8 is no upload; give one such as fl.quantize"),
        (
            lambda: make(
                upload=fl.quantize(3),
                privacy=fl.Privacy(1.0, 1.0),
                aggregator="cohort_mean",
                weighting="uniform",
            ),
            "privacy needs updates of a known norm",
        ),
    ],
)
def test_refuses_in_a_sentence(call, words):
    with pytest.raises(fl.FedLPError, match=words):
        call()


def test_refuses_a_layer_of_more_bits_than_are_counted():
    normalize = fl.types.Normalize(jnp.ones(()), jnp.zeros(()))
    example = fl.types.Batch(jnp.zeros((1, 4)), jnp.zeros(1, jnp.int32), None, normalize)
    task = fl.classification(Steps(depth=1, width=2**25))

    def init(upload):
        made = fl.fedavg(task, client_optimizer=optax.sgd(0.1), upload=upload)
        return jax.eval_shape(lambda key: made.init(key, example, 2), jax.random.key(0))

    with pytest.raises(
        fl.FedLPError, match="head1 with 100,663,299 parameters .* 1,610,612,784 bits"
    ):
        init(fl.cast("bfloat16"))
    assert init(fl.top_k(1e-3)).variables["params"]["hidden1"]["kernel"].size == 2**27
