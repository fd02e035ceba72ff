"""Image-classification sets that tensorflow-datasets has prepared, read without TensorFlow.

Nothing here starts a download. A start from the cache does not import tensorflow-datasets.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedlp_jax.data.cache import cached, digest
from fedlp_jax.errors import FedLPError, nearest

NAMES = ("train_inputs", "train_labels", "test_inputs", "test_labels", "num_classes")
_NAME = re.compile(r"(?P<set>\w[\w-]*)(?:/(?P<config>\w[\w.-]*))?(?::(?P<version>\d+\.\d+\.\d+))?")
_CHUNK = 500  # records between two steps of the progress bar
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's mode by number of channels


def load_prepared(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    train_split: str = "train",
    test_split: str | None = None,
    image: str | None = None,
    label: str | None = None,
    other_names: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """Loads a prepared set from the cache, or decodes and caches it.

    Where records carry their original position (CIFAR's `id` is `train_00012`), rows return to it;
    otherwise they keep the order on disk, which is the same everywhere.

    Args:
      name: as tensorflow-datasets writes it: `set` or `set/config`, perhaps with `:1.2.3`.
      data_dir: where sets are prepared; None means `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
      train_split: a split, or an expression such as `train[:90%]`.
      test_split: likewise; None means `test`, or `validation` where there is no `test`.
      image: name of the image feature; None means the only one, or the supervised one.
      label: name of the class label, likewise.
      other_names: further names to suggest for a misspelt one.

    Returns:
      The arrays in `NAMES`: inputs `uint8[N, height, width, channels]` and labels `i32[N]` of both
      splits, and `num_classes`, `i64[]`. Without a version in `name`, the newest one.

    Raises:
      FedLPError: the set is unknown, not or half prepared, stored in a format without random
        access, lacks a split, is not one of image classification, has images that are not uint8 or
        of more than one shape, or a file is damaged.
    """
    directory = _find(name, data_dir, other_names)
    files = [file for file in directory.rglob("*") if file.is_file()]
    title = name.split(":")[0].replace("/", "-")
    key = digest(files, train_split, test_split, image, label)

    def decode() -> dict[str, np.ndarray]:
        try:
            return _decode(name, directory, train_split, test_split, image, label)
        except (FedLPError, MemoryError):
            raise
        except Exception as error:  # tfds, array_record and Pillow raise many kinds
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise FedLPError(
                f"{name!r} cannot be read from {directory} ({reason[:300]}). Check the splits "
                f"train_split={train_split!r} and test_split={test_split!r}, or remove the "
                f"directory and prepare the set again: {_build(name, directory)}."
            ) from error

    return cached(f"{title}-{directory.name}-{key}", NAMES, decode)


def _find(name: str, data_dir: str | os.PathLike[str] | None, other_names: Collection[str]) -> Path:
    """The directory of the newest prepared version, or of the version in `name`."""
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise FedLPError(
            f"{name!r} is not the name of a data set; expected a name such as 'cifar10', "
            "'emnist/balanced' or 'mnist:3.0.1', or the path of an .npz file."
        )
    base = Path(
        os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    )
    home = base / name.partition(":")[0]
    homes = [home] if _versions(home) else [sub for sub in sorted(home.glob("*")) if _versions(sub)]
    if len(homes) > 1:
        configs = ", ".join(f"{parts['set']}/{sub.name}" for sub in homes)
        raise FedLPError(
            f"{name!r} is prepared in {len(homes)} configurations; choose one of {configs}."
        )
    if not homes:
        folders = sorted([*base.glob("*"), *base.glob("*/*")])
        prepared = ["/".join(sub.relative_to(base).parts) for sub in folders if _versions(sub)]
        held = f"which holds {', '.join(prepared) or 'no prepared set'}"
        raise FedLPError(
            f"No data set {name!r} is prepared under {base} "
            f"({held if base.is_dir() else 'which does not exist'}), nor is it one of this "
            f"package's own ({', '.join(other_names)})"
            + (nearest(name, [*other_names, *prepared]) or ".")
            + " If tensorflow-datasets has it, prepare it once where there is a network: "
            + f"{_build(name, base)}. data_dir= or TFDS_DATA_DIR names another directory."
        )
    versions = _versions(homes[0])
    version = parts["version"] or versions[-1].name
    for folder in versions:
        if folder.name == version:
            return folder
    there = ", ".join(folder.name for folder in versions)
    raise FedLPError(f"{name!r} is not prepared under {base}, which has version {there}.")


def _versions(folder: Path) -> list[Path]:
    """Subdirectories named like 3.0.1, the newest last."""
    versions = [path for path in folder.glob("*.*.*") if re.fullmatch(r"\d+\.\d+\.\d+", path.name)]
    return sorted(versions, key=lambda path: tuple(map(int, path.name.split("."))))


def _build(name: str, base: Path) -> str:
    return (
        "`pip install tensorflow importlib_resources`, then "
        f"`tfds build {name} --file_format=array_record --data_dir={base}`"
    )


def _decode(
    name: str,
    directory: Path,
    train_split: str,
    test_split: str | None,
    image: str | None,
    label: str | None,
) -> dict[str, np.ndarray]:
    """Decodes both splits into memory."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(directory)
    info = builder.info
    formats = {form.value for form in (info.file_format, *(info.alternative_file_formats or ()))}
    if "array_record" not in formats:
        raise FedLPError(
            f"{name!r} is prepared under {directory} as {' and '.join(sorted(formats))}, which "
            "cannot be read without TensorFlow. Convert it once: `pip install tensorflow "
            f"importlib_resources`, then `tfds convert_format --dataset_version_dir={directory} "
            "--out_file_format=array_record`."
        )
    keys = info.supervised_keys or ()
    image = _feature(name, info.features, keys, tfds.features.Image, "image", image)
    label = _feature(name, info.features, keys, tfds.features.ClassLabel, "label", label)
    kind, shape = info.features[image].np_dtype, info.features[image].shape
    if kind != np.uint8 or len(shape) != 3:
        raise FedLPError(
            f"{name!r} holds {np.dtype(kind)} images of shape {shape}; only uint8 [height, width, "
            "channels] can be read. Convert them and pass the arrays to from_arrays."
        )
    arrays: list[np.ndarray] = []
    for split in (train_split, test_split or ("test" if "test" in info.splits else "validation")):
        # Pillow decodes, whatever else is installed: OpenCV gives other pixels for a JPEG.
        source = builder.as_data_source(
            split, decoders={image: tfds.decode.SkipDecoding()}, file_format="array_record"
        )
        arrays += _decode_split(f"{name} {split}", source, image, label, _MODES.get(shape[-1] or 0))
    classes = np.asarray(info.features[label].num_classes, np.int64)
    return dict(zip(NAMES, [*arrays, classes], strict=True))


