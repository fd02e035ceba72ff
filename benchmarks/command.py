"""The common options of all commands, and the file that they write."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.machine import machine


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of every command; its help is the docstring of its module."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    parser.add_argument("--smoke", action="store_true", help="run tiny sizes, as a test")
    return parser


def write(file: str | None, result: dict[str, Any]) -> None:
    """Writes a result with processor, versions and commit, if a file is named."""
    if file:
        save(file, result | machine())


def save(file: str, result: dict[str, Any]) -> None:
    """Writes a result that already says where it was measured."""
    Path(file).write_text(json.dumps(result, indent=2) + "\n")
