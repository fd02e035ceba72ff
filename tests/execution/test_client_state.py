"""What clients keep between rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Steps, dataset, flat

import fedlp_jax as fl
from fedlp_jax.execution import client_state as store_module
from fedlp_jax.execution.client_state import ClientState, ClientStore
from fedlp_jax.execution.packing import unpack
from fedlp_jax.execution.plan import Plan
from fedlp_jax.execution.scheduling import lay_out
from fedlp_jax.prng import head_key
from fedlp_jax.types import Batch, Normalize

EXAMPLE = Batch(
    jnp.zeros((1, 4)), jnp.zeros(1, jnp.int32), None, Normalize(np.ones(()), np.zeros(()))
)
ROOT = jax.random.key(5)
TASK = fl.classification(Steps())
ASSIGNED = np.array([0, 2, 0, 0, 2], np.int32)  # nobody at depth 2
TWO = Plan(2, 1)


def make(plan=TWO):
    levels = fl.submodel.by_depth(1, "persist").levels(TASK, TASK.init(ROOT, EXAMPLE), EXAMPLE)
    return levels, ClientStore([with_head(level) for level in levels], ASSIGNED, ROOT, plan)


def with_head(level):
    """What a client of this level keeps."""
    return ClientState(
        lambda root, client: level.private(head_key(root, client), EXAMPLE), level.private_shapes
    )


def slots_of(ids, plan):
    """A cohort of some clients as it is laid out: (client of each slot, segment)."""
    ids = np.sort(ids)
    layout = lay_out(np.ones(len(ids), int), ASSIGNED[ids], [1.0, 2.0, 3.0], plan)
    return np.where(layout.member >= 0, ids[layout.member], -1), layout.segment


@pytest.mark.parametrize("plan", [Plan(2, 1), Plan(4, 1)])
def test_rows_are_each_clients_own_first_draw(plan):
    levels, store = make(plan)
    client, segment = slots_of([0, 2, 3], plan)
    rows = store.rows(client, segment)
    kernels = {}
    for slot in np.flatnonzero(client >= 0):
        expected = levels[0].private(head_key(ROOT, client[slot]), EXAMPLE)
        got = unpack({k: x[slot] for k, x in rows.items()}, levels[0].private_shapes)
        assert np.array_equal(flat(got), flat(expected))
        kernels[client[slot]] = np.asarray(got["params"]["head1"]["kernel"])
    assert not np.array_equal(kernels[0], kernels[3])


def test_rows_have_room_for_the_largest_head_of_a_slot_and_not_for_all():
    levels, store = make()
    client, segment = slots_of([0, 1, 4], TWO)
    rows = store.rows(client, segment)
    heads = [level.private(ROOT, EXAMPLE) for level in levels]
    largest = max(sum(x.size for x in jax.tree.leaves(head)) for head in heads)
    assert {k: x.shape for k, x in rows.items()} == {"float32": (len(client), largest)}
    assert store.row_bytes == 4 * largest


@pytest.mark.parametrize("plan", [Plan(1, 1), Plan(2, 1), Plan(4, 1)])
@pytest.mark.parametrize("block", [1, 3, None], ids="{}_at_once".format)
@pytest.mark.parametrize("halted", [False, True])
def test_rows_are_put_back_where_they_came_from_and_nowhere_else(plan, halted, block, monkeypatch):
    _, store = make(plan)
    before = jax.tree.map(np.asarray, store.stacks)
    client, segment = slots_of([0, 3, 4, 1], plan)  # of levels 0, 0, 2 and 2
    rows = {k: x + 1.0 for k, x in store.rows(client, segment).items()}
    if block is not None:  # by default all of so small ones
        one = sum(x.nbytes for x in rows.values()) // len(client)
        monkeypatch.setattr(store_module, "_BLOCK_BYTES", block * one)
    store.put(client, segment, rows, jnp.asarray(halted))
    changed = np.isin(np.flatnonzero(ASSIGNED == 0), [0, 3])
    for old, new in zip(jax.tree.leaves(before[0]), jax.tree.leaves(store.stacks[0]), strict=True):
        per_client = changed.reshape(-1, *(1,) * (old.ndim - 1)) & (not halted)
        np.testing.assert_array_equal(np.asarray(new), np.where(per_client, old + 1, old))
    for old, new in zip(
        jax.tree.leaves(before[1:]), jax.tree.leaves(store.stacks[1:]), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(new), old)


def test_the_next_rows_are_where_those_that_were_put_back_have_been():
    _, store = make()
    rows = store.rows(*slots_of([0, 1, 4], TWO))
    was = rows["float32"].addressable_data(0).unsafe_buffer_pointer()
    store.put(*slots_of([0, 1, 4], TWO), rows, jnp.asarray(False))
    client, segment = slots_of([0, 2, 3], TWO)
    again = store.rows(client, segment)
    assert rows["float32"].is_deleted()
    assert again["float32"].addressable_data(0).unsafe_buffer_pointer() == was


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


@pytest.mark.slow
def test_a_head_reset_to_init_is_the_same_bits_at_every_participation():
    seen = heads_seen("reset_to_init", rounds=3)
    assert len(seen) == 3
    assert np.array_equal(seen[0], seen[1])
    assert np.array_equal(seen[0], seen[2])


@pytest.mark.slow
def test_a_head_that_persists_goes_on_from_where_it_was():
    seen = heads_seen("persist", rounds=3)
    assert len(seen) == 3
    assert np.array_equal(seen[0], heads_seen("reset_to_init", rounds=1)[0])
    assert not np.allclose(seen[0], seen[1])
    assert not np.allclose(seen[1], seen[2])


@pytest.mark.slow
def test_heads_stand_still_with_a_run_that_halts():
    """The clients' updates are finite, the server's step is not."""
    data = dataset()
    clients = fl.partition.iid(data.train.labels, clients=12)
    algorithm = fl.fedlp_hetero(
        TASK,
        depths=np.ones(12, int),
        client_optimizer=optax.sgd(0.5),
        server_optimizer=optax.sgd(lambda count: jnp.where(count < 1, 1.0, jnp.inf)),
        steps=1,
        batch_size=5,
    )
    run = fl.Simulation(algorithm, data, clients, rounds=2, cohort=4, plan=TWO)
    run.compile()
    first = jax.tree.map(np.asarray, run.stage.store.stacks)
    run.read(run.dispatch(1))
    second = jax.tree.map(np.asarray, run.stage.store.stacks)
    assert not np.array_equal(flat(first), flat(second))
    with pytest.raises(fl.DivergedError, match="not the model"):
        run.read(run.dispatch(2))
    assert np.array_equal(flat(run.stage.store.stacks), flat(second))


def level(shapes):
    """A level whose clients keep arrays of these shapes, drawn from (root, client)."""
    like = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}

    def init(root, client):
        return {k: jax.random.normal(head_key(root, client), s) for k, s in shapes.items()}

    return ClientState(init, like)


MIXED = [level({"a": (3,), "b": (2, 2)}), level({"a": (4, 5)}), level({})]
OF_MIXED = np.array([0, 1, 0, 2, 1, 1], np.int32)


def mixed_slots(ids, plan):
    ids = np.asarray(ids)
    layout = lay_out(np.ones(len(ids), int), OF_MIXED[ids], [1.0, 2.0, 3.0], plan)
    return np.where(layout.member >= 0, ids[layout.member], -1), layout.segment


def check_heads(rows, client, factor):
    """That each slot has its client's first head, times the factor of that client."""
    for slot in np.flatnonzero(client >= 0):
        of = MIXED[OF_MIXED[client[slot]]]
        got = unpack({"float32": rows["float32"][slot]}, of.shapes)
        expected = of.init(ROOT, client[slot])
        for name in expected:
            np.testing.assert_array_equal(
                np.asarray(got[name]), factor[client[slot]] * np.asarray(expected[name])
            )


