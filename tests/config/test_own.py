"""A configuration names code of the user's own as `module:name`."""

import pathlib
import sys
import textwrap

import jax
import numpy as np
import pytest

import fedlp_jax as fl
from fedlp_jax.config import own
from fedlp_jax.config.build import build
from fedlp_jax.config.loading import dump_config, load_config, merge, parse_config, parse_yaml
from fedlp_jax.errors import FedLPError
from fedlp_jax.execution import plan

MODULE = """
import flax.linen as nn
import numpy as np
import optax
from flax import nnx

import fedlp_jax as fl
from fedlp_jax.aggregation.means import cohort_mean


class Net(nn.Module):
    num_classes: int
    width: int = 16
    sizes: tuple[int, ...] = (3, 3)

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes, name="head")(x.reshape(x.shape[0], -1))


class Module(nnx.Module):
    def __init__(self, num_classes: int, width: int = 8, *, rngs: nnx.Rngs):
        self.out = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, x):
        return self.out(x.reshape(x.shape[0], -1))


def task(module, smoothing: float = 0.0):
    return fl.classification(module)


def algorithm(task, client_optimizer: optax.GradientTransformation, keep: float, **settings):
    return fl.fedlp_homo(task, keep=keep, client_optimizer=client_optimizer, **settings)


def fixed_rate(task, rate):
    return fl.fedavg(task, client_optimizer=optax.sgd(rate))


def policy(keep: float = 0.5):
    return fl.masks.bernoulli(keep)


def split(labels, clients: int, seed: int = 0):
    return fl.partition.natural(labels, clients=(np.arange(len(labels)) + seed) % clients)


def data(size: int = 0):
    return fl.load("digits")


def rule():
    return cohort_mean()


def three():
    return 3


number = 3
"""
RAW = {
    "data": {"name": "digits"},
    "partition": {"name": "iid", "clients": 20},
    "model": {"name": "logistic"},
    "algorithm": {"name": "fedavg", "client_optimizer": {"name": "sgd", "learning_rate": 0.1}},
    "rounds": 2,
    "cohort": 4,
    "plan": {"devices": 1, "width": 1},
}


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    (folder / "own_parts.py").write_text(textwrap.dedent(MODULE))
    (folder / "own_broken.py").write_text("raise ValueError('no card')")
    (folder / "own_lacking.py").write_text("import no_such_library")
    before = list(sys.path)
    own.search(folder)
    yield folder
    sys.path[:] = before


def made(**sections):
    return build(parse_config(RAW | sections))


def test_every_part_may_be_the_users_own():
    arguments = made(
        seed=1,
        data={"name": "own_parts:data", "options": {"size": 3}},
        partition={"name": "own_parts:split", "clients": 10},
        model={"name": "own_parts:Net", "width": 4},
        task={"name": "own_parts:task", "smoothing": 0.1},
        algorithm={
            "name": "own_parts:algorithm",
            "keep": 0.5,
            "batch_size": 8,
            "client_optimizer": {"name": "sgd", "learning_rate": 0.1},
            "aggregator": "own_parts:rule",
        },
    )
    labels = arguments["data"].train.labels
    expected = fl.partition.natural(labels, clients=(np.arange(len(labels)) + 1) % 10)
    assert arguments["clients"].hash == expected.hash  # with the seed of the run
    result = fl.simulate(**arguments)
    assert result.layers.names == ("head",)
    assert result.history["upload_bytes"][-1] < result.history["download_bytes"][-1]


def test_a_users_algorithm_that_passes_its_settings_on_is_the_one_it_calls():
    settings = {
        "keep": 0.5,
        "batch_size": 8,
        "client_optimizer": RAW["algorithm"]["client_optimizer"],
    }
    mine = fl.simulate(**made(algorithm={"name": "own_parts:algorithm", **settings}))
    ours = fl.simulate(**made(algorithm={"name": "fedlp_homo", **settings}))
    jax.tree.map(np.testing.assert_array_equal, mine.variables, ours.variables)


def test_compose_takes_a_mask_policy():
    optimizer = RAW["algorithm"]["client_optimizer"]
    rates = {}
    for policy in ({"name": "own_parts:policy", "keep": 0.25}, {"name": "bernoulli", "keep": 0.75}):
        algorithm = {"name": "compose", "policy": policy, "client_optimizer": optimizer}
        rates[policy["name"]] = made(algorithm=algorithm)["algorithm"].upload_rates((), 1).item()
    assert rates == {"own_parts:policy": 0.25, "bernoulli": 0.75}


def test_arguments_without_annotations_take_what_yaml_gives():
    algorithm = {"name": "own_parts:fixed_rate", "rate": 0.5}
    assert made(algorithm=algorithm)["algorithm"].task is not None
    with pytest.raises(FedLPError, match="rate: is missing"):
        made(algorithm={"name": "own_parts:fixed_rate"})


