"""docs/paper.md shows what the committed cells hold, and the draws explain every upload."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import paper
from fedlp_jax.paper import results
from fedlp_jax.paper.cells import Study, read_runs
from fedlp_jax.paper.published import Cell

ROOT = Path(__file__).parents[2]
STUDY = Study(ROOT / "benchmarks/results/paper")
PAGE = (ROOT / "docs/paper.md").read_text()


@pytest.fixture(scope="module")
def runs():
    return {run.path.name: (cell, run) for cell, rs in read_runs(STUDY).items() for run in rs}


def test_the_committed_tables_are_those_of_the_committed_cells():
    made = results.make_table(STUDY)
    text = results.markdown(made)
    assert (STUDY.out / "table.md").read_text() == text
    assert (STUDY.out / "table.csv").read_text() == results.as_csv(made)
    assert paper.with_tables(PAGE, {"cells": text}) == PAGE


def test_every_cell_says_where_it_ran(runs):
    for _, run in runs.values():
        assert {"commit", "versions", "device"} <= set(run.summary), run.path
        assert run.summary["commit"]


def test_runs_of_one_cell_on_two_machines_booked_the_same_uploads(runs):
    elsewhere = {name: cell.name for name, (cell, _) in runs.items() if "@" in name}
    pairs = [(runs[name], runs[here]) for name, here in elsewhere.items() if here in runs]
    assert pairs
    for (_, there), (_, here) in pairs:
        both = zip(here.rows, there.rows, strict=False)
        assert all(a["upload_params"] == b["upload_params"] for a, b in both)


def test_a_run_of_other_draws_is_found_out(runs):
    _, run = runs["homo-0.5-iid-own-seed25"]
    assert paper.exchange(Cell("homo-0.5", "iid", 25, "own"), run)["rounds"] == 20
    with pytest.raises(ValueError, match="has not sent what its draws say"):
        paper.exchange(Cell("homo-0.5", "iid", 26, "own"), run)


@pytest.mark.slow
def test_the_page_shows_what_the_draws_give(runs):
    tables = {
        "exchange": paper.table("exchange", [paper.exchange(*one) for one in runs.values()]),
        "rounding": paper.table("rounding", paper.rounding(runs)),
    }
    assert paper.with_tables(PAGE, tables) == PAGE


def test_expectations_are_means_over_many_rounds():
    """FedLP-Hetero's are of cohorts alone, given the depths of the run."""
    for cell in (Cell("hetero-3", "iid", 25, "own"), Cell("homo-0.3", "iid", 25, "reference")):
        drawn = paper.replay(cell, 400)
        senders = drawn.upload.sum(axis=1)
        megabytes, inactive = paper.expected(cell, drawn)
        sent = senders @ (4 * (drawn.layers.params + drawn.layers.statistics)) / 1e6 + 5e-5
        for values, mean in ((sent, megabytes), ((senders == 0).sum(axis=1), inactive)):
            error = np.std(values) / 20
            assert abs(values.mean() - mean) < 4 * error


def test_a_round_ends_with_its_last_client(runs):
    cell, run = runs["fedavg-iid-own-seed25"]
    ends = paper.seconds(cell, run)["phone, 20 Mbit/s down, 5 up"]
    model = 4 * (551_466 + 896)
    macs = 3 * 39_355_648 * 500 * 5
    assert ends[0] == pytest.approx(model / 2.5e6 + macs / 1e10 + (model + 5) / 6.25e5)
    assert ends[-1] == pytest.approx(20 * ends[0])
