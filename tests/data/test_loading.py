from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from prepared_set import records, write

from fedlp_jax.data import cache as cache_module
from fedlp_jax.data import loading, tfds
from fedlp_jax.data.loading import load
from fedlp_jax.errors import FedLPError
from fedlp_jax.types import Normalize

DATA_DIR = os.environ.get("TFDS_DATA_DIR", "")
# The real sets are decoded once a machine, as for a user; all else caches under tmp_path.
USERS_CACHE = str(cache_module.cache_dir())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- the package's own


def test_digits_are_scaled_to_one():
    data = load("digits")
    assert repr(data) == (
        "Dataset(digits: 1,437 training and 360 test examples of uint8[8, 8, 1], 10 classes)"
    )
    gain, shift = data.normalize
    assert (16 * gain + shift, 0 * gain + shift) == (1, 0)


def test_synthetic_takes_its_options():
    data = load("synthetic", examples=30, test_examples=7, shape=[3, 3], num_classes=4, seed=5)
    assert data.train.inputs.shape == (30, 3, 3, 1)
    assert len(data.test.labels) == 7
    assert data.num_classes == 4
    assert (data.train.inputs != load("synthetic", examples=30, shape=(3, 3)).train.inputs).any()


# --- npz


def _arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 256, (8, 5, 5), dtype=np.uint8)
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    return [inputs[:5], labels[:5], inputs[5:], labels[5:]]


@pytest.mark.parametrize(
    "keys",
    [
        ("train_inputs", "train_labels", "test_inputs", "test_labels"),
        ("x_train", "y_train", "x_test", "y_test"),
    ],
)
def test_an_npz_is_read_by_either_set_of_names(tmp_path, keys):
    arrays = _arrays()
    path = tmp_path / "mine.npz"
    np.savez(path, **dict(zip(keys, arrays, strict=True)), client=np.array(list("babca")))
    data = load(path, num_classes=6, normalize=Normalize(1, 0))
    np.testing.assert_array_equal(data.train.inputs[..., 0], arrays[0])
    np.testing.assert_array_equal(data.test.labels, arrays[3])
    assert (data.name, data.num_classes) == ("mine", 6)
    assert data.client.tolist() == [1, 0, 1, 2, 0]
    assert data.normalize.gain == 1


def test_an_npz_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(FedLPError, match=r"There is no file .*none.npz"):
        load(tmp_path / "none.npz")
    path = tmp_path / "mine.npz"
    np.savez(path, a=1, b=2)
    with pytest.raises(
        FedLPError, match="holds the arrays a, b; expected train_inputs, .* x_train"
    ):
        load(path)
    pickled = _arrays()
    pickled[1] = np.array([None] * 5)
    np.savez(path, **dict(zip(("x_train", "y_train", "x_test", "y_test"), pickled, strict=True)))
    with pytest.raises(FedLPError, match=r"cannot be read as an .npz of plain arrays"):
        load(path)
    path.write_bytes(b"PK not a zip")
    with pytest.raises(FedLPError, match=r"cannot be read as an .npz"):
        load(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(FedLPError, match=r"cannot be read as an .npz"):
        load(path)


def test_an_npz_larger_than_memory_is_refused(tmp_path, monkeypatch):
    np.savez(tmp_path / "mine.npz", x_train=np.zeros(1000))
    monkeypatch.setattr(loading, "usable_memory", lambda: 99)
    with pytest.raises(
        FedLPError, match=r"mine.npz unpacks to 8,128 bytes, and this machine has 99"
    ):
        load(tmp_path / "mine.npz")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(FedLPError, match="There is no file"):
        load(tmp_path / "pipe.npz")


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ("x_train", "y_train", "x_test", "y_test")
    np.savez(tmp_path / "mine.npz", **dict(zip(keys, _arrays(), strict=True)))
    assert len(load("~/mine.npz").train.labels) == 5
    write(tmp_path / "sets", {"train": records(3), "test": records(2)})
    assert len(load("tiny", "~/sets").train.labels) == 3
    with pytest.raises(FedLPError, match="There is no file ~nobody-at-all/mine.npz"):
        load("~nobody-at-all/mine.npz")


def test_an_npz_may_hold_windows_of_a_series(tmp_path):
    keys = ("x_train", "y_train", "x_test", "y_test")
    np.savez(tmp_path / "mine.npz", **dict(zip(keys, _arrays(), strict=True)))
    data = load(tmp_path / "mine.npz", add_channel=False)
    assert data.train.inputs.shape == (5, 5, 5)


# --- tensorflow-datasets


def test_a_prepared_set_is_loaded_and_then_comes_from_the_cache(tmp_path, cache, monkeypatch):
    rows = records(9)
    write(tmp_path, {"train": rows, "test": records(4)})
    first = load("tiny", tmp_path)
    np.testing.assert_array_equal(first.train.inputs, [row.image for row in rows])
    monkeypatch.setattr(tfds, "_decode", None)
    second = load("tiny", tmp_path)
    np.testing.assert_array_equal(second.train.inputs, first.train.inputs)
    np.testing.assert_array_equal(second.train.labels, first.train.labels)
    assert second.num_classes == first.num_classes == 3
    assert [entry.name[:11] for entry in cache.iterdir()] == ["tiny-1.0.0-"]


def test_other_splits_and_a_set_prepared_again_are_other_entries(tmp_path, cache):
    directory = write(tmp_path, {"train": records(9), "test": records(4)})
    load("tiny", tmp_path)
    swapped = load("tiny", tmp_path, train_split="test", test_split="train")
    assert (len(swapped.train.labels), len(swapped.test.labels)) == (4, 9)
    os.utime(directory / "features.json", ns=(1, 1))
    load("tiny", tmp_path)
    assert len(list(cache.iterdir())) == 3


def test_a_set_without_test_labels_is_refused(tmp_path):
    rows = [row._replace(label=-1) for row in records(2)]
    write(tmp_path, {"train": records(3), "test": rows})
    with pytest.raises(FedLPError, match="tiny: test_labels go from -1 .* another split"):
        load("tiny", tmp_path)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [("mnist", 0.1307, 0.3081), ("fashion_mnist", 0.1307, 0.3081), ("tiny", 0.5, 0.5)],
)
def test_each_set_has_the_normalisation_of_the_literature(tmp_path, name, mean, std):
    write(tmp_path, {"train": records(3), "test": records(2)}, name=name)
    gain, shift = load(name, tmp_path).normalize
    np.testing.assert_allclose(51 * gain + shift, (0.2 - mean) / std, rtol=1e-5)
    assert load(f"{name}:1.0.0", tmp_path).normalize.gain == gain


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("digits", "seed", r"load\('digits'\) has no option 'seed'. Its options: none"),
        ("synthetic", "example", "has no option 'example'; did you mean 'examples'?"),
        ("cifar10", "split", "has no option 'split'; did you mean 'test_split'?"),
        ("x.npz", "shape", "has no option 'shape'. Its options: num_classes, normalize, add"),
    ],
)
def test_an_unknown_option_is_refused(name, option, message):
    with pytest.raises(FedLPError, match=message):
        load(name, **{option: 1})


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("synthetic", {"shape": 8}, r"synthetic: shape must be a list .* \(8, 8, 1\), got 8"),
        ("synthetic", {"shape": None}, "shape must be a list .* got None"),
        ("synthetic", {"shape": "88"}, "shape must be a list .* got '88'"),
        ("synthetic", {"shape": ["8"]}, r"shape\[0\]='8' must be a whole number"),
        ("mnist", {"train_split": 3}, "mnist: train_split must be text, got 3"),
        ("mnist", {"train_split": None}, "mnist: train_split must be text, got None"),
        ("mnist", {"label": ["a"]}, r"mnist: label must be text, got \['a'\]"),
    ],
)
def test_an_option_of_another_form_is_refused(name, option, message):
    with pytest.raises(FedLPError, match=message):
        load(name, **option)


