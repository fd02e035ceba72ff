"""The reference behaviour against an implementation in PyTorch: same weights, batches and masks.

Opt-in: without the extra `bench` it is skipped. The PyTorch side, `benchmarks/torch_networks.py`
and `Plain` here, is written from what is known of the code of FedLP's authors, and copies nothing.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

import fedlp_jax as fl
from fedlp_jax.algorithms.reference_draws import reference_draws
from fedlp_jax.data.batching import example_of
from fedlp_jax.prng import Purpose, client_key, head_key

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[bench]'")

BATCH, CLIENTS, SEED = 10, 2, 3
FULL, SHORT = (5, 500), (1, 50)  # epochs, images of a client: 250 steps, as published; 5 steps


def cifar():
    if not (Path(os.environ.get("TFDS_DATA_DIR", "/nowhere")) / "cifar10").is_dir():
        pytest.skip("CIFAR-10 is not prepared in TFDS_DATA_DIR")
    return fl.load("cifar10")


def images(per_client):
    """The first images of CIFAR-10.

    Real ones, since Adam divides rounding errors by rounding errors where gradients vanish: on
    noise with a few patterns, soon learnt, PyTorch itself ends 1e-8 away when its first weights
    change by 2e-16, and here 1e-12.
    """
    data = cifar()
    rows, few = slice(CLIENTS * per_client), slice(10)
    return fl.from_arrays(
        data.train.inputs[rows],
        data.train.labels[rows],
        data.test.inputs[few],
        data.test.labels[few],
    )


def run_of(work, dtype, keep):
    """A simulation of one round, compiled, its data and its clients."""
    epochs, per_client = work
    data = images(per_client)
    clients = fl.partition.iid(data.train.labels, clients=CLIENTS, seed=0)
    algorithm = fl.fedlp_homo(
        fl.classification(fl.models.FedLPCNN(num_classes=10, init="pytorch")),
        keep=keep,
        behaviour="reference",
        client_optimizer=optax.adam(1e-3),
        epochs=epochs,
        batch_size=BATCH,
    )
    settings = {"rounds": 1, "cohort": CLIENTS, "seed": SEED, "plan": fl.Plan(2, 1)}
    first = fl.simulate(algorithm, data, clients, **settings | {"rounds": 0}).state.variables
    first = cast(first, dtype)
    return fl.Simulation(algorithm, data, clients, variables=first, **settings), first


def cast(variables, dtype):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), variables)


def ours(run):
    """The variables after the round, and who sent which tensor, by path."""
    run.compile()
    (record,) = run.records(run.dispatch(1))
    sent = record.metrics.upload
    return flat(run.state.variables), dict(zip(run.spec.layers.names, sent.T, strict=True))


def flat(variables):
    return {"/".join(path): np.asarray(x) for path, x in flatten_dict(variables).items()}


class Plain:
    """FedLP in PyTorch: train, mask every tensor, mean over those who sent it."""

    def __init__(self, data, first, dtype):
        from benchmarks import torch_networks as networks

        self.networks, self.first, self.dtype = networks, flat(first), dtype
        gain, shift = (np.asarray(x, np.float64) for x in data.normalize)
        inputs = data.train.inputs * gain + shift  # as stored in float32; 1e-8 would be amplified
        self.images = torch.from_numpy(inputs.transpose(0, 3, 1, 2).copy()).to(dtype)
        self.labels = torch.from_numpy(data.train.labels.astype(np.int64))

    def train(self, orders, depth=5, head=None):
        """One client from the server's weights and its own head; a row of `orders` an epoch."""
        model = self.networks.FedLPCNN(depth).to(self.dtype)
        named, start = self.networks.named(model), self.first | (head or {})
        for path, tensor in named.items():
            tensor.copy_(torch.from_numpy(self.networks.to_torch(start[path])))
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for order in orders:
            for rows in torch.from_numpy(order).split(BATCH):
                optimizer.zero_grad()
                logits = model(self.images[rows])
                torch.nn.functional.cross_entropy(logits, self.labels[rows]).backward()
                optimizer.step()
        return {p: self.networks.to_flax(t.numpy().copy()) for p, t in named.items()}

    def round(self, trained, sent):
        """The server's variables after one round."""
        new = {}
        for path, old in self.first.items():
            who = [k for k in range(len(trained)) if sent[path.partition("/")[2]][k]]
            new[path] = np.mean([trained[k][path] for k in who], axis=0) if who else old
        return new


