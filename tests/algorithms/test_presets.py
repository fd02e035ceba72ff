"""The two behaviours: what the word sets, that what is given wins, and what the page says."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import yaml
from small import Steps, dataset, flat

import fedlp_jax as fl
from fedlp_jax.algorithms.presets import BEHAVIOURS, DEFAULT
from fedlp_jax.config.loading import dump_config, load_config, parse_config
from fedlp_jax.simulation.evaluation import train_metrics

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/behaviours.md").read_text()
RESULTS = ROOT / "benchmarks/results/behaviours.json"
DATA = dataset()
CLIENTS = fl.partition.quantity(DATA.train.labels, clients=6, alpha=2.0, seed=1)
TASK = fl.classification(Steps(norm=True))
LOCAL = {"client_optimizer": optax.sgd(0.1), "batch_size": 4}
HETERO = {
    "data": {"name": "digits"},
    "partition": {"name": "mixed", "clients": 20},
    "model": {"name": "fedlp_cnn"},
    "algorithm": {
        "name": "fedlp_hetero",
        "depths": "uniform",
        "client_optimizer": {"name": "sgd", "learning_rate": 0.1},
    },
    "rounds": 1,
    "cohort": 5,
}


def settings(config):
    """The settings that a behaviour is about, wherever they are in a configuration."""
    sections = (config, config.partition, config.model, config.algorithm)
    return {k: v for s in sections for k, v in dict(s).items() if k in BEHAVIOURS[DEFAULT]._fields}


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_word_sets_every_setting(name):
    assert settings(parse_config(HETERO | {"behaviour": name})) == BEHAVIOURS[name]._asdict()


def test_every_setting_differs_and_the_default_is_layerwise():
    one, other = BEHAVIOURS.values()
    assert all(a != b for a, b in zip(one, other, strict=True))
    assert settings(parse_config(HETERO)) == BEHAVIOURS["layerwise"]._asdict()


@pytest.mark.parametrize(("section", "field"), [("algorithm", "heads"), ("model", "init")])
def test_what_is_given_wins(section, field):
    given = getattr(BEHAVIOURS["layerwise"], field)
    raw = HETERO | {"behaviour": "reference", section: HETERO[section] | {field: given}}
    wanted = BEHAVIOURS["reference"]._replace(**{field: given})
    assert settings(parse_config(raw)) == wanted._asdict()


def test_a_section_gets_only_the_fields_it_has():
    raw = HETERO | {"behaviour": "reference", "partition": {"name": "iid", "clients": 20}}
    raw["algorithm"] = {**HETERO["algorithm"], "name": "fedavg"}
    del raw["algorithm"]["depths"]
    assert set(settings(parse_config(raw))) == {
        "weighting", "layers", "train_loss", "init", "draws",
    }  # fmt: skip


def test_the_resolved_file_has_the_settings_in_place_of_the_word(tmp_path):
    config = parse_config(HETERO | {"behaviour": "reference"})
    resolved = yaml.safe_load(dump_config(config))
    assert "behaviour" not in resolved
    assert resolved["algorithm"]["weighting"] == "uniform"
    assert parse_config(resolved) == config
    file = tmp_path / "hetero.yaml"
    file.write_text(yaml.safe_dump(HETERO | {"behaviour": "reference"}))
    again = load_config(file, {"behaviour": "layerwise"})
    assert settings(again) == BEHAVIOURS["layerwise"]._asdict()


def test_an_unknown_behaviour_is_refused():
    with pytest.raises(fl.FedLPError, match=r"did you mean 'reference'\?"):
        parse_config(HETERO | {"behaviour": "refrence"})
    with pytest.raises(fl.FedLPError, match=r"behaviour 'paper' is unknown. Known: reference, la"):
        fl.fedavg(TASK, behaviour="paper", **LOCAL)
    with pytest.raises(fl.FedLPError, match="behaviour 'paper' is unknown"):
        fl.fedlp_hetero(TASK, depths=1, behaviour="paper", **LOCAL)


def parts(make, **arguments):
    """What `compose` has made of arguments, as far as a behaviour decides it."""
    algorithm = make(TASK, **arguments, **LOCAL)
    (composed,) = algorithm.round.args
    heads = (composed.submodels.persist, composed.submodels.shared_heads)
    return composed.by_examples, composed.layers, algorithm.layers, algorithm.train_loss, heads


def run(make, **arguments):
    algorithm = make(TASK, **arguments, **LOCAL)
    return fl.simulate(algorithm, DATA, CLIENTS, rounds=2, cohort=4, seed=3)


NAMED = pytest.mark.parametrize(
    ("make", "arguments"),
    [(fl.fedlp_homo, {"keep": 0.5}), (fl.fedlp_hetero, {"depths": "uniform"})],
)


@NAMED
def test_the_word_makes_the_parts_of_the_settings(make, arguments):
    preset = BEHAVIOURS["reference"]._asdict()
    names = ("weighting", "layers", "train_loss") + (("heads",) if "depths" in arguments else ())
    word = parts(make, behaviour="reference", **arguments)
    assert word == parts(make, **arguments, **{name: preset[name] for name in names})
    assert word != parts(make, **arguments)


@pytest.mark.slow
@NAMED
def test_the_word_is_the_settings_to_the_bit(make, arguments):
    preset = BEHAVIOURS["reference"]._asdict()
    names = ("weighting", "layers", "train_loss") + (("heads",) if "depths" in arguments else ())
    word = run(make, behaviour="reference", **arguments)
    spelt = run(make, **arguments, **{name: preset[name] for name in names})
    assert np.array_equal(flat(word.variables), flat(spelt.variables))
    assert np.array_equal(word.history["train_loss"], spelt.history["train_loss"])
    assert word.layers.names == spelt.layers.names
    other = run(make, **arguments)
    assert not np.array_equal(flat(word.variables), flat(other.variables))


@pytest.mark.parametrize(("kind", "loss"), [("examples", 7 / 5), ("batches", (6 / 2 + 1) / 2)])
def test_a_loss_is_the_mean_over_examples_or_over_steps_and_clients(kind, loss):
    """Two clients: four examples in two batches, and one example in one."""
    f32 = np.float32
    client = fl.types.ClientMetrics(
        means={"loss": fl.types.Mean(f32([6, 1]), f32([4, 1]))},
        batch_loss_sum=f32([6, 1]),
        steps=np.array([2, 1]),
        finite=np.array([True, True]),
    )
    assert train_metrics(client, np.zeros(2, int), [""], kind)["train_loss"] == pytest.approx(loss)


@pytest.mark.slow
def test_losses_are_means_of_what_they_say():
    """One step a batch of a model that does not learn: every batch's loss is known."""
    frozen = LOCAL | {"client_optimizer": optax.sgd(0.0)}
    reported = {}
    for kind in ("examples", "batches"):
        algorithm = fl.fedavg(fl.classification(Steps()), train_loss=kind, **frozen)
        result = fl.simulate(algorithm, DATA, CLIENTS, rounds=1, cohort=6, seed=3)
        reported[kind] = result.history["train_loss"][0]
    task, variables = algorithm.task, result.variables
    batch = fl.types.Batch(DATA.train.inputs, DATA.train.labels, None, DATA.normalize)
    loss = np.asarray(optax.softmax_cross_entropy_with_integer_labels(
        task.outputs(variables, batch), batch.labels
    ))  # fmt: skip
    rows = [CLIENTS.rows(k) for k in range(6)]
    assert len({len(r) for r in rows}) > 1
    np.testing.assert_allclose(reported["examples"], loss[np.concatenate(rows)].mean(), rtol=1e-5)
    np.testing.assert_allclose(
        reported["batches"], np.mean([batch_means(k, loss) for k in range(6)]), rtol=1e-5
    )
    assert abs(reported["examples"] - reported["batches"]) > 1e-4


