"""linen and nnx modules as pure functions, and rows that pad a batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small import Steps, dataset, flat

import fedlp_jax as fl
from fedlp_jax.tasks.flax_adapter import network
from fedlp_jax.types import Batch, Normalize

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 4)).astype(np.float32)
Y = RNG.integers(0, 3, 6).astype(np.int32)
IDENTITY = Normalize(np.float32(1), np.float32(0))
KEY = jax.random.key(0)


def batch(rows, padding=0):
    """The first rows of X, and then rows that do not count."""
    x = np.concatenate([X[:rows], np.full((padding, 4), 1e3, np.float32)])
    y = np.concatenate([Y[:rows], np.zeros(padding, np.int32)])
    valid = jnp.arange(rows + padding) < rows if padding else None
    return Batch(jnp.asarray(x), jnp.asarray(y), valid, IDENTITY)


class NnxNet(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


MODULES = {
    "linen": lambda: Steps(norm=True),
    "nnx": lambda: NnxNet(nnx.Rngs(0)),
    "nnx function": lambda: NnxNet,
}


@pytest.mark.parametrize("kind", MODULES)
def test_a_padded_batch_equals_the_short_one(kind):
    """Loss, gradient and new batch statistics: padding rows may not enter a batch normalisation."""
    task = fl.classification(MODULES[kind]())
    variables = task.init(KEY, batch(1))

    def step(b):
        def loss(params):
            return task.loss({**variables, "params": params}, b, KEY)

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    short, padded = jax.jit(lambda: step(batch(4)))(), jax.jit(lambda: step(batch(4, padding=3)))()
    for a, b in zip(jax.tree.leaves(short), jax.tree.leaves(padded), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    statistics = short[0][1].statistics["batch_stats"]
    assert not np.allclose(flat(statistics), flat(variables["batch_stats"]))


@pytest.mark.parametrize("kind", MODULES)
def test_any_module_trains(kind):
    data = dataset(examples=240)
    clients = fl.partition.iid(data.train.labels, clients=7)
    algorithm = fl.fedlp_homo(
        fl.classification(MODULES[kind]()),
        keep=0.7,
        client_optimizer=optax.sgd(0.1),
        epochs=2,
        batch_size=8,
    )
    result = fl.simulate(algorithm, data, clients, rounds=8, cohort=4)
    assert result.history["test_accuracy"][-1] > 0.6  # chance is a third
    assert set(result.variables) == {"params", "batch_stats"}


def test_an_nnx_instance_keeps_its_numbers_and_is_not_changed():
    module = NnxNet(nnx.Rngs(7))
    before = flat(nnx.to_pure_dict(nnx.state(module, nnx.Param)))
    task = fl.classification(module)
    variables = task.init(KEY, batch(1))
    assert np.array_equal(flat(variables["params"]), before)
    task.loss(variables, batch(4), KEY)
    assert type(module.norm) is nnx.BatchNorm
    assert np.array_equal(flat(nnx.to_pure_dict(nnx.state(module, nnx.Param))), before)
    expected = NnxNet(nnx.Rngs(7))
    expected.eval()
    np.testing.assert_allclose(task.outputs(variables, batch(6)), expected(X), rtol=1e-6)


def test_an_nnx_function_follows_the_seed():
    task = fl.classification(NnxNet)
    one, two = (task.init(jax.random.key(seed), batch(1)) for seed in (0, 1))
    assert not np.array_equal(flat(one["params"]), flat(two["params"]))


def test_dropout_follows_the_key_and_only_while_training():
    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic):
            return nn.Dense(3)(nn.Dropout(0.5)(x, deterministic=deterministic))

    for module in (Dropped(), lambda rngs: NnxNet(rngs, rate=0.5)):
        net = network(module)
        variables = net.init(KEY, jnp.asarray(X))
        keys = [jax.random.key(0), jax.random.key(0), jax.random.key(1)]
        a, b, c = (np.asarray(net.apply(variables, X, key, None)[0]) for key in keys)
        assert np.array_equal(a, b)
        assert not np.array_equal(a, c)
        still = [np.asarray(net.apply(variables, X, None, None)[0]) for _ in range(2)]
        assert np.array_equal(*still)


@pytest.mark.parametrize("name", ["train", "training", "deterministic", "use_running_average"])
def test_the_switch_to_training_is_found_by_its_name(name):
    if name in ("train", "training"):

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x, train=None, training=None):
                train = train if training is None else training
                return nn.Dense(3)(x) + (1.0 if train else 0.0)

    else:

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x, deterministic=None, use_running_average=None):
                off = deterministic if use_running_average is None else use_running_average
                return nn.Dense(3)(x) + (0.0 if off else 1.0)

    net = network(Net())
    variables = net.init(KEY, jnp.asarray(X))
    on, off = (net.apply(variables, jnp.asarray(X), key, None)[0] for key in (KEY, None))
    np.testing.assert_allclose(on - off, 1.0, rtol=1e-5)


def test_a_norm_over_regrouped_rows_is_refused_where_rows_are_padded():
    class Regrouped(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(x.reshape(-1, 2))
            return nn.Dense(3)(x.reshape(-1, 4))

    task = fl.classification(Regrouped())
    variables = task.init(KEY, batch(1))
    task.loss(variables, batch(4), KEY)
    with pytest.raises(fl.FedLPError, match="a BatchNorm got 14 rows in a batch of 7"):
        task.loss(variables, batch(4, padding=3), KEY)


def test_a_module_without_a_whole_number_of_depths_offers_none():
    assert network(nn.Dense(3)).at_depth is None
    assert network(Steps(depth=3)).depth == 3


def test_an_nnx_sequence_has_a_layer_for_each_module():
    def make(rngs):
        norm = nnx.BatchNorm(8, rngs=rngs)
        return nnx.Sequential(
            nnx.Linear(4, 8, rngs=rngs), norm, nnx.relu, nnx.Linear(8, 3, rngs=rngs)
        )

    data = dataset()
    algorithm = fl.fedlp_homo(
        fl.classification(make), keep=0.5, client_optimizer=optax.sgd(0.1), batch_size=5
    )
    result = fl.simulate(
        algorithm,
        data,
        fl.partition.iid(data.train.labels, clients=4),
        rounds=2,
        cohort=4,
        faults=fl.Faults(profile=fl.Profile(1e9, 1e6, 2e5)),  # which counts MACs by module
    )
    assert result.layers.names == ("layers/0", "layers/1", "layers/3")
    assert result.history["train_macs"][0] > 0


@pytest.mark.parametrize("stream", ["noise", "params"])
def test_any_stream_of_random_numbers_is_there_while_training(stream):
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            if train:
                x = x + jax.random.normal(self.make_rng(stream), x.shape, x.dtype)
            return nn.Dropout(0.5, deterministic=not train)(nn.Dense(3)(x))

    net = network(Noisy())
    variables = net.init(KEY, jnp.asarray(X))
    a, b, c = (
        np.asarray(net.apply(variables, X, jax.random.key(seed), None)[0]) for seed in (0, 0, 1)
    )
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def refused(module):
    data = dataset()
    algorithm = fl.fedavg(fl.classification(module), client_optimizer=optax.sgd(0.1))
    clients = fl.partition.iid(data.train.labels, clients=4)
    fl.simulate(algorithm, data, clients, rounds=1, cohort=2)


def test_collections_that_have_no_mean_are_refused():
    class Sown(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("losses", "l2", (x**2).sum())
            return nn.Dense(3)(x)

    class Counts(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.variable("counters", "steps", lambda: jnp.zeros((), jnp.int32))
            return nn.Dense(3)(x)

    with pytest.raises(fl.FedLPError, match=r"variables\['losses'\]\['l2'\]\[1\] are nothing and"):
        refused(Sown())
    with pytest.raises(
        fl.FedLPError, match=r"\['counters'\]\['steps'\] have dtype int32, and only"
    ):
        refused(Counts())
