"""Every file under configs/ is read, built on data like its own, and checked for shapes."""

import gzip
import json
import os
from pathlib import Path

import jax
import pytest

from fedlp_jax.config import experiment
from fedlp_jax.config.build import build
from fedlp_jax.config.loading import load_config
from fedlp_jax.config.schema import ALGORITHMS
from fedlp_jax.data.batching import example_of
from fedlp_jax.types import Examples

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
PAPER, OWN = CONFIGS / "paper", CONFIGS / "algorithms"
SHAPES = {"cifar10": [32, 32, 3], "mnist": [28, 28, 1], "fashion_mnist": [28, 28, 1]}
SPLITS = {
    "iid": ("iid", {}),
    "d-niid": ("dirichlet", {"alpha": 1.0, "reference": True}),
    "m-niid": ("mixed", {"ratio": 0.95, "reference": True}),
}
ROWS = {
    "fedavg": {},
    **{f"homo-{p}": {"keep": p} for p in (0.1, 0.3, 0.5, 0.7)},
    **{f"hetero-{f}": {"depths": f, "heads": "reset_to_init", "keep": 1.0} for f in (1, 3, 5)},
    "hetero-u": {"depths": "uniform", "heads": "reset_to_init", "keep": 1.0},
}


def name(path):
    return path.relative_to(CONFIGS).as_posix()


def lookalike(path, folder):
    """Overrides that put generated data of the same shape where a data set may be missing."""
    config = load_config(path)
    if config.data.name == "digits":
        return {}
    if config.data.name == "shakespeare":
        roles = {"play::ROLE": ["abcdefghi" * 200]}  # with padding, ten tokens
        (folder / "roles.json.gz").write_bytes(gzip.compress(json.dumps(roles).encode()))
        return {"data.data_dir": str(folder), "cohort": 1}
    options = {"examples": 6000, "shape": SHAPES[config.data.name]}
    return {"data.name": "synthetic", "data.options": options}


def test_every_algorithm_has_a_file_of_its_own():
    named = {p.stem: load_config(p).algorithm.name for p in FILES if p.parent == OWN}
    missing = {name for name in ALGORITHMS if named.get(name) != name}
    assert missing == {"compose"}  # which the others call


@pytest.mark.parametrize("path", FILES, ids=name)
def test_is_read_and_says_how_to_run_it(path):
    config = load_config(path)
    assert config.name == path.stem
    command = f"#   fedlp run configs/{name(path)}\n"
    if path.name == "base.yaml":
        command = "#   fedlp run configs/paper/homo-0.5-iid.yaml\n"
    assert command in path.read_text()


@pytest.mark.parametrize(
    "path",
    [*CONFIGS.glob("*.yaml"), PAPER / "homo-0.5-d-niid.yaml", PAPER / "hetero-u-iid.yaml"],
    ids=name,
)
def test_is_built_and_its_model_takes_the_data(path, tmp_path):
    arguments = build(load_config(path, lookalike(path, tmp_path)))
    algorithm, data = arguments["algorithm"], arguments["data"]
    example = example_of(Examples(data.train.inputs, data.train.labels, data.normalize))
    shapes = jax.eval_shape(algorithm.task.init, jax.random.key(0), example)
    levels = algorithm.levels(shapes, example)
    assert len(levels) == (5 if path.stem.startswith("hetero") else 1)
    for level in levels:
        held = jax.eval_shape(level.task.init, jax.random.key(0), example)
        outputs = jax.eval_shape(level.task.outputs, held, example)
        assert outputs.shape == ((1, 80, 10) if path.stem == "shakespeare" else (1, 10))
        level.task.check(outputs.shape, example, data.num_classes)


def test_there_is_every_cell_of_the_table():
    names = {f"{row}-{split}.yaml" for row in ROWS for split in SPLITS}
    assert {p.name for p in PAPER.iterdir()} == names | {"base.yaml"}
    assert len(names) == 27


@pytest.mark.parametrize("row", ROWS)
def test_a_cell_differs_from_fedavg_in_its_row_and_split_alone(row):
    base = load_config(PAPER / "fedavg-iid.yaml").model_dump()
    scheme = {"fedavg": "fedavg", "homo": "fedlp_homo", "hetero": "fedlp_hetero"}
    algorithm = base["algorithm"] | {"name": scheme[row.split("-")[0]]} | ROWS[row]
    algorithm |= {"download": None} if algorithm["name"] == "fedlp_homo" else {}
    for split, (kind, settings) in SPLITS.items():
        cell = load_config(PAPER / f"{row}-{split}.yaml").model_dump()
        assert cell["partition"] == {"name": kind, "clients": 100, "seed": None} | (
            settings | ({"min_size": None} if kind == "dirichlet" else {})
        )
        assert cell["algorithm"] == algorithm
        for same in set(base) - {"name", "partition", "algorithm"}:
            assert cell[same] == base[same]


def test_the_cells_are_set_as_the_authors_code_is():
    config = load_config(PAPER / "fedavg-iid.yaml")
    assert (config.rounds, config.cohort, config.seed) == (200, 10, 25)
    assert (config.model.name, config.model.init) == ("fedlp_cnn", "pytorch")
    local = config.algorithm
    assert (local.epochs, local.batch_size, local.weighting) == (5, 10, "uniform")
    assert (local.layers, local.train_loss) == ("by_tensor", "batches")
    assert (local.client_optimizer.name, local.client_optimizer.learning_rate) == ("adam", 1e-3)


@pytest.mark.real_data
@pytest.mark.parametrize("split", SPLITS)
def test_a_cell_is_built_on_real_images(split):
    if not (Path(os.environ.get("TFDS_DATA_DIR", "/nowhere")) / "cifar10").is_dir():
        pytest.skip("CIFAR-10 is not prepared in TFDS_DATA_DIR")
    clients = build(load_config(PAPER / f"homo-0.5-{split}.yaml"))["clients"]
    assert clients.clients == 100
    if split == "m-niid":
        assert set(clients.sizes) == {501}


@pytest.mark.slow
def test_the_quickstart_learns(tmp_path):
    config = load_config(CONFIGS / "quickstart.yaml", {"plan.devices": 1, "eval_every": None})
    result = experiment.run(config, tmp_path / "out")
    assert result.history["test_accuracy"][-1] > 0.90


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((CONFIGS / "algorithms").iterdir()), ids=name)
def test_an_algorithm_learns_from_its_file(path, tmp_path):
    config = load_config(path, {"plan.devices": 1, "eval_every": None})
    last = experiment.run(config, tmp_path / "out").history.rows[-1]
    assert last.get("test_accuracy_personal", last.get("test_accuracy")) > 0.85
