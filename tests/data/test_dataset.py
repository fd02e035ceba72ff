from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from fedlp_jax.data.dataset import client_ids, from_arrays, pixels
from fedlp_jax.errors import FedLPError
from fedlp_jax.types import Normalize


def _arrays(dtype=np.uint8, shape=(4, 4, 1)):
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 256, (8, *shape)).astype(dtype)
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    return inputs[:5], labels[:5], inputs[5:], labels[5:]


def test_arrays_become_a_data_set():
    arrays = _arrays()
    data = from_arrays(*arrays, name="mine")
    assert data.train.inputs is arrays[0]  # uint8 as given is not copied
    assert data.train.labels.dtype == data.test.labels.dtype == np.int32
    assert data.test.labels.tolist() == [2, 0, 1]
    assert (data.name, data.num_classes, data.client) == ("mine", 3, None)
    assert repr(data) == (
        "Dataset(mine: 5 training and 3 test examples of uint8[4, 4, 1], 3 classes)"
    )


def test_bytes_are_scaled_to_one_around_zero_and_floats_are_left():
    gain, shift = from_arrays(*_arrays()).normalize
    np.testing.assert_allclose(np.array([0, 255]) * gain + shift, [-1, 1], atol=1e-6)
    gain, shift = from_arrays(*_arrays(np.float64)).normalize
    assert (gain, shift) == (1, 0)
    assert gain.dtype == shift.dtype == np.float32


def test_pixels_states_a_normalisation_by_mean_and_deviation():
    gain, shift = pixels([0.1, 0.2], [0.5, 0.4])
    x = np.array([255.0, 51.0])
    np.testing.assert_allclose(x * gain + shift, [(1 - 0.1) / 0.5, 0.0], atol=1e-6)
    assert gain.dtype == shift.dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_become_float32(dtype):
    arrays = _arrays(dtype)
    data = from_arrays(*arrays)
    assert data.train.inputs.dtype == np.float32
    np.testing.assert_array_equal(data.train.inputs, arrays[0])


@pytest.mark.parametrize(
    ("shape", "stored"), [((4, 5), (4, 5, 1)), ((4, 5, 3), (4, 5, 3)), ((7,), (7,))]
)
def test_images_without_a_channel_axis_get_one(shape, stored):
    data = from_arrays(*_arrays(shape=shape))
    assert data.train.inputs.shape == (5, *stored)
    assert data.test.inputs.shape == (3, *stored)


def test_labels_may_be_a_column_and_arrays_may_be_jax_ones():
    a, b, c, d = _arrays()
    data = from_arrays(jnp.asarray(a), b[:, None], jnp.asarray(c), jnp.asarray(d))
    assert data.train.labels.tolist() == b.tolist()
    assert isinstance(data.test.inputs, np.ndarray)


def test_client_ids_are_numbers_or_ranks_of_strings():
    assert from_arrays(*_arrays(), client=[9, 3, 9, -1, 3]).client.tolist() == [9, 3, 9, -1, 3]
    ids = client_ids(np.array(["w2", "w10", "w2"]), 3)
    assert ids.tolist() == [1, 0, 1]
    assert ids.dtype == np.int64
    assert client_ids(np.array(["b", "a"], object), 2).tolist() == [1, 0]


