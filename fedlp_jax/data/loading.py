"""A name -> `Dataset`: digits, a synthetic mixture, an .npz, or a set prepared for tfds."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fedlp_jax.data import builtin as embedded
from fedlp_jax.data import cache, prepared
from fedlp_jax.data import tfds as decoding
from fedlp_jax.data.archive import read_npz
from fedlp_jax.data.dataset import Dataset as Dataset
from fedlp_jax.data.dataset import Split as Split
from fedlp_jax.data.dataset import from_arrays as from_arrays
from fedlp_jax.data.dataset import pixels
from fedlp_jax.errors import FedLPError, nearest, shown, why
from fedlp_jax.types import Normalize

# What the literature uses; any other set of images gets .5 and .5.
_NORMALIZE = {
    "mnist": pixels(0.1307, 0.3081),
    "fashion_mnist": pixels(0.1307, 0.3081),  # MNIST's, as in the official FedLP code
}


def load(
    name: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None, **options: Any
) -> Dataset:
    """Loads a data set by name; never starts a download.

    Args:
      name: one of
        `digits`: 1,797 handwritten digits of 8 x 8 that scikit-learn carries, 1,437 to train on;
        `synthetic`: a seeded Gaussian mixture, see `embedded.synthetic` for its options;
        the path of an .npz file with `train_inputs`, `train_labels`, `test_inputs`, `test_labels`
        (or Keras' `x_train`, `y_train`, `x_test`, `y_test`) and perhaps `client`;
        any image-classification set that tensorflow-datasets has prepared in array_record.
      data_dir: where tensorflow-datasets prepares its sets; None means `$TFDS_DATA_DIR`, else
        `~/tensorflow_datasets`.
      **options: of `synthetic`: `examples`, `test_examples`, `shape`, `num_classes`, `seed`. Of an
        .npz: `num_classes`, `normalize`. Of tensorflow-datasets: `train_split`, `test_split`, and
        `image` and `label`, the features to read where there are several.

    Returns:
      The data set. Decoded images are cached, see `cache`.

    Raises:
      FedLPError: the name or an option is unknown, or the data cannot be read.
    """
    source: Callable[..., Dataset]
    text = os.fspath(name)
    if text in _OWN:
        source = _OWN[text]
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
    words = {"train_split": train_split, "test_split": test_split, "image": image, "label": label}
    for word, value in words.items():
        if not isinstance(value, str) and (value is not None or word == "train_split"):
            raise FedLPError(f"{name}: {word} must be text, got {shown(value)}.")
    found = prepared.find(
        name, data_dir, train_split=train_split, test_split=test_split, own_names=tuple(_OWN)
    )
    digest = cache.digest(found.files, found.train_split, found.test_split, image, label)
    plain = name.split(":")[0]
    entry = f"{plain.replace('/', '-')}-{found.version}-{digest}"
    decoded = cache.remember(entry, lambda: decoding.decode(found, image, label))
    normalize = _NORMALIZE.get(plain)
    return from_arrays(
        *decoded[:4], num_classes=decoded.num_classes, normalize=normalize, name=name
    )


def _from_npz(
    path: str,
    data_dir: str | os.PathLike[str] | None,
    *,
    num_classes: int | None = None,
    normalize: Normalize | None = None,
) -> Dataset:
    del data_dir
    ours = ("train_inputs", "train_labels", "test_inputs", "test_labels")
    keras = ("x_train", "y_train", "x_test", "y_test")

    def choose(held: list[str]) -> list[str]:
        keys = next((keys for keys in (ours, keras) if set(keys) <= set(held)), None)
        if keys is None:
            names = ", ".join(map(str, held[:8])) + (", ..." if len(held) > 8 else "")
            raise FedLPError(
                f"{path} holds the arrays {names or '(none)'}; expected {', '.join(ours)}, or "
                f"{', '.join(keras)}."
            )
        return [*keys, *(["client"] if "client" in held else [])]

    try:
        arrays = read_npz(path, choose)
    except FedLPError:
        raise
    except FileNotFoundError:
        raise FedLPError(f"There is no file {path}.") from None
    except Exception as error:  # a damaged archive can raise almost anything
        raise FedLPError(
            f"{path} cannot be read as an .npz of plain arrays ({why(error)}); write it with "
            "numpy.savez(path, train_inputs=..., ...) from arrays of numbers."
        ) from None
    client = arrays.pop("client", None)
    return from_arrays(
        *arrays.values(),
        num_classes=num_classes,
        normalize=normalize,
        client=client,
        name=Path(path).stem,
    )


def _digits(name: str, data_dir: str | os.PathLike[str] | None) -> Dataset:
    del data_dir
    return from_arrays(*embedded.digits(), num_classes=10, normalize=pixels(0, 1, 16), name=name)


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
    arrays = embedded.synthetic(examples, test_examples, tuple(shape), num_classes, seed)
    return from_arrays(*arrays, num_classes=num_classes, name=name)


_OWN: dict[str, Callable[..., Dataset]] = {"digits": _digits, "synthetic": _synthetic}
