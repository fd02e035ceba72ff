"""Hostile input: a table of cases, each refused in a sentence, and the page that shows them.

    python -m tests.hostile [--page docs/hostile-inputs.md]

A case prepares a folder that holds a good configuration, its data and a run with two checkpoints,
then acts in it: words of the command, or a function. What it says, its exit code, its seconds and
what it changed in the folder are its outcome.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import io
import os
import pickle
import platform
import resource
import shutil
import signal
import struct
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import typer.testing
import yaml

import fedlp_jax as fl
from fedlp_jax import cli
from fedlp_jax.config import experiment, resumption
from fedlp_jax.config.problem import section_kinds
from fedlp_jax.config.schema import Config, load_config, parse_config
from fedlp_jax.data import archive
from fedlp_jax.data import builtin as embedded
from fedlp_jax.data.holdings import Partition
from fedlp_jax.errors import FedLPError
from fedlp_jax.execution import map_clients as placement
from fedlp_jax.reporting import run_directory as report
from fedlp_jax.simulation import validation as checks
from fedlp_jax.simulation.run import Simulation

SECONDS = 20  # after which a case counts as hanging; the slowest takes about one
PAGE = Path(__file__).parents[1] / "docs" / "hostile-inputs.md"
GOOD = {
    "data": {"name": "own.npz"},
    "partition": {"name": "iid", "clients": 6},
    "model": {"name": "logistic"},
    "algorithm": {
        "name": "fedlp_homo",
        "keep": 0.5,
        "client_optimizer": {"name": "sgd", "learning_rate": 0.1},
    },
    "rounds": 2,
    "cohort": 3,
    "eval_every": 1,
    "plan": {"devices": 1, "width": 1},
    "checkpoint": {"every": 1, "keep": 2},
}


class Case(NamedTuple):
    """One hostile input."""

    group: str
    name: str
    prepare: Callable[[], Any]
    act: tuple[str, ...] | Callable[[], Any]
    code: int = 2  # exit code; 0 = goes on with a warning


class Outcome(NamedTuple):
    """What became of it."""

    code: int
    said: str
    seconds: float
    changed: list[str]  # files of the folder


# --- values of configuration fields, from the schema ------------------------------------------

VALUES: dict[str, Any] = {
    "text": "nonsense",
    "empty text": "",
    "NUL": "\0",
    "a path": "../../etc/passwd",
    "-1": -1,
    "1.5": 1.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "minus infinity": float("-inf"),
    "1e200": 1e200,
    "1e-320": 1e-320,
    "10^400": 10**400,
    "2^31": 2**31,
    "true": True,
    "null": None,
    "[]": [],
    "[[]]": [[]],
    "[1, [2]]": [1, [2]],
    "{}": {},
    "{a: 1}": {"a": 1},
    "a list of a text": ["nonsense"],
    "a long text": "x" * 100_000,
    "bytes": b"\xff",
}
# What a section needs beside its name to be good.
_NEEDS = {
    "dirichlet": {"clients": 6, "alpha": 1.0},
    "quantity": {"clients": 6, "alpha": 1.0},
    "iid": {"clients": 6},
    "shards": {"clients": 6},
    "mixed": {"clients": 6},
    "fedlp_homo": GOOD["algorithm"],
    "fedavg": {"client_optimizer": {"name": "sgd", "learning_rate": 0.1}},
    "fedlp_hetero": {"client_optimizer": {"name": "sgd", "learning_rate": 0.1}, "depths": 1},
    "corruption": {"kind": "nan", "share": 0.1},
    "profile": {"compute": 1.0, "download": 1.0, "upload": 1.0},
    "privacy": {"clip": 1.0, "noise_multiplier": 1.0},
}


def fields() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every field of every kind of every section: `(dotted field, kind, a good configuration)`."""
    for section, kinds in section_kinds(Config).items():
        for kind, model in kinds.items():
            last = section.rsplit(".", maxsplit=1)[-1]
            good: dict[str, Any] = dict(_NEEDS.get(kind or last, {}))
            if kind:
                good["name"] = kind
                if "learning_rate" in model.model_fields:
                    good["learning_rate"] = 0.1
            if section == "data":
                good = {"name": "digits"}
            raw = _laid(GOOD, section, good) if section else GOOD
            parse_config(raw)
            for field in model.model_fields:
                yield f"{section}.{field}".strip("."), kind, raw


def _laid(raw: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """A copy of `raw` with one dotted field set."""
    first, _, rest = dotted.partition(".")
    below = raw.get(first) or {}
    return raw | {first: _laid(below, rest, value) if rest else value}


def try_field(field: str, raw: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """What is said of every value of `VALUES` in a field, and the values that are accepted."""
    said, accepted = {}, []
    for name, value in VALUES.items():
        try:
            parse_config(_laid(raw, field, value), source="h.yaml")
        except FedLPError as error:
            said[name] = str(error)
        else:
            accepted.append(name)
    return said, accepted


# --- configuration files ----------------------------------------------------------------------


def _file(content: str | bytes, name: str = "h.yaml") -> Callable[[], Any]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda: Path(name).write_bytes(data)


def _config(**over: Any) -> str:
    return yaml.safe_dump(GOOD | over)


def _more(line: str) -> Callable[[], Any]:
    return _file(_config() + line + "\n")


def _without(key: str, line: str) -> Callable[[], Any]:
    """The good file with another line in place of a field."""
    return _file(line + "\n" + yaml.safe_dump({k: v for k, v in GOOD.items() if k != key}))


def _bomb(key: str, depth: int = 9) -> Callable[[], Any]:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth)]
    return _without(key, "\n".join([*lines, f"{key}: *a{depth - 1}"]))


def _chain() -> None:
    for i in range(500):
        Path(f"c{i}.yaml").write_text(f"extends: c{i + 1}.yaml\n")
    Path("h.yaml").write_text("extends: c0.yaml\n")


