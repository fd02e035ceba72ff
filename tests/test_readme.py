"""Every block of the README does what it says."""

import importlib
import inspect
import operator
import pathlib
import re
import shlex

import pytest
import yaml

import fedlp_jax as fl
from fedlp_jax.config.loading import parse_config

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_every_public_name_exists():
    names = set(re.findall(r"\bfl\.([A-Za-z_]+(?:\.[A-Za-z_]+)?)", README))
    assert len(names) > 20
    for name in names:
        operator.attrgetter(name)(fl)


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("python"))
def test_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    if "fedavg" in names:
        assert names["fedavg"].history["test_accuracy"][-1] > 0.9
        homo = names["homo"]
        assert homo.history["test_accuracy"][-1] > 0.9
        sent = [r.costs.total["upload_bytes"] for r in (homo, names["fedavg"])]
        assert 0.4 < sent[0] / sent[1] < 0.6
        assert (tmp_path / "docs/quickstart.png").stat().st_size > 10_000
    else:
        assert len(names["result"].history) == 2


@pytest.mark.parametrize("block", blocks("yaml"))
def test_configurations_are_valid(block):
    assert parse_config(yaml.safe_load(block)).rounds == 60


def commands():
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line]


def test_commands_exist():
    found = commands()
    reproduce = importlib.import_module("fedlp_jax.cli.reproduce")
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {words[0] for words in found} == {"make", "fedlp", "pip", "tfds", "export"}
    for words in found:
        if words[0] == "make":
            assert words[1] in targets
        if words[:2] == ["fedlp", "reproduce"]:
            options = inspect.signature(getattr(reproduce, words[2])).parameters
            assert {word[2:] for word in words if word.startswith("--")} <= set(options)
        elif words[0] == "fedlp":
            assert words[1] in ("run", "info")
            assert (ROOT / words[2]).is_file() or "--resume" in words


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) > 15
    for link in links:
        assert (ROOT / link).exists(), link