def orders(run, work, client):
    """The rows of a client in the order in which it trains on them, for each epoch."""
    key = client_key(jax.random.key(SEED), 1, client, Purpose.SHUFFLE)
    rows = run.clients.rows(client)
    draws = [
        np.asarray(jax.random.uniform(jax.random.fold_in(key, e), (len(rows),), jnp.float32))
        for e in range(work[0])
    ]
    return [rows[np.argsort(draw, kind="stable")].astype(np.int64) for draw in draws]


def difference(work, dtype, keep):
    """How far both models are apart, and the tensors sent."""
    run, first = run_of(work, dtype, keep)
    found, sent = ours(run)
    plain = Plain(images(work[1]), first, getattr(torch, dtype.dtype.name))
    trained = [plain.train(orders(run, work, k)) for k in range(CLIENTS)]
    wanted = plain.round(trained, sent)
    return apart(found, wanted, plain.first), sent


def apart(found, wanted, first):
    """Length of the difference of two models, over that of the update."""
    assert set(found) == set(wanted)
    away = sum(np.square(found[p] - wanted[p]).sum() for p in wanted)
    moved = sum(np.square(wanted[p] - first[p]).sum() for p in wanted)
    return np.sqrt(away / moved)


@pytest.mark.slow
def test_a_whole_round_in_float64_is_that_of_pytorch():
    """250 steps of each client, then one aggregation of 40 tensors that are masked one by one."""
    with jax.enable_x64(True):
        off, sent = difference(FULL, jnp.float64, keep=0.5)
    counts = {int(s.sum()) for s in sent.values()}
    assert counts == {0, 1, 2}  # kept, one sender, a mean
    assert off < 1e-6


@pytest.mark.slow
def test_a_round_of_hetero_with_the_authors_draws_is_that_of_pytorch():
    """FedLP-Hetero(1) on iid: their clients, depths and first cohort; five steps of each."""
    data, steps = cifar(), 5
    draws = reference_draws(data.train.labels, flag=1, rounds=1)
    algorithm = fl.fedlp_hetero(
        fl.classification(fl.models.FedLPCNN(num_classes=10, init="pytorch")),
        depths=draws.depths,
        behaviour="reference",
        client_optimizer=optax.adam(1e-3),
        steps=steps,
        batch_size=BATCH,
    )
    example = example_of(fl.types.Examples(data.train.inputs, data.train.labels, data.normalize))
    first = algorithm.task.init(jax.random.key(0), example)
    settings = {"rounds": 1, "cohort": draws.cohort, "seed": SEED, "plan": fl.Plan(2, 1)}
    with jax.enable_x64(True):
        first = cast(first, jnp.float64)
        run = fl.Simulation(algorithm, data, draws.partition, variables=first, **settings)
        run.compile()
        (record,) = run.records(run.dispatch(1))
        found = flat(run.state.variables)
        levels = algorithm.levels(first, example)
        heads = [
            flat(levels[level].private(head_key(jax.random.key(SEED), client), example))
            for client, level in zip(record.client, record.level, strict=True)
        ]
    assert record.client.tolist() == sorted(draws.cohorts[0])
    depths = draws.depths[record.client]
    assert len(set(depths)) > 1 and 5 in depths
    batches = np.stack([orders(run, (1, 500), k)[0][: steps * BATCH] for k in record.client])
    used, places = np.unique(batches, return_inverse=True)
    seen = fl.from_arrays(*2 * (data.train.inputs[used], data.train.labels[used]))
    plain = Plain(seen, first, torch.float64)
    trained = [
        plain.train([place], int(depth), head)
        for place, depth, head in zip(places.reshape(batches.shape), depths, heads, strict=True)
    ]
    sent = {p.partition("/")[2]: [p in one for one in trained] for p in plain.first}
    assert apart(found, plain.round(trained, sent), plain.first) < 1e-6


@pytest.mark.slow
def test_five_steps_in_float32_are_those_of_pytorch():
    """No more steps: Adam's first are signs, and one ulp in the weights grows tenfold in five."""
    off, _ = difference(SHORT, jnp.float32, keep=1.0)
    assert off < 1e-2