def _fan() -> None:
    for i in range(30):
        Path(f"f{i}.yaml").write_text(f"extends: [f{i + 1}.yaml, f{i + 1}.yaml]\n")
    Path("f30.yaml").write_text(_config())
    Path("h.yaml").write_text("extends: f0.yaml\n")


def _beside(make: Callable[[Path], Any]) -> Callable[[], Any]:
    """A good file that extends `other.yaml`, which is made by a function."""

    def prepare() -> None:
        Path("h.yaml").write_text(_config(extends="other.yaml"))
        make(Path("other.yaml"))

    return prepare


def _outside(path: Path) -> None:
    Path("..", "secret.yaml").write_text("seed: 1\n")
    path.symlink_to(Path("..", "secret.yaml"))


RUN = ("run", "h.yaml", "--out", "out")
NOTHING: Callable[[], Any] = lambda: None  # noqa: E731


def _files() -> Iterator[Case]:
    deep = 5000
    contents: dict[str, Callable[[], Any]] = {
        "billion laughs in a number": _bomb("rounds"),
        "billion laughs in a list": _bomb("cohort"),
        "billion laughs in an unknown field": _bomb("zzz"),
        "an alias that contains itself, in a list": _more("zzz: &r [*r]"),
        "an alias that contains itself, in a section": _without("plan", "plan: &p {devices: *p}"),
        "the whole file within itself": _file("&a\nrounds: *a\n"),
        "a merge key of itself": _more("zzz: &a\n  <<: *a"),
        "an alias of nothing": _more("zzz: *nobody"),
        "lists nested 5,000 deep": _more(f"zzz: {'[' * deep}{']' * deep}"),
        "mappings nested 5,000 deep": _more(f"zzz: {'{a: ' * deep}1{'}' * deep}"),
        "lists that are never closed": _more(f"zzz: {'[' * deep}"),
        "the tag !!python/object/apply": _more("zzz: !!python/object/apply:os.system ['touch x']"),
        "the tag !!python/object/new": _more("zzz: !!python/object/new:os.system ['touch x']"),
        "the tag !!python/name": _more("zzz: !!python/name:os.system"),
        "the tag !!python/module": _more("zzz: !!python/module:os"),
        "an unknown tag": _more("zzz: !secret 1"),
        "!!int of a text": _more("zzz: !!int abc"),
        "!!float of a text": _more("zzz: !!float abc"),
        "!!bool of a text": _more("zzz: !!bool abc"),
        "!!timestamp of a text": _more("zzz: !!timestamp abc"),
        "!!binary of a text": _more("zzz: !!binary é"),
        "!!map of a list": _more("zzz: !!map [1]"),
        "!!omap of a list": _more("zzz: !!omap [a]"),
        "a day that is none": _more("zzz: 2024-99-99"),
        "a number of 5,000 digits": _without("rounds", f"rounds: {'9' * 5000}"),
        "a number of 400 digits": _without("rounds", f"rounds: {'9' * 400}"),
        "a hexadecimal number of 10,000 digits": _without("rounds", f"rounds: 0x{'f' * 10_000}"),
        "a number of 20,000 sexagesimal places": _without("rounds", f"rounds: 1{':30' * 20_000}"),
        "ninety written as 1:30": _without("rounds", "rounds: 1:30"),
        "eight written as 010": _without("rounds", "rounds: 010"),
        "a text of 100,000 letters": _without("rounds", f"rounds: {'x' * 100_000}"),
        "a list of 20,000 numbers": _without("rounds", f"rounds: [{'1,' * 20_000}]"),
        "5,000 unknown fields": _file(_config() + "".join(f"k{i}: 1\n" for i in range(5000))),
        "two million bytes": _more("#" * 2_000_000),
        "a key given twice": _more("rounds: 3"),
        "a key given twice, deep": _without("plan", "plan: {width: 1, width: 2}"),
        "an empty key": _more("'': 1"),
        "a key that is a number": _more("1: 2"),
        "a key that is null": _more("~: 2"),
        "a key that is a list": _more("? [1]\n: 2"),
        "a key of two lines": _more('"a\\nb": 1'),
        "a key that clears the terminal": _more('"\\e[2J": 1'),
        "a key with dots": _more("algorithm.keep: 1"),
        "a value that clears the terminal": _without("rounds", 'rounds: "\\e[2J"'),
        "two documents": _more("---\nrounds: 1"),
        "tabs for indentation": _more("zzz:\n\ta: 1"),
        "no YAML at all": _file("%PDF-1.4 {{{ : : ["),
        "nothing": _file(""),
        "only a comment": _file("# nothing\n"),
        "a single number": _file("3\n"),
        "a list": _file("- a\n- b\n"),
        "a NUL byte": _file(_config().encode() + b"\0"),
        "Latin-1": _file(_config().encode() + b"# caf\xe9\n"),
        "UTF-16": _file(_config().encode("utf-16")),
        "random bytes": _file(np.random.default_rng(0).bytes(1000)),
        "a name that is a path": _file(_config(name="../../x")),
        "a name that is a dot": _file(_config(name="..")),
        "a name of 300 letters": _file(_config(name="x" * 300)),
        "a name that no text file takes": _file(_config() + 'name: "\\ud800"\n'),
        "extends itself": _file(_config(extends="h.yaml")),
        "extends itself by another name": _file(_config(extends="./x/../h.yaml")),
        "a circle of two": _beside(lambda p: p.write_text("extends: h.yaml\n")),
        "a chain of 500 files": _chain,
        "a fan of 2^30 files": _fan,
        "extends a file above": _file(_config(extends="../secret.yaml")),
        "extends far above": _file(_config(extends="../" * 40 + "etc/passwd")),
        "extends an absolute path": _file(_config(extends="/etc/passwd")),
        "extends a device": _file(_config(extends="/dev/zero")),
        "extends a link that leads out": _beside(_outside),
        "extends a link to itself": _beside(lambda p: p.symlink_to(p.name)),
        "extends a pipe": _beside(lambda p: os.mkfifo(p)),
        "extends a directory": _beside(lambda p: p.mkdir()),
        "extends a file that is not there": _file(_config(extends="nobody.yaml")),
        "extends an empty name": _file(_config(extends="")),
        "extends the folder": _file(_config(extends=".")),
        "extends a name with NUL": _file(_config() + 'extends: "a\\0b"\n'),
        "extends a name of 5,000 letters": _file(_config(extends="x" * 5000)),
        "extends a number": _file(_config(extends=3)),
        "extends a list in a list": _file(_config(extends=[["a.yaml"]])),
        "extends an address": _file(_config(extends="http://example.org/a.yaml")),
        "extends a broken file": _beside(lambda p: p.write_text("a: [")),
    }
    for name, prepare in contents.items():
        yield Case("Configuration files", name, prepare, RUN)
    paths: dict[str, tuple[Callable[[], Any], str]] = {
        "a directory": (lambda: os.mkdir("h.yaml"), "h.yaml"),
        "a pipe": (lambda: os.mkfifo("h.yaml"), "h.yaml"),
        "/dev/zero": (NOTHING, "/dev/zero"),
        "/dev/null": (NOTHING, "/dev/null"),
        "a link to /dev/zero": (lambda: os.symlink("/dev/zero", "h.yaml"), "h.yaml"),
        "a link to itself": (lambda: os.symlink("h.yaml", "h.yaml"), "h.yaml"),
        "a link to nothing": (lambda: os.symlink("gone.yaml", "h.yaml"), "h.yaml"),
        "no file": (NOTHING, "h.yaml"),
        "no folder": (NOTHING, "nowhere/h.yaml"),
        "an empty path": (NOTHING, ""),
        "a path with NUL": (NOTHING, "a\0b.yaml"),
        "a path of 5,000 letters": (NOTHING, "x" * 5000),
        "a file as a folder": (NOTHING, "a.yaml/h.yaml"),
    }
    for name, (prepare, path) in paths.items():
        yield Case("Paths of configurations", name, prepare, ("run", path, "--out", "out"))


