"""Tables for the terminal: whatever the width, every number is there as a whole."""

import collections
import io
import json
import re

import pytest
import typer.testing
import yaml
from rich.console import Console
from small import DIGITS

from fedlp_jax import cli
from fedlp_jax.execution import plan as plans
from fedlp_jax.reporting.tables import NumbersTable, two_columns


def drawn(part, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(part)
    return console.file.getvalue().splitlines()


def numbers(text):
    return collections.Counter(re.findall(r"\d[\d.,e+-]*", text))


def test_columns_without_room_follow_below_beside_the_names():
    head = ("layer", "parameters sent", "bytes", "why")
    rows = [("conv1", "123,456", "1.5", "it moved most"), ("[fc]", "7", "2.5", "")]
    table = NumbersTable("Layers", head, rows, total=("all", "123,463", "4", ""), words={3})
    assert table.fits(56) and not table.fits(48)
    wide = [line.split() for line in drawn(table, 56)]
    assert ["[fc]", "7", "2.5"] in wide and ["all", "123,463", "4"] in wide
    narrow = [line.split() for line in drawn(table, 24)]
    assert ["layer", "sent"] in narrow and ["[fc]", "7"] in narrow and ["all", "4"] in narrow
    assert ["conv1", "1.5", "it"] in narrow and ["moved"] in narrow
    assert sum(line == ["Layers"] for line in narrow) == 1


def test_what_has_no_room_at_all_is_broken_not_cut():
    number, path = "123,456,789,012,345,678", "/a/very/long/path/without/a/space"
    for part, text in (
        (NumbersTable("", ("", "count"), [("name", number)]), number),
        (two_columns({"to": path}, title="t"), path),
    ):
        lines = drawn(part, 20)
        assert len(lines) > 3 and max(map(len, lines)) <= 20
        assert text in re.sub(r"name|\bto\b|count|[^\w,/]", "", "".join(lines))


@pytest.fixture
def a_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plans, "setup", lambda cpu_devices=None: None)  # jax is in use here
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(DIGITS | {"rounds": 5}))
    for i in range(5):
        folder = tmp_path / f"runs/{i}"
        folder.mkdir(parents=True)
        config = {"name": f"an-experiment-{i}", "algorithm": i}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        row = {"round": 1, "test_accuracy": i / 7, "upload_bytes": 12_345_678 * i, "seconds": i / 3}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")


@pytest.mark.parametrize(
    "words",
    [
        "plan small.yaml --devices 8,64,256 --step-seconds 2.345e-4",
        "compare runs --target 0.2",
        "info small.yaml",
        "reproduce paper --costs --rows fedavg",
        "algorithms scaffold",
    ],
)
def test_no_command_cuts_a_number_off(a_place, words):
    call = typer.testing.CliRunner().invoke
    wide = call(cli.app, words.split(), env={"COLUMNS": "300"})
    assert wide.exit_code == 0, wide.output
    for width in (80, 60):
        narrow = call(cli.app, words.split(), env={"COLUMNS": str(width)})
        assert max(map(len, narrow.stdout.splitlines())) <= width or "algorithms" in words
        assert "…" not in narrow.stdout
        assert numbers(wide.stdout) <= numbers(narrow.stdout)
