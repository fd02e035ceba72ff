"""linen and nnx modules as pure functions, and rows that pad a batch."""

import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from small import Steps, dataset, flat

import fedlp_jax as fl
from fedlp_jax import errors
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


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[] if k == "nnx function" else pytest.mark.slow) for k in MODULES],
)
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


SWITCHES = {
    **dict.fromkeys(("train", "training", "is_training"), True),
    **dict.fromkeys(("deterministic", "use_running_average", "inference"), False),
}


def linen_with(place, name):
    """A module that adds 1 while its switch, an argument or a field, says to train."""
    if place == "argument":
        body = f"lambda self, x, {name}=None: self.add(x, {name})"
    else:
        body = f"lambda self, x: self.add(x, self.{name})"
    fields = {"__annotations__": {name: "bool | None"}, name: None} if place == "field" else {}

    def add(self, x, value):
        return nn.Dense(3, name="fc")(x) + (1.0 if value == SWITCHES[name] else 0.0)

    call = nn.compact(eval(body))
    call.__name__ = "__call__"
    return type("Net", (nn.Module,), {**fields, "add": add, "__call__": call})()


def nnx_with(place, name):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.fc = nnx.Linear(4, 3, rngs=rngs)
            if place == "field":
                setattr(self, name, not SWITCHES[name])

        def add(self, x, value):
            return self.fc(x) + (1.0 if value == SWITCHES[name] else 0.0)

    if place == "argument":
        Net.__call__ = eval(f"lambda self, x, {name}=None: self.add(x, {name})")
    else:
        Net.__call__ = lambda self, x: self.add(x, getattr(self, name))
    return Net


@pytest.mark.parametrize("place", ["argument", "field"])
@pytest.mark.parametrize("make", [linen_with, nnx_with])
@pytest.mark.parametrize("name", SWITCHES)
def test_the_switch_to_training_is_found_by_its_name(make, place, name):
    net = network(make(place, name))
    variables = net.init(KEY, jnp.asarray(X))
    on, off = (net.apply(variables, jnp.asarray(X), key, None)[0] for key in (KEY, None))
    np.testing.assert_allclose(on - off, 1.0, rtol=1e-5)


class FrozenNorm(nn.Module):
    @nn.compact
    def __call__(self, x, learning=False):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not learning)(x))


class FrozenDropout(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=True)(x))


class NnxFrozen(nnx.Module):
    def __init__(self, rngs, norm):
        self.layer = nnx.BatchNorm(4, rngs=rngs) if norm else nnx.Dropout(0.5, rngs=rngs)
        self.norm, self.fc = norm, nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x, learning=False):
        name = "use_running_average" if self.norm else "deterministic"
        return self.fc(self.layer(x, **{name: not learning}))


@pytest.mark.parametrize(
    "module",
    [
        FrozenNorm(),
        FrozenDropout(),
        lambda rngs: NnxFrozen(rngs, norm=True),
        lambda rngs: NnxFrozen(rngs, norm=False),
    ],
    ids=["norm", "dropout", "nnx norm", "nnx dropout"],
)
def test_a_model_that_is_never_switched_to_training_costs_one_warning(module):
    task = fl.classification(module)
    variables = task.init(KEY, batch(1))
    with pytest.warns(UserWarning, match="uses neither in training; .* train or ") as caught:
        task.loss(variables, batch(4), KEY)
        task.loss(variables, batch(4), KEY)
    assert len(caught) == 1
    task.evaluate(variables, batch(4))


class OwnNorm(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        mean = self.variable("batch_stats", "m", jnp.zeros, (1, 4))
        if train:
            mean.value = x.mean(0, keepdims=True)
        return nn.Dense(3)(x - mean.value)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.softmax(x @ x.T) @ x)


