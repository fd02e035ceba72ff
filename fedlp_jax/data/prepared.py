"""Directories that tensorflow-datasets has prepared: found, and checked before anything is read.

They are understood from their own JSON files, so that neither a mistake nor a start from the cache
waits for tensorflow-datasets to be imported. Nothing here starts a download.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from fedlp_jax.data.files import read_plain
from fedlp_jax.errors import FedLPError, nearest, shown

_NAME = re.compile(r"(?P<set>\w[\w-]*)(?:/(?P<config>\w[\w.-]*))?(?::(?P<version>\d+\.\d+\.\d+))?")
_JSON_BYTES = 100_000_000  # some sets list a million file names
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_SHARD = (
    "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # file names, unless the set says otherwise
)


class Prepared(NamedTuple):
    """A prepared data set whose files have been found to be all there."""

    name: str
    version: str
    directory: Path
    files: list[Path]  # all that the decoded arrays depend on
    train_split: str
    test_split: str


def find(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    train_split: str = "train",
    test_split: str | None = None,
    own_names: Collection[str] = (),
) -> Prepared:
    """Finds a prepared data set and checks that its files are there.

    Args:
      name: as tensorflow-datasets writes it: `set` or `set/config`, perhaps with `:1.2.3`.
      data_dir: where sets are prepared; None means `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
      train_split: a split, or an expression such as `train[:90%]`.
      test_split: the same; None means `test`, or `validation` where there is no `test`.
      own_names: further names the caller knows, to suggest one for a misspelt name.

    Returns:
      The newest version, or the one asked for.

    Raises:
      FedLPError: the set is unknown, not prepared, half prepared, stored in a format without random
        access, or lacks a split.
    """
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise FedLPError(
            f"{name!r} is not the name of a data set; expected a name such as 'cifar10', "
            "'emnist/balanced' or 'mnist:3.0.1', or the path of an .npz file."
        )
    base = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    try:
        base = base.expanduser()
    except RuntimeError:  # there is no such user, so no such directory
        base = base.absolute()
    home = base / parts["set"]
    if not _holds_versions(home) and not _incomplete(home):
        raise FedLPError(_not_there(name, base, own_names))
    directory = _version(name, base, _configuration(name, home, parts["config"]), parts["version"])
    info = _information(name, base, directory)

    splits = info["splits"]
    if test_split is None:
        test_split = "test" if "test" in splits else "validation"
    used = _named_splits(name, splits, f"{train_split}+{test_split}")
    formats = info["formats"]
    if "array_record" not in formats:
        raise FedLPError(
            f"{name!r} is prepared under {directory} as {' and '.join(sorted(formats))}, which "
            "cannot be read without TensorFlow. Convert it once: `pip install tensorflow "
            f"importlib_resources`, then `tfds convert_format --dataset_version_dir={directory} "
            "--out_file_format=array_record`."
        )
    shards = [shard for split in used for shard in _shards(parts["set"], splits[split])]
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        lack = f"{directory} lacks {len(missing)} of {len(shards)} files, {missing[0]} among them"
        raise FedLPError(_half_prepared(name, base, lack))
    files = [directory / file for file in (*shards, "dataset_info.json", "features.json")]
    return Prepared(name, directory.name, directory, files, train_split, test_split)


