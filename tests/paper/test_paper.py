"""`fedlp reproduce paper`: costs to the published digits; cells survive interruption."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import typer.testing

import fedlp_jax as fl
from fedlp_jax import FedLPError, __version__, cli
from fedlp_jax.config.loading import dump_config, load_config
from fedlp_jax.config.resume import run_checkpoint
from fedlp_jax.execution import plan as plans
from fedlp_jax.paper import cells as cells_module
from fedlp_jax.paper import results
from fedlp_jax.paper.cells import (
    Study,
    check_file,
    estimate,
    read_cells,
    read_runs,
    run_cells,
    run_cells_together,
    unfinished,
)
from fedlp_jax.paper.costs import DIGIT_SLIP, row_costs
from fedlp_jax.paper.figures import draw_figures
from fedlp_jax.paper.published import ROWS, SPLITS, Cell, cell_config, choose
from fedlp_jax.reporting import plots
from fedlp_jax.reporting.run_directory import RunDirectory
from fedlp_jax.simulation.result import DivergedError

PAPER = Path(__file__).parents[2] / "configs" / "paper"
CELLS = [Cell(row, split) for row in ROWS for split in SPLITS]
IID = [Cell("fedavg", "iid"), Cell("homo-0.5", "iid")]


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plans, "setup", lambda cpu_devices=None: None)  # jax is in use here


def fedlp(*words, columns=80):
    """The command, in this process."""
    run = typer.testing.CliRunner(env={"COLUMNS": str(columns)})
    return run.invoke(cli.app, ["reproduce", "paper", *words], prog_name="fedlp")


def invented(study, cell, status="done", accuracy=0.5, config=None, where=""):
    """A cell with invented numbers, as a run would leave it."""
    config = config or study.config(cell)
    path = study.path(cell).with_name(cell.name + where)
    path.mkdir(parents=True)
    rounds = range(1, config.rounds + 1 - (status == "unfinished"))
    rows = [
        {"round": r, "test_accuracy": accuracy + r / 1000, "upload_bytes": 2e6, "seconds": 1.5}
        for r in rounds
    ]
    (path / "config.yaml").write_text(dump_config(config))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    device = {"platform": "cpu", "kind": "cpu", "count": 2, "processor": "Abacus 1"}
    versions = dict.fromkeys(("jax", "flax", "optax", "python"), "1.0")
    about = {"device": device, "versions": versions, "commit": "abc"}
    if status != "unfinished":
        (path / "summary.json").write_text(json.dumps({"status": status} | about))
    return path


def table(out):
    """The table.json of a directory."""
    return results.Table(**json.loads((out / "table.json").read_text()))


# the published table


def test_a_cell_equals_its_configuration_file():
    for cell in CELLS:
        file = PAPER / f"{cell.row}-{cell.split}.yaml"
        head = file.read_text().splitlines()[0]
        assert cell_config(cell) == load_config(file), file.name
        assert head.startswith(f"# {ROWS[cell.row].label}, "), file.name
        assert f"published accuracy {cell.published:.2f}%" in head, file.name


def test_small_is_the_protocol_with_fewer_rounds():
    paper, small = (cell_config(Cell("hetero-u", "d-niid"), scale) for scale in ("paper", "small"))
    assert small == paper.model_copy(update={"rounds": 20})
    assert cell_config(CELLS[0], "small", rounds=7).rounds == 7


def test_cells_are_chosen_in_the_order_of_the_table():
    assert choose() == CELLS
    assert choose(["hetero-5", "fedavg"], ["m-niid"], seeds=2) == [
        Cell(row, "m-niid", seed) for seed in (25, 26) for row in ("fedavg", "hetero-5")
    ]
    assert choose(["homo-0.1"], ["iid"], draws="own") == [Cell("homo-0.1", "iid", 25, "own")]
    with pytest.raises(FedLPError, match="draws 'theirs' is unknown"):
        choose(draws="theirs")
    with pytest.raises(FedLPError, match=r"row 'homo-0.4' is unknown; did you mean 'homo-0.*'"):
        choose(["homo-0.4"])


# costs


@pytest.fixture(scope="module")
def costs():
    return {cost.id: cost for cost in row_costs()}


def test_every_comm_agrees_to_two_decimals(costs):
    assert [round(cost.comm_kparams, 2) for cost in costs.values()] == [
        1102.93, 606.61, 716.91, 827.20, 937.49, 169.60, 225.28, 318.66, 710.80,
    ]  # fmt: skip
    assert {cost.comm_difference for cost in costs.values()} == {0.0}
    assert costs["homo-0.3"].comm_kparams == pytest.approx(1.3 * 551.466)


def test_comp_agrees_where_the_whole_model_is_taken_as_published(costs):
    assert [round(cost.comp_mmacs, 2) for cost in costs.values()] == [
        39.36, 39.36, 39.36, 39.36, 39.36, 18.03, 24.91, 24.43, 31.89,
    ]  # fmt: skip
    assert {cost.comp_difference_as_published_convention for cost in costs.values()} == {0.0}
    # What DIGIT_SLIP says of the other reading.
    assert [cost.comp_difference for cost in costs.values()] == [
        3.0, 3.0, 3.0, 3.0, 3.0, 0.3, 0.29, 0.6, 1.79,
    ]  # fmt: skip
    assert "36.36" in DIGIT_SLIP and "39.36" in DIGIT_SLIP


def test_what_the_paper_leaves_out(costs):
    whole, shallow = costs["fedavg"], costs["hetero-1"]
    assert whole.download_bytes == 4 * (551_466 + 896)
    assert whole.upload_bytes == whole.download_bytes + 5  # 40 tensors, a bit each
    assert costs["homo-0.1"].upload_bytes == pytest.approx(0.1 * whole.download_bytes + 5)
    assert shallow.shared_params == (10_272, 28_896, 65_952, 140_064, 551_466)
    assert shallow.local_params == (1_060_266, 554_602, 591_658, 403_626, 551_466)
    assert [round(macs / 1e6, 3) for macs in shallow.forward_macs] == [
        11.634, 15.894, 25.396, 29.886, 39.356,
    ]  # fmt: skip
    first = 32 * 32 * 32 * (3 * 3 * 3)  # the layer whose inputs need no gradient
    norms = 4 * 2 * (32 * 32 * 32 + 16 * 16 * 64 + 8 * 8 * 128)
    (forward,), (backward,) = whole.forward_macs, whole.backward_macs
    assert forward == 39_355_648
    assert backward == 2 * (forward - norms) - first


def test_costs_are_printed_as_json_alone(costs):
    said = fedlp("--costs", "--json")
    assert said.exit_code == 0, said.output
    rows = json.loads(said.stdout)
    assert [row["row"] for row in rows] == [row.label for row in ROWS.values()]
    wanted = {
        "row", "comm_kparams", "comm_published", "comp_mmacs", "comp_as_published_convention",
        "comp_published",
    }  # fmt: skip
    assert all(wanted <= set(row) for row in rows)
    assert rows[5]["local_params"] == list(costs["hetero-1"].local_params)


@pytest.mark.parametrize("row", ["homo-0.3", "hetero-3"])
def test_costs_of_one_row_are_its_own_alone(costs, row):
    said = fedlp("--costs", "--json", "--rows", row)
    assert [found["id"] for found in json.loads(said.stdout)] == [row]
    shown = fedlp("--costs", "--rows", row)
    assert shown.exit_code == 0, shown.output
    assert f"{costs[row].comm_kparams:.2f}" in shown.stdout and "FedAvg" not in shown.stdout


@pytest.mark.parametrize("columns", [80, 120])
def test_costs_fit_a_terminal(costs, columns):
    said = fedlp("--costs", columns=columns)
    assert said.exit_code == 0, said.output
    assert "…" not in said.stdout
    assert max(map(len, said.stdout.splitlines())) <= columns
    words = " ".join(said.stdout.split())
    assert "1102.93" in words and "1,060,266" in words and DIGIT_SLIP in words


# a directory of cells


def test_a_cell_is_recognised_by_its_configuration(tmp_path):
    study = Study(tmp_path, "small")
    plain = load_config(
        PAPER / "fedavg-iid.yaml", {"rounds": 20, "data.data_dir": "elsewhere", "plan.devices": 3}
    )
    invented(study, IID[0], config=plain)
    invented(study, IID[1], "unfinished")
    invented(study, Cell("hetero-1", "m-niid", 26), "diverged")
    assert {cell: (f.status, f.rounds) for cell, f in read_cells(study).items()} == {
        IID[0]: ("done", 20),
        IID[1]: ("unfinished", 19),
        Cell("hetero-1", "m-niid", 26): ("diverged", 20),
    }
    assert unfinished(study, [*IID, Cell("fedavg", "m-niid")]) == [IID[1], Cell("fedavg", "m-niid")]


def test_the_directory_of_another_study_is_refused_and_unchanged(tmp_path):
    invented(Study(tmp_path, "small"), IID[0])
    before = sorted(tmp_path.rglob("*"))
    said = fedlp("--out", str(tmp_path), "--rows", "hetero-1", "--rounds", "9")
    assert said.exit_code == 2
    assert "fedavg-iid-reference-seed25 holds another run: rounds was 20 and is 9. " in said.stderr
    assert fedlp("--out", str(tmp_path), "--scale", "smoke").exit_code == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_cell_of_fewer_rounds_counts_for_those_it_has(tmp_path):
    """As the cells of several machines do: whoever has more goes on."""
    own = Cell("homo-0.5", "iid", draws="own")
    invented(Study(tmp_path, "small"), own)
    invented(Study(tmp_path, rounds=30), own, "unfinished", where="@elsewhere")
    study = Study(tmp_path)
    (run, short) = read_runs(study)[own]
    assert (run.path.name, run.status, run.rounds) == (f"{own.name}@elsewhere", "unfinished", 29)
    assert (short.status, short.rounds) == ("unfinished", 20)
    assert unfinished(study, [own]) == [own]
    (entry,) = (entry for entry in results.make_table(study).cells if entry["seeds"])
    assert (entry["id"], entry["draws"], entry["rounds"]) == ("homo-0.5", "own", 29)
    assert entry["final"] == pytest.approx(52.9)
    assert [run["averaged"] for run in entry["runs"]] == [True, False]
    text = results.markdown(results.make_table(study))
    assert "| FedLP-Homo(0.5) | 52.45 (29) | 77.60 |" in text
    assert "No comparison: 29 rounds, and published is the value after 200" in text


def test_a_cell_made_elsewhere_is_taken_if_configuration_and_version_match(tmp_path):
    study = Study(tmp_path)
    path = invented(study, IID[0], where="@h200")
    file, summary = path / "config.yaml", path / "summary.json"
    text = file.read_text()
    # A file of the same images, where tensorflow-datasets is not installed.
    file.write_text(
        f"# fedlp_jax {__version__}\n" + text.replace("name: cifar10\n", "name: a/cifar10.npz\n")
    )
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"commit": None}))
    (path / "origin.json").write_text('{"commit": "71ce71b"}')
    assert read_cells(study)[IID[0]].summary["commit"] == "71ce71b"
    assert unfinished(study, IID) == IID[1:]
    file.write_text("# fedlp_jax 99.0\n" + text)
    assert read_cells(study)[IID[0]].status == "done"  # a table may be of any version
    with pytest.raises(FedLPError, match=f"was run by fedlp_jax 99.0, and this is {__version__}; "):
        results.run_study(study, IID)
    assert not (tmp_path / "table.json").exists()
    file.write_text(text.replace("draws: reference", "draws: own"))
    with pytest.raises(FedLPError, match="holds another run: draws was own and is reference"):
        read_cells(study)
    file.write_text(text.replace("name: cifar10\n", "name: cifar100.npz\n"))
    with pytest.raises(FedLPError, match="data.name was cifar100 and is cifar10"):
        read_cells(study)


def test_a_run_that_was_killed_before_its_configuration_was_written_is_unfinished(tmp_path):
    study = Study(tmp_path, "small")
    path = invented(study, IID[0], "unfinished")
    (path / "config.yaml").write_text("")
    assert read_cells(study)[IID[0]].status == "unfinished"


def test_a_cell_that_another_process_runs_is_refused(tmp_path):
    study = Study(tmp_path, "smoke")
    path = study.path(IID[0])
    path.mkdir(parents=True)
    running = RunDirectory(path, "r")
    with pytest.raises(FedLPError, match="another run is writing in"):
        list(run_cells(study, IID))
    running.close()


def executing(monkeypatch, study, error_at=None, error=None):
    """Replaces training by invented cells; one may end in an error."""
    ran = []

    def execute(config, path, *, resume, progress, stop):
        cell = next(cell for cell in CELLS if study.path(cell) == path)
        assert config == study.config(cell)
        assert resume == path.exists()
        ran.append(cell)
        if len(ran) - 1 == error_at:
            raise error
        invented(study, cell)

    monkeypatch.setattr(cells_module, "execute", execute)
    return ran


def test_only_unfinished_cells_run_and_the_time_left_is_shown(tmp_path, monkeypatch):
    study = Study(tmp_path, "smoke")
    invented(study, CELLS[1])
    ran = executing(monkeypatch, study)
    said = []
    assert (
        list(run_cells(study, CELLS[:4], say=said.append)) == ran == [CELLS[i] for i in (0, 2, 3)]
    )
    assert [line.split(", about")[0] for line in said] == [
        "cell 2 of 4: fedavg-iid-reference-seed25",
        "cell 3 of 4: fedavg-m-niid-reference-seed25",
        "cell 4 of 4: homo-0.1-iid-reference-seed25",
    ]
    assert ["left" in line for line in said] == [False, True, True]
    assert list(run_cells(study, CELLS[:4])) == []


def test_an_interruption_says_how_to_resume_and_leaves_the_table(tmp_path, monkeypatch):
    study = Study(tmp_path, "smoke")
    executing(monkeypatch, study, error_at=2, error=KeyboardInterrupt())
    said = fedlp("--out", str(tmp_path), "--scale", "smoke")
    assert said.exit_code == 130
    assert "fedlp: interrupted." in said.stderr
    assert "2 of 27 cells are done. The same command resumes fedavg-m-niid" in said.stderr
    assert [entry["status"] for entry in table(tmp_path).cells] == ["done"] * 2 + ["not run"] * 52
    assert (tmp_path / "accuracy_by_round_reference.png").is_file()


def executing_together(monkeypatch, study, error_at=None, error=None):
    """Replaces a sweep by invented cells; one may end in an error."""
    asked = []

    def execute_runs(runs, again, *, resume, log, stop):
        assert resume
        asked.extend(label for label, _, _ in runs)
        for i, (label, config, path) in enumerate(runs):
            cell = next(cell for cell in CELLS if cell.name == label)
            assert config == study.config(cell) and path == study.path(cell)
            if i == error_at:
                error.add_note(again)
                raise error
            invented(study, cell)
            log(label, 25, {"round": 1})

    monkeypatch.setattr(cells_module, "execute_runs", execute_runs)
    return asked


def test_with_a_log_the_unfinished_cells_run_together(tmp_path, monkeypatch):
    study = Study(tmp_path, "smoke")
    invented(study, CELLS[1])
    asked, seen = executing_together(monkeypatch, study), []
    found, _ = results.run_study(study, CELLS[:3], log=lambda *row: seen.append(row[0]))
    assert asked == seen == [CELLS[0].name, CELLS[2].name]
    assert [entry["status"] for entry in found.cells[:3]] == ["done"] * 3
    assert table(tmp_path).cells == found.cells


def test_an_interruption_of_cells_that_run_together_leaves_the_table(tmp_path, monkeypatch):
    study, error = Study(tmp_path, "smoke"), KeyboardInterrupt()
    executing_together(monkeypatch, study, 1, error)
    with pytest.raises(KeyboardInterrupt):
        results.run_study(study, IID, log=lambda *row: None)
    assert error.__notes__ == ["The same command resumes the study."]
    assert [entry["status"] for entry in table(tmp_path).cells][:1] == ["done"]


def test_a_table_that_cannot_be_written_hides_no_interruption(tmp_path, monkeypatch):
    study, error = Study(tmp_path, "smoke"), KeyboardInterrupt()
    executing_together(monkeypatch, study, 1, error)
    (tmp_path / "table.csv").mkdir()
    with pytest.raises(KeyboardInterrupt):
        results.run_study(study, IID, log=lambda *row: None)
    again, table_too = error.__notes__
    assert again == "The same command resumes the study."
    assert "the table cannot be written to" in table_too
    with pytest.raises(FedLPError, match="Is a directory. All cells are kept; once files can be"):
        results.run_study(study, IID[:1], log=lambda *row: None)


def test_a_figure_that_cannot_be_drawn_costs_no_table(tmp_path):
    study = Study(tmp_path, "smoke")
    invented(study, IID[0])
    (tmp_path / "accuracy_by_round_reference.png").mkdir()
    with pytest.raises(FedLPError, match="picture .* cannot be written"):
        results.run_study(study, IID[:1])
    assert table(tmp_path).cells[0]["status"] == "done"


def test_progress_counts_the_cells_that_run(tmp_path, monkeypatch):
    study = Study(tmp_path, "smoke")
    invented(study, IID[0])
    executing_together(monkeypatch, study)
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    words = ["--out", str(tmp_path), "--scale", "smoke", "--rows", "fedavg,homo-0.5"]
    said = fedlp(*words, "--splits", "iid")
    assert said.exit_code == 0, said.output
    assert "compiling for 1 runs of 2 rounds in all" in said.stderr
    said = fedlp(*words, "--splits", "iid")
    assert said.exit_code == 0 and "compiling" not in said.stderr


@pytest.mark.slow
def test_cells_that_run_together_are_what_they_are_alone(tmp_path):
    cells = choose(("homo-0.5",), ("iid",))
    together, alone = Study(tmp_path / "a", "smoke", 1), Study(tmp_path / "b", "smoke", 1)
    run_cells_together(together, cells)
    list(run_cells(alone, cells))
    for cell in cells:
        (a,), (b,) = (
            [{**row, "seconds": 0} for row in read_cells(study)[cell].rows]
            for study in (together, alone)
        )
        assert a == b
    run_cells_together(together, cells)  # nothing is left to do


def test_a_study_may_read_its_data_set_from_a_file(tmp_path):
    plain, study = Study(tmp_path), Study(tmp_path, data="/elsewhere/images.npz")
    invented(plain, IID[0])
    assert unfinished(study, IID) == IID[1:]  # the first is the same cell
    settings = [run_checkpoint(one.config(IID[1]), tmp_path).settings for one in (plain, study)]
    assert settings[0] == settings[1]  # one resumes the other's
    assert dump_config(study.config(IID[1])) == dump_config(plain.config(IID[1]))
    with pytest.raises(FedLPError, match="scale smoke has its data, the embedded digits; omit"):
        read_cells(Study(tmp_path, "smoke", data="digits.npz"))


@pytest.mark.slow
def test_a_cell_that_began_with_the_data_set_goes_on_with_a_file_of_it(tmp_path, monkeypatch):
    data = fl.load("digits")
    x, y, u, v = (*data.train, *data.test)
    np.savez("digits.npz", train_inputs=x, train_labels=y, test_inputs=u, test_labels=v)
    monkeypatch.setattr(cells_module, "_SHA256", {"digits": data.hash})
    monkeypatch.setattr(
        cells_module, "load", lambda file: fl.load(file, normalize=data.normalize)
    )  # small numbers, which a file of pixels does not have
    asked = []
    with pytest.raises(KeyboardInterrupt):
        list(
            run_cells(
                Study(tmp_path / "halves", "smoke"),
                IID[:1],
                stop=lambda: asked.append(1) or len(asked) > 2,
            )
        )
    halves, whole = (
        Study(tmp_path / name, "smoke", data=file)
        for name, file in (("halves", "digits.npz"), ("whole", None))
    )
    assert len(read_cells(halves)[IID[0]].rows) == 1
    list(run_cells(halves, IID[:1]))
    list(run_cells(whole, IID[:1]))
    resumed, at_once = (
        [{**row, "seconds": 0} for row in read_cells(study)[IID[0]].rows]
        for study in (halves, whole)
    )
    assert resumed == at_once and len(resumed) == 2


def test_the_cells_of_a_study_are_read_once_before_they_run(tmp_path, monkeypatch):
    study, read, before = Study(tmp_path, "smoke"), [], []
    invented(study, IID[0])
    executing(monkeypatch, study)
    execute, reading = cells_module.execute, cells_module.read_runs
    monkeypatch.setattr(
        cells_module, "execute", lambda *a, **k: before.append(len(read)) or execute(*a, **k)
    )
    monkeypatch.setattr(cells_module, "read_runs", lambda one: read.append(one) or reading(one))
    words = ["--out", str(tmp_path), "--scale", "smoke", "--rows", "fedavg,homo-0.5"]
    said = fedlp(*words, "--splits", "iid")
    assert said.exit_code == 0 and "cell 2 of 2: homo-0.5" in said.stderr
    assert before == [1]


def test_a_file_of_other_examples_is_refused_before_a_cell_begins(tmp_path):
    file, out = tmp_path / "cifar10.npz", tmp_path / "out"
    x, y = np.full((200, 32, 32, 3), 255, np.uint8), np.arange(200) % 10
    np.savez(file, train_inputs=x, train_labels=y, test_inputs=x, test_labels=y)
    sentence = r"200 training and .* but not the images of cifar10 in.* fl.load\('cifar10'\)"
    for log in (None, lambda *row: None):
        with pytest.raises(FedLPError, match=sentence):
            results.run_study(Study(out, data=str(file)), IID, log=log)
    with pytest.raises(FedLPError, match=sentence):
        estimate(Study(out, data=str(file)), IID)
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(FedLPError, match="cannot be read as an .npz"):
        results.run_study(Study(out, data=str(file)), IID)
    assert not out.exists()


@pytest.mark.slow
def test_a_file_of_the_published_examples_is_accepted(tmp_path):
    try:
        data = fl.load("cifar10")
    except FedLPError:
        pytest.skip("needs CIFAR-10 in TFDS_DATA_DIR")
    file = tmp_path / "cifar10.npz"  # as Keras has it
    (x, y), (u, v) = (
        (split.inputs, split.labels.astype(np.uint8)[:, None]) for split in (data.train, data.test)
    )
    np.savez(file, x_train=x, y_train=y, x_test=u, y_test=v)
    check_file(Study(tmp_path, data=str(file)))
    np.savez(file, x_train=x[::-1], y_train=y[::-1], x_test=u, y_test=v)  # other clients' images
    with pytest.raises(FedLPError, match="in their order; write it from"):
        check_file(Study(tmp_path, data=str(file)))


def test_a_cell_that_diverges_does_not_stop_the_others(tmp_path, monkeypatch):
    study = Study(tmp_path, "smoke")
    ran = executing(monkeypatch, study, 0, DivergedError("round 1: nobody is left.", None))
    said = []
    assert list(run_cells(study, IID, say=said.append)) == ran == IID
    assert "fedavg-iid-reference-seed25 diverged: round 1: nobody is left." in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--out", "o", "--rows", "fedavgg"], "row 'fedavgg' is unknown; did you mean 'fedavg'?"),
        (["--out", "o", "--splits", "iid,c-niid"], "split 'c-niid' is unknown"),
        (["--out", "o", "--scale", "tiny"], "scale 'tiny' is unknown"),
        (
            ["--costs", "--rows", "homo-0.50"],
            "row 'homo-0.50' is unknown; did you mean 'homo-0.5'?",
        ),
        (["--out", "o", "--draws", "mine"], "draws 'mine' is unknown. Known: reference, own"),
        (["--json"], "--json belongs to --costs"),
        ([], "--out DIR is needed"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence):
    said = fedlp(*words)
    assert said.exit_code == 2
    assert sentence in said.stderr
    assert not Path("o").exists()


# the table


def test_seeds_that_diverged_are_counted_beside_the_mean_of_the_others(tmp_path):
    study = Study(tmp_path, "small")
    for seed, status in ((25, "done"), (26, "diverged"), (27, "done"), (28, "diverged")):
        invented(study, IID[0]._replace(seed=seed), status)
    text = results.markdown(results.make_table(study))
    assert "| FedAvg | 51.55 ± 0.00, 2 diverged | 77.94 |" in text


def test_more_rounds_than_the_published_are_not_compared(tmp_path):
    study = Study(tmp_path, rounds=300)
    invented(study, IID[0])
    entry = results.make_table(study).cells[0]
    assert entry["agreement"].startswith("No comparison: 300 rounds")


@pytest.fixture
def study(tmp_path):
    study = Study(tmp_path, "small")
    invented(study, IID[0], accuracy=0.6)
    invented(study, IID[0]._replace(seed=26), accuracy=0.62)
    invented(study, IID[1], "unfinished")
    invented(study, Cell("hetero-3", "d-niid"), "diverged")
    return study


def test_a_table_has_a_number_only_for_what_was_run(study):
    cells = results.make_table(study).cells
    found = {(entry["id"], entry["split"]): entry for entry in cells if entry["draws"] != "own"}
    assert (len(cells), len(found)) == (54, 27)
    cell = found["fedavg", "iid"]
    # Rounds 11 to 20 add 1.1 to 2 points to the accuracy of each seed.
    assert cell["last_ten_mean"] == pytest.approx(61 + 1.55)
    assert (cell["final"], cell["best"]) == (63.0, 63.0)
    assert cell["seed_sd"] == pytest.approx(2**0.5, abs=1e-4)
    assert cell["last_ten_sd"] == pytest.approx(np.std(range(10), ddof=1) / 10, abs=1e-4)
    assert cell["difference"] == pytest.approx(62.55 - 77.94)
    assert (cell["upload_megabytes"], cell["seconds"], cell["rounds"]) == (40.0, 30.0, 20)
    assert cell["seeds"] == [25, 26] and cell["runs"][0]["commit"] == "abc"
    half = found["homo-0.5", "iid"]
    assert (half["status"], half["rounds"], half["final"]) == ("unfinished", 19, 51.9)
    status = {key: entry["status"] for key, entry in found.items() if entry["status"] != "not run"}
    assert status == {
        ("fedavg", "iid"): "done",
        ("homo-0.5", "iid"): "unfinished",
        ("hetero-3", "d-niid"): "diverged",
    }
    for key in set(found) - {("fedavg", "iid"), ("homo-0.5", "iid")}:
        assert found[key]["last_ten_mean"] is found[key]["difference"] is None
    needed = {"row", "split", "draws", "seeds", "rounds", "last_ten_mean", "final", "published"}
    assert all(needed <= set(entry) for entry in cells)


def test_a_table_is_written_as_json_csv_and_markdown(study):
    made = results.make_table(study)
    results.write_table(made, study.out)
    assert table(study.out) == made
    lines = list(csv.DictReader(io.StringIO((study.out / "table.csv").read_text())))
    assert len(lines) == 54
    assert (lines[0]["last_ten_mean"], lines[0]["seeds"]) == ("62.55", "25 26")
    assert (lines[1]["last_ten_mean"], lines[1]["status"]) == ("", "not run")
    text = (study.out / "table.md").read_text()
    assert "| FedAvg | 62.55 ± 1.41 | 77.94 | not run | 77.67 | not run | 67.57 |" in text
    assert "| FedLP-Homo(0.5) | 51.45 (19) | 77.60 |" in text
    assert "2 x Abacus 1, jax 1.0" in text and "commit abc" in text
    assert "The published runs again" in text and "draws of our own" not in text
    invented(study, IID[0]._replace(draws="own"))
    assert "draws of our own" in results.markdown(results.make_table(study))


@pytest.mark.parametrize(
    ("accuracy", "sentence"),
    [
        # Of the last ten of 200 rounds: 19.55 points more, standard deviation 0.303.
        (0.5798, "Agrees: -0.41 points are 1.4 standard deviations of its last ten rounds (0.30)"),
        (0.59, "Open: +0.61 points are 2.0 standard deviations of its last ten rounds (0.30), but"),
    ],
)
def test_agreement_is_counted_in_standard_deviations(tmp_path, accuracy, sentence):
    study = Study(tmp_path)
    invented(study, IID[0], accuracy=accuracy)
    entry = results.make_table(study).cells[0]
    assert entry["agreement"].startswith(sentence)
    invented(study, IID[0]._replace(seed=26), accuracy=accuracy - 0.1)
    entry = results.make_table(study).cells[0]
    verdict, _, how = entry["agreement"].partition(":")
    assert verdict == "Agrees" and how.endswith("over 2 seeds (7.07)")
    invented(study, IID[1], accuracy=0.5)
    invented(study, IID[1]._replace(seed=26), accuracy=0.501)
    (entry,) = (
        one for one in results.make_table(study).cells if one["id"] == IID[1].row and one["seeds"]
    )
    assert entry["agreement"].startswith("Differs: -8.00 points are 113.2 standard d")


def test_a_smoke_table_compares_with_nothing(tmp_path):
    study = Study(tmp_path, "smoke")
    invented(study, IID[0])
    made = results.make_table(study)
    assert made.cells[0]["difference"] is None
    assert "its accuracies are comparable to nothing" in results.markdown(made)


def test_a_panel_for_each_split_that_was_run(study):
    names = ["accuracy_by_round_reference.png", "accuracy_by_upload_megabytes_reference.png"]
    assert draw_figures(study) == names
    assert all((study.out / name).stat().st_size > 10_000 for name in draw_figures(study))
    assert draw_figures(Study(study.out / "empty")) == []


def test_panels_share_their_axis_of_accuracies(study, monkeypatch):
    invented(study, Cell("fedavg", "m-niid"), accuracy=0.1)
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    draw_figures(study)
    assert len(drawn) == 2
    for figure in drawn:
        assert len(figure.axes) == 2 and len({axes.get_ylim() for axes in figure.axes}) == 1


# the estimate


def test_an_estimate_scales_a_measured_piece_by_modelled_work(tmp_path, monkeypatch):
    rows = [{"seconds": 9.0}, {"seconds": 0.6}, {"seconds": 1.1}]  # compiled; trained; tested

    def simulate(**arguments):
        assert arguments["algorithm"] and arguments["rounds"] == 3
        return types.SimpleNamespace(history=types.SimpleNamespace(rows=rows))

    monkeypatch.setattr(cells_module, "simulate", simulate)
    study = Study(tmp_path, "smoke")
    whole, half = estimate(study, IID).values()
    images = 2 * 4 * 35  # of two rounds of four clients, one epoch; 1437 / 40 dealt evenly
    assert whole.seconds == pytest.approx(0.6 / (3 * 4 * 10) * images + 2 * 0.5)
    assert half.seconds == pytest.approx(whole.seconds)
    # The ledger's bytes of a client; only conv1 and fc1 depend on the size of the images.
    fc1, conv1 = (2048 - 128) * 128, 2 * 9 * 32
    assert whole.upload_megabytes == pytest.approx(8e-6 * (4 * (552_362 - fc1 - conv1) + 5))
    assert 0.5 < half.upload_megabytes / whole.upload_megabytes < 0.5001
    said = fedlp("--estimate", "--scale", "smoke", "--rows", "homo-0.5", "--splits", "iid,m-niid")
    assert said.exit_code == 0, said.output
    assert "measured now" in said.stdout and "FedLP-Homo(0.5)" in said.stdout
    assert not list(tmp_path.rglob("*"))


# the real thing


def command(*words):
    """The command, as a process."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from fedlp_jax.cli import main; main()",
            "reproduce",
            "paper",
            *words,
        ],
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_study_resumes_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLP_CACHE_DIR", str(tmp_path / "cache"))
    out, study = tmp_path / "out", Study(tmp_path / "out", "smoke")
    words = ["--scale", "smoke", "--rows", "fedavg,homo-0.5", "--splits", "iid", "--out", str(out)]
    process = command(*words)
    deadline = time.monotonic() + 300
    while not (study.path(IID[1]) / ".lock").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert unfinished(study, IID) == IID[1:]
    first = (study.path(IID[0]) / "metrics.jsonl").stat().st_mtime_ns
    assert [entry["status"] for entry in table(out).cells if entry["status"] != "not run"] == [
        "done"
    ]

    said = fedlp(*words)
    assert said.exit_code == 0, said.output
    assert "cell 2 of 2: homo-0.5-iid-reference-seed25" in said.stderr
    assert (study.path(IID[0]) / "metrics.jsonl").stat().st_mtime_ns == first
    entries = [e for e in table(out).cells if e["seeds"]]
    assert [(e["id"], e["rounds"]) for e in entries] == [("fedavg", 2), ("homo-0.5", 2)]
    fedavg, homo = (e["upload_megabytes"] for e in entries)
    assert 0.2 < homo / fedavg < 0.8
    assert "Written to" in said.stdout and (out / "accuracy_by_round_reference.png").is_file()


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", ["{", "[" * 99_999, "\0"], ids=["cut", "deep", "NUL"])
def test_a_cell_with_broken_files_is_named(study, name, content):
    (study.path(IID[0]) / name).write_text(content)
    with pytest.raises(
        FedLPError, match=f"{IID[0].name} has a .* that cannot be read: .*Remove the"
    ):
        read_cells(study)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", "3\n" * 20),
        ("metrics.jsonl", '{"round": 1}\n' * 20),
        ("metrics.jsonl", '{"round": 1, "test_accuracy": null}\n' * 20),
        ("origin.json", '{"device": "H200"}'),
        ("origin.json", '{"versions": "0.11"}'),
    ],
)
@pytest.mark.parametrize("cell", IID, ids=["done", "unfinished"])
def test_a_cell_without_what_a_table_needs_is_named(study, cell, name, content):
    path = study.path(cell)
    if not (path / "summary.json").exists():
        (path / "summary.json").write_text('{"versions": {"jax": "1.0"}}')
    (path / name).write_text(content)
    with pytest.raises(FedLPError, match=f"{cell.name} has a .* that cannot be read: .*Remove the"):
        results.make_table(study)