class NnxOwnNorm(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.fc(x - x.mean(0, keepdims=True))


class NnxNormWithoutMask(nnx.BatchNorm):
    def __call__(self, x, use_running_average=None):
        return super().__call__(x, use_running_average)


MIXING = {
    "own statistic": OwnNorm(),
    "rows attend to rows": Attention(),
    "reversed rows": nn.Sequential([lambda x: x[::-1], nn.Dense(3)]),
    "shifted rows": nn.Sequential([lambda x: jnp.roll(x, 1, 0), nn.Dense(3)]),
    "one batch size": nn.Sequential([lambda x: x.reshape(7, 4), nn.Dense(3)]),
    "nnx": NnxOwnNorm,
    "nnx without a mask": lambda rngs: nnx.Sequential(
        NnxNormWithoutMask(4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
    ),
}


@pytest.mark.parametrize("kind", MIXING)
def test_rows_that_may_mix_with_padding_cost_one_warning(kind):
    net = network(MIXING[kind])
    x = jnp.asarray(np.concatenate([X, X[:1]]))
    variables = net.init(KEY, x)
    net.apply(variables, x, KEY, None)  # nothing is padded
    with pytest.warns(UserWarning, match="choose a batch_size that divides") as caught:
        net.apply(variables, x, KEY, jnp.arange(7) < 4)
        net.apply(variables, x, KEY, jnp.arange(7) < 4)
    assert len(caught) == 1


class OtherCollection(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        level = self.variable("levels", "level", jnp.zeros, ())
        if train:
            level.value = level.value + 1.0
        return nn.Dense(3)(x)


class NnxLevel(nnx.Variable):
    pass


class NnxOtherVariable(nnx.Module):
    def __init__(self, rngs, kind):
        self.level = kind(jnp.zeros(()))
        self.fc = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        self.level.value = self.level.value + 1.0
        return self.fc(x)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (OtherCollection(), "collection 'levels' is taken for batch statistics: .* averaged over"),
        (
            lambda rngs: NnxOtherVariable(rngs, NnxLevel),
            "changes its NnxLevel 'level' in training, but between steps only nnx.Param",
        ),
        (lambda rngs: NnxOtherVariable(rngs, nnx.BatchStat), None),
    ],
)
def test_what_is_done_with_other_variables_is_said(module, message):
    net = network(module)
    variables = net.init(KEY, jnp.asarray(X))
    with errors.collecting() as said, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.apply(variables, jnp.asarray(X), KEY, None)
        net.apply(variables, jnp.asarray(X), None, None)  # evaluation says nothing
    assert len(said) == (message is not None)
    assert message is None or re.search(message, said[0])


class RowByRow(nn.Module):
    """What may look as if it mixed rows, but does not."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.LayerNorm()(nn.GroupNorm(2)(nn.Dense(8)(x)))
        x = nn.Dropout(0.5, deterministic=not train)(x).reshape(x.shape[0], 4, 2)
        x = nn.RNN(nn.SimpleCell(8))(x) + nn.MultiHeadDotProductAttention(2)(nn.Dense(8)(x))
        x = x + jax.vmap(lambda row: jnp.cumsum(row[::-1], 0))(x)
        self.sow("intermediates", "spread", x.std((1, 2)))
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(x).max(1))


def test_layers_that_compute_row_by_row_cost_no_warning():
    x = jnp.asarray(X)
    for net in (network(RowByRow()), network(MODULES["linen"]())):  # a warning would be an error
        variables = jax.eval_shape(net.init, KEY, x)
        outputs, _ = jax.eval_shape(
            lambda v, n=net: n.apply(v, x, KEY, jnp.arange(6) < 4), variables
        )
        assert outputs.shape == (6, 3)


def test_a_derived_batch_norm_is_masked():
    class Derived(nn.BatchNorm):
        @nn.compact
        def __call__(self, x, use_running_average=None):
            return super().__call__(x, use_running_average)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(3)(Derived(momentum=0.0)(x, use_running_average=not train))

    class NnxDerived(nnx.BatchNorm):
        pass

    def make(rngs):
        norm = NnxDerived(4, momentum=0.0, rngs=rngs)
        return nnx.Sequential(norm, nnx.Linear(4, 3, rngs=rngs))

    for module in (Net(), make):
        task = fl.classification(module)
        variables = task.init(KEY, batch(1))
        _, aux = task.loss(variables, batch(4, padding=3), KEY)
        means = [v for v in jax.tree.leaves(aux.statistics) if not np.all(v > 0)]
        np.testing.assert_allclose(means[0], X[:4].mean(0), rtol=1e-5)


def test_an_augmentation_that_mixes_rows_costs_a_warning():
    def mixup(key, x):
        return 0.5 * (x + jax.random.permutation(key, x))

    def flip(key, x):
        return jnp.where(jax.random.bernoulli(key, 0.5, (x.shape[0], 1)), x, -x)

    for augment, count in ((mixup, 1), (flip, 0)):
        task = fl.classification(nn.Dense(3), augment=augment)
        variables = task.init(KEY, batch(1))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            task.loss(variables, batch(4, padding=3), KEY)
        assert len(caught) == count


def test_inputs_keep_their_digits_with_short_parameters():
    inputs = []

    class Ids(nn.Module):
        @nn.compact
        def __call__(self, x):
            inputs.append(x)
            return nn.Dense(3, param_dtype=jnp.bfloat16)(x)

    task = fl.classification(Ids())
    ids = np.float32([[257.0], [999.0], [1000.0]])
    ids_batch = Batch(jnp.asarray(ids), jnp.zeros(3, jnp.int32), None, IDENTITY)
    variables = task.init(KEY, ids_batch)
    task.loss(variables, ids_batch, KEY)
    task.evaluate(variables, ids_batch)
    for x in inputs:
        assert x.dtype == jnp.float32
        np.testing.assert_array_equal(x, ids)


def test_several_outputs_are_refused():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x), x

    task = fl.classification(Two())
    variables = task.init(KEY, batch(1))
    for f in (
        lambda b: task.loss(variables, b, KEY),
        lambda b: task.outputs(variables, b),
    ):
        with pytest.raises(fl.FedLPError, match=r"returns a tuple, .* needs one array"):
            f(batch(4))


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
