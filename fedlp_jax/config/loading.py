"""YAML files -> a checked `Config`: parents first, then the file itself, then overrides.

A file names its parents in `extends:`, relative to itself; later parents win over earlier ones, and
the file over all of them. Sections are merged field by field, anything else is replaced. A section
that changes its kind (`name`) loses the fields that only the old kind has.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from fedlp_jax.config.own import is_own
from fedlp_jax.config.schema import KINDS, Config
from fedlp_jax.data.files import read_plain, replacing
from fedlp_jax.errors import FedLPError, nearest, shown, why
from fedlp_jax.execution.plan import Plan

EXAMPLES = Path(__file__).parent / "configs"  # in a checkout, a link to the configs at its top
Raw = dict[str, Any]  # a file's content: nested, not yet checked
_WORDS = {
    "a valid tuple": "a list",
    "a valid dictionary": "a section",
    "a valid string": "text",
    "a valid boolean": "true or false",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "Field required": "is missing",
}  # pydantic's -> YAML's
_REPLACED = {"keep", "layers", "aggregator"}  # mappings that are one value, and never merged


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads a YAML file and all that it extends, and checks the result.

    Args:
      path: the file, or the name of an example, see `located`. The stem of the file is the run's
        `name` unless it gives one; no parent does.
      overrides: dotted field -> value, laid over the file: `{"algorithm.keep": 0.7}`.

    Raises:
      FedLPError: one sentence for each problem, with the dotted field.
    """
    path = located(path)
    raw = {"name": path.stem} | _with_parents(path, _root(path), ())
    for field, value in (overrides or {}).items():
        raw = merge(raw, _nested(field, value))
    return parse_config(raw, source=str(path))


def located(path: str | Path) -> Path:
    """The file of a configuration.

    Args:
      path: of a file, or the name of an example that comes with the package, such as "quickstart"
        or "paper/homo-0.5-iid". A file of that name goes first.
    """
    path = Path(path).expanduser()
    example = EXAMPLES / f"{path}.yaml"
    named = not path.is_absolute() and ".." not in path.parts and not path.is_file()
    return example if named and example.is_file() else path


def parse_config(raw: Mapping[str, Any], source: str = "") -> Config:
    """Checks a nested dictionary.

    Args:
      raw: what a YAML file would give.
      source: the name of the file, for the messages.

    Raises:
      FedLPError: one sentence for each problem, with the dotted field.
    """
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        sentences = _sentences(error, raw)
    raise FedLPError("\n".join(f"{source}: {one}" if source else one for one in sentences))


def dump_config(config: Config) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one."""
    text = io.StringIO()
    YAML().dump(config.model_dump(mode="json"), text)
    return text.getvalue()


def parse_yaml(text: str | bytes) -> Any:
    """The values of YAML 1.2 text: 1e-3 is a number, 010 is ten, no key comes twice.

    Raises:
      FedLPError: the text is not YAML, or asks for an object of a Python class.
    """
    try:
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise FedLPError(f"not valid YAML: {line}{error.problem or error.context}") from None
    except Exception as error:  # text that is not UTF-8, a bad date, nesting without end
        raise FedLPError(f"not valid YAML: {why(error)}") from None


def parse_value(text: str) -> Any:
    """One value of the command line: `0.5`, `[64, 32]`, `null`, `uniform`.

    Raises:
      FedLPError: the text is not YAML.
    """
    try:
        return parse_yaml(text)
    except FedLPError as error:
        raise FedLPError(f"{shown(text)} is {error}; quote it.") from None


def split_words(words: Iterable[str]) -> tuple[str, dict[str, Any]]:
    """Splits the words of a command line into the file and its `--any.field VALUE` pairs.

    Returns:
      `(path, {dotted field: value})`; values are YAML.

    Raises:
      FedLPError: a field without a value, or not exactly one file.
    """
    files: list[str] = []
    overrides: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            files.append(os.path.expanduser(word))
            continue
        field, equals, value = word[2:].partition("=")
        value = value if equals else next(rest, "--")
        if value.startswith("--"):
            raise FedLPError(f"--{field[:100]} needs a value, as in --algorithm.keep 0.5.")
        overrides[field] = value if field == "name" else parse_value(value)
    if len(files) != 1:
        raise FedLPError(f"give one configuration, not {len(files)}: {shown(files)}.")
    return files[0], overrides


def merge(base: Raw, over: Raw, section: str = "") -> Raw:
    """Lays `over` over `base`; neither is changed."""
    kinds, old, new = KINDS.get(section, {}), base.get("name"), over.get("name", base.get("name"))
    if new != old and section == "data":
        base = {key: value for key, value in base.items() if key != "options"}
    elif new != old and all(isinstance(name, str) and name in kinds for name in (old, new)):
        lost = kinds[old].model_fields.keys() - kinds[new].model_fields.keys()
        base = {key: value for key, value in base.items() if key not in lost}
    elif new != old and kinds and (is_own(old) or is_own(new)):
        base = {}  # the fields of a user's function are known once it is imported
    result = base | over
    for key in base.keys() & over.keys() - _REPLACED:
        if isinstance(base[key], dict) and isinstance(over[key], dict):
            result[key] = merge(base[key], over[key], f"{section}.{key}".strip("."))
    return result


def write_plan(path: str | Path, plan: Plan) -> None:
    """Puts the fields of a plan that are not None into a file's `plan:`; comments stay.

    Raises:
      FedLPError: the file cannot be read or written.
    """
    path = Path(path).expanduser()
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 1000
    try:
        raw = yaml.load(path.read_text("utf-8"))
        raw["plan"] = raw.get("plan") or {}
        raw["plan"].update({k: v for k, v in vars(plan).items() if v is not None})
        with replacing(path.resolve()) as file:
            yaml.dump(raw, file)
    except OSError as error:
        raise FedLPError(f"{path} cannot be written: {why(error)}.") from error


def _nested(field: str, value: Any) -> Raw:
    """`("a.b", 1)` -> `{"a": {"b": 1}}`."""
    parts = field.split(".")
    if not all(parts):
        raise FedLPError(f"{shown(field)} is not a field: write it as in --algorithm.keep 0.5.")
    for part in reversed(parts):
        value = {part: value}
    return value


def _with_parents(path: Path, root: Path, children: tuple[Path, ...]) -> Raw:
    """A file over its parents; `children` are the files that led here."""
    if path.resolve() in children:
        raise FedLPError(f"{path} extends itself, through {children[-1].name}.")
    raw = _read(path)
    extends = raw.pop("extends", None) or []
    parents = [extends] if isinstance(extends, str) else extends
    if not isinstance(parents, list) or not all(isinstance(one, str) for one in parents):
        raise FedLPError(f"{path}: extends must be a file name or a list of them (got {extends}).")
    base: Raw = {}
    for parent in parents:
        if not (path.parent / parent).resolve().is_relative_to(root):
            raise FedLPError(
                f"{path} extends {parent}, which is outside {root}; a configuration extends files "
                "of its own folder, or of the folder configs that it is in."
            )
        if not (path.parent / parent).exists():
            near = nearest(parent, [p.name for p in path.parent.glob("*.y*ml")])
            raise FedLPError(
                f"{path} extends {parent}, which is no file of {path.parent}"
                f"{near or '; copy it there, or give another.'}"
            )
        inherited = _with_parents(path.parent / parent, root, (*children, path.resolve()))
        inherited.pop("name", None)
        base = merge(base, inherited)
    return merge(base, raw)


def _examples(name: Path) -> str:
    """A hint at the examples of the package."""
    names = sorted(str(p.relative_to(EXAMPLES).with_suffix("")) for p in EXAMPLES.rglob("*.yaml"))
    shown = ", ".join(name for name in names if not name.startswith("paper/"))
    return f"{nearest(name, names) or '.'} The package has these examples: {shown}, paper/..."


def _root(path: Path) -> Path:
    """The folder that no `extends` may leave: the nearest one named configs, or the file's own."""
    folder = path.resolve().parent
    return next((p for p in (folder, *folder.parents) if p.name == "configs"), folder)


