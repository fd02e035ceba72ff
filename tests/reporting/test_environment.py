import json
import os

from fedlp_jax.reporting import environment
from fedlp_jax.reporting import run_directory as report


def test_the_environment_can_be_written_down():
    found = json.loads(json.dumps(report.plain(environment.environment())))
    assert found["device"]["count"] >= 1
    assert found["versions"]["jax"] and found["versions"]["fedlp_jax"]


def test_the_commit_is_that_of_the_package_or_none(tmp_path, monkeypatch):
    assert environment.commit() is None or len(environment.commit().removesuffix("-dirty")) == 40
    monkeypatch.setenv("PATH", os.fspath(tmp_path))  # no git
    assert environment.commit() is None
