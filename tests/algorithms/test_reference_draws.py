import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import cohort_of

import fedlp_jax as fl
from fedlp_jax.algorithms.reference_draws import reference_draws
from fedlp_jax.pruning.layers import layer_table

# Of the shape of CIFAR-10: 50,000 examples, 5,000 of each class.
LABELS = np.random.RandomState(0).permutation(np.repeat(np.arange(10), 5000))


FEW = LABELS[:5000]


def depth_counts(flag):
    return np.bincount(reference_draws(LABELS, flag=flag, rounds=1).depths, minlength=6)[1:]


@pytest.mark.parametrize(
    ("flag", "counts"),
    [(1, [56, 9, 8, 11, 16]), (3, [8, 8, 57, 11, 16]), (5, [8, 8, 8, 10, 66])],
)
def test_depths_are_those_of_the_published_runs(flag, counts):
    """Counts of clients of depth 1 to 5 that the authors' code draws on iid with seed 25."""
    assert depth_counts(flag).tolist() == counts


def test_the_deepest_clients_take_part_as_often_as_they_did():
    draws = reference_draws(LABELS, flag=1, rounds=100)
    assert (draws.depths[draws.cohorts] == 5).sum() == 147
    assert all(len(set(row)) == 10 for row in draws.cohorts)
    assert np.array_equal(draws.cohort(0, 7, 100), draws.cohorts[6])
    with pytest.raises(fl.FedLPError, match="round 101 lies beyond the 100 rounds"):
        draws.cohort(0, 101, 100)


@pytest.mark.parametrize("flag", [None, 1])
def test_first_cohorts_are_those_of_one_generator_asked_in_turn(flag):
    generator = np.random.RandomState(25)
    pool = list(range(50_000))
    for _ in range(100):
        held = set(generator.choice(pool, 500, replace=False))
        pool = list(set(pool) - held)
    if flag is not None:
        for _ in range(100):
            generator.choice([1, 2, 3, 4, 5], 1, p=[0.6, 0.1, 0.1, 0.1, 0.1])
    cohorts = [generator.choice(range(100), 10, replace=False) for _ in range(3)]
    assert np.array_equal(reference_draws(LABELS, flag=flag, rounds=3).cohorts, cohorts)


@pytest.mark.parametrize("keep", [0.1, 0.3])
def test_an_entry_is_sent_by_nobody_as_often_as_ten_trials_fail(keep):
    drawn = reference_draws(FEW, keep=keep, rounds=200).uniforms
    assert drawn.shape == (200, 46, 10)
    generator = random.Random(25)
    assert drawn[0, :2].ravel().tolist() == [generator.random() for _ in range(20)]
    nobody = (drawn >= keep).all(axis=2)
    expected = (1 - keep) ** 10  # .349 at .1, .028 at .3
    error = np.sqrt(expected * (1 - expected) / nobody.size)
    assert abs(nobody.mean() - expected) < 4 * error


def test_iid_deals_every_example_once():
    partition = reference_draws(LABELS, rounds=1).partition
    assert set(partition.sizes) == {500}
    assert np.array_equal(np.sort(partition.order), np.arange(50_000))


def test_dirichlet_uses_every_example_once_in_uneven_shares():
    partition = reference_draws(LABELS, split="dirichlet", rounds=1).partition
    assert np.array_equal(np.sort(partition.order), np.arange(50_000))
    assert partition.sizes.mean() == 500
    assert 120 < partition.sizes.std() < 200  # about 157 in 50 draws of the authors' code


def test_mixed_gives_25_of_the_first_2500_and_two_shards_of_238():
    partition = reference_draws(LABELS, split="mixed", rounds=1).partition
    assert set(partition.sizes) == {501}
    sorted_rows = np.argsort(LABELS[:49_980], kind="stable").reshape(210, 238)
    shard_of = np.full(50_000, -1)
    shard_of[sorted_rows] = np.arange(210)[:, None]
    used = []
    for k in range(100):
        rows = partition.rows(k)
        assert (rows[:25] < 2500).all()
        shards = shard_of[rows[25:]].reshape(2, 238)
        assert (shards == shards[:, :1]).all()
        used += shards[:, 0].tolist()
    assert len(set(used)) == 200


