import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import yaml

import fedlp_jax
from fedlp_jax.execution.compilation import keep_programs

RUN = """
import json, sys
import jax.monitoring
seen = []
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event.rsplit("/")[-1]))
from fedlp_jax.cli import app
code = app(sys.argv[1:], standalone_mode=False)
assert not code, code
print(json.dumps({name: seen.count(name) for name in ("cache_hits", "cache_misses")}))
"""
SMALL = {
    "data": {"name": "synthetic", "options": {"examples": 40, "test_examples": 10}},
    "partition": {"name": "iid", "clients": 4},
    "model": {"name": "logistic"},
    "algorithm": {"name": "fedavg", "client_optimizer": {"name": "sgd", "learning_rate": 0.1}},
    "rounds": 2,
    "cohort": 4,
    "plan": {"devices": 2},
}


def run(folder, out):
    """How many programs a process found and how many it compiled, and the model it trained."""
    config = folder / "small.yaml"
    config.write_text(yaml.safe_dump(SMALL))
    clean = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    settings = {
        "FEDLP_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(Path(fedlp_jax.__file__).parents[1]),
    }
    command = [sys.executable, "-c", RUN, "run", str(config), "--out", str(folder / out)]
    done = subprocess.run(command, env=clean | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1]), (folder / out / "variables.npz").read_bytes()


@pytest.mark.slow
def test_a_second_process_compiles_nothing_and_trains_the_same_model(tmp_path):
    first, model = run(tmp_path, "first")
    stored = sorted((tmp_path / "cache" / "xla").iterdir())
    second, same_model = run(tmp_path, "second")
    assert first["cache_misses"] == len(stored) >= 2  # the round, the evaluation
    assert second["cache_misses"] == 0
    assert second["cache_hits"] >= first["cache_misses"]
    assert same_model == model  # bit for bit
    assert sorted((tmp_path / "cache" / "xla").iterdir()) == stored


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """jax as a user has it: no place for compiled programs; ours is tmp_path."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], None)
    monkeypatch.setenv("FEDLP_CACHE_DIR", str(tmp_path))
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_folder_is_the_users_own(unset):
    folder = keep_programs()
    assert folder == unset / "xla" == Path(jax.config.jax_compilation_cache_dir)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_place_chosen_for_jax_stays(unset):
    jax.config.update("jax_compilation_cache_dir", str(unset / "mine"))
    assert keep_programs() == unset / "mine"
    assert not (unset / "xla").exists()


def test_nothing_is_stored_where_jax_is_told_not_to(unset):
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert keep_programs() is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert not (unset / "xla").exists()


@pytest.mark.parametrize("obstacle", ["a file", "no permission", "no home"])
def test_a_folder_that_cannot_be_written_is_no_error(unset, monkeypatch, obstacle):
    if obstacle == "a file":
        (unset / "xla").touch()
    elif obstacle == "no permission":
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    else:
        monkeypatch.setattr(
            "fedlp_jax.execution.compilation.cache_dir",
            lambda: Path("~nobody-at-all").expanduser(),
        )
    assert keep_programs() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_programs_compiled_long_ago_are_deleted(unset):
    folder = keep_programs()
    old, new, other = folder / "old-cache", folder / "new-cache", folder / "other"
    for file in (old, new, other):
        file.touch()
    for file in (old, other):
        os.utime(file, (time.time() - 40 * 24 * 3600,) * 2)
    jax.config.update("jax_compilation_cache_dir", None)
    keep_programs()
    assert sorted(folder.iterdir()) == [new, other]
