"""YAML files -> one nested dictionary: parents first, then the file itself, then overrides.

A file may name one or several parents in `extends:`, relative to itself; later parents win over
earlier ones and the file over all of them. Sections are merged field by field, everything else
(lists, the mapping of `algorithm.layers`) is replaced. Where a section changes its kind, the fields
that only the old kind has are left behind.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedlp_jax.config.yaml import parse_yaml
from fedlp_jax.data.files import read_plain
from fedlp_jax.errors import FedLPError, nearest, shown, why

_FILES = 100  # that one configuration may extend, each counted as often as it is named

Raw = dict[str, Any]  # as read: nested, not yet checked
# dropped(section, old kind, new kind) -> the fields which do not survive that change
Dropped = Callable[[str, str, str], set[str]]

# Only these are merged field by field.
SECTIONS = frozenset(
    {
        "data",
        "data.options",
        "partition",
        "model",
        "algorithm",
        "algorithm.client_optimizer",
        "algorithm.server_optimizer",
        "algorithm.privacy",
        "faults",
        "faults.corruption",
        "faults.profile",
        "plan",
        "checkpoint",
    }
)


def read_config(path: str | Path, overrides: Mapping[str, Any] | None, dropped: Dropped) -> Raw:
    """Reads a file with all its parents and lays the overrides over them.

    Args:
      path: a YAML file. A run's `name` is the file's own `name`, or else its stem: it is never
        inherited.
      overrides: dotted field -> value, as `{"algorithm.keep": 0.7}`.
      dropped: says which fields a change of kind leaves behind.

    Raises:
      FedLPError: a file is missing, empty, broken or no mapping, names a key twice, extends itself,
        or extends something outside the folder of the first file.
    """
    top = Path(path)
    raw = {"name": top.stem} | _with_parents(top, _root(top), (), dropped, [])
    for field, value in (overrides or {}).items():
        raw = merge(raw, nest(field, value), dropped)
    return raw


def nest(field: str, value: Any) -> Raw:
    """`("a.b", 1)` -> `{"a": {"b": 1}}`.

    Raises:
      FedLPError: a part of the dotted field is empty.
    """
    parts = field.split(".")
    if not all(parts) or not field.isprintable() or len(parts) > 10:
        raise FedLPError(f"{shown(field)} is not a field: write it as in --algorithm.keep 0.5.")
    for part in reversed(parts):
        value = {part: value}
    return value


def merge(base: Raw, over: Raw, dropped: Dropped, section: str = "") -> Raw:
    """Lays `over` over `base`; neither is changed."""
    result = dict(base)
    old, new = base.get("name"), over.get("name")
    if section and isinstance(old, str) and isinstance(new, str) and old != new:
        result = {k: v for k, v in base.items() if k not in dropped(section, old, new)}
    for key, value in over.items():
        inner = f"{section}.{key}" if section else str(key)
        below = result.get(key)
        if inner in SECTIONS and isinstance(below, dict) and isinstance(value, dict):
            value = merge(below, value, dropped, inner)
        result[key] = value
    return result


def _with_parents(
    path: Path, root: Path, chain: tuple[Path, ...], dropped: Dropped, read: list[Path]
) -> Raw:
    """The file at `path` over its parents.

    `chain` holds the files that led here, `read` all files so far.
    """
    real = _real(path)
    if real in chain:
        circle = " -> ".join(p.name for p in (*chain[chain.index(real) :], real))
        raise FedLPError(f"{path} extends itself: {circle}.")
    read.append(real)
    if len(read) > _FILES:
        raise FedLPError(
            f"{read[0].name} extends more than {_FILES} files, each counted as often as it is "
            "extended; write some of them as one."
        )
    raw = _read(path)
    extends = raw.pop("extends", None)
    parents = [extends] if isinstance(extends, str) else extends or []
    if not isinstance(parents, list) or not all(p and isinstance(p, str) for p in parents):
        raise FedLPError(
            f"{path}: extends is {shown(extends)}, but must be a file name or a list of them."
        )
    base: Raw = {}
    for name in parents:
        parent = path.parent / name
        if not _real(parent).is_relative_to(root):
            raise FedLPError(
                f"{path} extends {_named(name)}, which is outside {root}; a configuration "
                "may only extend files of its own folder or of the configs folder it is in."
            )
        inherited = _with_parents(parent, root, (*chain, real), dropped, read)
        inherited.pop("name", None)
        base = merge(base, inherited, dropped)
    return merge(base, raw, dropped)


def _real(path: Path) -> Path:
    """Where a path leads in the end."""
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # no text, too long, a circle of links
        raise FedLPError(
            f"{_named(path)} cannot be read as a text file: {_cause(error)}."
        ) from None


def _cause(error: Exception) -> str:
    return "its links lead in a circle" if isinstance(error, RuntimeError) else why(error)


def _named(path: Path | str) -> str:
    """A path in a sentence."""
    text = str(path)
    return text if text.isprintable() and len(text) <= 200 else shown(text)


def _root(top: Path) -> Path:
    """The folder no `extends` may leave: the nearest one named configs, or the file's own."""
    folder = _real(top).parent
    named = (p for p in (folder, *folder.parents) if p.name == "configs")
    return next(named, folder)


def _read(path: Path) -> Raw:
    try:
        text = read_plain(path).decode("utf-8-sig")
    except FileNotFoundError:
        if path.is_symlink():
            raise FedLPError(
                f"{path} is a link to {os.readlink(path)}, where nothing is."
            ) from None
        raise FedLPError(f"{_named(path)} does not exist{_nearest_file(path)}") from None
    except (OSError, ValueError) as error:
        raise FedLPError(
            f"{_named(path)} cannot be read as a text file: {_cause(error)}."
        ) from error
    try:
        raw = parse_yaml(text)
    except ValueError as error:
        raise FedLPError(f"{path}{error}.") from None
    if raw is None:
        raise FedLPError(f"{path} is empty; configs/quickstart.yaml is one to start from.")
    if not isinstance(raw, dict):
        what = "a list" if isinstance(raw, list) else "a single value"
        raise FedLPError(f"{path} holds {what}, but must hold fields and values.")
    return raw


def _nearest_file(path: Path) -> str:
    """A hint at a file of the same folder with nearly that name."""
    if not path.parent.is_dir():
        return f", nor does the folder {path.parent}."
    try:
        names = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:  # a folder that may be passed, but not listed
        return "."
    return nearest(path.name, names, lambda name: str(path.parent / name)) or "."
