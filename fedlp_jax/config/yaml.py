"""YAML text -> plain Python values, whoever wrote it: bounded in size, depth and what aliases add.

Only the plain types of YAML are made: a tag that names anything else is refused, as is a key given
twice. An alias may repeat a value, but not contain itself, nor multiply until no memory is left: a
few hundred bytes of aliases to aliases stand for billions of values.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from fedlp_jax.errors import FedLPError, shown, why

_DEPTH, _VALUES = 40, 500_000  # the most of a file: levels, and values once aliases are filled in


def parse_yaml(text: str) -> Any:
    """The values of a text.

    Raises:
      ValueError: it is not YAML, or beyond the bounds; the message says where, after `line N` if
        that is known.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = error.problem or "it cannot be parsed"
        if problem.startswith("but "):
            problem = f"{error.context}, {problem}"
        raise ValueError(f"{line} is not valid YAML: {' '.join(problem.split())}") from None
    except Exception as error:  # scalars with a tag they do not fit raise whatever comes
        told = isinstance(error, yaml.YAMLError | ValueError | OverflowError)
        said = why(error) if told else "a value does not fit its tag"
        raise ValueError(f" is not valid YAML: {said}") from None


def to_yaml(value: Any) -> str:
    """Plain values as text that `parse_yaml` reads as the same ones."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_value(text: str) -> Any:
    """One value of the command line, read as YAML: `0.5`, `[64, 32]`, `null`, `uniform`.

    Raises:
      FedLPError: the text is not YAML.
    """
    try:
        return parse_yaml(text)
    except ValueError:
        raise FedLPError(f"{shown(text)} cannot be read as a YAML value; quote it.") from None


class _Loader(yaml.SafeLoader):
    """The safe loader with the bounds; it also reads `1e-3` as a number."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # by node: how many values it stands for

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > _DEPTH:
            self._refuse(f"it is nested more than {_DEPTH} levels deep", self.peek_event())
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None
        node = super().compose_node(parent, index)
        self._depth -= 1
        if id(node) not in self._sizes:
            if alias is not None:  # its node is not complete yet
                self._refuse("an alias contains itself", alias)
            self._sizes[id(node)] = self._size(node)
        return node

    def _size(self, node: Any) -> int:
        """How many values a node stands for, once aliases are filled in."""
        below: list[Any] = []
        if isinstance(node, yaml.CollectionNode):
            for entry in node.value:
                below += entry if isinstance(entry, tuple) else [entry]
        size = 1 + sum(self._sizes[id(one)] for one in below)
        if size > _VALUES:
            self._refuse(f"its aliases stand for more than {_VALUES:,} values", node)
        return size

    @staticmethod
    def _refuse(problem: str, at: Any) -> None:
        raise yaml.composer.ComposerError(problem=problem, problem_mark=at.start_mark)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            problem = "is given twice" if isinstance(key, str) and key in seen else ""
            if not isinstance(key, str) or not key or not key.isprintable():
                problem = "is not text" if not isinstance(key, str) else "is no name"
            if problem:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {shown(key)} {problem}", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """The safe dumper, which quotes what the loader would take for a number."""


# Numbers as everybody writes them. To YAML 1.1, 1e-3 is text, 010 is eight and 1:30 is ninety.
_NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)",
    "float": r"[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}
for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {
        first: [(tag, found) for tag, found in known if tag.rsplit(":")[-1] not in _NUMBERS]
        for first, known in yaml.resolver.Resolver.yaml_implicit_resolvers.items()
    }
    for _name, _pattern in _NUMBERS.items():
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), list("-+.0123456789")
        )
