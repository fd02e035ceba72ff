"""Data sets that need no download: scikit-learn's handwritten digits and a synthetic mixture."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np

from fedlp_jax.data.files import usable_memory
from fedlp_jax.errors import FedLPError, check_number, shown

Arrays = tuple[
    np.ndarray, np.ndarray, np.ndarray, np.ndarray
]  # inputs and labels to train on, then to test on

_SEPARATION = 5.0  # distance of two class means in standard deviations of the noise
_CONTRAST = 32.0  # grey levels of one standard deviation of the noise
_CHUNK_BYTES = 4 << 20


def digits() -> Arrays:
    """Handwritten digits as scikit-learn ships them.

    They are the test part of the UCI set of 1998, by 13 of its 43 writers. Sorted by class, every
    fifth example goes to the test split, so both splits have the same class shares, to within one
    example, and nothing is drawn.

    Returns:
      Inputs `uint8[1437, 8, 8, 1]` and `uint8[360, 8, 8, 1]` in 0..16, with their labels.

    Raises:
      FedLPError: scikit-learn is not installed.
    """
    # Read the table itself, since importing scikit-learn takes seconds.
    package = importlib.util.find_spec("sklearn")
    if package is None or not package.submodule_search_locations:
        raise FedLPError(
            "The data set 'digits' is part of scikit-learn, which is not installed: "
            "`pip install scikit-learn`."
        )
    file = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8, converters=float)
        inputs, labels = table[:, :-1], table[:, -1]
    else:  # a scikit-learn that stores it elsewhere
        from sklearn.datasets import load_digits

        inputs, labels = load_digits(return_X_y=True)
    inputs = inputs.astype(np.uint8).reshape(-1, 8, 8, 1)
    test = np.zeros(len(labels), bool)
    test[np.argsort(labels, kind="stable")[::5]] = True
    return (
        inputs[~test],
        labels[~test].astype(np.int32),
        inputs[test],
        labels[test].astype(np.int32),
    )


def synthetic(
    examples: int, test_examples: int, shape: tuple[int, ...], num_classes: int, seed: int
) -> Arrays:
    """Images of a Gaussian mixture with one mean per class, in 256 grey levels.

    `x = 127.5 + 32 (mean[label] + noise)`, with noise of standard deviation 1 and means about 5
    apart for every shape: with ten classes, a linear model reaches about 95 %.

    Args:
      examples: N, training examples.
      test_examples: test examples.
      shape: of one example.
      num_classes: classes of equal probability.
      seed: of means, labels and noise.

    Returns:
      Inputs `uint8[N, *shape]` and labels `i32[N]` of both splits.

    Raises:
      FedLPError: a count is not a positive integer, or the data does not fit in memory.
    """
    counts = {
        "examples": examples,
        "test_examples": test_examples,
        "num_classes": num_classes,
        **{f"shape[{axis}]": size for axis, size in enumerate(shape)},
    }
    for word, count in counts.items():
        check_number(f"synthetic: {word}", count, ge=1, integer=True)
    if check_number("synthetic: seed", seed, ge=0, integer=True) >= 2**64 or not shape:
        raise FedLPError(
            f"synthetic: expected a seed below 2**64 and a shape with at least one axis, got "
            f"seed={shown(seed)} and shape={shown(shape)}."
        )
    # A byte per value and four per label; the means are float32.
    needs = (examples + test_examples) * (math.prod(shape) + 4) + 4 * num_classes * math.prod(shape)
    if needs > usable_memory() or max(examples, test_examples, num_classes) >= 2**31 - 1:
        raise FedLPError(
            f"synthetic: {shown(examples)} and {shown(test_examples)} examples of shape "
            f"{shown(list(shape))} in {shown(num_classes)} classes take more than the "
            f"{usable_memory():,} bytes that this machine has for them; lower one of them."
        )
    rng = np.random.Generator(np.random.Philox(key=int(seed)))
    values = int(np.prod(shape))
    means = rng.standard_normal((num_classes, values), np.float32)
    means *= _CONTRAST * _SEPARATION / np.sqrt(2.0 * values)
    splits: list[np.ndarray] = []
    for count in (examples, test_examples):
        labels = rng.integers(num_classes, size=count, dtype=np.int32)
        inputs = np.empty((count, values), np.uint8)
        # Chunks that fit the processor's cache are several times faster than one pass.
        rows = max(_CHUNK_BYTES // (4 * values), 1)
        for first in range(0, count, rows):
            chunk = means[labels[first : first + rows]]
            noise = rng.standard_normal(chunk.shape, np.float32)
            chunk += 127.5 + _CONTRAST * noise
            inputs[first : first + rows] = np.clip(np.rint(chunk), 0, 255)
        splits += [inputs.reshape(count, *shape), labels]
    return splits[0], splits[1], splits[2], splits[3]
