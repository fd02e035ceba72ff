"""Several processes are one machine: the same numbers, the same end, the same refusals."""

import json

import crowd
import jax
import numpy as np
import optax
import pytest
from small import Steps, dataset, flat, in_float64

import fedlp_jax as fl
from fedlp_jax import hosts
from fedlp_jax.data.batching import example_of
from fedlp_jax.staging import on_host

PLAN = fl.Plan(devices=4, width=2)


# the same numbers


def shared():
    """Three rounds in float64, with heads that clients of a depth share."""
    task = fl.classification(Steps(depth=2, width=4, norm=True))
    optimizer = optax.sgd(0.1, momentum=0.9)
    with jax.enable_x64(True):
        algorithm = fl.fedlp_hetero(
            task, depths="uniform", heads="shared", client_optimizer=optimizer, batch_size=2
        )
        data = dataset()
        example = example_of(on_host(data.train, data.normalize))
        start = algorithm.init(jax.random.key(0), example, 12, None)
        return simulated(algorithm, rounds=3, variables=in_float64(start.variables))


def private():
    """Heads of clients' own, a sum that is over columns instead of clients, and lost clients."""
    task = fl.classification(Steps(depth=2, width=4))
    algorithm = fl.fedlp_hetero(
        task,
        depths="uniform",
        heads="persist",
        aggregator="median",
        client_optimizer=optax.sgd(0.1),
        batch_size=2,
    )
    return simulated(algorithm, rounds=2, faults=fl.Faults(dropout=0.3))


def simulated(algorithm, **settings):
    data = dataset()
    clients = fl.partition.iid(data.train.labels, clients=12)
    return fl.simulate(algorithm, data, clients, cohort=8, plan=PLAN, **settings)


RUNS = {"shared": shared, "private": private}


def noted(names):
    """What a process saw of the runs, in a file of its own."""
    found = {}
    for name in names:
        result = RUNS[name]()
        found |= {f"{name} ledger {k}": v for k, v in result.costs.arrays().items()}
        found[f"{name} variables"] = flat(result.variables)
        found[f"{name} plan"] = np.asarray([result.plan.devices, result.plan.width])
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]
        found[f"{name} rows"] = np.asarray(json.dumps(rows))
    np.savez(f"{hosts.index()}.npz", **found)


@pytest.fixture(scope="module")
def alone():
    return {name: run() for name, run in RUNS.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "names"), [(2, ["shared", "private"]), (4, ["shared"])])
def test_processes_have_the_numbers_of_one(number, names, alone, tmp_path):
    codes = crowd.ended(crowd.call(tmp_path, number, noted, names))
    said = tmp_path / "said.txt"
    assert codes == [0] * number, said.read_text() if said.exists() else codes
    each = [dict(np.load(tmp_path / f"{i}.npz")) for i in range(number)]
    for other in each[1:]:
        for name, value in each[0].items():
            np.testing.assert_array_equal(value, other[name], err_msg=name)
    found = each[0]
    for name in names:
        expected = alone[name]
        assert tuple(found[f"{name} plan"]) == (4, 2)
        for key, value in expected.costs.arrays().items():
            np.testing.assert_array_equal(found[f"{name} ledger {key}"], value)
        rows = json.loads(str(found[f"{name} rows"]))
        for row, own in zip(expected.history, rows, strict=True):
            assert own == {k: about(row[k]) for k in row if k != "seconds"}
        exact = {"rtol": 1e-8, "atol": 1e-12} if name == "shared" else {"rtol": 1e-3, "atol": 1e-5}
        np.testing.assert_allclose(found[f"{name} variables"], flat(expected.variables), **exact)


def about(value):
    return pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
