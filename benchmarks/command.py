"""The common options of all commands, and the file that they write."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from fedlp_jax.data.files import replacing
from fedlp_jax.errors import why


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of every command; its help is the docstring of its module."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", type=_writable, help="write the results here")
    parser.add_argument("--smoke", action="store_true", help="run tiny sizes, as a test")
    return parser


def write(file: str | None, result: dict[str, Any]) -> None:
    """Writes a result with processor, versions and commit, if a file is named."""
    if file:
        save(file, result | machine())


def save(file: str, result: dict[str, Any]) -> None:
    """Writes a result that already says where it was measured; a kill leaves the file before it."""
    with replacing(Path(file)) as opened:
        opened.write(f"{json.dumps(result, indent=2)}\n".encode())


def _writable(file: str) -> str:
    """The name of a file, tried before minutes are spent on what it shall hold."""
    path = Path(file)
    try:
        if path.exists():
            path.open("ab").close()
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{file} cannot be written ({why(error)}); name another file."
        ) from None
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{file} is a device or a pipe; name a file.")
    return file
