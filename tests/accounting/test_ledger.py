"""The ledger against counts by hand."""

import jax
import numpy as np
import optax
import pytest
from small import Steps, dataset

import fedlp_jax as fl
from fedlp_jax.accounting.ledger import Ledger
from fedlp_jax.pruning.layers import LayerTable

LAYERS = LayerTable(
    tuple("abcdefghi"),  # nine layers: two bytes of mask
    {},
    params=np.arange(1, 10),
    statistics=np.array([0, 2, 0, 0, 0, 0, 0, 0, 0]),
)


def test_totals_follow_the_masks():
    ledger = Ledger(LAYERS, clients=5)
    upload = np.zeros((2, 9))
    upload[0, 1], upload[1, 1], upload[1, 8] = 1, 1, 1
    row = ledger.add(np.array([4, 2]), upload, np.ones((2, 9)))
    assert row["upload_params"] == 2 + 2 + 9
    assert row["download_params"] == 2 * 45
    assert row["upload_bytes"] == 4 * (4 + 4 + 9) + 2 * 2
    assert row["download_bytes"] == 4 * 2 * 47
    assert ledger.client_upload_bytes.tolist() == [0, 0, 4 * 13 + 2, 0, 4 * 4 + 2]
    ledger.add(np.array([4, 2]), upload, np.ones((2, 9)))
    assert ledger.total == {name: 2 * value for name, value in row.items()}
    assert ledger.layer_upload_params.tolist() == [0, 8, 0, 0, 0, 0, 0, 0, 18]


def test_an_empty_ledger_has_totals():
    assert set(Ledger(LAYERS, 5).total.values()) == {0}


@pytest.mark.slow
def test_a_run_books_what_its_masks_say():
    data = dataset()
    clients = fl.partition.iid(data.train.labels, clients=12)
    common = {"client_optimizer": optax.sgd(0.1), "batch_size": 5}
    task = fl.classification(Steps(norm=True))
    fedavg = fl.simulate(fl.fedavg(task, **common), data, clients, rounds=2, cohort=4)
    params = sum(x.size for x in jax.tree.leaves(fedavg.variables["params"]))
    stats = sum(x.size for x in jax.tree.leaves(fedavg.variables["batch_stats"]))
    assert fedavg.costs.total["upload_params"] == 2 * 4 * params
    assert fedavg.costs.total["download_bytes"] == 2 * 4 * 4 * (params + stats)
    assert fedavg.costs.total["upload_bytes"] == 2 * 4 * (4 * (params + stats) + 1)
    # Depth 1 shares its first layer and norm with the server, and no head.
    depths = np.ones(12, int)
    hetero = fl.simulate(
        fl.fedlp_hetero(task, depths=depths, **common), data, clients, rounds=1, cohort=4
    )
    shared = 4 * 8 + 8 + 2 * 8
    assert hetero.costs.total["upload_params"] == 4 * shared
    assert hetero.costs.total["download_bytes"] == 4 * 4 * (shared + 2 * 8)


def test_a_ledger_is_restored_from_its_arrays():
    ledger, restored = Ledger(LAYERS, clients=5), Ledger(LAYERS, clients=5)
    ledger.add(np.array([4, 2]), np.eye(9)[:2], np.ones((2, 9)), np.array([True, False]))
    restored.load(ledger.arrays())
    assert restored.total == ledger.total
    assert ledger.total["upload_bytes"] == 4 * (1 + 4) + 2  # one of the two sent its mask
    np.testing.assert_array_equal(restored.client_upload_bytes, ledger.client_upload_bytes)