def batch_means(client, loss):
    """The mean over batches of 4 of the mean loss of a batch, for a client in round 1."""
    key = jax.random.key(3)
    for part in (1, client, 1, 0):  # round, client, shuffling, epoch
        key = jax.random.fold_in(key, part)
    rows = CLIENTS.rows(client)
    draw = np.asarray(jax.random.uniform(key, (len(rows),), np.float32))
    order = rows[np.argsort(draw, kind="stable")]
    return np.mean([loss[order[i : i + 4]].mean() for i in range(0, len(order), 4)])


def test_the_page_has_every_setting_with_both_values():
    rows = re.findall(r"^\| `(?:\w+\.)?(\w+)` \| `(\w+)` \| `(\w+)` \|", PAGE, re.MULTILINE)
    written = {name: (reference, layerwise) for name, reference, layerwise in rows}
    wanted = zip(*(BEHAVIOURS[name] for name in ("reference", "layerwise")), strict=True)
    said = [tuple(str(v).lower() if isinstance(v, bool) else v for v in pair) for pair in wanted]
    assert written == dict(zip(BEHAVIOURS[DEFAULT]._fields, said, strict=True))


def test_the_page_shows_the_measured_table():
    from benchmarks import behaviours

    assert behaviours.with_table(PAGE, json.loads(RESULTS.read_text())) == PAGE


@pytest.mark.slow
def test_the_python_of_the_page_runs():
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    names = {}
    exec(compile(block, "behaviours.md", "exec"), names)
    assert len(names["result"].history) == 2
    assert len(names["result"].layers) == 4  # two weights and two biases
