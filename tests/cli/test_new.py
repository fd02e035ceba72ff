"""`fedlp new` writes a project that runs; examples come with the package."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer.testing

from fedlp_jax import FedLPError, cli
from fedlp_jax.config import own
from fedlp_jax.config.build import build
from fedlp_jax.config.loading import EXAMPLES, load_config, located
from fedlp_jax.execution import plan as plans

ROOT = Path(cli.__file__).parents[2]
FILES = ["README.md", "config.yaml", "mask_policy.py", "model.py", "test_project.py"]


def fedlp(*words):
    return typer.testing.CliRunner().invoke(cli.app, list(words))


def test_a_project_has_its_parts_and_its_configuration_builds(tmp_path, monkeypatch):
    said = fedlp("new", str(tmp_path / "mine"))
    assert said.exit_code == 0 and "python -m pytest" in said.output
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == FILES
    monkeypatch.setattr(sys, "path", [*sys.path])
    own.search(tmp_path / "mine")
    arguments = build(load_config(tmp_path / "mine/config.yaml"))
    assert arguments["clients"].clients == 50 and arguments["cohort"] == 10
    for module in ("model", "mask_policy"):
        sys.modules.pop(module)


def test_what_is_not_an_empty_directory_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    said = fedlp("new", str(tmp_path))
    assert said.exit_code == 2 and "is not empty" in said.output
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    said = fedlp("new", str(tmp_path / "notes.txt"))
    assert said.exit_code == 2 and "is a file" in said.output


@pytest.mark.slow
def test_the_test_of_a_project_passes(tmp_path):
    fedlp("new", str(tmp_path / "mine"))
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        words, cwd=tmp_path / "mine", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


# examples


def test_an_example_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart").name == "quickstart"
    assert load_config("paper/homo-0.5-iid").algorithm.keep == 0.5
    assert load_config("algorithms/scaffold").algorithm.name == "scaffold"  # extends another
    for path in EXAMPLES.rglob("*.yaml"):
        assert located(path.relative_to(EXAMPLES).with_suffix("")) == path
    assert located("../configs/quickstart") == Path("../configs/quickstart")


def test_a_file_goes_before_an_example_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()
    assert located("quickstart").parent == EXAMPLES
    Path("quickstart").rmdir()
    Path("quickstart").write_text((EXAMPLES / "quickstart.yaml").read_text() + "seed: 9\n")
    assert load_config("quickstart").seed == 9


def test_a_name_that_is_neither_is_refused_with_the_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FedLPError) as refused:
        load_config("quickstat")
    assert "quickstat does not exist; did you mean 'quickstart'? The package" in str(refused.value)
    assert "algorithms/scaffold, " in str(refused.value)
    with pytest.raises(FedLPError, match=r"quickstat.yaml does not exist\.$"):
        load_config("quickstat.yaml")


def test_an_example_is_not_tuned_in_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plans, "setup", lambda cpu_devices=None: None)
    said = fedlp("tune", "quickstart")
    assert said.exit_code == 2 and "quickstart is an example of the package" in said.output


# the command


def test_every_command_has_examples_in_its_help():
    for command in cli.app.registered_commands:
        assert "Examples:" in command.epilog and f"fedlp {command.callback.__name__}" in (
            command.epilog
        )


def test_the_shell_can_complete_commands():
    said = fedlp("--help")
    assert "--install-completion" in said.output and "--version" in said.output
