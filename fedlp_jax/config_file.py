"""YAML files -> one nested dictionary: parents first, then the file itself, then overrides.

A file may name one or several parents in `extends:`, relative to itself; later parents win over
earlier ones and the file over all of them. Sections are merged field by field, everything else
(lists, the mapping of `algorithm.layers`) is replaced. Where a section changes its kind, the fields
that only the old kind has are left behind.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedlp_jax.types import FedLPError, nearest

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
    raw = {"name": top.stem} | _with_parents(top, _root(top), (), dropped)
    for field, value in (overrides or {}).items():
        raw = merge(raw, nest(field, value), dropped)
    return raw


def nest(field: str, value: Any) -> Raw:
    """`("a.b", 1)` -> `{"a": {"b": 1}}`.

    Raises:
      FedLPError: a part of the dotted field is empty.
    """
    parts = field.split(".")
    if not all(parts):
        raise FedLPError(f"'{field}' is not a field: write it as in --algorithm.keep 0.5.")
    for part in reversed(parts):
        value = {part: value}
    return value


def parse_value(text: str) -> Any:
    """One value of the command line, read as YAML: `0.5`, `[64, 32]`, `null`, `uniform`.

    Raises:
      FedLPError: the text is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise FedLPError(f"'{text}' cannot be read as a YAML value; quote it.") from error


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


def _with_parents(path: Path, root: Path, chain: tuple[Path, ...], dropped: Dropped) -> Raw:
    """The file at `path` over its parents; `chain` holds the files that led here."""
    real = path.resolve()
    if real in chain:
        circle = " -> ".join(p.name for p in (*chain[chain.index(real) :], real))
        raise FedLPError(f"{path} extends itself: {circle}.")
    raw = _read(path)
    extends = raw.pop("extends", None)
    parents = [extends] if isinstance(extends, str) else extends or []
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise FedLPError(
            f"{path}: extends is {extends!r}, but must be a file name or a list of them."
        )
    base: Raw = {}
    for name in parents:
        parent = path.parent / name
        if not parent.resolve().is_relative_to(root):
            raise FedLPError(
                f"{path} extends {name}, which is outside {root}; a configuration may only extend "
                "files of its own folder or of the configs folder it is in."
            )
        inherited = _with_parents(parent, root, (*chain, real), dropped)
        inherited.pop("name", None)
        base = merge(base, inherited, dropped)
    return merge(base, raw, dropped)


def _root(top: Path) -> Path:
    """The folder no `extends` may leave: the nearest one named configs, or the file's own."""
    folder = top.resolve().parent
    named = (p for p in (folder, *folder.parents) if p.name == "configs")
    return next(named, folder)


def _read(path: Path) -> Raw:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FedLPError(f"{path} does not exist{_nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FedLPError(f"{path} cannot be read as a text file: {error}.") from error
    try:
        raw = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise FedLPError(f"{path}{line} is not valid YAML: {error.problem}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FedLPError(f"{path} is not valid YAML: {error}.") from error
    if raw is None:
        raise FedLPError(f"{path} is empty; configs/quickstart.yaml is one to start from.")
    if not isinstance(raw, dict):
        raise FedLPError(f"{path} holds a {type(raw).__name__}, but must hold fields and values.")
    return raw


def _nearest_file(path: Path) -> str:
    """A hint at a file of the same folder with nearly that name."""
    if not path.parent.is_dir():
        return f", nor does the folder {path.parent}."
    names = [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    return nearest(path.name, names, lambda name: str(path.parent / name)) or "."


class _Loader(yaml.SafeLoader):
    """The safe loader, which also refuses a key given twice and reads `1e-3` as a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} is not text", problem_mark=key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key '{key}' is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot and a sign in a number with an exponent; nobody writes 1.0e-3.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)