def _read(path: Path) -> Raw:
    try:
        raw = parse_yaml(read_plain(path))
    except FileNotFoundError:
        hint = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")])
        if not hint and not path.suffix:
            hint = _examples(path)
        raise FedLPError(f"{path} does not exist{hint or '.'}") from None
    except OSError as error:
        raise FedLPError(f"{path} cannot be read: {why(error)}.") from None
    except FedLPError as error:
        raise FedLPError(f"{path} is {error}.") from None
    if not isinstance(raw, dict):
        raise FedLPError(
            f"{path} holds {shown(raw)}, not fields and values; start from configs/quickstart.yaml."
        )
    return raw


def _sentences(error: ValidationError, raw: Any) -> Iterable[str]:
    """`field: message (got value)` for each field that has a problem."""
    problems: dict[str, list[Any]] = {}
    for problem in error.errors(include_url=False):
        problems.setdefault(_field(problem, raw), []).append(problem)
    for field, several in problems.items():
        if any(other.startswith(f"{field}.") for other in problems):
            continue  # it failed as another type, too; the inner problem says more
        message = " or ".join(dict.fromkeys(map(_message, several)))
        message = message.replace(" or must be ", " or ")
        shows_value = several[0]["type"] not in ("missing", "value_error")
        got = f" (got {shown(several[0]['input'])})" if shows_value else ""
        if several[0]["type"] == "literal_error":
            choices = several[0]["ctx"]["expected"].replace(" or ", ", ").split(", ")
            got += nearest(several[0]["input"], [choice.strip("'") for choice in choices])
        sentence = f"{field}{': ' if field else ''}{message}{got}"
        yield sentence if sentence.endswith(("?", ".")) else f"{sentence}."


def _message(problem: Any) -> str:
    """What pydantic says, in the words of YAML."""
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    if problem["type"] in ("model_type", "model_attributes_type"):
        return "must be a section"
    message = problem["msg"].replace("Input should be", "must be")
    for python, yaml in _WORDS.items():
        message = message.replace(python, yaml)
    return message[0].lower() + message[1:]


def _field(problem: Any, raw: Any) -> str:
    """The dotted field of a problem, without the types that pydantic tried on the way to it."""
    parts, value = [], raw
    for part in problem["loc"]:
        in_list = isinstance(value, list) and isinstance(part, int)
        if in_list or (isinstance(value, dict) and part in value):
            parts.append(str(part) if str(part).isprintable() else ascii(part))
            value = value[part]
    if problem["type"] == "missing":
        parts.append(str(problem["loc"][-1]))
    return ".".join(parts)