NAN = np.ones((5, 4, 4, 1))
NAN[3, 0, 0, 0] = np.nan
HUGE = np.ones((5, 4, 4, 1))
HUGE[2] = 1e300


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, np.zeros((5,), np.uint8), r"x: train_inputs have shape \[5\]; expected \[N, ...\]"),
        (0, np.zeros((0, 4, 4, 1), np.uint8), r"train_inputs have shape \[0, 4, 4, 1\]"),
        (2, np.zeros((3, 0), np.uint8), r"test_inputs have shape \[3, 0\]"),
        (0, np.zeros((4, 4, 4, 1), np.uint8), "inputs hold 4 examples but train_labels 5"),
        (2, np.zeros((3, 5, 5, 1), np.uint8), r"uint8\[4, 4, 1\] but test examples uint8\[5, 5, 1"),
        (2, np.zeros((3, 4, 4, 1)), r"examples are uint8\[4, 4, 1\] but test examples float32\["),
        (0, NAN, "a NaN, .* in 1 of 5 examples, the first in row 3"),
        (0, HUGE, "beyond float32 in 1 of 5 examples, the first in row 2"),
        (
            0,
            np.full((5, 4), 2**40),
            r"inputs go from 1099511627776 .* 32 bits cannot",
        ),
        (0, np.zeros((5, 4, 4, 1), bool), "train_inputs are bool"),
        (0, np.full((5, 4), None), "train_inputs are object"),
        (
            1,
            np.zeros((5,)),
            r"train_labels are float64\[5\]; expected integers \[N\]; .*astype\(int\)",
        ),
        (1, np.zeros((5, 3), int), r"int64\[5, 3\]; .* one-hot array, take .argmax"),
        (1, np.zeros(5, bool), r"train_labels are bool\[5\]; .*astype\(int\)"),
        (1, np.array(list("aabbc")), "number them with numpy.unique"),
        (
            1,
            np.array([0, 1, -1, 0, 0]),
            "labels go from -1 to 1 in 5 .* another split",
        ),
        (3, np.array([0, 1, 2**40]), "labels go from 0 to 1099511627776"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(position, value, message):
    arrays = list(_arrays())
    arrays[position] = value
    with pytest.raises(FedLPError, match=message):
        from_arrays(*arrays, name="x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 2}, "label 2 is out of range for num_classes=2"),
        ({"num_classes": 3.0}, "x: num_classes=3.0 must be a whole number of at least 1"),
        ({"num_classes": 0}, "x: num_classes=0 must be a whole number"),
        ({"normalize": Normalize([1, 2], 0)}, r"normalize.gain is \[1.0, 2.0\]; .* 1 channels"),
        ({"normalize": Normalize(1, np.nan)}, "normalize.shift is nan"),
        ({"normalize": 0.5}, r"x: normalize is 0.5; expected a pair \(gain, shift\), each one"),
        ({"normalize": [1, 2, 3]}, r"normalize is \[1, 2, 3\]; expected a pair"),
        ({"normalize": "12"}, "normalize is '12'; expected a pair"),
        ({"normalize": {"gain": 1, "shift": 0}}, "expected a pair"),
        ({"normalize": [10**400, 0]}, "expected a pair"),
        ({"normalize": [1e300, 0]}, "normalize.gain is inf; expected one finite number"),
        ({"client": [1, 2]}, r"Client ids are int64\[2\]; .* each of the 5 training examples"),
        ({"client": [0.5] * 5}, "Client ids are float64"),
        (
            {"client": np.full(5, 2**63, np.uint64)},
            "Client id 9223372036854775808 has more than 63",
        ),
        ({"add_channel": 1}, "x: add_channel=1 must be true, false or None"),
        ({"num_classes": 2**31}, "num_classes=2147483648; .* fewer than"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(FedLPError, match=message):
        from_arrays(*_arrays(), name="x", **options)


# --- guesses are announced


@pytest.mark.parametrize(
    "column",
    [[16777216.0, 16777217.0], [1.7e9, 1.7e9 + 1], [1 + 1e-9, 1.0], [0.0, 1e9 + 1]],
    ids=["whole numbers", "seconds", "a small spread", "ids"],
)
def test_floats_that_lose_digits_warn(column):
    inputs = np.column_stack([column, [0.5, 0.1]])
    with pytest.warns(UserWarning, match="x: train_inputs lose digits in float32: in 1 of 2 feat"):
        from_arrays(inputs, [0, 1], inputs.astype(np.float32), [0, 1], name="x")


def test_ordinary_floats_do_not_warn():
    inputs = np.random.default_rng(0).normal(100, 3, (8, 4))
    inputs[:, 1] = 0.1
    data = from_arrays(inputs, [0, 1] * 4, inputs, [0, 1] * 4)  # a warning would be an error
    np.testing.assert_array_equal(data.train.inputs, inputs.astype(np.float32))


def test_small_bytes_are_taken_for_pixels_with_a_warning():
    bits = np.array([[0], [1], [1]], np.uint8)
    with pytest.warns(
        UserWarning, match=r"x: inputs are uint8 and go up to 1, .* normalize=\(1, 0"
    ):
        from_arrays(bits, [0, 1, 0], bits, [0, 1, 0], name="x")
    data = from_arrays(bits, [0, 1, 0], bits, [0, 1, 0], normalize=(1, 0))
    assert (bits * data.normalize.gain + data.normalize.shift).ravel().tolist() == [0, 1, 1]


def test_windows_of_a_series_keep_their_shape_where_that_is_asked():
    windows, labels = np.zeros((3, 100, 9), np.float32), [0, 1, 0]
    with pytest.warns(UserWarning, match=r"train_inputs .* taken for grey .* add_channel=False"):
        data = from_arrays(windows, labels, windows, labels)
    assert data.train.inputs.shape == (3, 100, 9, 1)
    for add_channel, shape in ((False, (3, 100, 9)), (True, (3, 100, 9, 1))):
        data = from_arrays(windows, labels, windows, labels, add_channel=add_channel)
        assert data.train.inputs.shape == data.test.inputs.shape == shape
