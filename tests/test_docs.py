"""Every page beside the README does what it says."""

import pathlib
import re

import pytest
import yaml

from fedlp_jax.config.loading import parse_config

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "robustness.md").read_text()
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = [CONTRIBUTING, ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("python"))
def test_python_runs(block):
    if "privacy=" in block:
        pytest.importorskip("dp_accounting", reason="the extra `privacy` is not installed")
    names = {}
    exec(compile(block, "robustness.md", "exec"), names)
    history = names["result"].history
    key = "epsilon" if "privacy=" in block else "simulated_time"
    assert (history[key] > 0).all()


def test_the_configuration_is_valid():
    raw = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    (block,) = blocks("yaml")
    config = parse_config(raw | yaml.safe_load(block))
    assert config.faults.corruption.kind == "sign_flip"
    section = re.search(r"`algorithm\.privacy: (\{.*\})`", PAGE)[1]
    raw["algorithm"]["privacy"] = yaml.safe_load(section)
    assert parse_config(raw).algorithm.privacy.delta == 1e-3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    for link in links:
        assert "://" in link or (page.parent / link).exists(), link


def test_examples_to_copy_have_at_most_sixty_lines():
    section = CONTRIBUTING.read_text().split("## Where does mine live?")[1].split("\n## ")[0]
    files = [link for link in re.findall(r"\]\(([^)#]+)\)", section) if link.endswith(".py")]
    assert len(files) > 10
    for file in files:
        assert len((ROOT / file).read_text().splitlines()) <= 60, file


def test_software_and_paper_can_be_cited():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2303.06360"