# --- the command line -------------------------------------------------------------------------


def _words() -> Iterator[Case]:
    several: dict[str, tuple[str, ...]] = {
        "no field": ("--=1",),
        "only a dot": ("--.", "1"),
        "an empty part": ("--algorithm..keep", "1"),
        "a field of 3,000 parts": (f"--{'a.' * 3000}a", "1"),
        "a field of 5,000 letters": (f"--model.{'x' * 5000}", "1"),
        "a field that clears the terminal": ("--\x1b[2J", "1"),
        "a field below a number": ("--rounds.x", "1"),
        "a field below a list": ("--model.hidden.x", "1"),
        "no value": ("--algorithm.keep",),
        "two files": ("b.yaml",),
        "a field as a value": ("--algorithm.keep", "--rounds", "3"),
        "a value that is no YAML": ("--algorithm.keep", "[1"),
        "a value of two documents": ("--algorithm.keep", "1\n---\n2"),
        "a value with NUL": ("--algorithm.keep", "\0"),
        "a value nested 3,000 deep": ("--algorithm.keep", "[" * 3000 + "]" * 3000),
        "a value that contains itself": ("--algorithm.keep", "&a [*a]"),
        "a value of 5,000 digits": ("--algorithm.keep", "9" * 5000),
        "a value with a Python tag": ("--algorithm.keep", "!!python/name:os.system"),
        "a value with a tag it does not fit": ("--algorithm.keep", "!!bool abc"),
        "rounds of nothing": ("--rounds", ""),
        "rounds of NaN": ("--rounds", ".nan"),
        "rounds of 5,000 digits": ("--rounds", "9" * 5000),
        "rounds of 2^31": ("--rounds", "2147483648"),
        "a seed of 2^32": ("--seed", "4294967296"),
        "a negative seed": ("--seed=-1",),
        "a cohort of all and more": ("--cohort", "7"),
        "a cohort of NaN": ("--cohort", ".nan"),
        "a share above one": ("--cohort", "1.5"),
        "a name that is a path": ("--name", "../x"),
        "a name of spaces": ("--name", "  "),
        "extends on the command line": ("--extends", "/etc/passwd"),
        "a section that is null": ("--algorithm", "null"),
        "a kind that is a list": ("--algorithm.name", "[fedavg]"),
        "a kind that is a section": ("--model.name", "{a: 1}"),
        "an unknown behaviour": ("--behaviour", "[reference]"),
        "a directory without a name": ("--out", ""),
        "a directory with NUL": ("--out", "a\0b"),
        "a directory of 300 letters": ("--out", "x" * 300),
        "a directory in a file": ("--out", "a.yaml/x"),
        "a directory that is a file": ("--out", "a.yaml"),
        "a directory that is a device": ("--out", "/dev/null"),
        "a directory that holds a run": ("--out", "run"),
        "an option that the data set has as a field": ("--data.options.name", "x"),
        "options that are a list": ("--data.options", "[1]"),
        "an option nobody knows": ("--data.options.zzz", "1"),
        "an option of bytes": ("--data.options.num_classes", "!!binary /w=="),
        "an option of a set": ("--data.options.num_classes", "!!set {a, b}"),
        "an option that clears the terminal": ("--data.options.num_classes", '"\\e[2J"'),
        "an option nested 30 deep": ("--data.options.num_classes", "[" * 30 + "]" * 30),
        "classes of NaN": ("--data.options.num_classes", ".nan"),
        "classes of true": ("--data.options.num_classes", "true"),
        "2^31 - 1 classes": ("--data.options.num_classes", "2147483647"),
        "fewer classes than labels": ("--data.options.num_classes", "2"),
        "a normalisation of NaN": ("--data.options.normalize", "[.nan, 0]"),
        "a normalisation of text": ("--data.options.normalize", "[a, b]"),
        "a model that no machine holds": (
            "--model",
            "{name: mlp, hidden: [2000000000, 2000000000]}",
        ),
        "more steps than 32 bits count": (
            "--algorithm.epochs",
            "2147483647",
            "--algorithm.batch_size",
            "1",
        ),
        "a batch of 2^31 - 1": ("--algorithm.batch_size", "2147483647"),
        "a data set of another name": ("--data.name", "../../etc/passwd"),
        "a data directory of nobody": ("--data.name", "mnist", "--data.data_dir", "~nobody1/x"),
        "synthetic data of 10^12 examples": _synthetic("examples: 1000000000000"),
        "synthetic data of 10^400 examples": _synthetic(f"examples: {'9' * 400}"),
        "synthetic data of huge images": _synthetic("shape: [100000, 100000, 100000]"),
        "synthetic data of 2^31 classes": _synthetic("num_classes: 2147483648"),
        "synthetic data of a seed that is true": _synthetic("seed: true"),
        "synthetic data without a shape": _synthetic("shape: []"),
        "a rule that is no regular expression": ("--algorithm.layers", "{'(': x}"),
        "a rule without a name": ("--algorithm.layers", "{'.*': ''}"),
        "a rule for no layer": ("--algorithm.layers", "{nobody: x}"),
        "a rate for no layer": ("--algorithm.keep", "{nobody: 0.5}"),
        "a rate of every client but one": ("--algorithm.keep", "[0.1, 0.2, 0.3, 0.4, 0.5]"),
        "rates of rows of two lengths": ("--algorithm.keep", "[[0.5], [0.5, 0.5]]"),
        "a dropout of every client but one": ("--faults", "{dropout: [0, 0, 0, 0, 0]}"),
        "an over-selection of 10^30": (
            "--faults",
            "{over_selection: 1e30, profile: {compute: 1, download: 1, upload: 1}}",
        ),
    }
    for name, words in several.items():
        out = () if "--out" in words else ("--out", "out")
        yield Case("The command line", name, NOTHING, ("run", "a.yaml", *words, *out))


