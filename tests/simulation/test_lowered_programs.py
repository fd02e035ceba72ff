"""What a round is on accelerators, shown on its program lowered for them, without having one."""

import jax
import optax
import pytest

import fedlp_jax as fl


def lowered(platform, width=4):
    """The text of a round of the reference CNN on four devices, lowered for a platform."""
    data = fl.load("synthetic", examples=64, shape=(32, 32, 3), num_classes=10, seed=0)
    clients = fl.partition.iid(data.train.labels, clients=16, seed=0)
    task = fl.classification(fl.models.FedLPCNN(num_classes=10))
    algorithm = fl.fedlp_homo(task, keep=0.5, client_optimizer=optax.adam(1e-3), batch_size=2)
    run = fl.Simulation(
        algorithm, data, clients, rounds=1, cohort=16, plan=fl.Plan(devices=4, width=width)
    )
    staged = run.stage(1)
    cohort, private = staged.cohort, staged.private
    program = jax.jit(
        lambda state, cohort, key: algorithm.round(
            state, private, run.stage.train, cohort, key, run.plan
        ),
        donate_argnums=0,
    )
    return (
        program.trace(run.state, cohort, run.stage.key)
        .lower(lowering_platforms=(platform,))
        .as_text()
    )


@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
def test_a_round_is_products_and_one_reduction(platform):
    text = lowered(platform)
    assert "stablehlo.convolution" not in text  # vmapped over kernels it would be a grouped one
    assert (
        text.count("stablehlo.dot_general") >= 8 * 3 - 1
    )  # the first layer needs no input gradient
    assert text.count("stablehlo.all_reduce") == 1
    for word in ("all_gather", "all_to_all", "collective_permute", "infeed", "outfeed", "callback"):
        assert word not in text
    donated = text.count("tf.aliasing_output") + text.count("jax.buffer_donor")
    assert donated > 40  # the server's state is updated in place
