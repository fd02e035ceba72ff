"""Records of a prepared image-classification set -> arrays, without TensorFlow."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from fedlp_jax.data.cache import Decoded
from fedlp_jax.data.prepared import Prepared
from fedlp_jax.errors import FedLPError

_CHUNK = 500  # records between two steps of the progress line
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of pillow, by channels
# Below this many pixels, handing an image to a thread costs more than decoding it.
_PIXELS_WORTH_A_THREAD = 128 * 128


def decode(prepared: Prepared, image: str | None = None, label: str | None = None) -> Decoded:
    """Decodes both splits of a prepared set into memory.

    Where the records carry their original position (CIFAR's `id` is `train_00012`), rows go back to
    it; otherwise they keep the order on the disk, which is the same everywhere.

    Args:
      prepared: from `prepared.find`.
      image: name of the image feature; None means the only one, or the supervised one.
      label: name of the class label, chosen likewise.

    Returns:
      Inputs `uint8[N, height, width, channels]` and labels `i32[N]` of both splits.

    Raises:
      FedLPError: a package is missing, the set is not one of image classification, its images have
        more than one shape or are not uint8, or a file is damaged.
    """
    tfds = _require("tensorflow_datasets", "tensorflow-datasets", prepared.name)
    _require("array_record.python.array_record_data_source", "array_record", prepared.name)
    _require("PIL.Image", "pillow", prepared.name)
    with _explained(prepared):
        builder = tfds.builder_from_directory(prepared.directory, file_format="array_record")
        features, keys = builder.info.features, builder.info.supervised_keys or ()
        image = _feature(prepared, features, keys, tfds.features.Image, "image", image)
        label = _feature(prepared, features, keys, tfds.features.ClassLabel, "label", label)
        kind, shape = features[image].np_dtype, features[image].shape
        if kind != np.uint8 or len(shape) != 3:
            raise FedLPError(
                f"{prepared.name!r} holds {np.dtype(kind)} images of shape {shape}; only uint8 "
                "[height, width, channels] can be read. Convert them and pass the arrays to "
                "from_arrays."
            )
        splits = []
        for split in (prepared.train_split, prepared.test_split):
            source = builder.as_data_source(
                split, decoders={image: tfds.decode.SkipDecoding()}, file_format="array_record"
            )
            mode = _MODES.get(shape[-1] or 0)
            splits.append(_decode_split(f"{prepared.name} {split}", source, image, label, mode))
        train, test = splits
        return Decoded(*train, *test, features[label].num_classes)


@contextlib.contextmanager
def _explained(prepared: Prepared) -> Iterator[None]:
    """Turns whatever tfds, array_record and pillow raise on bad input into a sentence."""
    try:
        yield
    except (FedLPError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise FedLPError(
            f"Splits {prepared.train_split!r} and {prepared.test_split!r} of {prepared.name!r} "
            f"cannot be read from {prepared.directory} ({reason}). Check the splits' names, or "
            "remove the directory and prepare the set again."
        ) from error


def _require(module: str, package: str, name: str) -> Any:
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise FedLPError(
            f"Reading {name!r} needs the package {package} ({error}): `pip install {package}`."
        ) from None


def _feature(
    prepared: Prepared, features: Any, supervised: Sequence[Any], kind: type, word: str, name: Any
) -> str:
    """Name of the one feature of a kind, or of the one among the supervised keys."""
    found = sorted(key for key in features if isinstance(features[key], kind))
    if name is None:
        chosen = [key for key in found if key in supervised] or found
        name = chosen[0] if len(chosen) == 1 else None
    if name in found:
        return name
    wanted = f"{word}={name!r} is not among them" if name else "image classification needs one"
    raise FedLPError(
        f"{prepared.name!r} has {len(found)} features of kind {kind.__name__} "
        f"({', '.join(found) or 'none'}), and {wanted}"
        + (f"; say which with {word}=." if len(found) > 1 else ".")
    )


def _decode_split(
    title: str, source: Any, image: str, label: str, mode: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of one split."""
    count = len(source)
    inputs = np.empty((0, 0, 0, 0), np.uint8)
    labels = np.empty((count,), np.int32)
    ids: list[Any] = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        for first in _progress(f"Decoding {title}", count):
            records = source.__getitems__(list(range(first, min(first + _CHUNK, count))))
            encoded = [record[image] for record in records]
            if first == 0:
                inputs = np.empty((count, *_pixels(encoded[0], mode).shape), np.uint8)
            large = inputs.shape[1] * inputs.shape[2] >= _PIXELS_WORTH_A_THREAD
            decoded = (threads.map if large else map)(lambda data: _pixels(data, mode), encoded)
            for row, pixels in enumerate(decoded, first):
                if pixels.shape != inputs.shape[1:]:
                    raise FedLPError(
                        f"The images of {title} differ in shape (number 0 is {inputs.shape[1:]}, "
                        f"number {row} is {pixels.shape}), and a batch needs one shape. Resize "
                        "them and pass the arrays to from_arrays."
                    )
                inputs[row] = pixels
            labels[first : first + len(records)] = [record[label] for record in records]
            ids += [record.get("id") for record in records]
    order = _original_order(ids)
    return (inputs, labels) if order is None else (inputs[order], labels[order])


def _pixels(encoded: bytes, mode: str | None) -> np.ndarray:
    """Decodes one PNG or JPEG to `uint8[height, width, channels]`."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as picture:
        wanted = mode or ("L" if picture.mode in ("1", "L") else "RGB")
        pixels = np.asarray(picture if picture.mode == wanted else picture.convert(wanted))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _original_order(ids: list[Any]) -> np.ndarray | None:
    """The order of the numbers at the end of the ids, if these number the examples of one source.

    Args:
      ids: one a record, such as `b"train_00012"`; None where records have none.

    Returns:
      `i64[N]`, or None if some id has no number, two are equal, or the words before them differ.
    """
    found = [
        re.fullmatch(rb"(.*?)(\d+)", text) if isinstance(text, bytes) else None for text in ids
    ]
    numbered = [match.groups() for match in found if match is not None]
    words, numbers = {word for word, _ in numbered}, [int(number) for _, number in numbered]
    if len(numbers) < len(ids) or len(words) != 1 or len(set(numbers)) < len(numbers):
        return None
    return np.argsort(np.asarray(numbers))


def _progress(title: str, count: int) -> Iterator[int]:
    """First rows of the chunks of `count` rows, with a line of progress on a terminal."""
    chunks = range(0, count, _CHUNK)
    if not sys.stderr.isatty():
        yield from chunks
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(chunks, title, console=Console(stderr=True), transient=True)
