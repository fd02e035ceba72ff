import functools
import json

import jax
import numpy as np
import pytest
from small import HOMO

import fedlp_jax as fl
from fedlp_jax.accounting.ledger import Ledger
from fedlp_jax.cli.tables import config_tables
from fedlp_jax.config import experiment
from fedlp_jax.config.build import build
from fedlp_jax.config.loading import parse_config
from fedlp_jax.config.overview import macs_by_layer, overview
from fedlp_jax.data.batching import example_of
from fedlp_jax.reporting.tables import show
from fedlp_jax.simulation.result import History, Result
from fedlp_jax.types import Examples

SMALL = HOMO | {
    "model": {"name": "mlp", "hidden": [16]},
    "algorithm": HOMO["algorithm"] | {"keep": 1.0},
    "rounds": 1,
}
HETERO = SMALL | {
    "data": {"name": "synthetic", "options": {"examples": 400, "shape": [32, 32, 3]}},
    "partition": {"name": "iid", "clients": 200},
    "model": {"name": "fedlp_cnn"},
    "algorithm": {
        "name": "fedlp_hetero",
        "depths": [0.5, 0.0, 0.0, 0.0, 0.5],
        "client_optimizer": {"name": "sgd", "learning_rate": 0.1},
    },
}


def of(raw):
    return _of(json.dumps(raw))


@functools.cache
def _of(text):
    config = parse_config(json.loads(text))
    arguments = build(config)
    return config, arguments, overview(config, arguments)


def test_with_certain_masks_the_expected_traffic_is_what_the_ledger_books():
    _, arguments, view = of(SMALL)
    row = fl.simulate(**arguments).history.rows[0]
    assert view.upload_bytes == row["upload_bytes"] == view.fedavg["upload_bytes"]
    assert view.download_bytes == row["download_bytes"] == view.fedavg["download_bytes"]


@pytest.mark.parametrize(("keep", "share"), [(0.25, 0.25), ([0.0] * 10 + [1.0] * 10, 0.5)])
def test_expected_upload_follows_keep(keep, share):
    _, _, view = of(SMALL | {"algorithm": SMALL["algorithm"] | {"keep": keep}})
    mask_bytes = 4 * 1  # one byte for each client of the cohort
    whole = view.fedavg["upload_bytes"] - mask_bytes
    assert view.upload_bytes - mask_bytes == pytest.approx(share * whole)


@pytest.mark.parametrize("changes", [{}, {"heads": "shared", "layers": {"exit1_": "first exit"}}])
def test_info_and_run_know_one_fedavg(changes):
    raw = HETERO | {"algorithm": HETERO["algorithm"] | {"depths": [0.2] * 5} | changes}
    _, arguments, view = of(raw)
    costs = Ledger(view.layers, clients=200)
    costs.clients.append(view.cohort)  # as if one round had been run
    data, task = arguments["data"], arguments["algorithm"].task
    example = example_of(Examples(data.train.inputs, data.train.labels, data.normalize))
    variables = jax.eval_shape(task.init, jax.random.key(0), example)
    result = Result(variables, None, History(), costs, arguments["plan"], view.layers, {})
    assert experiment.summarize("x", arguments, result)["fedavg"] == view.fedavg
    assert view.fedavg["upload_params"] == 4 * 551_466
    assert view.fedavg["upload_bytes"] == view.fedavg["download_bytes"] + 4 * 1  # 8 layers


def test_submodels_have_the_known_sizes():
    _, _, view = of(HETERO)
    assert [level.shared for level in view.levels] == [10_272, 28_896, 65_952, 140_064, 551_466]
    assert [level.held for level in view.levels] == [
        *(1_060_266, 554_602, 591_658, 403_626, 551_466),
    ]
    assert sum(level.clients for level in view.levels) == 200
    assert view.levels[1].clients == 0
    macs = [sum(level.macs.values()) / 1e6 for level in view.levels]
    np.testing.assert_allclose(macs, [11.634, 15.894, 25.396, 29.886, 39.356], atol=6e-4)
    share = view.levels[0].clients / 200
    sent = share * 10_272 + (1 - share) * 551_466
    statistics = 2 * (share * 64 + (1 - share) * 448)
    assert view.download_bytes == pytest.approx(4 * 4 * (sent + statistics), rel=1e-6)


@pytest.mark.parametrize("raw", [SMALL, HETERO])
def test_macs_of_layers_add_up(raw):
    _, _, view = of(raw)
    counts = macs_by_layer(view.levels[-1].macs, view.layers)
    assert sum(counts) == sum(view.levels[-1].macs.values())
    by_tensor = of(raw | {"algorithm": raw["algorithm"] | {"layers": "by_tensor"}})[2]
    assert sum(macs_by_layer(view.levels[-1].macs, by_tensor.layers)) == sum(counts)
    if raw is SMALL:
        assert counts == [64 * 16, 16 * 10]
        named = of(raw | {"algorithm": raw["algorithm"] | {"layers": {"fc1": "first"}}})[2]
        assert named.layers.names == ("fc2", "first")
        assert macs_by_layer(view.levels[0].macs, named.layers) == counts[::-1]


def test_the_tables_show_depths_only_where_there_are_some(capsys):
    for raw, shown in ((SMALL, False), (HETERO, True)):
        config, _, view = of(raw)
        show(*config_tables(config, view))
        text = capsys.readouterr().out
        assert ("Submodels" in text) == shown
        assert "Expected traffic per round" in text


@pytest.mark.parametrize(
    ("algorithm", "rounds"),
    [
        ({"name": "fedbabu", "head": "fc2"}, 1),
        ({"name": "fedpart", "full_rounds": 1, "group_rounds": 1, "download": "group"}, 3),
        (
            {
                "name": "fedbuff",
                "buffer": 2,
                "profile": {"compute": 1e6, "download": 1e5, "upload": 1e5},
            },
            1,
        ),
    ],
)
def test_expected_traffic_is_what_the_ledger_books(algorithm, rounds):
    optimizer = SMALL["algorithm"]["client_optimizer"]
    raw = SMALL | {"algorithm": algorithm | {"client_optimizer": optimizer}, "rounds": rounds}
    _, arguments, view = of(raw)
    booked = fl.simulate(**arguments).costs.total
    assert view.upload_bytes * rounds == pytest.approx(booked["upload_bytes"])
    assert view.download_bytes * rounds == pytest.approx(booked["download_bytes"])