def _synthetic(options: str) -> tuple[str, ...]:
    return ("--data", f"{{name: synthetic, options: {{{options}}}}}")


# --- data files -------------------------------------------------------------------------------


def arrays(**over: Any) -> dict[str, Any]:
    """The arrays of `own.npz`, with some of them replaced, or left out where they are None."""
    rng = np.random.default_rng(0)
    found = {}
    for part, count in (("train", 60), ("test", 20)):
        found[f"{part}_inputs"] = rng.normal(size=(count, 4)).astype(np.float32)
        found[f"{part}_labels"] = np.arange(count) % 3
    return {name: array for name, array in (found | over).items() if array is not None}


def _npz(name: str = "own.npz", **over: Any) -> Callable[[], Any]:
    return lambda: np.savez(name, **arrays(**over))


def _with(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[], Any]:
    def prepare() -> None:
        array = arrays()[name].copy()
        found = change(array)
        np.savez("own.npz", **arrays(**{name: array if found is None else found}))

    return prepare


def _set(index: Any, value: Any) -> Callable[[np.ndarray], None]:
    return lambda array: array.__setitem__(index, value)


def _cut(path: str, keep: float) -> Callable[[], Any]:
    return lambda: os.truncate(path, int(os.path.getsize(path) * keep))


def _flip(path: str, at: float, bit: int = 0) -> Callable[[], Any]:
    """One bit of a file, at a share of its length."""

    def prepare() -> None:
        data = bytearray(Path(path).read_bytes())
        data[min(int(at * len(data)), len(data) - 1)] ^= 1 << bit
        Path(path).write_bytes(data)

    return prepare


def _member(path: str, name: str, content: bytes, **info: Any) -> Callable[[], Any]:
    """The archive with one member replaced by some bytes."""

    def prepare() -> None:
        with zipfile.ZipFile(path) as old:
            members = {n: old.read(n) for n in old.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for member, data in (members | {f"{name}.npy": content}).items():
                new.writestr(member, data)

    return prepare


def _header(shape: str, kind: str = "<f4", body: bytes = b"") -> bytes:
    """An array of numpy's format that says what it likes."""
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + body


def _pickled() -> bytes:
    array = np.array([None, {"a": 1}], object)
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=True)
    return file.getvalue()


def _zip_bomb(path: str, name: str) -> Callable[[], Any]:
    """Says in its directory, and in every array, that each of them has 4 GiB."""

    def prepare() -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for member in {**arrays(), name: None}:
                new.writestr(f"{member}.npy", _header("(4294967166,)", "|u1"))
        data = bytearray(Path(path).read_bytes())
        at = 0
        while (at := data.find(b"PK\x01\x02", at)) >= 0:  # 32 bits there say at most 4 GiB
            data[at + 24 : at + 28] = struct.pack("<I", 0xFFFFFFFE)
            at += 4
        Path(path).write_bytes(data)

    return prepare


