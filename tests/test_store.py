"""What clients keep between rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Steps, dataset, flat

import fedlp_jax as fl
from fedlp_jax.keys import head_key
from fedlp_jax.placement import Plan
from fedlp_jax.store import PrivateStore
from fedlp_jax.types import Batch, Normalize

EXAMPLE = Batch(
    jnp.zeros((1, 4)), jnp.zeros(1, jnp.int32), None, Normalize(np.ones(()), np.zeros(()))
)
ROOT = jax.random.key(5)
TASK = fl.classification(Steps())
ASSIGNED = np.array([0, 2, 0, 0, 2], np.int32)  # nobody at depth 2


def make():
    levels = fl.submodel.by_depth(1, "persist").levels(TASK, TASK.init(ROOT, EXAMPLE), EXAMPLE)
    return levels, PrivateStore(levels, ASSIGNED, ROOT, EXAMPLE, Plan(2, 1))


def test_rows_are_each_clients_own_first_draw():
    levels, store = make()
    slots = np.array([3, -1, 1, 0], np.int32)
    rows = store.rows(slots)
    for slot, client in ((0, 3), (3, 0)):
        expected = levels[0].private(head_key(ROOT, client), EXAMPLE)
        got = jax.tree.map(lambda x, slot=slot: x[slot], rows[0])
        assert np.array_equal(flat(got), flat(expected))
    assert not jax.tree.leaves(rows[2])  # the deepest level has nothing private
    kernels = np.asarray(rows[0]["params"]["head1"]["kernel"])
    assert not np.array_equal(kernels[0], kernels[3])


def test_rows_are_put_back_where_they_came_from_and_nowhere_else():
    _, store = make()
    everyone = np.array([0, 2, 3, -1], np.int32)
    before = np.asarray(store.rows(everyone)[0]["params"]["head1"]["bias"])
    slots = np.array([3, -1, 1, -1], np.int32)
    changed = jax.tree.map(lambda x: x + 1.0, store.rows(slots))
    store.put(slots, changed)
    after = np.asarray(store.rows(everyone)[0]["params"]["head1"]["bias"])
    assert np.array_equal(after[:2], before[:2])
    np.testing.assert_allclose(after[2], before[2] + 1)


def heads_seen(policy, rounds):
    """The heads with which clients begin, recorded by a task that peeks at its variables."""
    seen = []

    def peek(kernel, first):
        if first:
            seen.append(np.asarray(kernel).copy())

    def at_depth(depth):
        inner = TASK.at_depth(depth)

        def loss(variables, batch, key):
            head = variables["params"].get("head1")
            if head is not None:
                jax.debug.callback(peek, head["kernel"], True)
            return inner.loss(variables, batch, key)

        return inner._replace(loss=loss)

    data = dataset()
    clients = fl.partition.iid(data.train.labels, clients=12)
    algorithm = fl.fedlp_hetero(
        TASK._replace(at_depth=at_depth),
        depths=np.ones(12, int),
        heads=policy,
        client_optimizer=optax.sgd(0.5),
        steps=1,
        batch_size=5,
    )
    fl.simulate(algorithm, data, clients, rounds=rounds, cohort=lambda *_: [4], plan=Plan(1, 1))
    jax.effects_barrier()
    return seen


def test_a_head_reset_to_init_is_the_same_bits_at_every_participation():
    seen = heads_seen("reset_to_init", rounds=3)
    assert len(seen) == 3
    assert np.array_equal(seen[0], seen[1])
    assert np.array_equal(seen[0], seen[2])


def test_a_head_that_persists_goes_on_from_where_it_was():
    seen = heads_seen("persist", rounds=3)
    assert len(seen) == 3
    assert np.array_equal(seen[0], heads_seen("reset_to_init", rounds=1)[0])
    assert not np.allclose(seen[0], seen[1])
    assert not np.allclose(seen[1], seen[2])


def test_a_store_that_cannot_fit_is_refused_with_the_numbers(monkeypatch):
    from fedlp_jax import store

    monkeypatch.setattr(store.os, "sysconf", lambda name: 10)
    with pytest.raises(fl.FedLPError, match=r"heads='persist' would keep .* GiB for 5 clients"):
        make()
