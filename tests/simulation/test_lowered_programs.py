"""What a round is on accelerators, shown on its program lowered for them, without having one."""

import optax
import pytest

import fedlp_jax as fl
from fedlp_jax.simulation.program import rounds_of


@pytest.fixture(scope="module")
def traced():
    """A round of the reference CNN on four devices, traced once."""
    data = fl.load("synthetic", examples=64, shape=(32, 32, 3), num_classes=10, seed=0)
    clients = fl.partition.iid(data.train.labels, clients=16, seed=0)
    task = fl.classification(fl.models.FedLPCNN(num_classes=10))
    algorithm = fl.fedlp_homo(task, keep=0.5, client_optimizer=optax.adam(1e-3), batch_size=2)
    plan = fl.Plan(devices=4, width=4)
    run = fl.Simulation(algorithm, data, clients, rounds=1, cohort=16, plan=plan)
    return rounds_of(algorithm, run.plan).trace(*run.round_shapes(run.plan))


@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
def test_a_round_is_products_and_one_reduction(traced, platform):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.convolution" not in text  # vmapped over kernels it would be a grouped one
    assert (
        text.count("stablehlo.dot_general") >= 8 * 3 - 1
    )  # the first layer needs no input gradient
    assert text.count("stablehlo.all_reduce") == 1
    for word in ("all_gather", "all_to_all", "collective_permute", "infeed", "outfeed", "callback"):
        assert word not in text
    donated = text.count("tf.aliasing_output") + text.count("jax.buffer_donor")
    assert donated > 40  # the server's state is updated in place