def _data() -> Iterator[Case]:
    run = ("run", "a.yaml", "--out", "out")
    several: dict[str, Callable[[], Any]] = {
        "no file": lambda: os.unlink("own.npz"),
        "an empty file": lambda: Path("own.npz").write_bytes(b""),
        "a text": lambda: Path("own.npz").write_text("hello"),
        "a pickle": lambda: Path("own.npz").write_bytes(pickle.dumps({"a": 1})),
        "one array, not an archive": lambda: _write_npy("own.npz"),
        "a directory": lambda: (os.unlink("own.npz"), os.mkdir("own.npz")),
        "a pipe": lambda: (os.unlink("own.npz"), os.mkfifo("own.npz")),
        "/dev/zero": lambda: (os.unlink("own.npz"), os.symlink("/dev/zero", "own.npz")),
        "a link to itself": lambda: (os.unlink("own.npz"), os.symlink("own.npz", "own.npz")),
        "cut after 10%": _cut("own.npz", 0.1),
        "cut after half": _cut("own.npz", 0.5),
        "cut after 99%": _cut("own.npz", 0.99),
        "a flipped bit in a number": _flip("own.npz", 0.2),
        "a flipped bit in a header": _flip("own.npz", 0.01),
        "a flipped bit in the directory": _flip("own.npz", 0.97),
        "an array of Python objects": _member("own.npz", "train_labels", _pickled()),
        "an array that says it has 2^46 numbers": _member(
            "own.npz", "train_inputs", _header("(70368744177664,)")
        ),
        "an array that says it has -1 numbers": _member(
            "own.npz", "train_inputs", _header("(-1,)")
        ),
        "an array whose shape is a program": _member(
            "own.npz", "train_inputs", _header("(__import__('os').getpid(),)")
        ),
        "an array with more numbers than it says": _member(
            "own.npz", "train_inputs", _header("(1,)", body=b"\0" * 400)
        ),
        "an array of an unknown type": _member("own.npz", "train_inputs", _header("(1,)", "<q9")),
        "a member that is no array": _member("own.npz", "train_inputs", b"hello"),
        "an archive that says it unpacks to 16 GiB and more": _zip_bomb("own.npz", "train_inputs"),
        "no test labels": _npz(test_labels=None),
        "no arrays": lambda: np.savez("own.npz"),
        "no examples": _npz(train_inputs=np.zeros((0, 4)), train_labels=np.zeros(0, int)),
        "no test examples": _npz(test_inputs=np.zeros((0, 4)), test_labels=np.zeros(0, int)),
        "examples of no values": _npz(train_inputs=np.zeros((60, 0))),
        "inputs without an axis for examples": _npz(train_inputs=np.float32(3)),
        "fewer labels than inputs": _npz(train_labels=np.arange(59) % 3),
        "more labels than inputs": _npz(train_labels=np.arange(61) % 3),
        "test inputs of another shape": _npz(test_inputs=np.zeros((20, 5), np.float32)),
        "test inputs of another type": _npz(test_inputs=np.zeros((20, 4), np.uint8)),
        "a NaN": _with("train_inputs", _set((3, 1), np.nan)),
        "an infinity": _with("test_inputs", _set((3, 1), -np.inf)),
        "a number beyond float32": _npz(train_inputs=np.full((60, 4), 1e300)),
        "inputs that are 64-bit integers": _npz(train_inputs=np.zeros((60, 4), int)),
        "inputs that are complex": _npz(train_inputs=np.zeros((60, 4), complex)),
        "inputs that are texts": _npz(train_inputs=np.full((60, 4), "a")),
        "inputs that are dates": _npz(train_inputs=np.zeros((60, 4), "datetime64[s]")),
        "labels that are floats": _npz(train_labels=np.arange(60) % 3 + 0.0),
        "labels that are true and false": _npz(train_labels=np.arange(60) % 2 == 1),
        "labels that are texts": _npz(train_labels=np.full(60, "cat")),
        "labels one-hot": _npz(train_labels=np.eye(3, dtype=int)[np.arange(60) % 3]),
        "a negative label": _with("train_labels", _set(3, -1)),
        "a label of 2^31": _with("train_labels", _set(3, 2**31)),
        "a label of 10^9": _with("train_labels", _set(3, 10**9)),
        "a label of 2^63": _npz(train_labels=np.full(60, 2**63, np.uint64)),
        "clients of another number": _npz(client=np.arange(59)),
        "clients that are floats": _npz(client=np.zeros(60)),
    }
    for name, prepare in several.items():
        yield Case("Data files", name, prepare, run)


def _write_npy(path: str) -> None:
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


# --- partitions -------------------------------------------------------------------------------


def _partitions() -> Iterator[Case]:
    labels = np.arange(6) % 3
    good = {"order": [0, 1], "offset": [0, 1, 2], "labels": labels, "num_classes": 3}
    several: dict[str, dict[str, Any]] = {
        "a row beyond the data": {"order": [0, 6]},
        "a row below zero": {"order": [-1, 0]},
        "a row of 2^32, which 32 bits take for 0": {"order": [0, 2**32]},
        "a row of 10^30": {"order": [0, 10**30]},
        "rows that are floats": {"order": [0.0, 1.0]},
        "rows of NaN": {"order": [np.nan, 1]},
        "rows that are texts": {"order": ["a", "b"]},
        "rows of two lengths": {"order": [[0], [1, 2]]},
        "an empty client": {"offset": [0, 2, 2]},
        "no client": {"offset": [0]},
        "clients that overlap": {"offset": [0, 2, 1, 2]},
        "an offset that falls, without a sign": {"offset": np.array([0, 2, 1, 2], np.uint64)},
        "offsets that end early": {"offset": [0, 1]},
        "offsets that end late": {"offset": [0, 1, 9]},
        "offsets that begin late": {"offset": [1, 2]},
        "no offsets": {"offset": []},
        "no labels": {"labels": []},
        "a negative label": {"labels": [0, -1]},
        "a label of 2^31": {"labels": [0, 2**31]},
        "fewer classes than labels": {"num_classes": 2},
        "classes of NaN": {"num_classes": float("nan")},
        "classes of text": {"num_classes": "3"},
    }
    for name, over in several.items():
        yield Case("Partitions", name, NOTHING, lambda over=over: Partition(**(good | over)))
    many = np.arange(60) % 3
    calls: dict[str, Callable[[], Any]] = {
        "more clients than examples": lambda: fl.partition.iid(many, clients=61),
        "no clients": lambda: fl.partition.iid(many, clients=0),
        "true clients": lambda: fl.partition.iid(many, clients=True),
        "clients of NaN": lambda: fl.partition.iid(many, clients=float("nan")),
        "10^400 clients": lambda: fl.partition.iid(many, clients=10**400),
        "a seed of text": lambda: fl.partition.iid(many, clients=2, seed="a"),
        "an alpha of NaN": lambda: fl.partition.dirichlet(many, clients=2, alpha=float("nan")),
        "an alpha of 0": lambda: fl.partition.quantity(many, clients=2, alpha=0),
        "a tiny alpha": lambda: fl.partition.dirichlet(many, clients=30, alpha=1e-320),
        "10^30 shards": lambda: fl.partition.shards(many, clients=2, shards_per_client=10**30),
        "a ratio of NaN": lambda: fl.partition.mixed(many, clients=2, ratio=float("nan")),
        "one client id too few": lambda: fl.partition.natural(many, clients=np.arange(59)),
        "client ids of two lengths": lambda: fl.partition.natural(many, clients=[[1], [1, 2]]),
        "a partition of other data": lambda: fl.simulate(
            fl.fedavg(
                fl.classification(fl.models.Logistic(num_classes=3)), client_optimizer=_sgd()
            ),
            fl.from_arrays(*arrays().values()),
            fl.partition.iid(many[:50], clients=2),
            rounds=1,
            cohort=1,
        ),
    }
    for name, act in calls.items():
        yield Case("Partitions", name, NOTHING, act)


