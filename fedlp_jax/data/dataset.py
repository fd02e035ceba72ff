"""Arrays -> `Dataset`: everything is checked here, once, so that nothing downstream has to."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any, NamedTuple

import numpy as np

from fedlp_jax.errors import FedLPError, shown, why
from fedlp_jax.types import Normalize


class Split(NamedTuple):
    """Examples and their labels."""

    inputs: np.ndarray  # uint8 or f32[N, ...]; images are [N, height, width, channels]
    labels: np.ndarray  # i32[N]

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.inputs.nbytes + self.labels.nbytes


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A classification data set in memory, or mapped from the disk. Made by `load`."""

    name: str
    train: Split
    test: Split
    num_classes: int
    normalize: Normalize  # from stored to model inputs
    client: np.ndarray | None = None  # i64[N], whose each training example is, where that is known

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of inputs and labels of both splits, wherever they were loaded from."""
        digest = hashlib.sha256()
        for array in (*self.train, *self.test):
            digest.update(f"{array.dtype}{list(array.shape)}".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def __repr__(self) -> str:
        inputs = self.train.inputs
        return (
            f"Dataset({self.name}: {len(self.train.labels):,} training and "
            f"{len(self.test.labels):,} test examples of {inputs.dtype}{list(inputs.shape[1:])}, "
            f"{self.num_classes} classes)"
        )


def from_arrays(
    train_inputs: Any,
    train_labels: Any,
    test_inputs: Any,
    test_labels: Any,
    *,
    num_classes: int | None = None,
    normalize: Normalize | None = None,
    client: Any = None,
    name: str = "arrays",
) -> Dataset:
    """Makes a data set of your own arrays.

    Args:
      train_inputs: uint8 or floating `[N, ...]`; images without a channel axis (three axes in all)
        get one of size 1. Floats become float32.
      train_labels: integers `[N]` or `[N, 1]` in `0 .. num_classes - 1`.
      test_inputs: like `train_inputs`.
      test_labels: like `train_labels`.
      num_classes: None means one more than the largest label.
      normalize: a pair (gain, shift), each one number or one per channel: the model sees
        `x * gain + shift`. None means `x / 127.5 - 1` for uint8 and nothing for floats.
      client: integers or strings `[N]`, whose each training example is; strings become their rank.
      name: for messages and reports.

    Returns:
      The data set.

    Raises:
      FedLPError: shapes disagree, a type is unfit, a number is not finite, or a label is out of
        range.
    """
    train = _split(name, "train", train_inputs, train_labels)
    test = _split(name, "test", test_inputs, test_labels)
    if train.inputs.shape[1:] != test.inputs.shape[1:] or train.inputs.dtype != test.inputs.dtype:
        raise FedLPError(
            f"{name}: training examples are {train.inputs.dtype}{list(train.inputs.shape[1:])} but "
            f"test examples {test.inputs.dtype}{list(test.inputs.shape[1:])}; they must be alike."
        )
    largest = int(max(train.labels.max(), test.labels.max()))
    if num_classes is None:
        num_classes = largest + 1
        examples = len(train.labels) + len(test.labels)
        if num_classes > max(examples, 1000):
            raise FedLPError(
                f"{name}: label {largest} would make {num_classes:,} classes of {examples:,} "
                "examples; number the classes from 0, or give num_classes if that is meant."
            )
    whole = isinstance(num_classes, int | np.integer) and not isinstance(num_classes, bool)
    if not whole or not 1 <= num_classes < 2**31:
        raise FedLPError(
            f"{name}: num_classes must be a positive integer, got {shown(num_classes)}."
        )
    if largest >= num_classes:
        raise FedLPError(
            f"{name}: label {largest} is out of range for num_classes={num_classes}; labels count "
            "from 0."
        )
    if normalize is None:
        normalize = pixels(0.5, 0.5) if train.inputs.dtype == np.uint8 else IDENTITY
    return Dataset(
        name=name,
        train=train,
        test=test,
        num_classes=int(num_classes),
        normalize=_affine(name, normalize, train.inputs.shape),
        client=None if client is None else client_ids(client, len(train.labels)),
    )


def pixels(mean: Any, std: Any, scale: float = 255.0) -> Normalize:
    """The map `(x / scale - mean) / std`, the usual way to state how images are normalised.

    Args:
      mean: a number, or one per channel, of `x / scale`.
      std: the same.
      scale: the largest stored value.

    Returns:
      Gain and shift, `f32[]` or `f32[channels]`.
    """
    mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    return Normalize(
        np.asarray(1 / (scale * std), np.float32), np.asarray(0 - mean / std, np.float32)
    )


IDENTITY = Normalize(np.asarray(1, np.float32), np.asarray(0, np.float32))


def _split(name: str, which: str, inputs: Any, labels: Any) -> Split:
    """Checks one split and brings it to the types of `Split`."""
    where = f"{name}: {which}"
    inputs, labels = as_array(f"{where}_inputs", inputs), as_array(f"{where}_labels", labels)
    if inputs.ndim < 2 or 0 in inputs.shape:
        raise FedLPError(
            f"{where}_inputs have shape {list(inputs.shape)}; expected [N, ...] with at least one "
            "example and one value in each."
        )
    if labels.ndim == 2 and labels.shape[1] == 1:  # Keras keeps CIFAR's labels so
        labels = labels[:, 0]
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise FedLPError(
            f"{where}_labels are {labels.dtype}{list(labels.shape)}; expected integers [N]"
            + (" (of a one-hot array, take .argmax(-1))." if labels.ndim == 2 else ".")
        )
    if len(inputs) != len(labels):
        raise FedLPError(
            f"{where}_inputs hold {len(inputs):,} examples but {which}_labels {len(labels):,}."
        )
    if labels.min() < 0 or labels.max() >= 2**31 - 1:
        raise FedLPError(
            f"{where}_labels go from {labels.min()} to {labels.max()}; expected 0 .. num_classes "
            "- 1. A -1 often stands for 'no label': choose another split."
        )
    if np.issubdtype(inputs.dtype, np.floating):
        with np.errstate(over="ignore"):  # becomes an infinity, which is refused
            inputs = inputs.astype(np.float32, copy=False)
        finite = np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1)
        if not finite.all():
            raise FedLPError(
                f"{where}_inputs hold a NaN, an infinity or a number beyond float32 in "
                f"{(~finite).sum():,} of {len(inputs):,} examples, the first in row "
                f"{finite.argmin()}; remove or repair them."
            )
    elif inputs.dtype != np.uint8:
        raise FedLPError(
            f"{where}_inputs are {inputs.dtype}; expected uint8 or floating. Cast them, for "
            "example with .astype(numpy.float32)."
        )
    return Split(inputs[..., None] if inputs.ndim == 3 else inputs, labels.astype(np.int32))


def as_array(what: str, values: Any) -> np.ndarray:
    """`numpy.asarray`, which says of rows of several lengths whose they are.

    Raises:
      FedLPError: the values are not an array.
    """
    try:
        return np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise FedLPError(f"{what} cannot be made an array: {why(error)}.") from None


def _affine(name: str, normalize: Normalize, shape: tuple[int, ...]) -> Normalize:
    """Checks that gain and shift are finite numbers, one or one per channel."""
    try:
        if isinstance(normalize, str):  # "12" would be read as 1 and 2
            raise TypeError
        with np.errstate(over="ignore"):  # becomes an infinity, which is refused
            gain, shift = (np.asarray(part, np.float32) for part in normalize)
    except (TypeError, ValueError, OverflowError):
        raise FedLPError(
            f"{name}: normalize is {shown(normalize)}; expected a pair (gain, shift), each one "
            "number or one per channel, for x * gain + shift."
        ) from None
    for word, part in (("gain", gain), ("shift", shift)):
        if part.shape not in ((), shape[-1:]) or not np.isfinite(part).all():
            raise FedLPError(
                f"{name}: normalize.{word} is {part.tolist()}; expected one finite number, or one "
                f"for each of the {shape[-1]} channels."
            )
    return Normalize(gain, shift)


def client_ids(values: Any, examples: int) -> np.ndarray:
    """Whose each example is, as numbers: integers stay, strings become their rank.

    Args:
      values: integers or strings `[N]`.
      examples: N.

    Returns:
      `i64[N]`.

    Raises:
      FedLPError: there is not one integer or string for each example.
    """
    ids = as_array("Client ids", values)
    text = ids.dtype.kind in "US" or (
        ids.dtype.kind == "O" and all(isinstance(one, str) for one in ids.ravel())
    )
    if ids.shape != (examples,) or not (text or ids.dtype.kind in "iu"):
        raise FedLPError(
            f"Client ids are {ids.dtype}{list(ids.shape)}; expected one integer or string for each "
            f"of the {examples:,} training examples."
        )
    if not text:
        return ids.astype(np.int64)
    # A dictionary: numpy takes ten times as long to sort a million strings.
    names: list[Any] = ids.tolist()
    rank = {name: i for i, name in enumerate(sorted(set(names)))}
    return np.fromiter((rank[name] for name in names), np.int64, examples)
