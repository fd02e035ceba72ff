"""A client that decides by its update what it sends: the ledger books that, and no more."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Steps, dataset

import fedlp_jax as fl
from fedlp_jax.aggregation.means import cohort_mean, masked_mean

DATA = dataset()
CLIENTS = fl.partition.iid(DATA.train.labels, clients=6, seed=0)
TASK = fl.classification(Steps(depth=2))
PLAN = fl.Plan(devices=1, width=1)


def moved_by(threshold, mean=masked_mean):
    """Layers whose parameters moved by more than `threshold` are sent."""

    def sends(update, layers):
        squares = jnp.zeros(len(layers))
        for path, leaf in jax.tree_util.tree_leaves_with_path(update["params"]):
            squares = squares.at[layers.names.index(path[0].key)].add((leaf**2).sum())
        return jnp.sqrt(squares) > threshold

    return mean()._replace(sends=sends)


def run(aggregator="masked_mean", cohort=1, **settings):
    algorithm = fl.fedavg(
        TASK,
        client_optimizer=optax.sgd(0.1),
        batch_size=5,
        aggregator=aggregator,
        **settings,
    )
    return fl.simulate(algorithm, DATA, CLIENTS, rounds=1, cohort=cohort, seed=1, plan=PLAN)


@pytest.mark.slow
def test_a_layer_that_a_client_holds_back_is_neither_booked_nor_averaged():
    whole, start = (
        run(),
        fl.simulate(
            fl.fedavg(TASK, client_optimizer=optax.sgd(0.1)),
            DATA,
            CLIENTS,
            rounds=0,
            cohort=1,
            seed=1,
        ),
    )
    norms = {
        name: float(
            np.sqrt(
                sum(
                    ((whole.variables["params"][name][leaf] - value) ** 2).sum()
                    for leaf, value in layer.items()
                )
            )
        )
        for name, layer in start.variables["params"].items()
    }
    threshold = sorted(norms.values())[1] * 0.999  # between the smallest and the second
    held_back = min(norms, key=norms.get)
    result = run(moved_by(threshold))
    expected = [name != held_back for name in result.layers.names]
    assert result.costs.senders[0].tolist() == expected
    bytes_sent = 4 * result.layers.params[np.array(expected)].sum() + 1  # and a mask of one byte
    assert result.costs.total["upload_bytes"] == bytes_sent
    for name, layer in result.variables["params"].items():
        source = start if name == held_back else whole
        jax.tree.map(np.testing.assert_array_equal, layer, source.variables["params"][name])


@pytest.mark.slow
def test_a_gate_that_opens_is_no_gate():
    ours, theirs = run(moved_by(-1.0), cohort=4), run(cohort=4)
    jax.tree.map(np.testing.assert_array_equal, ours.variables, theirs.variables)
    assert ours.costs.total == theirs.costs.total
    assert ours.clients["kept"].tolist() == theirs.clients["kept"].tolist()


def test_privacy_refuses_a_gate():
    with pytest.raises(fl.FedLPError, match="`sends` reads the update"):
        run(
            moved_by(1.0, cohort_mean),
            privacy=fl.Privacy(clip=1.0, noise_multiplier=1.0),
            weighting="uniform",
        )
