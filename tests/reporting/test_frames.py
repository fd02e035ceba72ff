"""Rows of runs as data frames and as files."""

import json
import sys

import numpy as np
import pandas
import pytest
import typer.testing
import yaml
from pandas.testing import assert_frame_equal

import fedlp_jax as fl
from fedlp_jax import cli
from fedlp_jax.reporting.frames import frame, runs_frame, write
from fedlp_jax.simulation.client_history import ClientHistory
from fedlp_jax.simulation.result import History

ROWS = [{"round": 1, "loss": 0.5}, {"round": 2, "loss": None, "test_accuracy": 0.75}]


@pytest.fixture
def runs(tmp_path):
    """Two run directories that differ in keep and seed."""
    made = []
    for keep, seed in [(0.5, 0), (1.0, 3)]:
        folder = tmp_path / f"keep{keep}"
        folder.mkdir()
        config = {"name": "run", "seed": seed, "algorithm": {"keep": keep}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        columns = {
            "round": np.array([1, 1, 2]),
            "client": np.array([0, 4, 4]),
            "kept": np.array([[True, False], [True, True], [False, True]]),
            "layers": np.array(["fc1", "fc2"]),
        }
        np.savez(folder / "clients.npz", **columns)
        made.append(folder)
    return made


def test_rows_and_columns_become_a_frame_with_nan_where_a_number_is_missing():
    table = frame(ROWS)
    assert list(table.columns) == ["round", "loss", "test_accuracy"]
    assert table["round"].tolist() == [1, 2] and table["round"].dtype == np.int64
    assert np.isnan(table["loss"][1]) and np.isnan(table["test_accuracy"][0])
    assert_frame_equal(frame({"round": [1, 2]}), table[["round"]])
    history = History()
    history.rows = ROWS
    assert_frame_equal(history.to_frame(), table)


def test_a_table_of_clients_has_a_column_for_each_layer():
    empty = ClientHistory(metrics=("loss",), layers=("fc1", "fc2"), sizes=(3, 3)).to_frame()
    assert list(empty.columns) == [
        "round", "client", "level", "examples", "outcome", "corrupt", "loss",
        "kept_fc1", "kept_fc2",
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_runs_are_exported_with_experiment_seed_and_directory(runs, tmp_path, suffix):
    out = tmp_path / f"made/rounds{suffix}"
    words = ["export", *map(str, runs), "--out", str(out)]
    said = typer.testing.CliRunner().invoke(cli.app, words)
    assert said.exit_code == 0 and said.output.startswith("4 rows written"), said.output
    table = pandas.read_csv(out) if suffix == ".csv" else pandas.read_parquet(out)
    assert_frame_equal(table, runs_frame(runs), check_dtype=False)
    assert table["experiment"].tolist() == ["run (keep=0.5)"] * 2 + ["run (keep=1.0)"] * 2
    assert table["seed"].tolist() == [0, 0, 3, 3]
    assert table["directory"].unique().tolist() == list(map(str, runs))


def test_clients_of_runs_are_exported(runs):
    table = runs_frame(runs, clients=True)
    assert table["kept_fc1"].tolist() == [True, True, False] * 2
    (runs[1] / "clients.npz").unlink()
    with pytest.raises(fl.FedLPError, match=r"keep1.0 has no readable clients.npz"):
        runs_frame(runs, clients=True)


def test_what_cannot_be_written_is_said(tmp_path, monkeypatch):
    with pytest.raises(fl.FedLPError, match=r"a.xlsx must end in .csv or .parquet"):
        write(frame(ROWS), tmp_path / "a.xlsx")
    (tmp_path / "file").write_text("")
    with pytest.raises(fl.FedLPError, match=r"a.csv cannot be written: "):
        write(frame(ROWS), tmp_path / "file/a.csv")
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(fl.FedLPError, match=r"pandas: pip install 'fedlp-jax\[frames\]'"):
        frame(ROWS)
