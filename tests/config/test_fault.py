"""Configurations of faults, robust rules and privacy: what they build, and what is refused."""

import math

import pytest
import yaml

import fedlp_jax as fl
from fedlp_jax.aggregation.robust import RULES, Robust
from fedlp_jax.config.experiment import build, execute
from fedlp_jax.config.overview import overview
from fedlp_jax.config.schema import dump_config, load_config, parse_config

RAW = """
data: {name: digits}
partition: {name: iid, clients: 20}
model: {name: logistic}
algorithm:
  name: fedlp_homo
  keep: 0.5
  aggregator: {name: trimmed_mean, trim: 0.3}
  clip: 5.0
  client_optimizer: {name: sgd, learning_rate: 0.1}
faults:
  dropout: 0.1
  corruption: {kind: sign_flip, share: 0.2}
  profile: {compute: 1.0e+9, download: 1.0e+6, upload: 2.0e+5}
  deadline: 2.0
  over_selection: 1.5
rounds: 2
cohort: 4
plan: {devices: 1, width: 1}
"""


def raw(**fields):
    """`RAW` with dotted fields laid over it, `__` for a dot."""
    tree = yaml.safe_load(RAW)
    for field, value in fields.items():
        *path, last = field.split("__")
        here = tree
        for part in path:
            here = here[part]
        here[last] = value
    return tree


def test_a_run_is_built_written_and_read_back(tmp_path):
    config = parse_config(raw())
    assert parse_config(yaml.safe_load(dump_config(config))) == config
    outcome = execute(config, tmp_path / "out")
    assert (outcome.directory / "plots" / "accuracy_by_simulated_time.png").is_file()
    assert load_config(outcome.directory / "config.yaml").faults == config.faults
    final = outcome.summary["final"]
    assert final["chosen"] == 6
    assert final["arrived"] <= 4
    assert math.isfinite(final["simulated_time"])
    assert overview(config, build(config)).stacked_bytes > 0


def test_every_rule_can_be_named():
    for name in RULES:
        algorithm = build(parse_config(raw(algorithm__aggregator=name)))["algorithm"]
        assert algorithm.stacked
    assert isinstance(RULES["krum"](byzantine=0.2), Robust)
    assert not build(parse_config(raw(algorithm__aggregator="cohort_mean")))["algorithm"].stacked


def test_fields_are_set_from_the_command_line(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(RAW)
    config = load_config(path, {"faults.dropout": 0.3, "algorithm.aggregator": "median"})
    assert (config.faults.dropout, config.faults.deadline) == (0.3, 2.0)
    assert config.algorithm.aggregator == "median"
    without = load_config(path, {"faults": None})
    assert build(without)["faults"] is None


def test_privacy_reaches_the_algorithm():
    settings = {
        "algorithm__aggregator": "cohort_mean",
        "algorithm__weighting": "uniform",
        "algorithm__clip": None,
        "algorithm__privacy": {"clip": 1, "noise_multiplier": 2},
    }
    algorithm = build(parse_config(raw(**settings)))["algorithm"]
    assert algorithm.privacy == fl.Privacy(1.0, 2.0, 1e-5)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"faults__dropout": 1.5}, "faults.dropout is 1.5"),
        ({"faults__corruption__kind": "sign-flip"}, "did you mean 'sign_flip'"),
        ({"faults__corruption__share": "many"}, "faults.corruption.share is 'many'"),
        ({"faults__profile__upload": 0}, "faults.profile.upload is 0"),
        ({"faults__over_selection": 0.5}, "faults.over_selection is 0.5"),
        ({"faults__deadlin": 1.0}, "did you mean 'deadline'"),
        ({"faults__availability": [[0.5, 2.0]]}, r"faults.availability\[0\] \[1\] is 2.0"),
        ({"algorithm__aggregator": "krumm"}, "did you mean 'krum'"),
        ({"algorithm__aggregator": {"name": "krum", "trim": 0.1}}, "krum does not take"),
        ({"algorithm__aggregator": {"name": "krum", "byzantine": 0.7}}, "is 0.7, but must be"),
        ({"algorithm__aggregator": {"trim": 0.1}}, "must have a name"),
        ({"algorithm__clip": -1}, "algorithm.clip is -1"),
        ({"algorithm__privacy": {"clip": 1}}, "algorithm.privacy.noise_multiplier is missing"),
    ],
)
def test_a_slip_is_refused_in_a_sentence(fields, says):
    with pytest.raises(fl.FedLPError, match=says):
        parse_config(raw(**fields))
