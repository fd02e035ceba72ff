from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedlp_jax.data import builtin
from fedlp_jax.errors import FedLPError


def test_digits_are_scikit_learns_and_split_evenly_by_class():
    train, train_labels, test, test_labels = builtin.digits()
    assert train.shape == (1437, 8, 8, 1)
    assert test.shape == (360, 8, 8, 1)
    assert train.dtype == test.dtype == np.uint8
    assert (train.min(), train.max()) == (0, 16)
    counts, test_counts = np.bincount(train_labels), np.bincount(test_labels)
    assert (counts + test_counts).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert abs(test_counts - (counts + test_counts) / 5).max() < 1


def test_digits_are_the_same_if_the_table_is_not_where_it_was(monkeypatch):
    from sklearn.datasets import load_digits

    expected = builtin.digits()
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    for one, other in zip(builtin.digits(), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    together = np.concatenate([expected[0], expected[2]]).reshape(-1, 64)
    theirs = load_digits().data.astype(np.uint8)
    assert sorted(map(bytes, together)) == sorted(map(bytes, theirs))


def test_digits_do_not_import_scikit_learn():
    program = (
        "import sys; from fedlp_jax.data import builtin; builtin.digits(); "
        "sys.exit('sklearn' in sys.modules)"
    )
    root = Path(builtin.__file__).parents[2]
    environment = {"PYTHONPATH": str(root), "PATH": "", "JAX_PLATFORMS": "cpu"}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FedLPError, match="`pip install scikit-learn`"):
        builtin.digits()


def test_a_linear_model_can_learn_the_mixture():
    train, labels, test, test_labels = builtin.synthetic(4000, 1000, (6, 6, 1), 10, 0)
    features = train.reshape(4000, -1) / 127.5 - 1
    weights, *_ = np.linalg.lstsq(features, np.eye(10)[labels], rcond=None)
    predicted = (test.reshape(1000, -1) / 127.5 - 1) @ weights
    accuracy = (predicted.argmax(1) == test_labels).mean()
    assert 0.85 < accuracy < 0.99


def test_the_mixture_has_its_shape_its_classes_and_its_spread():
    train, labels, test, test_labels = builtin.synthetic(3000, 50, (5, 4, 2), 4, 1)
    assert train.shape == (3000, 5, 4, 2)
    assert test.shape == (50, 5, 4, 2)
    assert train.dtype == np.uint8
    assert labels.dtype == test_labels.dtype == np.int32
    assert np.bincount(labels).min() > 650
    within = np.stack([train[labels == c].std(axis=0) for c in range(4)])
    np.testing.assert_allclose(within.mean(), 32, rtol=0.02)


def test_the_seed_alone_decides():
    first, again, other = (builtin.synthetic(20, 5, (4, 4, 1), 3, seed) for seed in (0, 0, 1))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert (first[0] != other[0]).any()


def test_examples_do_not_depend_on_how_many_fit_in_the_processors_cache(monkeypatch):
    whole = builtin.synthetic(100, 10, (4, 4, 1), 3, 0)[0]
    monkeypatch.setattr(builtin, "_CHUNK_BYTES", 7 * 64)
    np.testing.assert_array_equal(builtin.synthetic(100, 10, (4, 4, 1), 3, 0)[0], whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": 0}, "examples=0 must be a whole number of at least 1"),
        ({"test_examples": -1}, "test_examples=-1 must be"),
        ({"num_classes": 2.5}, "num_classes=2.5 must be"),
        ({"shape": (8, 0)}, r"shape\[1\]=0 must be"),
        ({"shape": ()}, "a shape with at least one axis"),
        ({"seed": -1}, "seed=-1 must be"),
    ],
)
def test_what_cannot_be_drawn_is_refused(change, message):
    good = {"examples": 4, "test_examples": 2, "shape": (2, 2), "num_classes": 2, "seed": 0}
    builtin.synthetic(**good)
    with pytest.raises(FedLPError, match=message):
        builtin.synthetic(**(good | change))
