"""`Dataset` of arrays, checked once here so that nothing downstream has to."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from fedlp_jax.errors import FedLPError, check_choice, check_number, collecting, shown, warn, why
from fedlp_jax.types import Normalize

IDENTITY = Normalize(np.asarray(1, np.float32), np.asarray(0, np.float32))


class Split(NamedTuple):
    """Examples and their labels."""

    inputs: np.ndarray  # uint8, f32 or (tokens) i32[N, ...]; images [N, height, width, channels]
    labels: np.ndarray  # i32[N] class labels, or targets: i32 or f32[N, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of inputs and labels."""
        return self.inputs.nbytes + self.labels.nbytes


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """A data set in memory, or mapped from disk. Made by `load` or `from_arrays`."""

    name: str
    train: Split
    test: Split
    num_classes: int  # of class labels or tokens; 0 = the targets are real numbers
    normalize: Normalize  # from stored inputs to model inputs; integers stay as they are
    client: np.ndarray | None = None  # i64[N], client id of each training example, if known
    warnings: tuple[str, ...] = ()  # what was assumed of the arrays, as `from_arrays` said

    @property
    def has_classes(self) -> bool:
        """Whether each example has one class label."""
        return self.num_classes > 0 and self.train.labels.ndim == 1

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
            f"{self._targets()})"
        )

    def _targets(self) -> str:
        if self.has_classes:
            return f"{self.num_classes} classes"
        labels = self.train.labels
        kind = f"tokens of {self.num_classes}" if self.num_classes else str(labels.dtype)
        return f"targets {kind}{list(labels.shape[1:])}"


def from_arrays(
    train_inputs: Any,
    train_labels: Any,
    test_inputs: Any,
    test_labels: Any,
    *,
    num_classes: int | None = None,
    normalize: Normalize | None = None,
    add_channel: bool | None = None,
    client: Any = None,
    targets: Literal["classes", "values"] = "classes",
    name: str = "arrays",
) -> Dataset:
    """Makes a data set of your own arrays.

    A guess that may be wrong is announced in one warning: floats that lose digits in float32, small
    integers taken for pixels, and windows of a series taken for images.

    Args:
      train_inputs: `[N, ...]` of uint8, floats or other integers. Floats become float32; integers,
        such as tokens, become int32 and are not normalised.
      train_labels: integers `[N]` or `[N, 1]` in `0 .. num_classes - 1`; see `targets`.
      test_inputs: like `train_inputs`.
      test_labels: like `train_labels`.
      num_classes: None means one more than the largest label, or 0 for real targets.
      normalize: a pair (gain, shift), each one number or one per channel: the model gets
        `x * gain + shift`. None means `x / 127.5 - 1` for uint8 and `x` for floats.
      add_channel: whether inputs get a last axis of size 1. None means yes for three axes in all,
        `[N, height, width]`, and no otherwise.
      client: integers or strings `[N]`, the client id of each training example; strings become
        their rank.
      targets: "classes" = a class label for each example; "values" = numbers of any shape
        `[N, ...]`, as for regression, several labels or sequences: integers become int32, floats
        float32.
      name: for messages and reports.

    Returns:
      The data set.

    Raises:
      FedLPError: shapes disagree, a type does not fit, a number is not finite, or a label is out of
        range.
    """
    if not (add_channel is None or isinstance(add_channel, bool)):
        raise FedLPError(f"{name}: add_channel={shown(add_channel)} must be true, false or None.")
    check_choice("targets", targets, ("classes", "values"))
    read = class_labels if targets == "classes" else target_values
    with collecting() as said:
        train = _split(name, "train", train_inputs, train_labels, add_channel, read)
        test = _split(name, "test", test_inputs, test_labels, add_channel, read)
        given, normalize = normalize, normalize or _guess_normalize(name, train, test)
    for what, *both in (
        ("targets", train.labels, test.labels),
        ("examples", train.inputs, test.inputs),
    ):
        ours, theirs = (f"{x.dtype}{list(x.shape[1:])}" for x in both)
        if ours != theirs:
            raise FedLPError(
                f"{name}: training {what} are {ours} but test {what} {theirs}; make them alike."
            )
    if given is not None and train.inputs.dtype == np.int32:
        raise FedLPError(
            f"{name}: integer inputs such as tokens are not normalised; omit normalize, or cast "
            "the inputs with .astype(numpy.float32)."
        )
    return Dataset(
        name=name,
        train=train,
        test=test,
        num_classes=_class_count(name, num_classes, train.labels, test.labels),
        normalize=_affine(name, normalize, train.inputs.shape),
        client=None if client is None else client_ids(client, len(train.labels)),
        warnings=tuple(said),
    )


