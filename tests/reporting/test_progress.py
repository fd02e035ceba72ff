import io

import pytest
from rich.console import Console

from fedlp_jax.reporting.progress import Progress, duration, sparkline


def row(round, **more):
    return {"round": round, "train_loss": 1.0 / round, "upload_bytes": 500_000} | more


def shown(rounds, terminal=False, show=None, rows=None, width=120, name="demo"):
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=width)
    with Progress(rounds, name, show=show, console=console) as progress:
        for one in rows or [row(r) for r in range(1, rounds + 1)]:
            progress.update(one)
    return text.getvalue()


def test_plain_lines_elsewhere_few_however_many_rounds():
    lines = shown(1000, show=True).splitlines()
    assert "compiling the first of 1000 rounds" in lines[0]
    assert lines[1].startswith("demo: round 1/1000  loss 1.0000  0.5 MB up")
    assert lines[-1].startswith("demo: round 1000/1000  loss 0.0010  500.0 MB up")
    assert 8 <= len(lines) <= 15
    assert "left" in lines[3] and "left" not in lines[-1]


def test_a_slow_run_gets_a_line_every_ten_seconds(monkeypatch):
    now = 0.0
    monkeypatch.setattr("fedlp_jax.reporting.progress.time.monotonic", lambda: now)

    def rows():
        nonlocal now
        for r in range(1, 32):
            yield row(r)
            now += 4.0

    lines = shown(1000, show=True, rows=rows()).splitlines()
    assert [line.split()[2].split("/")[0] for line in lines[1:]] == [
        str(r) for r in range(1, 32, 3)
    ]
    assert lines[2].endswith("1h06m left")  # 996 rounds of 4 seconds


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_cuts_nothing_off(width):
    rows = [row(r, test_accuracy_personal=r / 22002) for r in range(1, 12001, 1000)]
    text = shown(12000, terminal=True, rows=rows, width=width, name="a-run-of-a-rather-long-name")
    last = text.rsplit("train loss", 1)[1]
    for number in ("11001/12000", "0.5000", "0:00:00"):
        assert number in last
    assert "…" not in last


def test_the_last_known_accuracy_stays():
    rows = [row(1, test_accuracy=0.75), row(2), row(3, test_accuracy=None)]
    text = shown(3, show=True, rows=rows)
    assert text.count("accuracy 0.7500") >= 1
    assert "None" not in text


def test_a_table_and_a_bar_on_a_terminal():
    rows = [row(1, test_accuracy=0.5), row(2), row(3, test_accuracy=0.25)]
    text = shown(3, terminal=True, rows=rows)
    assert text.startswith("demo: compiling the first of 3 rounds ...\n")
    assert "3/3" in text and "1.5 MB" in text
    last = text.rsplit("train loss", 1)[1]  # what is left on the screen
    assert "█▃▁" in last and "0.3333" in last and "best 0.3333 in round 3" in last
    assert "█▁" in last and "0.2500" in last and "best 0.5000 in round 1" in last


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([3], "▁"),
        ([2, 2], "▁▁"),
        ([0, 7, 3.4], "▁█▄"),
        ([0, float("nan"), 1], "▁ █"),
        ([float("nan")] * 3, "   "),
        (range(160), "▁▂▃▄▅▆▇█"),
    ],
)
def test_sparklines(values, line):
    assert sparkline(values, columns=8) == line


@pytest.mark.parametrize(("terminal", "show"), [(False, None), (False, False), (True, False)])
def test_prints_nothing_unless_asked(terminal, show):
    assert "round" not in shown(3, terminal=terminal, show=show)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0s"), (59.94, "59.9s"), (75.2, "1m15s"), (7384, "2h03m")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
