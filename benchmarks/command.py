"""What the commands here share: their options, and the file they write."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.machine import machine


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Options that every command has; its help is the module's docstring."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    return parser


def write(file: str | None, result: dict[str, Any]) -> None:
    """Writes a result with processor, versions and commit, if a file is wanted."""
    if file:
        save(file, result | machine())


def save(file: str, result: dict[str, Any]) -> None:
    """Writes a result that says itself where it was measured."""
    Path(file).write_text(json.dumps(result, indent=2) + "\n")
