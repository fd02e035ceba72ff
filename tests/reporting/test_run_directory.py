import contextlib
import json
import os
import resource
import shutil
import tempfile

import numpy as np
import pytest

from fedlp_jax.data import partition
from fedlp_jax.errors import FedLPError
from fedlp_jax.reporting import environment
from fedlp_jax.reporting.plots import draw_run
from fedlp_jax.reporting.run_directory import CLIENTS, METRICS, RunDirectory, read_metrics

VARIABLES = {"params": {"fc": {"bias": np.float32([1, 2])}}}


@contextlib.contextmanager
def full_disk(limit=64):
    """No file may grow beyond a few bytes, which is as near to a full disk as a user gets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def written(path, rounds=1, **row):
    directory = RunDirectory(path, "r")
    directory.begin("seed: 1\n")
    for round in range(1, rounds + 1):
        directory.append({"round": round} | row)
    directory.save(VARIABLES)
    directory.save_arrays(CLIENTS, {"client": np.arange(3)})
    directory.summarize({"status": "done"})
    (directory.path / "plots").mkdir(exist_ok=True)
    (directory.path / "plots" / "accuracy.png").write_bytes(b"png")
    directory.close()
    return directory.path


def test_writes_all_parts_and_releases_its_lock(tmp_path):
    path = written(tmp_path / "out", rounds=3)
    assert sorted(p.name for p in path.iterdir()) == [
        "clients.npz",
        "config.yaml",
        "metrics.jsonl",
        "plots",
        "summary.json",
        "variables.npz",
    ]
    assert [row["round"] for row in read_metrics(path)] == [1, 2, 3]
    config = (path / "config.yaml").read_text()
    assert config.endswith("\nseed: 1\n")
    assert f"# jax {environment.versions()['jax']}\n" in config


def test_a_round_is_on_the_disk_at_once(tmp_path):
    directory = RunDirectory(tmp_path / "out", "r")
    directory.begin("")
    directory.append({"round": 1})
    assert len(read_metrics(tmp_path / "out")) == 1
    directory.close()


def test_every_line_is_json_whatever_the_numbers(tmp_path):
    path = written(
        tmp_path / "out",
        loss=float("nan"),
        accuracy=np.float32(np.inf),
        count=np.int64(2**40),
        array=np.array([[1.0, np.nan]]),
        left_out=None,
        flag=np.bool_(True),
    )
    (line,) = (path / "metrics.jsonl").read_text().splitlines()
    refuse = pytest.fail
    row = json.loads(line, parse_constant=lambda token: refuse(f"{token} is no JSON"))
    assert row == {
        "round": 1,
        "loss": None,
        "accuracy": None,
        "count": 2**40,
        "array": [[1.0, None]],
        "left_out": None,
        "flag": True,
    }


def test_numbers_runs_by_name(tmp_path):
    names = [written(None).as_posix() for _ in range(3)]
    assert names == ["runs/r-1", "runs/r-2", "runs/r-3"]
    (tmp_path / "runs" / "r-17").mkdir()
    (tmp_path / "runs" / "r-x").mkdir()
    (tmp_path / "runs" / "other-99").mkdir()
    assert written(None).as_posix() == "runs/r-18"


def test_two_runs_never_share_a_number(tmp_path):
    first, second = RunDirectory(None, "r"), RunDirectory(None, "r")
    assert first.path != second.path
    assert first.path.is_dir() and second.path.is_dir()


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path):
    for out in (None, tmp_path / "a" / "b"):
        directory = RunDirectory(out, "r")
        assert directory.path.is_dir()
        directory.close()
    assert list(tmp_path.iterdir()) == []


def test_closing_keeps_what_others_put_there(tmp_path):
    directory = RunDirectory(tmp_path / "a" / "b", "r")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    directory.close()
    assert (tmp_path / "a" / "notes.txt").exists()
    assert not (tmp_path / "a" / "b").exists()


def test_refuses_a_directory_that_holds_a_run_and_leaves_it_alone(tmp_path):
    path = written(tmp_path / "out", rounds=2)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(FedLPError, match=r"already holds a run .*--out.*--overwrite"):
        RunDirectory(path, "r")
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    path = written(tmp_path / "out", rounds=2)
    (path / "notes.txt").write_text("mine")
    directory = RunDirectory(path, "r", overwrite=True)
    assert len(read_metrics(path)) == 2  # nothing is lost before the new run has something
    directory.begin("seed: 2\n")
    directory.close()
    assert (path / "notes.txt").exists()
    assert read_metrics(path) == []
    assert not (path / "summary.json").exists()
    assert not (path / "variables.npz").exists()
    assert not (path / "plots" / "accuracy.png").exists()


def test_overwriting_does_not_take_a_config_for_a_run(tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(FedLPError, match=r"no metrics\.jsonl"):
        RunDirectory(tmp_path, "r", overwrite=True)
    assert (tmp_path / "config.yaml").read_text() == "mine"
    assert os.listdir(tmp_path) == ["config.yaml"]


@pytest.mark.parametrize("more", [{}, {"overwrite": True}, {"resume": True}])
def test_a_directory_where_a_run_is_writing_is_refused_and_loses_nothing(tmp_path, more):
    first = RunDirectory(tmp_path / "out", "r")
    sentence = r"another run is writing in .*out; wait until it ends, or choose .*--out"
    for round in (1, 2):
        with pytest.raises(FedLPError, match=sentence):
            RunDirectory(tmp_path / "out", "r", **more)
        if round == 1:
            first.begin("seed: 1\n")
        first.append({"round": round})
    first.close()
    assert len(read_metrics(tmp_path / "out")) == 2


def test_the_lock_of_a_killed_run_blocks_nobody(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").write_text("")  # left behind; nobody holds it
    assert len(read_metrics(written(tmp_path / "out"))) == 1
    assert ".lock" not in os.listdir(tmp_path / "out")


@pytest.mark.parametrize("deleted", ["", ".lock", METRICS])
def test_a_run_whose_files_were_deleted_ends_with_a_sentence(tmp_path, deleted):
    out = tmp_path / "out"
    directory = RunDirectory(out, "r")
    directory.begin("seed: 1\n")
    (out / deleted).unlink() if deleted else shutil.rmtree(out)
    for write in (
        lambda: directory.append({"round": 1}),
        lambda: directory.save(VARIABLES),
        lambda: directory.summarize({}),
    ):
        with pytest.raises(RuntimeError, match=r"out was deleted or replaced while this run wrote"):
            write()
    directory.close()
    assert not (out / "summary.json").exists()


def test_a_run_leaves_the_files_of_the_run_that_replaced_it(tmp_path):
    out = tmp_path / "out"
    first = RunDirectory(out, "r")
    shutil.rmtree(out)
    second = RunDirectory(out, "r")
    second.begin("seed: 2\n")
    with pytest.raises(RuntimeError, match="was deleted or replaced"):
        first.begin("seed: 1\n")
    first.close()
    second.append({"round": 1})
    second.close()
    assert len(read_metrics(out)) == 1
    assert (out / "config.yaml").read_text().endswith("seed: 2\n")


def test_a_resumed_run_starts_from_the_rounds_of_its_checkpoint(tmp_path):
    path = written(tmp_path / "out", rounds=3, of="old")
    with (path / METRICS).open("a") as file:
        file.write('{"round": 4, "of"')  # killed in the middle of a line
    directory = RunDirectory(path, "r", resume=True)
    directory.begin("rounds: 9\n", [{"round": 1, "of": "old"}])
    directory.append({"round": 2, "of": "new"})
    directory.close()
    assert [row["of"] for row in read_metrics(path)] == ["old", "new"]
    assert (path / "config.yaml").read_text().endswith("rounds: 9\n")
    assert (path / "earlier" / METRICS).read_text().count("old") == 3
    again = RunDirectory(path, "r", resume=True)
    again.begin("rounds: 9\n")
    again.close()
    assert (path / "earlier" / METRICS).read_text().count("old") == 3  # not the two rows of since


def test_nothing_is_removed_without_leave(tmp_path):
    directory = RunDirectory(tmp_path / "out", "r")
    for name in ("metrics.jsonl", "summary.json", "config.yaml"):
        (directory.path / name).write_text("theirs")  # of a program that ignores the lock
    with pytest.raises(FileExistsError):
        directory.begin("")
    directory.close()
    for name in ("metrics.jsonl", "summary.json", "config.yaml"):
        assert (directory.path / name).read_text() == "theirs"


@pytest.mark.parametrize("there", [True, False])
def test_a_directory_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch, there):
    if there:
        (tmp_path / "out").mkdir()

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", forbidden)  # root may write what others may not
    with pytest.raises(FedLPError, match=r"nothing can be written to .*out: Permission denied"):
        RunDirectory(tmp_path / "out", "r")
    assert (tmp_path / "out").exists() == there
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("out", [os.fsdecode(b"out\xff"), "a\\b"])
def test_a_name_that_cannot_hold_a_checkpoint_is_refused_at_once(tmp_path, out):
    with pytest.raises(FedLPError, match="choose another directory"):
        RunDirectory(tmp_path / out, "r")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_without_a_run_may_be_used(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    path = written(tmp_path / "out")
    assert len(read_metrics(path)) == 1


def test_refuses_what_cannot_be_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FedLPError, match="file is a file; name a directory with --out"):
        RunDirectory(tmp_path / "file", "r")
    with pytest.raises(FedLPError, match="cannot be made"):
        RunDirectory(tmp_path / "file" / "below", "r")


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    for name in (".lock", "config.yaml", "variables.npz"):
        folder = tmp_path / f"out of {name}"
        folder.mkdir()
        (folder / name).symlink_to(tmp_path / "mine")
        for more in ({}, {"resume": True}):
            with pytest.raises(FedLPError, match=r"\.lock: Too many levels|holds"):
                RunDirectory(folder, "r", **more)
        assert os.listdir(folder) == [name]
    path = written(tmp_path / "out")
    (path / ".summary.json").symlink_to(tmp_path / "mine")  # where the new one is written first
    directory = RunDirectory(path, "r", resume=True)
    directory.begin("seed: 1\n")
    directory.summarize({"status": "done"})
    directory.close()
    assert json.loads((path / "summary.json").read_text()) == {"status": "done"}
    assert (tmp_path / "mine").read_text() == "mine"


def test_plots_are_not_written_through_links(tmp_path):
    path = written(tmp_path / "out")
    (tmp_path / "mine").write_text("mine")
    for name in ("partition.png", ".partition.png", "accuracy_by_round.png"):
        (path / "plots" / name).symlink_to(tmp_path / "mine")
    clients = partition.iid(np.arange(40) % 4, clients=4, seed=0)
    rows = [{"round": 1, "test_accuracy": 0.5, "upload_bytes": 1}]
    draw_run(path / "plots", "r", clients, rows)
    assert (tmp_path / "mine").read_text() == "mine"
    for name in ("partition.png", "accuracy_by_round.png", "accuracy_by_upload_megabytes.png"):
        assert (path / "plots" / name).read_bytes().startswith(b"\x89PNG")
        assert not (path / "plots" / name).is_symlink()


def test_a_full_disk_leaves_the_files_that_were_there(tmp_path):
    path = written(tmp_path / "out")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    directory = RunDirectory(path, "r", resume=True)
    large = {"params": {"fc": {"kernel": np.zeros((99, 99), np.float32)}}}
    for name, write in (
        ("variables.npz", lambda: directory.save(large)),
        (
            "clients.npz",
            lambda: directory.save_arrays(CLIENTS, {"x": np.random.default_rng(0).random(999)}),
        ),
        ("summary.json", lambda: directory.summarize({"x": "y" * 999})),
    ):
        with pytest.raises(OSError, match=f"too large: '.*{name}'"), full_disk():
            write()
    directory.close()
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before
