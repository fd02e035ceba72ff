import sys

import typer.testing
import yaml
from small import DIGITS

from fedlp_jax import FedLPError, cli
from fedlp_jax.execution import plan as plans
from fedlp_jax.simulation import sweep


def test_a_sweep_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "setup", lambda cpu_devices=None: None)  # jax is in use here
    monkeypatch.setattr(sweep, "_CPU_MACS", 0)  # the program of one run compiles sooner
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(DIGITS | {"rounds": 2}))
    words = ["sweep", str(file), "--grid", "cohort=2,3", "--rounds=1", "--out", str(tmp_path / "o")]
    runner = typer.testing.CliRunner()
    result = runner.invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    assert "| cohort=3 | 1 | 1 |" in result.stdout
    assert "2 runs in" in result.stdout
    assert "compiling for 2 runs of 2 rounds in all" in result.stderr
    assert sorted(path.name for path in (tmp_path / "o/runs").iterdir()) == [
        "cohort=2-seed0",
        "cohort=3-seed0",
    ]
    pictures = sorted(path.name for path in (tmp_path / "o/plots").iterdir())
    assert pictures == ["accuracy_by_round.png", "accuracy_by_upload_megabytes.png"]
    compared = runner.invoke(cli.app, ["compare", str(tmp_path / "o"), "--format", "md"])
    assert compared.stdout == (tmp_path / "o/table.md").read_text()
    again = runner.invoke(cli.app, words)
    assert again.exit_code == cli.BAD_INPUT and "already holds a sweep" in again.stderr
    resumed = runner.invoke(cli.app, [*words, "--resume"])
    assert resumed.exit_code == 0 and "compiling" not in resumed.stderr
    assert "algorithm.keep=0.1,0.5,1" in runner.invoke(cli.app, ["sweep", "--help"]).stdout


def test_modules_are_found_beside_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command adds to it

    def setup(cpu_devices):
        raise FedLPError("jax is already in use.")  # enough for this test

    monkeypatch.setattr(plans, "setup", setup)
    (tmp_path / "net_of_a_sweep.py").write_text("from fedlp_jax.nn.models import Logistic as Net\n")
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(DIGITS | {"rounds": 2, "model": {"name": "net_of_a_sweep:Net"}}))
    words = ["sweep", str(file), "--grid", "cohort=2,3", "--out", str(tmp_path / "o")]
    result = typer.testing.CliRunner().invoke(cli.app, words)
    assert result.exit_code == cli.BAD_INPUT
    assert "names uses jax while it is imported" in result.stderr


def test_there_are_devices_for_every_point(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command adds to it
    asked = []

    def setup(cpu_devices):
        asked.append(cpu_devices)
        raise FedLPError("Nothing is run.")

    monkeypatch.setattr(plans, "setup", setup)
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(DIGITS | {"rounds": 2}))
    for devices in ("1,2", "2,1", "1,null"):
        words = ["sweep", str(file), "--grid", f"plan.devices={devices}", "--out", str(tmp_path)]
        assert typer.testing.CliRunner().invoke(cli.app, words).exit_code == cli.BAD_INPUT
    assert asked == [2, 2, None]