def _sgd() -> Any:
    import optax

    return optax.sgd(0.1)


# --- checkpoints, models and run directories --------------------------------------------------


def _latest() -> Any:
    """What a resumed run would go on from; the run itself is not resumed."""
    return resumption.earlier(load_config("run/config.yaml"), Path("run"))


def _both(damage: Callable[[str], Callable[[], Any]]) -> Callable[[], Any]:
    """Damages the facts of both checkpoints."""
    return lambda: [damage(f"run/checkpoints/{r}/facts/metadata")() for r in (1, 2)]


def essence(config: Config) -> dict[str, Any]:
    """The settings by which a run directory's checkpoints know their run."""
    return resumption._essence(config)


def _facts(path: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[], Any]:
    """Forges facts, with the right SHA-256."""

    def prepare() -> None:
        import json

        from fedlp_jax.simulation.checkpoint import _sum_of_facts

        file = Path(path, "facts", "metadata")
        facts = json.loads(file.read_text())
        facts.pop("sha256")
        change(facts)
        file.write_text(json.dumps(facts | {"sha256": _sum_of_facts(facts)}))

    return prepare


LAST = "run/checkpoints/2"
FACTS = f"{LAST}/facts/metadata"


def _largest() -> Path:
    """The file of the last checkpoint that holds its numbers."""
    files = (p for p in Path(LAST, "arrays").rglob("d/*") if p.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def _checkpoints() -> Iterator[Case]:
    passed: dict[str, Callable[[], Any]] = {
        "facts cut in half": _cut(FACTS, 0.5),
        "facts of no length": _cut(FACTS, 0),
        "a flipped bit in the facts": _flip(FACTS, 0.3),
        "facts that are no JSON": lambda: Path(FACTS).write_text("hello"),
        "facts that are a list": lambda: Path(FACTS).write_text("[1]"),
        "facts nested 100,000 deep": lambda: Path(FACTS).write_text("[" * 100_000),
        "facts that are a pickle": lambda: Path(FACTS).write_bytes(pickle.dumps({"a": 1})),
        "no facts": lambda: shutil.rmtree(f"{LAST}/facts"),
        "no arrays": lambda: shutil.rmtree(f"{LAST}/arrays"),
        "an empty directory": lambda: (shutil.rmtree(LAST), os.mkdir(LAST)),
        "arrays cut in half": lambda: _cut(str(_largest()), 0.5)(),
        "a flipped bit in the arrays": lambda: _flip(str(_largest()), 0.5)(),
        "arrays of no length": lambda: _cut(str(_largest()), 0)(),
        "a link in place of a checkpoint": lambda: (
            os.rename(LAST, "elsewhere"),
            os.symlink("../../elsewhere", LAST),
        ),
        "a link within a checkpoint": lambda: os.symlink("/etc/passwd", f"{LAST}/facts/x"),
        "a pipe in place of the facts": lambda: (os.unlink(FACTS), os.mkfifo(FACTS)),
        "a file in place of a checkpoint": lambda: (
            shutil.rmtree(LAST),
            Path(LAST).write_text("hello"),
        ),
        "the checkpoint of another round": lambda: (
            shutil.rmtree(LAST),
            shutil.copytree("run/checkpoints/1", LAST),
        ),
        "forged facts that name an array by a path": _facts(
            LAST, lambda f: f["arrays"].append(["../../../etc/passwd", "0"])
        ),
        "forged facts without arrays": _facts(LAST, lambda f: f.update(arrays="none")),
        "forged facts without a version": _facts(LAST, lambda f: f.pop("versions")),
        "forged facts of round NaN": _facts(LAST, lambda f: f.update(round=float("nan"))),
        "forged facts of a plan nobody knows": _facts(LAST, lambda f: f.update(plan={"x": 1})),
        "forged facts with another sum": _facts(
            LAST, lambda f: f["arrays"][0].__setitem__(1, "0" * 64)
        ),
    }
    for name, prepare in passed.items():
        yield Case("Checkpoints, the one before is taken", name, prepare, _latest, 0)
    refused: dict[str, Callable[[], Any]] = {
        "both cut in half": _both(lambda path: _cut(path, 0.5)),
        "both of no length": _both(lambda path: _cut(path, 0)),
        "a file in place of all": lambda: (
            shutil.rmtree("run/checkpoints"),
            Path("run/checkpoints").write_text("hello"),
        ),
        "a pipe in place of all": lambda: (
            shutil.rmtree("run/checkpoints"),
            os.mkfifo("run/checkpoints"),
        ),
        "another format": _facts(LAST, lambda f: f.update(format=99)),
        "forged settings": _facts(LAST, lambda f: f["settings"].update(seed=9)),
        "settings that clear the terminal": _facts(
            LAST, lambda f: f["settings"].update(seed="\x1b[2J\n")
        ),
    }
    for name, prepare in refused.items():
        yield Case("Checkpoints, none is taken", name, prepare, _latest)


def _models() -> Iterator[Case]:
    path = "run/variables.npz"
    several: dict[str, Callable[[], Any]] = {
        "no file": lambda: os.unlink(path),
        "an empty file": _cut(path, 0),
        "cut in half": _cut(path, 0.5),
        "a flipped bit in a number": _flip(path, 0.2),
        "a flipped bit in the directory": _flip(path, 0.97),
        "a pipe": lambda: (os.unlink(path), os.mkfifo(path)),
        "/dev/zero": lambda: (os.unlink(path), os.symlink("/dev/zero", path)),
        "a pickle": lambda: Path(path).write_bytes(pickle.dumps({"params": 1})),
        "an array of Python objects": _member(path, "params/x", _pickled()),
        "an array that says it has 2^46 numbers": _member(
            path, "params/x", _header("(70368744177664,)")
        ),
        "an archive that says it unpacks to 16 GiB and more": _zip_bomb(path, "params/x"),
        "integers": _member(path, "params/x", _header("(1,)", "<i4", b"\0" * 4)),
        "complex numbers": _member(path, "params/x", _header("(1,)", "<c8", b"\0" * 8)),
        "numbers of another byte order": _member(
            path, "params/x", _header("(1,)", ">f4", b"\0" * 4)
        ),
        "a name within a name": _member(
            path, "params/fc/kernel/x", _header("(1,)", "<f4", b"\0" * 4)
        ),
        "a data set": _npz(path),
        "no arrays": lambda: np.savez(path),
    }
    for name, prepare in several.items():
        yield Case("Models", name, prepare, lambda: fl.load_variables("run"))


def _directories() -> Iterator[Case]:
    resume = ("run", "run", "--resume")
    new = ("run", "a.yaml", "--out", "out")
    over = ("run", "a.yaml", "--out", "run", "--overwrite")

    def inside(make: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: (os.mkdir("out"), make())

    several: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
        "a run that is not there": (NOTHING, ("run", "nowhere", "--resume")),
        "a run without its configuration": (lambda: os.unlink("run/config.yaml"), resume),
        "a run whose configuration is broken": (
            lambda: Path("run/config.yaml").write_text("data: ["),
            resume,
        ),
        "a run whose configuration is a pipe": (
            lambda: (os.unlink("run/config.yaml"), os.mkfifo("run/config.yaml")),
            resume,
        ),
        "a run whose configuration extends another": (
            lambda: Path("run/config.yaml").write_text(_config(extends="../a.yaml")),
            resume,
        ),
        "a run whose configuration is another": (
            lambda: Path("run/config.yaml").write_text(_config(seed=9)),
            ("run", "a.yaml", "--out", "run", "--resume"),
        ),
        "a claim that is a pipe": (inside(lambda: os.mkfifo("out/.claim")), new),
        "a claim that is a directory": (inside(lambda: os.mkdir("out/.claim")), new),
        "a claim that is a link": (inside(lambda: os.symlink("/etc/passwd", "out/.claim")), new),
        "a model that is a link to nothing": (
            inside(lambda: os.symlink("../gone.npz", "out/variables.npz")),
            new,
        ),
        "metrics that are a link to nothing": (
            inside(lambda: os.symlink("../gone", "out/metrics.jsonl")),
            new,
        ),
        "plots that are a link, to be overwritten": (
            lambda: (
                shutil.rmtree("run/plots"),
                os.mkdir("mine"),
                Path("mine/photo.png").write_text("mine"),
                os.symlink("../mine", "run/plots"),
            ),
            over,
        ),
        "checkpoints that are a link, to be overwritten": (
            lambda: (
                os.rename("run/checkpoints", "mine"),
                os.symlink("../mine", "run/checkpoints"),
            ),
            over,
        ),
        "a directory of others, to be overwritten": (
            inside(lambda: Path("out/config.yaml").write_text("mine")),
            ("run", "a.yaml", "--out", "out", "--overwrite"),
        ),
    }
    for name, (prepare, words) in several.items():
        yield Case("Run directories", name, prepare, words)


# --- full and read-only disks -----------------------------------------------------------------


@contextlib.contextmanager
def full_disk(limit: int = 64) -> Iterator[None]:
    """No file may grow beyond a few bytes, which is as near to a full disk as any user gets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def read_only() -> Iterator[None]:
    """No file can be opened for writing, and no directory made: what root does not feel else."""

    def refuse(path: Any, *_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    real = Path.open

    def opened(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        return refuse(self) if set(mode) & set("wax+") else real(self, mode, *rest, **more)

    with mock.patch.object(Path, "open", opened), mock.patch.object(os, "mkdir", refuse):
        yield


def _begun(write: Callable[[Any], Any]) -> Callable[[], Any]:
    """Writes to the run directory as a run that goes on does, on a full disk."""

    def act() -> None:
        directory = report.RunDirectory("run", "r", resume=True)
        try:
            directory._metrics = open(os.devnull, "w")  # noqa: SIM115, it has begun
            with full_disk():
                write(directory)
        finally:
            directory.close()

    return act


def _disks() -> Iterator[Case]:
    big = {"params": {"fc": {"kernel": np.zeros((100, 100), np.float32)}}}
    several: dict[str, Callable[[], Any]] = {
        "full, when the model is written": _begun(lambda d: d.save(big)),
        "full, when the summary is written": _begun(lambda d: d.summarize({"x": "y" * 999})),
        "full, when the configuration is written": _begun(
            lambda d: d._replace("config.yaml", "x" * 999)
        ),
    }
    for name, act in several.items():
        yield Case("Disks", name, NOTHING, act, 1)

    def write_into(out: str) -> Callable[[], Any]:
        def act() -> None:
            with read_only():
                experiment.execute("a.yaml", out)

        return act

    yield Case("Disks", "read-only, a new directory", NOTHING, write_into("out"))
    yield Case("Disks", "read-only, one that is there", lambda: os.mkdir("out"), write_into("out"))


def cases() -> list[Case]:
    """All hand-made cases."""
    parts = (_files, _words, _data, _partitions, _checkpoints, _models, _directories, _disks)
    return [case for part in parts for case in part()]


# --- trying them ------------------------------------------------------------------------------


class Accepted(Exception):
    """A hostile input was about to be trained on."""


@contextlib.contextmanager
def untrained() -> Iterator[None]:
    """Nothing is compiled, and jax keeps its devices."""

    def accepted(self: Simulation) -> None:
        raise Accepted

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Simulation, "compile", accepted))
        stack.enter_context(mock.patch.object(placement, "setup", lambda cpu_devices=None: None))
        for module in (archive, embedded, checks):  # sentences name the memory of one machine
            stack.enter_context(mock.patch.object(module, "usable_memory", lambda: 2**33))
        yield


def template(folder: Path) -> Path:
    """A folder with a good configuration, its data, and the run they make."""
    folder.mkdir(parents=True)
    with contextlib.chdir(folder):
        Path("a.yaml").write_text(_config())
        np.savez("own.npz", **arrays())
        experiment.execute("a.yaml", "run", progress=False)
    return folder


def attempt(case: Case, good: Path, around: Path) -> Outcome:
    """Tries a case in a copy of the good folder, which is made within `around`."""
    folder = around / "here"
    shutil.copytree(good, folder)
    try:
        with contextlib.chdir(folder):
            case.prepare()
            before = _contents(folder)
            started = time.perf_counter()
            with _alarm(), untrained():
                code, said = _command(case.act) if isinstance(case.act, tuple) else _call(case.act)
            seconds = time.perf_counter() - started
            after = _contents(folder)
    finally:
        shutil.rmtree(around)
        around.mkdir()
    changed = sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
    return Outcome(code, said.replace(f"{folder}/", "").replace(str(folder), "."), seconds, changed)


def _command(words: tuple[str, ...]) -> tuple[int, str]:
    runner = typer.testing.CliRunner()
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)  # as in a process of its own
        done = runner.invoke(cli.app, list(words), prog_name="fedlp", catch_exceptions=False)
    lines = [line.removeprefix("fedlp: ") for line in done.stderr.splitlines()]
    lines = [line for line in lines if ": compiling " not in line]
    return done.exit_code, "\n".join(lines)


def _call(act: Callable[[], Any]) -> tuple[int, str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        try:
            act()
        except FedLPError as error:
            return 2, str(error)
        except OSError as error:
            return 1, f"the run failed: {error}"
    return 0, "\n".join(f"warning: {one.message}" for one in told)


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TimeoutError(f"still going after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _contents(folder: Path) -> dict[str, str]:
    """A digest of every file by its path; what is no file is known by its kind."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "directory" if path.is_dir() else "special"
    return found


# --- the page ---------------------------------------------------------------------------------

_INTRO = """# Hostile input

{count} inputs that nobody should give: {hand} made by hand, and {values} values in the
{fields} fields of a configuration. Each is refused with a sentence and exit code 2, unless another
code is shown; none ends in a traceback, none takes longer than {seconds} seconds, and none writes
or loses a file. Where one of two checkpoints is damaged, a run goes on from the other and says so.

`python -m tests.hostile --page docs/hostile-inputs.md` tries them all and writes this page;
`tests/test_hostile.py` tries them too, and random ones beside them. The memory of the machine is
taken to be 16 GiB, and sentences are cut to 300 characters.

{versions}
"""
_FIELDS = """
## Fields of a configuration

Each field of each kind of section was given {count} values: {values}. Values that a field accepts
mean something there.

| field | refused | accepted | for example |
| --- | ---: | --- | --- |
"""


def page(outcomes: dict[Case, Outcome]) -> str:
    """The Markdown of the page."""
    rows, tried = [], 0
    for field, kind, raw in fields():
        said, accepted = try_field(field, raw)
        tried += len(VALUES)
        first = next(iter(said.values()), "")
        where = f"`{field}`" + (f" of {kind}" if kind else "")
        rows.append(f"| {where} | {len(said)} | {', '.join(accepted)} | {_cell(first)} |")
    text = _INTRO.format(
        count=f"{len(outcomes) + tried:,}",
        hand=len(outcomes),
        values=f"{tried:,}",
        fields=len(rows),
        seconds=SECONDS,
        versions=versions(),
    )
    groups: dict[str, list[str]] = {}
    for case, outcome in outcomes.items():
        code = f" *(exit code {outcome.code})*" if outcome.code != 2 else ""
        groups.setdefault(case.group, []).append(f"| {case.name} | {_cell(outcome.said)}{code} |")
    for group, lines in groups.items():
        head = f"\n## {group}\n\n{len(lines)} cases.\n\n| input | what is said |\n| --- | --- |\n"
        text += head + "\n".join(lines) + "\n"
    text += _FIELDS.format(count=len(VALUES), values=", ".join(VALUES))
    return text + "\n".join(rows) + "\n"


def versions() -> str:
    """Of what some of the sentences are said by."""
    names = ("numpy", "orbax-checkpoint", "pydantic", "PyYAML")
    found = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    return f"Said with Python {platform.python_version()}, {found}."


def _cell(said: str) -> str:
    words = " ".join(said.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
    return words if len(words) <= 300 else f"{words[:300]}..."


def main() -> None:
    """Tries all cases and prints or writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", help="write the page here; otherwise it is printed")
    options = parser.parse_args()
    where = Path(options.page).absolute() if options.page else None
    with tempfile.TemporaryDirectory() as root:
        good, around = template(Path(root, "good")), Path(root, "around")
        around.mkdir()
        outcomes = {case: attempt(case, good, around) for case in cases()}
    text = page(outcomes)
    if where:
        where.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
