"""What the project promises; run with `python -m pytest`."""

from pathlib import Path

import numpy as np

import fedlp_jax as fl

CONFIG = Path(__file__).with_name("config.yaml")


def test_it_trains_and_small_layers_always_travel(tmp_path):
    config = fl.load_config(CONFIG, {"rounds": 3, "eval_every": 1, "plan.devices": 1})
    result = fl.run(config, out=tmp_path / "run")
    loss = result.history["train_loss"]
    assert loss[-1] < loss[0]

    sent = dict(zip(result.layers.names, np.sum(result.costs.senders, axis=0), strict=True))
    clients = sum(result.costs.clients)
    assert sent["out"] == clients  # 330 parameters
    assert 0 < sent["fc1"] < clients and 0 < sent["fc2"] < clients
