"""A plan put into a configuration file, and every other byte of it left as it is."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedlp_jax.config.schema import Config, load_config
from fedlp_jax.errors import FedLPError
from fedlp_jax.execution.map_clients import Plan

Edit = tuple[int, int, str]  # characters from, up to, and what takes their place


def write_plan(path: str | Path, plan: Plan) -> None:
    """Puts a plan into a configuration file: fields of `plan:` are changed or added, nothing else.

    Args:
      path: a YAML file.
      plan: its open fields are left as the file has them.

    Raises:
      FedLPError: the file is written in a way that this cannot change safely, or is not to be
        written; it is then as before.
    """
    _replace(Path(path), plan, really=True)


def check_writable(path: str | Path) -> None:
    """Refuses what `write_plan` would, before anything is measured.

    Raises:
      FedLPError: with the reason.
    """
    _replace(Path(path), Plan(1, 1), really=False)


def _replace(path: Path, plan: Plan, really: bool) -> None:
    fields = {k: v for k, v in dataclasses.asdict(plan).items() if v is not None}
    section = "\n".join(["plan:", *(f"  {key}: {value}" for key, value in fields.items())])
    advice = f"; write it yourself as\n{section}" if really else ""
    before = load_config(path)
    try:
        if not path.stat().st_mode & 0o222:
            raise FedLPError(f"{path} is read-only, so no plan can be put into it{advice}")
        text = path.read_bytes().decode("utf-8")
        changed = _with_fields(text, fields)
        with _beside(path, changed) as candidate:
            if changed is None or _reads_otherwise(candidate, before, fields):
                raise FedLPError(
                    f"{path} is written in a way that its plan cannot be changed without touching "
                    f"other lines{advice}"
                )
            if really:
                os.replace(candidate, path.resolve())
    except OSError as error:
        raise FedLPError(f"{path} cannot be written ({error}){advice}") from error


def _with_fields(text: str, fields: Mapping[str, Any]) -> str | None:
    """The text with these fields in its plan; None where there is no place for them."""
    root = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return None
    newline = "\r\n" if "\r\n" in text else "\n"
    sections = [value for key, value in root.value if key.value == "plan"]
    if not sections:
        flow = "{" + ", ".join(f"{k}: {v}" for k, v in fields.items()) + "}"
        if root.flow_style:
            edits = [_into_braces(text, root, {"plan": flow})]
        else:
            indent = " " * root.start_mark.column
            lines = [f"{indent}plan:", *(f"{indent}  {k}: {v}" for k, v in fields.items())]
            gap = newline if text.endswith("\n") else 2 * newline
            edits = [(len(text), len(text), gap + newline.join(lines) + newline)]
    elif isinstance(sections[0], yaml.MappingNode):
        edits = _of_section(text, sections[0], fields, newline)
    else:  # null
        flow = " {" + ", ".join(f"{k}: {v}" for k, v in fields.items()) + "}"
        edits = [_instead(sections[0], flow)]
    for start, stop, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[stop:]
    return text


def _of_section(
    text: str, section: yaml.MappingNode, fields: Mapping[str, Any], newline: str
) -> list[Edit]:
    """The changes to a plan that has fields already."""
    there = {key.value: value for key, value in section.value}
    edits = [_instead(there[key], f" {value}") for key, value in fields.items() if key in there]
    missing = {key: value for key, value in fields.items() if key not in there}
    if missing and section.flow_style:
        edits.append(_into_braces(text, section, missing))
    elif missing:
        last = section.value[-1][1].end_mark.index
        line_end = text.find("\n", last)
        line_end = len(text) if line_end < 0 else line_end - (newline == "\r\n")
        indent = newline + " " * section.value[0][0].start_mark.column
        edits.append((line_end, line_end, "".join(f"{indent}{k}: {v}" for k, v in missing.items())))
    return edits


def _instead(node: yaml.Node, value: str) -> Edit:
    """In the place of a scalar; `value` begins with a blank, for a place that is empty."""
    start, stop = node.start_mark.index, node.end_mark.index
    return start, stop, value if start == stop else value.strip()


def _into_braces(text: str, mapping: yaml.MappingNode, fields: Mapping[str, Any]) -> Edit:
    """At the end of a mapping in braces."""
    at = mapping.end_mark.index - 1
    words = ", ".join(f"{key}: {value}" for key, value in fields.items())
    comma = "" if not mapping.value or text[:at].rstrip().endswith(",") else ", "
    return at, at, comma + words


@contextlib.contextmanager
def _beside(path: Path, text: str | None) -> Iterator[Path]:
    """A file with this text in the same folder, which is gone at the end unless it was moved."""
    path = path.resolve()
    handle, name = tempfile.mkstemp(suffix=path.suffix, prefix=f".{path.stem}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write((text or "").encode())
        os.chmod(name, path.stat().st_mode & 0o7777)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _reads_otherwise(candidate: Path, before: Config, fields: Mapping[str, Any]) -> bool:
    """Whether a changed file means anything but the one before with this plan."""
    try:
        after = load_config(candidate)
    except FedLPError:
        return True
    name = {"name": before.name}  # that of the file, where none is given
    wanted = before.model_copy(update={"plan": before.plan.model_copy(update=fields)} | name)
    return after.model_copy(update=name) != wanted