def _subdirectories(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []


def _versions(path: Path) -> list[Path]:
    """Directories named like 3.0.1, the newest last."""
    found = [child for child in _subdirectories(path) if _VERSION.fullmatch(child.name)]
    return sorted(found, key=lambda child: tuple(map(int, child.name.split("."))))


def _configurations(home: Path) -> dict[str, Path]:
    return {child.name: child for child in _subdirectories(home) if _versions(child)}


def _holds_versions(home: Path) -> bool:
    return bool(_versions(home) or _configurations(home))


def _incomplete(home: Path) -> list[Path]:
    """Directories that tensorflow-datasets was writing when it was stopped."""
    pattern = "*.*.*.incomplete*"
    return sorted([*home.glob(pattern), *home.glob(f"*/{pattern}")])


def _configuration(name: str, home: Path, config: str | None) -> Path:
    """The directory that holds the versions: of the set, or of one configuration of it."""
    configurations = _configurations(home)
    if config is None:
        if len(configurations) < 2 or _versions(home):
            return home if _versions(home) else next(iter(configurations.values()), home)
        one = f"'{home.name}/{next(iter(configurations))}'"
        raise FedLPError(
            f"{name!r} is prepared in {len(configurations)} configurations "
            f"({', '.join(configurations)}); say which one, for example {one}."
        )
    if config not in configurations and not _incomplete(home / config):
        hint = nearest(config, configurations, lambda known: f"{home.name}/{known}") or "."
        raise FedLPError(
            f"{home.name!r} is not prepared in a configuration {config!r} under {home}{hint} There "
            f"are: {', '.join(configurations) or 'none'}."
        )
    return home / config


def _version(name: str, base: Path, home: Path, version: str | None) -> Path:
    versions = _versions(home)
    if not versions:
        left = _incomplete(home)[0]
        raise FedLPError(_half_prepared(name, base, f"{left} was never finished"))
    if version is None:
        return versions[-1]
    if home / version not in versions:
        there = ", ".join(path.name for path in versions)
        raise FedLPError(f"{name!r} is not prepared under {home}, which has version {there}.")
    return home / version


def _information(name: str, base: Path, directory: Path) -> dict[str, Any]:
    """The splits and formats of dataset_info.json; features.json only has to be readable too."""
    for file in ("features.json", "dataset_info.json"):
        try:
            read = json.loads(read_plain(directory / file, _JSON_BYTES))
            if file == "features.json":
                continue
            splits = {str(split["name"]): dict(split) for split in read.get("splits", [])}
            for split in splits.values():
                split["shardLengths"] = [int(n) for n in split.get("shardLengths", [])]
            formats = [read.get("fileFormat", "tfrecord"), *read.get("alternativeFileFormats", [])]
        except Exception as error:  # what is no such JSON can raise almost anything
            lack = f"{directory / file} cannot be read ({type(error).__name__})"
            raise FedLPError(_half_prepared(name, base, lack)) from None
    return {"splits": splits, "formats": set(map(str, formats))}


def _named_splits(name: str, splits: dict[str, Any], expression: str) -> list[str]:
    """The splits that occur in an expression, each of which must exist."""
    names = sorted(set(re.findall(r"[^\s+]+", re.sub(r"\[[^\]]*\]?", "", expression))))
    for split in names:
        if split not in splits:
            raise FedLPError(
                f"{name!r} has no split {split!r}{nearest(split, splits) or '.'} It has: "
                f"{', '.join(splits) or 'none'}. Name the two to use, for example "
                "train_split='train[:90%]', test_split='train[90%:]'."
            )
    return names


def _shards(dataset: str, split: dict[str, Any]) -> list[str]:
    """File names of a split's shards that hold anything, in array_record."""
    lengths = split["shardLengths"]
    shards = []
    for i, length in enumerate(lengths):
        file = str(split.get("filepathTemplate") or _SHARD)
        for word, value in {
            "DATASET": dataset,
            "SPLIT": split["name"],
            "FILEFORMAT": "array_record",
            "SHARD_INDEX": f"{i:05d}",
            "NUM_SHARDS": f"{len(lengths):05d}",
            "SHARD_X_OF_Y": f"{i:05d}-of-{len(lengths):05d}",
        }.items():
            file = file.replace(f"{{{word}}}", value)
        if file.startswith("/") or ".." in file.split("/") or not file.isprintable():
            raise FedLPError(
                f"The split {shown(split['name'])} of {dataset!r} says that its files are named "
                f"{shown(file)}, which leads out of its folder; prepare the set again."
            )
        if length:
            shards.append(file)
    return shards


def _build(name: str, base: Path) -> str:
    return (
        "`pip install tensorflow importlib_resources`, then "
        f"`tfds build {name} --file_format=array_record --data_dir={base}`"
    )


def _half_prepared(name: str, base: Path, lack: str) -> str:
    return (
        f"{name!r} is only half prepared: {lack}. Remove what is there and prepare it again where "
        f"there is a network: {_build(name, base)}."
    )


def _not_there(name: str, base: Path, own_names: Collection[str]) -> str:
    prepared = [home.name for home in _subdirectories(base) if _holds_versions(home)]
    held = f"which holds {', '.join(prepared) or 'no prepared set'}"
    return (
        f"No data set {name!r} is prepared under {base} "
        + (f"({held if base.is_dir() else 'there is no such directory'})")
        + (f", nor is it one of this package's own ({', '.join(own_names)})" if own_names else "")
        + (nearest(name, [*own_names, *prepared]) or ".")
        + " If tensorflow-datasets has it, prepare it once where there is a network: "
        + f"{_build(name, base)}. Another directory is named by data_dir= or TFDS_DATA_DIR."
    )