def pixels(mean: Any, std: Any, scale: float = 255.0) -> Normalize:
    """The normalisation `(x / scale - mean) / std` of images.

    Args:
      mean: a number, or one per channel, of `x / scale`.
      std: likewise.
      scale: the largest stored value.

    Returns:
      Gain and shift, `f32[]` or `f32[channels]`.
    """
    mean, std = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    return Normalize(
        np.asarray(1 / (scale * std), np.float32), np.asarray(0 - mean / std, np.float32)
    )


def class_labels(what: str, labels: Any) -> np.ndarray:
    """Checks class labels.

    Args:
      what: names them in messages.
      labels: integers `[N]` or `[N, 1]`, as Keras stores CIFAR's.

    Returns:
      Read-only `i32[N]`.

    Raises:
      FedLPError: they are not a list of at least one class number from 0 up.
    """
    labels = _as_array(what, labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2:
        raise FedLPError(
            f"{what} are {labels.dtype}{list(labels.shape)}; expected integers [N] (of a one-hot "
            "array, take .argmax(-1))."
        )
    labels = integers(what, labels)
    if len(labels) == 0:
        raise FedLPError(f"{what} are empty; at least one example is needed.")
    if labels.min() < 0 or labels.max() >= 2**31 - 1 or len(labels) >= 2**31:
        raise FedLPError(
            f"{what} go from {labels.min()} to {labels.max()} in {len(labels):,} examples; "
            "expected 0 .. num_classes - 1 and fewer than 2**31 examples. A -1 often stands for "
            "'no label': choose another split."
        )
    return read_only(labels, np.int32)


def read_only(values: np.ndarray, dtype: type) -> np.ndarray:
    """A read-only view, or a copy if the type differs; the caller's array stays writable."""
    view: np.ndarray = np.ascontiguousarray(values, dtype)[:]
    view.flags.writeable = False
    return view


def target_values(what: str, values: Any) -> np.ndarray:
    """Checks targets that are numbers of any shape.

    Args:
      what: names them in messages.
      values: integers or floats `[N, ...]`.

    Returns:
      `i32[N, ...]` or `f32[N, ...]`.

    Raises:
      FedLPError: they are something else, empty, not finite, or too large for 32 bits.
    """
    values = _as_array(what, values)
    if values.ndim < 1 or values.size == 0 or values.dtype.kind not in "biuf":
        raise FedLPError(
            f"{what} are {values.dtype}{list(values.shape)}; expected numbers [N, ...], at least "
            "one."
        )
    if values.dtype.kind != "f":
        return _as_int32(what, values)
    if not np.isfinite(single := values.astype(np.float32)).all():
        raise FedLPError(f"{what} hold a NaN, an infinity or a number beyond float32; remove it.")
    return single


def _as_int32(what: str, values: np.ndarray) -> np.ndarray:
    if values.min() < -(2**31) or values.max() >= 2**31:
        raise FedLPError(
            f"{what} go from {values.min()} to {values.max()}, which 32 bits cannot hold; number "
            "them from 0."
        )
    return values.astype(np.int32)


def integers(what: str, values: Any) -> np.ndarray:
    """A one-dimensional array of integers of any width.

    Raises:
      FedLPError: the values are something else.
    """
    values = _as_array(what, values)
    if values.ndim == 1 and (np.issubdtype(values.dtype, np.integer) or values.size == 0):
        return values
    hint = ""
    if values.dtype.kind in "fb":
        hint = "; convert them with .astype(int) if they are whole numbers"
    elif values.dtype.kind in "US":
        hint = "; number them with numpy.unique(..., return_inverse=True)"
    raise FedLPError(f"{what} are {values.dtype}{list(values.shape)}; expected integers [N]{hint}.")


def client_ids(values: Any, examples: int) -> np.ndarray:
    """Client ids as numbers: integers stay, strings become their rank.

    Args:
      values: integers or strings `[N]`.
      examples: N.

    Returns:
      `i64[N]`.

    Raises:
      FedLPError: there is not one integer or string for each example.
    """
    ids = _as_array("Client ids", values)
    text = ids.dtype.kind in "US" or (
        ids.dtype.kind == "O" and all(isinstance(one, str) for one in ids.ravel())
    )
    if ids.shape != (examples,) or not (text or ids.dtype.kind in "iu"):
        raise FedLPError(
            f"Client ids are {ids.dtype}{list(ids.shape)}; expected one integer or string for each "
            f"of the {examples:,} training examples."
        )
    if text:
        # A dictionary: numpy takes ten times as long to sort a million strings.
        names: list[Any] = ids.tolist()
        rank = {name: i for i, name in enumerate(sorted(set(names)))}
        return np.fromiter((rank[name] for name in names), np.int64, examples)
    if ids.max() >= 2**63:
        raise FedLPError(f"Client id {ids.max()} has more than 63 bits; pass the ids as strings.")
    return ids.astype(np.int64)


def _split(
    name: str,
    which: str,
    inputs: Any,
    labels: Any,
    add_channel: bool | None,
    read: Callable[[str, Any], np.ndarray],
) -> Split:
    """Checks one split and brings it to the types of `Split`; `read` checks its labels."""
    what = f"{name}: {which}_inputs"
    labels = read(f"{name}: {which}_labels", labels)
    inputs = _as_array(what, inputs)
    if inputs.ndim < 2 or 0 in inputs.shape:
        raise FedLPError(
            f"{what} have shape {list(inputs.shape)}; expected [N, ...] with at least one example "
            "and one value in each."
        )
    if len(inputs) != len(labels):
        raise FedLPError(
            f"{what} hold {len(inputs):,} examples but {which}_labels {len(labels):,}."
        )
    if np.issubdtype(inputs.dtype, np.floating):
        inputs = _single(what, inputs)
    elif inputs.dtype.kind in "iu" and inputs.dtype != np.uint8:
        inputs = _as_int32(what, inputs)
    elif inputs.dtype != np.uint8:
        raise FedLPError(
            f"{what} are {inputs.dtype}; expected integers or floats. Cast them, for example with "
            ".astype(numpy.float32)."
        )
    if add_channel is None and inputs.ndim == 3 and inputs.dtype != np.int32:
        add_channel = True
        if which == "train" and inputs.dtype != np.uint8 and inputs.shape[1] != inputs.shape[2]:
            _warn(
                f"{what} have shape {list(inputs.shape)} and are taken for grey images, which get "
                f"a channel axis: {[*inputs.shape, 1]}. Pass add_channel=False to keep the shape, "
                "as for windows of a series, or add_channel=True if they are images."
            )
    return Split(inputs[..., None] if add_channel else inputs, labels)


def _single(what: str, inputs: np.ndarray) -> np.ndarray:
    """Floats as finite float32; warns where that loses what tells examples apart."""
    with np.errstate(over="ignore"):  # becomes an infinity, which is refused
        single = inputs.astype(np.float32, copy=False)
    finite = np.isfinite(single).reshape(len(single), -1).all(axis=1)
    if not finite.all():
        raise FedLPError(
            f"{what} hold a NaN, an infinity or a number beyond float32 in {(~finite).sum():,} of "
            f"{len(single):,} examples, the first in row {finite.argmin()}; remove or repair them."
        )
    if inputs.dtype.itemsize > 4:
        error = np.abs(inputs - single).max(axis=0)
        spread = np.ptp(inputs, axis=0)
        # A unit of a large whole number, or a thousandth of what a feature varies by.
        lossy = (error >= 0.5) | ((spread > 0) & (error > 1e-3 * spread))
        if lossy.any():
            _warn(
                f"{what} lose digits in float32: in {lossy.sum():,} of {lossy.size:,} features, by "
                f"up to {error.max():.3g}. Subtract an offset, such as each feature's mean, before "
                "you pass them."
            )
    return single


def _guess_normalize(name: str, train: Split, test: Split) -> Normalize:
    """uint8 is taken for pixels, which small numbers may not be."""
    if train.inputs.dtype != np.uint8:
        return IDENTITY
    largest = max(train.inputs.max(), test.inputs.max())
    if largest < 128:
        _warn(
            f"{name}: inputs are uint8 and go up to {largest}, and are taken for pixels of 0 to "
            "255: the model gets x / 127.5 - 1. Pass normalize=(1, 0) for the numbers themselves, "
            "or normalize=(1 / 127.5, -1) if they are pixels."
        )
    return pixels(0.5, 0.5)


def _class_count(
    name: str, num_classes: int | None, train_labels: np.ndarray, test_labels: np.ndarray
) -> int:
    """Checks `num_classes` against the labels, or takes it from them."""
    if train_labels.dtype != np.int32:
        if num_classes:
            raise FedLPError(f"{name}: num_classes={shown(num_classes)}, but targets are floats.")
        return 0
    largest = int(max(train_labels.max(), test_labels.max()))
    if num_classes is None:
        examples = len(train_labels) + len(test_labels)
        if largest >= max(examples, 1000):
            raise FedLPError(
                f"{name}: label {largest} would make {largest + 1:,} classes of {examples:,} "
                "examples; number the classes from 0, or pass num_classes if that is intended."
            )
        return largest + 1
    num_classes = check_number(f"{name}: num_classes", num_classes, ge=1, integer=True)
    if not largest < num_classes < 2**31:
        raise FedLPError(
            f"{name}: label {largest} is out of range for num_classes={shown(num_classes)}; labels "
            "count from 0, and there are fewer than 2**31 classes."
        )
    return num_classes


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


def _as_array(what: str, values: Any) -> np.ndarray:
    """`numpy.asarray`, with a sentence for rows of different lengths."""
    try:
        return np.asarray(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise FedLPError(f"{what} cannot be made an array: {why(error)}.") from None


def _warn(message: str) -> None:
    warn(message, UserWarning, stacklevel=4)
