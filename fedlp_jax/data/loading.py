"""`load`: a name -> `Dataset`, from the package's own sets, an .npz file or tensorflow-datasets."""

from __future__ import annotations

import inspect
import os
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedlp_jax.data import builtin
from fedlp_jax.data.dataset import Dataset as Dataset
from fedlp_jax.data.dataset import Split as Split
from fedlp_jax.data.dataset import from_arrays as from_arrays
from fedlp_jax.data.dataset import pixels
from fedlp_jax.data.files import usable_memory
from fedlp_jax.data.shakespeare import shakespeare
from fedlp_jax.data.tfds import load_prepared
from fedlp_jax.errors import FedLPError, nearest, shown, why
from fedlp_jax.types import Normalize

# As in the literature; every other set of images gets .5 and .5.
_NORMALIZE = {
    "mnist": pixels(0.1307, 0.3081),
    "fashion_mnist": pixels(0.1307, 0.3081),  # MNIST's, as in the official FedLP code
}
_OWN_KEYS = ("train_inputs", "train_labels", "test_inputs", "test_labels")
_KERAS_KEYS = ("x_train", "y_train", "x_test", "y_test")


def load(
    name: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None, **options: Any
) -> Dataset:
    """Loads a data set by name; never starts a download.

    Args:
      name: one of
        `digits`: 1,797 handwritten digits of 8 x 8 from scikit-learn, 1,437 of them to train on;
        `synthetic`: a seeded Gaussian mixture, see `fedlp_jax.data.builtin.synthetic`;
        `shakespeare`: characters of the plays, see `fedlp_jax.data.shakespeare`;
        the path of an .npz file with `train_inputs`, `train_labels`, `test_inputs`, `test_labels`
        (or Keras' `x_train`, `y_train`, `x_test`, `y_test`) and perhaps `client`;
        any image-classification set that tensorflow-datasets has prepared in array_record.
      data_dir: where tensorflow-datasets prepares its sets; None means `$TFDS_DATA_DIR`, else
        `~/tensorflow_datasets`. Of `shakespeare`, the directory of its file.
      **options: of `synthetic`: `examples`, `test_examples`, `shape`, `num_classes`, `seed`. Of
        `shakespeare`: `length`, `min_windows`. Of an .npz: `num_classes`, `normalize`,
        `add_channel`, `targets`, see `from_arrays`. Of tensorflow-datasets: `train_split`,
        `test_split`, and `image` and `label`, the features to read where there are several.

    Returns:
      The data set. Decoded images are cached, see `fedlp_jax.data.cache`.

    Raises:
      FedLPError: the name or an option is unknown, or the data cannot be read.
    """
    source: Callable[..., Dataset]
    text = os.fspath(name)
    if text in _BUILTIN:
        source = _BUILTIN[text]
    elif text.endswith(".npz"):
        source = _from_npz
    else:
        source = _from_tfds
    known = [
        parameter.name
        for parameter in inspect.signature(source).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    for option in options:
        if option not in known:
            raise FedLPError(
                f"load({text!r}) has no option {option!r}{nearest(option, known) or '.'} Its "
                f"options: {', '.join(known) or 'none'}."
            )
    return source(text, data_dir, **options)


def _from_tfds(
    name: str,
    data_dir: str | os.PathLike[str] | None,
    *,
    train_split: str = "train",
    test_split: str | None = None,
    image: str | None = None,
    label: str | None = None,
) -> Dataset:
    choices = {"test_split": test_split, "image": image, "label": label}
    for word, value in {"train_split": train_split, **choices}.items():
        if not isinstance(value, str) and (value is not None or word == "train_split"):
            raise FedLPError(f"{name}: {word} must be text, got {shown(value)}.")
    prepared = load_prepared(
        name, data_dir, train_split=train_split, other_names=tuple(_BUILTIN), **choices
    )
    *arrays, classes = prepared.values()
    normalize = _NORMALIZE.get(name.split(":")[0], pixels(0.5, 0.5))
    return from_arrays(*arrays, num_classes=int(classes), normalize=normalize, name=name)


def _from_npz(
    path: str,
    data_dir: str | os.PathLike[str] | None,
    *,
    num_classes: int | None = None,
    normalize: Normalize | None = None,
    add_channel: bool | None = None,
    targets: Literal["classes", "values"] = "classes",
) -> Dataset:
    del data_dir
    file = Path(os.path.expanduser(path))
    if not file.is_file():  # a directory, or a pipe, which would block
        raise FedLPError(f"There is no file {path}.")
    try:
        arrays = _read_npz(file)
    except FedLPError:
        raise
    except Exception as error:  # numpy and zipfile raise many kinds
        raise FedLPError(
            f"{path} cannot be read as an .npz of plain arrays ({why(error)}); write it with "
            "numpy.savez(path, train_inputs=..., ...) from arrays of numbers."
        ) from None
    client = arrays.pop("client", None)
    return from_arrays(
        *arrays.values(),
        num_classes=num_classes,
        normalize=normalize,
        add_channel=add_channel,
        client=client,
        targets=targets,
        name=file.stem,
    )


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    """Four arrays of a data set in order, and `client` if it is there; never loads a pickle."""
    with zipfile.ZipFile(file) as members:
        size = sum(member.file_size for member in members.infolist())
    if size > usable_memory():
        raise FedLPError(
            f"{file} unpacks to {size:,} bytes, and this machine has {usable_memory():,} to use "
            "for it; store fewer or smaller arrays."
        )
    with np.load(file, allow_pickle=False) as archive:
        keys = next((keys for keys in (_OWN_KEYS, _KERAS_KEYS) if set(keys) <= set(archive)), None)
        if keys is None:
            names = ", ".join(archive.files[:8]) + (", ..." if len(archive.files) > 8 else "")
            raise FedLPError(
                f"{file} holds the arrays {names or '(none)'}; expected {', '.join(_OWN_KEYS)}, or "
                f"{', '.join(_KERAS_KEYS)}."
            )
        return {key: archive[key] for key in (*keys, "client") if key in archive}


def _digits(name: str, data_dir: str | os.PathLike[str] | None) -> Dataset:
    del data_dir
    return from_arrays(*builtin.digits(), num_classes=10, normalize=pixels(0, 1, 16), name=name)


def _synthetic(
    name: str,
    data_dir: str | os.PathLike[str] | None,
    *,
    examples: int = 10_000,
    test_examples: int = 2_000,
    shape: tuple[int, ...] = (8, 8, 1),
    num_classes: int = 10,
    seed: int = 0,
) -> Dataset:
    del data_dir
    if isinstance(shape, str) or not isinstance(shape, Iterable):
        raise FedLPError(
            f"{name}: shape must be a list of positive integers such as (8, 8, 1), got "
            f"{shown(shape)}."
        )
    arrays = builtin.synthetic(examples, test_examples, tuple(shape), num_classes, seed)
    return from_arrays(*arrays, num_classes=num_classes, normalize=pixels(0.5, 0.5), name=name)


def _shakespeare(
    name: str,
    data_dir: str | os.PathLike[str] | None,
    *,
    length: int = 80,
    min_windows: int = 10,
) -> Dataset:
    del name
    return shakespeare(data_dir, length=length, min_windows=min_windows)


_BUILTIN: dict[str, Callable[..., Dataset]] = {
    "digits": _digits,
    "synthetic": _synthetic,
    "shakespeare": _shakespeare,
}