def test_homo_sees_the_cohorts_of_fedavg_and_hetero_others():
    """To choose from one value, as Homo does for its rates, NumPy takes nothing."""
    generator = np.random.RandomState(25)
    generator.choice([0.5], 100)
    assert generator.randint(2**31) == np.random.RandomState(25).randint(2**31)
    fedavg, homo, hetero = (
        reference_draws(FEW, rounds=3, **scheme).cohorts
        for scheme in ({}, {"keep": 0.5}, {"flag": 1})
    )
    assert np.array_equal(fedavg, homo)
    assert not np.array_equal(fedavg, hetero)


def cnn_variables():
    """Variables with the names of FedLPCNN's."""
    number = jnp.zeros(1)
    block = {
        "conv": {"kernel": number, "bias": number},
        "norm": {"scale": number, "bias": number},
    }
    heads = {f"fc{i}": {"kernel": number, "bias": number} for i in (1, 2)}
    convs = range(1, 7)
    return {
        "params": {f"conv{i}": block for i in convs} | heads,
        "batch_stats": {f"conv{i}": {"norm": {"mean": number, "var": number}} for i in convs},
    }


def test_masks_follow_the_client_and_the_entry():
    draws = reference_draws(FEW, keep=0.3, rounds=20)
    assert abs((draws.uniforms < 0.3).mean() - 0.3) < 0.01
    table = layer_table(cnn_variables(), "by_tensor")
    assert len(table) == 40
    policy = draws.policy()
    state = policy.init(table, 100)
    order = np.sort(draws.cohorts[4])
    clients, coverage = cohort_of(order), jnp.ones((10, 40))
    masks, _ = policy.sample(jax.random.key(0), state, clients, jnp.int32(5), coverage)
    # conv1.weight is entry 0 of the state dict, fc2.bias entry 45.
    for name, entry in (("conv1/conv/kernel", 0), ("conv2/norm/var", 12), ("fc2/bias", 45)):
        for slot, client in enumerate(order):
            place = draws.cohorts[4].tolist().index(client)
            sent = draws.uniforms[4, entry, place] < 0.3
            assert bool(masks.upload[slot, table.names.index(name)]) == sent


def test_without_a_keep_rate_every_layer_is_sent():
    draws = reference_draws(FEW, rounds=2)
    policy, half = draws.policy(), reference_draws(FEW, rounds=2, keep=0.5).policy()
    assert policy.sample is half.sample  # so that both are lanes of one program
    table = layer_table({"params": {"a": jnp.zeros(2), "b": jnp.zeros(3)}})
    clients, coverage = cohort_of(draws.cohorts[1]), jnp.tile(jnp.asarray([1.0, 0.0]), (10, 1))
    state = policy.init(table, 100)
    masks, _ = policy.sample(jax.random.key(0), state, clients, jnp.int32(2), coverage)
    np.testing.assert_array_equal(masks.upload, coverage)
    np.testing.assert_array_equal(policy.expected(table, 100), [[1.0]])


def test_refusals():
    with pytest.raises(fl.FedLPError, match="flag=1 is of FedLP-Hetero and keep=0.5 of FedLP-Homo"):
        reference_draws(FEW, flag=1, keep=0.5)
    with pytest.raises(fl.FedLPError, match="flag=6 must be 'uniform' or a depth from 1 to 5"):
        reference_draws(FEW, flag=6)
    with pytest.raises(fl.FedLPError, match="cohort=101 must lie between 1 and the 100 clients"):
        reference_draws(FEW, cohort=101)
    table = layer_table({"params": {"a": jnp.zeros(2)}}, "by_tensor")
    with pytest.raises(fl.FedLPError, match="layers='by_tensor' .40 layers.; these are 1 layers"):
        reference_draws(FEW, keep=0.5, rounds=1).policy().init(table, 100)
