"""Data that needs no download: scikit-learn's handwritten digits, and a synthetic mixture."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np

from fedlp_jax.data.files import usable_memory
from fedlp_jax.errors import FedLPError, shown

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # train and test, inputs and labels

_SEPARATION = 5.0  # distance of two class means in standard deviations of the noise
_CONTRAST = 32.0  # grey levels of one standard deviation of the noise
_CHUNK_BYTES = 4 << 20


def digits() -> Arrays:
    """Handwritten digits as scikit-learn carries them.

    They are the test part of the UCI set of 1998, written by 13 of its 43 writers.

    Every fifth example of the set ordered by class is a test example, so that both parts hold each
    class in equal shares, to one example, without a draw.

    Returns:
      Inputs `uint8[1437, 8, 8, 1]` and `uint8[360, 8, 8, 1]` in 0..16, with their labels.

    Raises:
      FedLPError: scikit-learn is not installed.
    """
    # The table itself is read: importing scikit-learn takes seconds.
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
    else:  # a version that keeps it elsewhere
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

    `x = 127.5 + 32 (mean[label] + noise)`, noise of standard deviation 1, and means drawn so that
    two of them are about 5 apart whatever the shape: a linear model can reach about 95 % with ten
    classes.

    Args:
      examples: N, to train on.
      test_examples: to test on.
      shape: of one example.
      num_classes: of equal probability.
      seed: of everything that is drawn.

    Returns:
      Inputs `uint8[N, *shape]` and labels `i32[N]`, of both splits.

    Raises:
      FedLPError: a count is not a positive integer.
    """
    counts = {
        "examples": examples,
        "test_examples": test_examples,
        "num_classes": num_classes,
        **{f"shape[{axis}]": size for axis, size in enumerate(shape)},
    }
    for word, count in counts.items():
        if not isinstance(count, int | np.integer) or isinstance(count, bool) or count < 1:
            raise FedLPError(f"synthetic: {word} must be a positive integer, got {shown(count)}.")
    whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not whole or not 0 <= seed < 2**64 or not shape:
        raise FedLPError(
            f"synthetic: expected a seed in 0 .. 2**64 - 1 and a shape with at least one axis, got "
            f"seed={shown(seed)} and shape={shown(shape)}."
        )
    # A byte and a label an example, and the means in float32.
    needs = (examples + test_examples) * (math.prod(shape) + 4) + 4 * num_classes * math.prod(shape)
    if needs > usable_memory() or max(examples, test_examples, num_classes) >= 2**31 - 1:
        raise FedLPError(
            f"synthetic: {shown(examples)} and {shown(test_examples)} examples of shape "
            f"{shown(list(shape))} in {shown(num_classes)} classes take more than the "
            f"{usable_memory():,} bytes that this machine has for them; ask for less."
        )
    rng = np.random.Generator(np.random.Philox(key=int(seed)))
    values = int(np.prod(shape))
    means = rng.standard_normal((num_classes, values), np.float32)
    means *= _CONTRAST * _SEPARATION / np.sqrt(2.0 * values)
    splits: list[np.ndarray] = []
    for count in (examples, test_examples):
        labels = rng.integers(num_classes, size=count, dtype=np.int32)
        inputs = np.empty((count, values), np.uint8)
        # Chunks that stay in the processor's cache are several times faster than one pass.
        rows = max(_CHUNK_BYTES // (4 * values), 1)
        for first in range(0, count, rows):
            chunk = means[labels[first : first + rows]]
            noise = rng.standard_normal(chunk.shape, np.float32)
            chunk += 127.5 + _CONTRAST * noise
            inputs[first : first + rows] = np.clip(np.rint(chunk), 0, 255)
        splits += [inputs.reshape(count, *shape), labels]
    return splits[0], splits[1], splits[2], splits[3]
