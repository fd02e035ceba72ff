"""Checkpoints on disk: written whole, read only if every bit is as it was written."""

import contextlib
import gc
import json
import logging
import os
import pickle
import resource
import shutil
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from fedlp_jax import FedLPError
from fedlp_jax.execution.plan import Plan
from fedlp_jax.simulation import checkpoint
from fedlp_jax.simulation.checkpoint import Checkpoint, Saver
from fedlp_jax.simulation.snapshot import Snapshot


def snapshot(round):
    """A small run with all that may occur: scalars, short floats, bits, names like paths."""
    rng = np.random.default_rng(round)
    arrays = {
        ".variables['params']['fc']['kernel']": rng.normal(size=(40, 30)).astype(np.float32),
        ".variables['params']['a/b']['.']": np.asarray(jnp.arange(3, dtype=jnp.bfloat16)) + 1,
        "../../../escape": np.array([np.nan, np.inf, -0.0], np.float32),
        ".round": np.array(round, np.int32),
        ".halted": np.array(False),
        "ledger senders": rng.integers(0, 9, (round, 2)),
        "ledger clients": np.full(round, 4),
    }
    rows = [{"round": r, "loss": 0.1 * r, "none": None, "nan": np.nan} for r in range(1, round + 1)]
    return Snapshot(
        round,
        rows,
        {"padded_share": 0.1 * round, "imbalance": 1.0},
        {"seed": 3, "partition": "abc"},
        Plan(2, 1),
        {"1x2 * 2x3": "patches"},
        [[name, str(array.dtype), list(array.shape)] for name, array in arrays.items()],
        np.frombuffer(b"".join(array.tobytes() for array in arrays.values()), np.uint8),
    )


def write(where, *rounds):
    saver = Saver(where, None)
    for round in rounds:
        saver.save(snapshot(round))