@pytest.mark.parametrize("normalize", [0.5, [1, 2, 3]])
def test_an_npz_with_half_a_normalisation_is_refused(tmp_path, normalize):
    keys = ("x_train", "y_train", "x_test", "y_test")
    np.savez(tmp_path / "mine.npz", **dict(zip(keys, _arrays(), strict=True)))
    with pytest.raises(FedLPError, match=r"mine: normalize is .* expected a pair \(gain, shift\)"):
        load(tmp_path / "mine.npz", normalize=normalize)


def test_an_unknown_name_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(FedLPError, match="did you mean 'digits'"):
        load("digit", tmp_path)


# --- the real data


def _needs(name: str) -> pytest.MarkDecorator:
    there = bool(DATA_DIR) and (Path(DATA_DIR) / name).is_dir()
    return pytest.mark.skipif(not there, reason=f"{name} is not prepared under TFDS_DATA_DIR")


@pytest.mark.slow  # decodes 60,000 images where nothing is cached yet
@pytest.mark.real_data
@_needs("cifar10")
def test_cifar10_is_in_its_original_order(monkeypatch):
    monkeypatch.setenv("FEDLP_CACHE_DIR", USERS_CACHE)
    data = load("cifar10")
    assert data.train.inputs.shape == (50_000, 32, 32, 3)
    assert data.test.inputs.shape == (10_000, 32, 32, 3)
    assert np.bincount(data.train.labels).tolist() == [5000] * 10
    assert np.bincount(data.test.labels).tolist() == [1000] * 10
    # The beginning of data_batch_1 and of test_batch, as published.
    assert data.train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert data.train.inputs[0, 0, :2].tolist() == [[59, 62, 63], [43, 46, 45]]
    assert data.test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    # The known means of the training pixels.
    means = data.train.inputs[::50].mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=0.01)

    # A second start, in a process of its own, from the cache.
    program = (
        "import sys, time; from fedlp_jax.data import loading; start = time.perf_counter(); "
        "data = loading.load('cifar10'); print(time.perf_counter() - start); "
        "print(data.train.labels[:3].tolist(), 'tensorflow_datasets' in sys.modules)"
    )
    root = Path(loading.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    output = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    seconds, contents = output.splitlines()
    assert contents == "[6, 9, 9] False"
    assert float(seconds) < 2


@pytest.mark.slow
@pytest.mark.real_data
@_needs("mnist")
def test_mnist_has_its_counts_and_its_normalisation(monkeypatch):
    monkeypatch.setenv("FEDLP_CACHE_DIR", USERS_CACHE)
    data = load("mnist")
    assert data.train.inputs.shape == (60_000, 28, 28, 1)
    assert data.test.inputs.shape == (10_000, 28, 28, 1)
    assert np.bincount(data.train.labels).tolist() == [
        *(5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
    ]
    values = data.train.inputs[:5000] * data.normalize.gain + data.normalize.shift
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02


@pytest.mark.real_data
@_needs("fashion_mnist")
def test_part_of_fashion_mnist(tmp_path):
    data = load("fashion_mnist", train_split="train[:200]", test_split="test[:100]")
    assert data.train.inputs.shape == (200, 28, 28, 1)
    assert len(np.unique(data.test.labels)) == 10