@pytest.mark.parametrize("plan", [Plan(1, 1), Plan(2, 1), Plan(4, 1)])
def test_heads_of_different_structures_share_the_rows(plan):
    store = ClientStore(MIXED, OF_MIXED, ROOT, plan)
    client, segment = mixed_slots([1, 2, 3, 5], plan)
    rows = store.rows(client, segment)
    assert rows["float32"].shape == (len(client), 20)
    check_heads(rows, client, dict.fromkeys(range(6), 1))
    before = jax.tree.map(np.asarray, store.stacks)
    store.put(client, segment, {"float32": rows["float32"] * 2}, jnp.asarray(False))
    twice = dict.fromkeys(range(6), 1) | dict.fromkeys([1, 2, 3, 5], 2)
    np.testing.assert_array_equal(np.asarray(store.stacks[0]["b"][0]), before[0]["b"][0])  # of 0
    np.testing.assert_array_equal(np.asarray(store.stacks[1]["a"][1]), before[1]["a"][1])  # of 4
    # Another cohort, whose rows are those of the first: short heads where long ones have been.
    client, segment = mixed_slots([0, 2, 3, 4], plan)
    check_heads(store.rows(client, segment), client, twice)


def test_a_cohort_of_another_size_has_rows_of_its_own():
    store = ClientStore(MIXED, OF_MIXED, ROOT, Plan(1, 1))
    client, segment = mixed_slots([1, 2], Plan(1, 1))
    store.put(client, segment, store.rows(client, segment), jnp.asarray(False))
    client, segment = mixed_slots([0, 1, 2, 5], Plan(1, 1))
    rows = store.rows(client, segment)
    assert rows["float32"].shape == (4, 20)
    check_heads(rows, client, dict.fromkeys(range(6), 1))


def test_a_level_that_names_other_shapes_than_it_makes_is_refused():
    wrong = level({"a": (3,)})._replace(shapes={"a": jax.ShapeDtypeStruct((4,), jnp.float32)})
    with pytest.raises(fl.FedLPError, match=r"level 1 begin with state .*\(3,\).*\(4,\)"):
        ClientStore([wrong], np.zeros(2, np.int32), ROOT, Plan(1, 1))
