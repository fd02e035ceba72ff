"""Bad input is refused in a sentence before anything compiles, whatever reads it."""

import contextlib
import gc
import gzip
import io
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import typer.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fedlp_jax as fl
from fedlp_jax import cli
from fedlp_jax.config.experiment import run
from fedlp_jax.config.loading import dump_config, load_config, parse_config, parse_yaml
from fedlp_jax.data.loading import load
from fedlp_jax.execution import plan as plans

RAW = {
    "data": {"name": "digits"},
    "partition": {"name": "iid", "clients": 20},
    "model": {"name": "logistic"},
    "algorithm": {"name": "fedavg", "client_optimizer": {"name": "sgd", "learning_rate": 0.1}},
    "rounds": 1,
    "cohort": 2,
    "plan": {"devices": 1, "width": 1},
    "checkpoint": {"every": 1},
}
quick = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def refusal(read):
    """The sentence of a refusal: short, and printable."""
    with pytest.raises(fl.FedLPError) as error:
        read()
    sentence = str(error.value)
    assert sentence.isprintable() and len(sentence) < 1000
    return sentence


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    run(RAW, path)
    return path


@pytest.fixture
def directory(finished, tmp_path):
    """A copy of a finished run of one round, with one checkpoint."""
    return shutil.copytree(finished, tmp_path / "run")


# YAML; more in tests/config/test_loading.py


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b"a: 'b",
        b"a: !!python/name:os.system",
        b"{" * 10_000,
        b"a: 1\na: 2\n",
        b"\x1b[2J: 1\n",
    ],
)
def test_a_file_that_is_not_a_configuration(tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert "bad.yaml" in refusal(lambda: load_config(path))


def test_a_configuration_that_is_not_a_file(tmp_path):
    assert "cannot be read" in refusal(lambda: load_config(tmp_path))
    assert "does not exist" in refusal(lambda: load_config(tmp_path / "nowhere" / "a.yaml"))
    os.mkfifo(tmp_path / "pipe.yaml")  # to open one would wait for ever
    assert "cannot be read" in refusal(lambda: load_config(tmp_path / "pipe.yaml"))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
fields = [
    "seed",
    "cohort",
    "model",
    "data",
    "algorithm",
    "faults",
    "plan",
    "x",
    "name",
]


@quick
@given(st.dictionaries(st.sampled_from(fields), values, max_size=3))
def test_any_mapping_is_taken_or_refused_in_sentences(raw):
    try:
        config = parse_config(RAW | raw)
    except fl.FedLPError as error:
        assert all(line.isprintable() for line in str(error).splitlines())
    else:
        assert dump_config(parse_config(parse_yaml(dump_config(config)))) == dump_config(config)


# Shakespeare; more in tests/data/test_shakespeare.py


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 10_000, b'{"a": ["b"], "c": 1}', b"\xff"])
def test_a_file_without_roles(tmp_path, content):
    (tmp_path / "roles.json.gz").write_bytes(gzip.compress(content))
    assert "roles.json.gz" in refusal(lambda: load("shakespeare", tmp_path))


# .npz


def arrays(**changes):
    good = {
        "train_inputs": np.full((20, 4, 4, 1), 255, np.uint8),
        "train_labels": np.arange(20) % 2,
        "test_inputs": np.full((4, 4, 4, 1), 255, np.uint8),
        "test_labels": np.arange(4) % 2,
    }
    return {name: value for name, value in (good | changes).items() if value is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {"test_labels": None},
        {"train_labels": np.arange(19)},
        {"train_labels": np.arange(20) - 1},
        {"train_inputs": np.full((20, 3), np.nan, np.float32)},
        {"test_inputs": np.zeros((4, 5, 5, 1), np.uint8)},
        {"train_inputs": np.array([{}] * 20, object)},  # a pickle, which nothing ever loads
    ],
)
def test_an_archive_without_a_data_set(tmp_path, changes):
    path = tmp_path / "own.npz"
    np.savez(path, **arrays(**changes))
    assert "own" in refusal(lambda: load(str(path)))


@quick
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7), keep=st.floats(0, 1))
def test_a_flipped_bit_or_a_cut_of_an_archive_changes_no_number(tmp_path, at, bit, keep):
    file = io.BytesIO()
    np.savez(file, **arrays())
    whole = file.getvalue()
    flipped = bytearray(whole)
    flipped[at % len(flipped)] ^= 1 << bit
    for content in (bytes(flipped), whole[: int(keep * (len(whole) - 1))]):
        (tmp_path / "own.npz").write_bytes(content)
        with contextlib.suppress(fl.FedLPError):
            data = load(str(tmp_path / "own.npz"))
            np.testing.assert_array_equal(data.train.inputs, arrays()["train_inputs"])
            np.testing.assert_array_equal(data.test.labels, arrays()["test_labels"])


# checkpoints and run directories


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_not_resumed(directory):
    files = (p for p in (directory / "checkpoints").rglob("*") if p.is_file())
    damage(max(files, key=lambda p: p.stat().st_size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sentence = refusal(lambda: run(RAW | {"rounds": 2}, directory, resume=True))
        gc.collect()  # what orbax raises while it is collected is a warning, too
    assert "checkpoint" in sentence


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 3, "rounds": 2}, "seed"),
        ({"cohort": 3, "rounds": 2}, "cohort"),
        ({"model": {"name": "mlp"}, "rounds": 2}, "model"),
    ],
)
def test_another_run_is_not_resumed(directory, changes, sentence):
    assert sentence in refusal(lambda: run(RAW | changes, directory, resume=True))


def test_a_finished_run_is_not_overwritten(directory):
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    assert "already holds a run" in refusal(lambda: run(RAW, directory))
    assert {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()} == before


# the command line: one refusal of each command from end to end; more in tests/cli


@pytest.mark.parametrize(
    "words",
    [
        ("run", "bad.yaml"),
        ("run", "good.yaml", "--rounds", "-3"),
        ("run", "good.yaml", "--algorithm.kep", "1"),
        ("run", "good.yaml", "--data.name", "no_such_set"),
        ("run", "good.yaml", "--cohort", "50"),
        ("run", "good.yaml", "--out", "file"),
        ("run", "nowhere", "--resume"),
        ("info", "bad.yaml"),
        ("tune", "bad.yaml"),
        ("sweep", "good.yaml", "--grid", "algorithm.kep=1", "--out", "sweep"),
        ("sweep", "good.yaml", "--grid", "cohort=50", "--out", "sweep"),
        ("reproduce", "paper", "--rows", "homo-2", "--out", "paper"),
    ],
)
def test_a_command_that_is_refused_writes_nothing_and_exits_with_2(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plans, "setup", lambda cpu_devices=None: None)  # jax is in use here
    Path("good.yaml").write_text(json.dumps(RAW))
    Path("bad.yaml").write_text(json.dumps(RAW | {"roundz": 3}))
    Path("file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    result = typer.testing.CliRunner().invoke(cli.app, list(words), prog_name="fedlp")
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1].startswith("fedlp: ") and "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before