def assert_same(found, wanted):
    assert found._replace(data=0, rows=0) == wanted._replace(data=0, rows=0)
    assert repr(found.rows) == repr(wanted.rows)  # NaN is not equal to itself
    assert list(found.arrays) == list(wanted.arrays)
    for name, array in wanted.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert found.arrays[name].shape == array.shape
        assert found.arrays[name].tobytes() == array.tobytes()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A directory with checkpoints after rounds 3 and 5."""
    path = tmp_path_factory.mktemp("two") / "checkpoints"
    write(Checkpoint(path, every=1, settings={"rate": 0.1}), 3, 5)
    return path


@pytest.fixture
def copied(two, tmp_path):
    shutil.copytree(two, tmp_path / "checkpoints")
    return Checkpoint(tmp_path / "checkpoints", settings={"rate": 0.1})


def test_what_is_read_is_what_was_written_in_every_bit(two):
    found = Checkpoint(two, settings={"rate": 0.1}).latest()
    assert_same(found, snapshot(5))


def test_nothing_is_written_outside_whatever_the_names(two):
    assert [path.name for path in two.parent.iterdir()] == ["checkpoints"]
    assert not list(two.rglob("*escape*"))


def test_no_directory_has_no_checkpoint(tmp_path):
    assert Checkpoint(tmp_path / "none").latest() is None
    assert list(tmp_path.iterdir()) == []


def test_the_last_few_are_kept(tmp_path):
    where = Checkpoint(tmp_path / "c", keep=3)
    write(where, 1, 2, 4, 7, 9)
    assert where.rounds() == [4, 7, 9]


def test_no_pickle_is_loaded(two, monkeypatch):
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("a pickle was loaded"))
    assert Checkpoint(two, settings={"rate": 0.1}).latest().round == 5


# damage


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 8
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, truncate, os.unlink])
def test_whatever_file_is_damaged_no_wrong_bit_is_read(copied, damage):
    skipped = 0
    files = sorted(p.relative_to(copied.directory) for p in copied.directory.rglob("5/**/*"))
    for name in files:
        file = copied.directory / name
        if not file.is_file():
            continue
        good = file.read_bytes()
        damage(file)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found = copied.latest()
        assert_same(found, snapshot(found.round))
        if found.round == 3:
            skipped += 1
            assert "5 is damaged and skipped" in str(warned[0].message)
        file.write_bytes(good)
    assert skipped >= 2  # at least the data and the facts


def test_a_flipped_bit_of_an_array_is_seen_by_its_digest(copied, monkeypatch):
    """orbax itself restores it without an error."""
    import orbax.checkpoint as ocp

    plain = ocp.CheckpointManager.restore

    def flipped(self, step, **kwargs):
        found = plain(self, step, **kwargs)
        if "arrays" in found and step == 5:
            found["arrays"]["data"][17] ^= 1
        return found

    monkeypatch.setattr(ocp.CheckpointManager, "restore", flipped)
    with pytest.warns(UserWarning, match="5 is damaged and skipped: the SHA-256 of its arrays"):
        assert copied.latest().round == 3


def test_where_all_are_damaged_nothing_is_made_up(copied):
    for file in copied.directory.rglob("*"):
        if file.is_file():
            truncate(file)
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(FedLPError, match=r"all checkpoints .* are damaged \(after rounds 3, 5\)"),
    ):
        copied.latest()


def test_what_a_killed_run_left_half_written_is_no_checkpoint_and_goes(copied):
    half = copied.directory / "7.orbax-checkpoint-tmp-1"
    shutil.copytree(copied.directory / "5", half)
    assert copied.latest().round == 5
    Saver(copied, copied.latest()).save(snapshot(8))
    assert not half.exists()
    assert copied.rounds() == [5, 8]


def test_damaged_ones_make_room_when_their_round_comes_again(copied):
    truncate(next(copied.directory.glob("5/facts/metadata")))
    with pytest.warns(UserWarning, match="skipped"):
        start = copied.latest()
    Saver(copied, start).save(snapshot(5))
    assert_same(copied.latest(), snapshot(5))


# other runs, other versions


def test_other_settings_are_refused_with_every_field_that_differs(two):
    settings = {"rate": 0.2, "model": {"name": "mlp", "hidden": [3]}}
    with pytest.raises(FedLPError) as error:
        Checkpoint(two, settings=settings).latest()
    assert (
        "5 belongs to another run: rate was 0.1 and is 0.2; model.name was not set and is mlp; "
        in (str(error.value))
    )


def test_a_setting_that_a_checkpoint_lacks_counts_as_its_default(two):
    def settings(momentum):
        return Checkpoint(two, settings={"rate": 0.1, "server": {"momentum": momentum}})

    defaults = {"server": {"momentum": 0.0}, "rate": 0.2}  # it has a rate
    assert settings(0.0).latest(defaults).round == 5
    with pytest.raises(FedLPError, match="server.momentum was 0.0 and is 0.9. Resume"):
        settings(0.9).latest(defaults)
    with pytest.raises(FedLPError, match="server.momentum was not set and is 0.0. Resume"):
        settings(0.0).latest()


def test_a_checkpoint_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    write(Checkpoint(tmp_path / "c"), 1)
    monkeypatch.undo()
    with pytest.raises(FedLPError, match=r"by fedlp_jax .* in format 6, but .* reads format 5"):
        Checkpoint(tmp_path / "c").latest()


def test_another_version_of_jax_is_told(tmp_path, monkeypatch):
    versions = checkpoint._versions()
    monkeypatch.setattr(checkpoint, "_versions", lambda: versions | {"jax": "0.0.1"})
    write(Checkpoint(tmp_path / "c"), 1)
    monkeypatch.undo()
    with pytest.warns(UserWarning, match=r"written with jax 0\.0\.1, not .*: the bits"):
        assert Checkpoint(tmp_path / "c").latest().round == 1


def test_checkpoints_of_another_run_are_not_written_over(copied):
    with pytest.raises(FedLPError, match=r"has the checkpoints of a run, the last after round 5"):
        Saver(copied, None)
    over = Checkpoint(copied.directory, overwrite=True)
    saver = Saver(over, None)
    assert copied.rounds() == [3, 5]  # until there is something new
    saver.save(snapshot(1))
    assert copied.rounds() == [1]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"every": 0}, "checkpoint.every=0 must be a whole number of at least 1"),
        ({"every": 1.5}, "checkpoint.every=1.5 must be a whole number"),
        ({"keep": None}, "checkpoint.keep=None must be a whole number"),
        ({"minutes": -1}, "checkpoint.minutes=-1 must be a number of at least 0"),
        ({"minutes": float("nan")}, "checkpoint.minutes=nan"),
        ({"settings": {"a": {1, 2}}}, "settings cannot be written as JSON"),
    ],
)
def test_refusals(settings, sentence):
    with pytest.raises(FedLPError, match=sentence):
        Checkpoint("here", **settings)


# when, and when not


def test_a_checkpoint_is_due_by_rounds_or_minutes_and_the_first_within_30_seconds(
    tmp_path, monkeypatch
):
    now = [0.0]
    monkeypatch.setattr("fedlp_jax.simulation.checkpoint.time.monotonic", lambda: now[0])
    by_rounds = Saver(Checkpoint(tmp_path, every=3, minutes=None), None)
    by_time = Saver(Checkpoint(tmp_path / "c", minutes=2), None)
    often = Saver(Checkpoint(tmp_path / "d", minutes=0.1), None)
    never = Saver(None, None)
    due = []
    for round in range(1, 9):
        now[0] += 25
        assert often.due(round)
        assert not never.due(round)
        assert by_rounds.due(round) == (round % 3 == 0)
        if by_time.due(round):
            due.append(round)
            by_time.save(snapshot(round))
    assert due == [2, 7]
    assert by_rounds.rounds_until_due(4) == 3


def test_a_run_is_saved_at_its_end_if_it_was_interrupted_or_is_long(tmp_path):
    short = Saver(Checkpoint(tmp_path / "a"), None)
    assert short.due_at_end(4, interrupted=True)
    assert not short.due_at_end(4, interrupted=False)
    assert not short.due_at_end(0, interrupted=True)  # nothing was done
    assert Saver(Checkpoint(tmp_path / "a", every=100), None).due_at_end(4, interrupted=False)
    assert Saver(Checkpoint(tmp_path / "a"), snapshot(2)).due_at_end(4, interrupted=False)
    assert not Saver(Checkpoint(tmp_path / "a"), snapshot(4)).due_at_end(4, interrupted=False)
    assert not Saver(None, None).due_at_end(4, interrupted=True)


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond a few bytes, which is as near to a full disk as any user gets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_names_the_directory_and_leaves_the_last_checkpoint(copied):
    saver = Saver(copied, copied.latest())
    sentence = r"in .*checkpoints could not be written \(the last is after round 5\)"
    with pytest.raises(RuntimeError, match=sentence), full_disk():
        saver.save(snapshot(9))
    assert_same(copied.latest(), snapshot(5))


def test_a_deleted_directory_is_made_again(copied):
    saver = Saver(copied, copied.latest())
    saver.save(snapshot(6))
    shutil.rmtree(copied.directory)
    saver.save(snapshot(9))
    assert copied.rounds() == [9]
    assert_same(copied.latest(), snapshot(9))


@pytest.mark.parametrize("name", [os.fsdecode(b"\xff"), "a\\b", "gs:", "x" * 300, "file/below"])
def test_a_directory_that_cannot_hold_a_checkpoint_is_refused_at_once(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        FedLPError, match="is not UTF-8|backslash or|nothing can be written|cannot be read"
    ):
        Saver(Checkpoint(tmp_path / name), None)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["run[1]", "a*b", "a b?", "100%", "\u00e9\n"])
def test_any_other_name_holds_a_checkpoint(tmp_path, name):
    where = Checkpoint(tmp_path / name)
    write(where, 2)
    assert_same(where.latest(), snapshot(2))


def test_nothing_stays_patched_and_nothing_is_logged(copied, capfd):
    import sys

    from absl import logging as absl_logging

    def settings():
        return (
            sys.unraisablehook,
            absl_logging.get_verbosity(),
            logging.getLogger("asyncio").level,
        )

    before = settings()
    truncate(next(copied.directory.glob("5/arrays/data/0")))
    with pytest.warns(UserWarning, match="skipped"):
        Saver(copied, copied.latest()).save(snapshot(4))
    gc.collect()
    assert settings() == before
    assert capfd.readouterr() == ("", "")


def test_the_facts_are_plain_json(two):
    facts = json.loads((two / "5" / "facts" / "metadata").read_text())
    assert facts["format"] == checkpoint.FORMAT
    assert facts["settings"] == {"rate": 0.1}
    assert len(facts["snapshot"]["layout"]) == 7