def _feature(
    name: str, features: Any, supervised: Sequence[Any], kind: type, option: str, choice: str | None
) -> str:
    """Name of the one feature of a kind, or of the one among the supervised keys."""
    names = sorted(key for key in features if isinstance(features[key], kind))
    if choice is None:
        candidates = [key for key in names if key in supervised] or names
        choice = candidates[0] if len(candidates) == 1 else None
    if choice is not None and choice in names:
        return choice
    lack = f"{option}={choice!r} is not among them" if choice else "image classification needs one"
    raise FedLPError(
        f"{name!r} has {len(names)} features of kind {kind.__name__} "
        f"({', '.join(names) or 'none'}), and {lack}"
        + (f"; choose one with {option}=." if len(names) > 1 else ".")
    )


def _decode_split(
    title: str, source: Any, image: str, label: str, mode: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of one split."""
    from rich.console import Console
    from rich.progress import track

    count = len(source)
    inputs = np.empty((0, 0, 0, 0), np.uint8)
    labels = np.empty((count,), np.int32)
    ids: list[Any] = []
    chunks = track(
        range(0, count, _CHUNK),
        f"Decoding {title}",
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    for first in chunks:
        rows = range(first, min(first + _CHUNK, count))
        for row, record in zip(rows, source.__getitems__(list(rows)), strict=True):
            picture = _picture(record[image], mode)
            if row == 0:
                inputs = np.empty((count, *picture.shape), np.uint8)
            if picture.shape != inputs.shape[1:]:
                raise FedLPError(
                    f"The images of {title} differ in shape (number 0 is {inputs.shape[1:]}, "
                    f"number {row} is {picture.shape}), and a batch needs one shape. Resize "
                    "them and pass the arrays to from_arrays."
                )
            inputs[row], labels[row] = picture, record[label]
            ids.append(record.get("id"))
    order = _original_order(ids)
    return (inputs, labels) if order is None else (inputs[order], labels[order])


def _picture(encoded: bytes, mode: str | None) -> np.ndarray:
    """Decodes one PNG or JPEG to `uint8[height, width, channels]`."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as picture:
        mode = mode or ("L" if picture.mode in ("1", "L") else "RGB")
        pixels = np.asarray(picture if picture.mode == mode else picture.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _original_order(ids: list[Any]) -> np.ndarray | None:
    """The order of the numbers at the end of the ids, if these number the examples of one source.

    Args:
      ids: one per record, such as `b"train_00012"`; None where records have none.

    Returns:
      `i64[N]`, or None if some id has no number, two are equal, or the words before them differ.
    """
    matches = [re.fullmatch(rb"(.*?)(\d+)", one) for one in ids if isinstance(one, bytes)]
    words = {match[1] for match in matches if match}
    numbers = [int(match[2]) for match in matches if match]
    if len(numbers) < len(ids) or len(words) != 1 or len(set(numbers)) < len(numbers):
        return None
    return np.argsort(np.asarray(numbers))
