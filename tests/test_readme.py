"""Every block of the README does what it says."""

import json
import operator
import pathlib
import re
import shlex

import pytest
import typer.main

import fedlp_jax as fl
from fedlp_jax import cli

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_every_public_name_exists():
    names = set(re.findall(r"\bfl\.([A-Za-z_]+(?:\.[A-Za-z_]+)?)", README))
    assert len(names) >= 8
    for name in names:
        operator.attrgetter(name)(fl)


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("python"))
def test_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["fedavg"].history["test_accuracy"][-1] > 0.9
    homo = names["homo"]
    assert homo.history["test_accuracy"][-1] > 0.9
    sent = [r.costs.total["upload_bytes"] for r in (homo, names["fedavg"])]
    assert 0.4 < sent[0] / sent[1] < 0.6
    assert (tmp_path / "docs/quickstart.png").stat().st_size > 10_000


def test_the_speeds_are_the_measured_ones():
    for number in range(1, 5):
        file = ROOT / "benchmarks" / "results" / f"speed_w{number}.json"
        (run,) = json.loads(file.read_text())["results"]
        median = {k: v["ms_per_client_step"]["median"] for k, v in run["contenders"].items()}
        torch = min(time for name, time in median.items() if "torch" in name)
        numbers = [f"{x:#.3g}" for x in (median["ours"], torch, run["ratio_to_best_torch"])]
        assert re.search(rf"^\| W{number}: .* \| {' . '.join(numbers)} \|$", README, re.MULTILINE)


def test_commands_exist():
    assert {words[0] for words in check_commands(README)} == {"make", "fedlp"}


def check_commands(page):
    """The commands of a page's shell blocks, after a look at whether they exist."""
    text = "".join(re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    lines = [re.split(r" [#>] ", line + " ")[0].strip() for line in text.splitlines()]
    found = [shlex.split(line) for line in lines if line and line[0] != "#"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in found:
        if words[0] == "make":
            assert words[1] in targets
        elif words[0] == "fedlp":
            check_command(words[1:])
    return found


def check_command(words):
    """One use of `fedlp`: the subcommand, its options, and a file that it is given."""
    command = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    options = {name for parameter in command.params for name in parameter.opts}
    free = command.context_settings.get("ignore_unknown_options", False)
    for word in words:
        if word.startswith("--"):
            assert free or word in options, word
        elif word.startswith("configs/"):
            assert (ROOT / word).is_file(), word


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) > 15
    for link in links:
        assert (ROOT / link).exists(), link
