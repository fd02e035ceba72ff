import json
import os

from fedlp_jax.reporting import environment
from fedlp_jax.reporting import run_directory as report


def test_the_environment_can_be_written_down():
    written = json.loads(json.dumps(report.plain(environment.environment())))
    assert written["device"]["count"] >= 1
    assert written["versions"]["jax"] and written["versions"]["fedlp_jax"]
    assert environment.origin(written).startswith(f"{written['device']['count']} x ")


def test_the_commit_is_that_of_the_package_or_none(tmp_path, monkeypatch):
    assert environment.commit() is None or len(environment.commit().removesuffix("-dirty")) == 40
    monkeypatch.setenv("PATH", os.fspath(tmp_path))  # no git
    assert environment.commit() is None
