"""What is said about a configuration that does not pass: one sentence for each problem.

The dotted field comes first, then the value and what it may be, or the nearest field or kind that
is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from fedlp_jax.errors import nearest, shown

_SHOWN = 10  # problems; whoever has more has given another file

# dotted section -> kind -> class; a section of one kind only has the kind ""
Kinds = dict[str, dict[str, type[BaseModel]]]


def section_kinds(root: type[BaseModel]) -> Kinds:
    """All sections that a configuration may have, by dotted name; the root is ""."""
    kinds: Kinds = {"": {"": root}}
    _collect(root, "", kinds)
    return kinds


def sentences(error: ValidationError, raw: Mapping[str, Any], kinds: Kinds) -> list[str]:
    """One sentence for each problem, in the order of the fields."""
    problems = error.errors(include_url=False)
    said = [_sentence(one, raw, kinds) for one in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        said.append(f"there are {len(problems) - _SHOWN} more problems like these.")
    return list(dict.fromkeys(said))


def _sentence(problem: Any, raw: Mapping[str, Any], kinds: Kinds) -> str:
    parts = _parts(problem["loc"], kinds)
    field = _plain(".".join(parts))
    value = problem.get("input")
    match problem["type"]:
        case "refused":
            return _refused(field, problem["msg"])
        case "extra_forbidden":
            return _unknown_field(".".join(parts[:-1]), parts[-1], raw, kinds)
        case "missing":
            return f"{field} is missing."
        case "union_tag_not_found":
            return f"{field}.name is missing: it may be {_listed(kinds[field])}."
        case "union_tag_invalid":
            tag = problem["input"].get("name") if isinstance(value, dict) else problem["ctx"]["tag"]
            hint = nearest(tag, kinds[field]) or f": it may be {_listed(kinds[field])}."
            return f"{field}.name is {shown(tag)}, which is not known{hint}"
        case "model_type" | "model_attributes_type" | "dict_type":
            hint = f"; to choose a kind set {field}.name" if len(kinds.get(field, "")) > 1 else ""
            return f"{field} is {shown(value)}, but must be a section with fields of its own{hint}."
        case _:
            return f"{field} is {shown(value)}: {problem['msg']}."


def _plain(field: str) -> str:
    """A field in a sentence: as it is, unless it is long or has what cannot be printed."""
    return field if field.isprintable() and len(field) <= 100 else shown(field)


def _refused(field: str, predicate: str) -> str:
    """`keep` and `is 2, ...`, or `keep` and `[1] is 2, ...` about one entry of a list."""
    space = "" if predicate.startswith("[") or not field else " "
    return f"{field}{space}{predicate}" + ("" if predicate.endswith("?") else ".")


def _unknown_field(section: str, leaf: str, raw: Mapping[str, Any], kinds: Kinds) -> str:
    field = _plain(f"{section}.{leaf}".strip("."))
    if "." in leaf:
        return (
            f"{shown(leaf)} is written with dots, which is for the command line; nest it in a file."
        )
    here = kinds[section]
    kind = _kind_of(section, raw, kinds)
    whole = f"'{kind}'" if kind else (f"section {section}" if section else "a configuration")
    others = [name for name, model in here.items() if leaf in model.model_fields]
    if others:
        return f"{field} is not a field of {whole}, only of {_listed(others)}."
    own = here[kind].model_fields
    hint = nearest(leaf, own) or _nearest_elsewhere(leaf, kinds)
    return f"{field} is not a field of {whole}" + (hint or f": it has {_listed(own, 'and')}.")


def _nearest_elsewhere(leaf: str, kinds: Kinds) -> str:
    """A hint at a field of another section with exactly or nearly that name."""
    full = {
        name: f"{section}.{name}".strip(".")
        for section, models in reversed(kinds.items())
        for model in models.values()
        for name in model.model_fields
    }
    return nearest(leaf, full, full.__getitem__)


def _kind_of(section: str, raw: Mapping[str, Any], kinds: Kinds) -> str:
    """The kind that the raw section says it is, "" where there is only one."""
    value: Any = raw
    for part in section.split(".") if section else ():
        value = value.get(part) if isinstance(value, Mapping) else None
    name = value.get("name") if isinstance(value, Mapping) else None
    return name if isinstance(name, str) and name in kinds[section] else ""


def _parts(loc: tuple[int | str, ...], kinds: Kinds) -> list[str]:
    """Pydantic's place of an error without the kinds it names on the way."""
    parts: list[str] = []
    named: set[str] = set()
    for part in map(str, loc):
        section = ".".join(parts)
        if part and part in kinds.get(section, ()) and section not in named:
            named.add(section)
        else:
            parts.append(part)
    return parts


def _collect(model: type[BaseModel], section: str, kinds: Kinds) -> None:
    for name, info in model.model_fields.items():
        inner = f"{section}.{name}".strip(".")
        for part in _models(info.annotation):
            tag = get_args(part.model_fields["name"].annotation) if _named(part) else ()
            kinds.setdefault(inner, {})[tag[0] if tag else ""] = part
            _collect(part, inner, kinds)


def _named(model: type[BaseModel]) -> bool:
    return "name" in model.model_fields


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The sections within a type: `A | B | None` -> [A, B]."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _listed(words: Any, last: str = "or") -> str:
    *first, end = words
    return f"{', '.join(first)} {last} {end}" if first else str(end)
