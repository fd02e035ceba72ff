"""Every block of the pages under docs/ does what it says."""

import pathlib
import re

import pytest
import yaml

from fedlp_jax.config.loading import parse_config

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "robustness.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


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


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGE) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / "docs" / link).exists(), link
