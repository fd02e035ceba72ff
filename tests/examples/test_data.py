"""A data set and a partition of your own, from arrays."""

import numpy as np

import fedlp_jax as fl


def two_moons(examples, seed):
    """Inputs `f32[N, 2]` on two half circles, and labels `i32[N]`."""
    rng = np.random.default_rng(seed)
    angle, labels = rng.uniform(0, np.pi, examples), rng.integers(0, 2, examples)
    moons = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    moons[labels == 1] = [1.0, 0.5] - moons[labels == 1]
    noise = rng.normal(scale=0.1, size=moons.shape)
    return (moons + noise).astype(np.float32), labels.astype(np.int32)


def by_side(inputs, clients):
    """`i32[N]`, the client of each example: neighbours from left to right."""
    rank = np.argsort(np.argsort(inputs[:, 0]))
    return (rank * clients // len(inputs)).astype(np.int32)


def test_every_client_holds_its_part_of_the_plane():
    data = fl.from_arrays(*two_moons(200, seed=0), *two_moons(50, seed=1), num_classes=2)
    owner = by_side(data.train.inputs, clients=5)
    clients = fl.partition.natural(data.train.labels, clients=owner)
    assert clients.sizes.tolist() == [40] * 5
    right = [data.train.inputs[clients.rows(k), 0].max() for k in range(5)]
    assert right == sorted(right)