def test_an_nnx_module_gets_its_random_numbers_from_the_task():
    arguments = made(model={"name": "own_parts:Module", "width": 4})
    result = fl.simulate(**arguments)
    assert result.layers.names == ("out",)


def test_a_configuration_with_own_code_is_written_whole():
    model = {"name": "own_parts:Net", "width": 4}
    config = parse_config(RAW | {"model": model})
    again = parse_config(parse_yaml(dump_config(config)))
    assert again == config
    assert again.model.model_dump() == model | {"sizes": (3, 3)}


def test_another_kind_loses_the_fields_of_the_old_one():
    base = {"model": {"name": "mlp", "hidden": [3]}}
    assert merge(base, {"model": {"name": "a:B", "width": 1}})["model"] == {
        "name": "a:B",
        "width": 1,
    }


def test_modules_are_found_beside_the_configuration_from_the_command_line(tmp_path, monkeypatch):
    from fedlp_jax.cli.run import load

    (tmp_path / "own_beside.py").write_text(MODULE)
    (tmp_path / "c.yaml").write_text(
        "data: {name: digits}\npartition: {name: iid, clients: 9}\nrounds: 1\ncohort: 3\n"
        "model: {name: 'own_beside:Net'}\n"
        "algorithm: {name: fedavg, client_optimizer: {name: sgd, learning_rate: 0.1}}\n"
    )
    with pytest.raises(FedLPError, match="there is no module own_beside"):
        load_config(tmp_path / "c.yaml")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(plan, "setup", lambda **_: None)  # a process sets its devices once
    assert load(str(tmp_path / "c.yaml"), {}).model.width == 16


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"model": {"name": "own_parts:Nett"}}, "has no 'Nett'; did you mean 'Net'"),
        ({"model": {"name": "own_parts:Net", "wdth": 1}}, "'wdth' is not a field.*'width'"),
        ({"model": {"name": "own_parts:Net", "width": "x"}}, "model.width: must be a"),
        ({"model": {"name": "own_parts:number"}}, "is 3, not a function"),
        ({"model": {"name": "no_such_module:x"}}, "there is no module no_such_module"),
        ({"model": {"name": "own_broken:x"}}, "importing own_broken failed: no card"),
        ({"model": {"name": "own_lacking:x"}}, "importing own_lacking failed: No module named"),
        ({"model": {"name": "a:b:c"}}, "not written as module:function"),
        ({"model": {"name": "os:system"}}, "Python's own library"),
        ({"data": {"name": "own_parts:three"}}, "returned 3, .* a fedlp_jax.data.dataset.Dataset"),
        ({"task": {"name": "own_parts:three"}}, "returned 3, .* a fedlp_jax.tasks.task.Task"),
        (
            {"partition": {"name": "own_parts:three"}},
            "returned 3, .* a fedlp_jax.data.partition.Partition",
        ),
        (
            {"algorithm": {"name": "own_parts:three"}},
            "returned 3, .* a fedlp_jax.algorithms.base.Algorithm",
        ),
        (
            {
                "algorithm": RAW["algorithm"]
                | {"name": "compose", "policy": {"name": "own_parts:three"}}
            },
            "returned 3, .* a fedlp_jax.pruning.policy.MaskPolicy",
        ),
        (
            {"algorithm": RAW["algorithm"] | {"aggregator": "own_parts:three"}},
            "returned 3, .* a fedlp_jax.aggregation.reducer.Reducer",
        ),
    ],
)
def test_bad_code_is_refused_in_a_sentence(sections, sentence):
    with pytest.raises(FedLPError, match=sentence):
        made(**sections)


def test_a_version_of_a_data_set_is_no_code():
    assert not own.is_own("mnist:3.0.1")
    assert own.is_own("package.module:Name")


def test_the_configuration_of_the_page_is_built(module):
    folder = module
    (folder / "my_data.py").write_text(
        MODULE + "\ndef load(year: int):\n    return data(year)\n"
        "\ndef by_hospital(labels, clients: int):\n    return split(labels, clients)\n"
    )
    (folder / "my_models.py").write_text(MODULE)
    (folder / "my_tasks.py").write_text(
        MODULE + "\ndef focal(module, gamma: float = 2.0):\n    return task(module)\n"
    )
    (folder / "my_masks.py").write_text(MODULE + "\nweekday = policy\n")
    (folder / "my_rules.py").write_text(
        MODULE + "\ndef krum_twice(faulty: int):\n    return rule()\n"
    )
    page = pathlib.Path(__file__).parents[2] / "docs" / "own_code.md"
    block = page.read_text().split("```yaml\n")[1].split("```")[0]
    arguments = build(parse_config(parse_yaml(block)))
    assert arguments["clients"].clients == 20 and arguments["rounds"] == 50
    assert arguments["algorithm"].upload_rates((), 1).item() == 0.5
