"""Width submodels: slices of every layer, as smaller dense networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Steps, dataset, flat

import fedlp_jax as fl
from fedlp_jax.accounting.macs import forward_macs
from fedlp_jax.prng import root_key
from fedlp_jax.types import Batch, Normalize

KEY = root_key(0)
ORDERS = {"first": None, "rolling": fl.widths.rolling, "drawn": fl.widths.drawn}


def batch(*shape):
    inputs = np.random.default_rng(1).normal(size=(4, *shape)).astype(np.float32)
    labels = np.zeros(4, np.int32)
    return Batch(*jax.device_put((inputs, labels)), None, Normalize(np.float32(1), np.float32(0)))


def prepared(module, shape):
    """A task, a batch, and variables of which none is at its initial value."""
    task, example = fl.classification(module), batch(*shape)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(task.init, KEY, example)
    values = jax.tree.map(lambda x: rng.uniform(0.1, 0.3, x.shape).astype(np.float32), shapes)
    return task, example, jax.device_put(values)


def placed(level, round=3, client=5):
    return level if level.place is None else level.place(KEY, jnp.int32(round), jnp.int32(client))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (fl.models.MLP(hidden=(6, 10)), (3, 2)),
        pytest.param(fl.models.MNISTCNN(), (16, 16, 1), marks=pytest.mark.slow),
        pytest.param(fl.models.FedLPCNN(), (16, 16, 3), marks=pytest.mark.slow),
        pytest.param(fl.models.ResNet(), (8, 8, 3), marks=pytest.mark.slow),
    ],
    ids=["mlp", "mnist_cnn", "fedlp_cnn", "resnet"],
)
def test_a_slice_computes_what_the_whole_model_does_without_the_other_units(module, shape, order):
    """Units whose entries are all zero put out zero, also through a batch normalisation."""
    task, example, variables = prepared(module, shape)
    scheme = fl.widths.by_width([0.3, 1.0], order=ORDERS[order])
    level = placed(scheme.levels(task, variables, example)[0])
    held = level.extract(variables)
    alone = level.embed(held, variables)
    np.testing.assert_allclose(
        level.task.outputs(held, example), task.outputs(alone, example), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(flat(level.extract(alone)), flat(held))
    ours = flat(level.embed(jax.tree.map(jnp.ones_like, held), variables)) > 0
    np.testing.assert_array_equal(flat(alone)[ours], flat(variables)[ours])
    assert 0 < ours.sum() == flat(held).size < ours.size


def test_a_batch_trains_the_narrower_network_that_it_draws():
    """Its loss, gradient and batch statistics are those of the slice, and the rest stands still."""
    task, example, variables = prepared(Steps(depth=2, norm=True), (4,))
    rates = [0.25, 0.5, 1.0]
    widest = fl.widths.by_width(rates, per_batch=True).levels(task, variables, example)[-1]
    slices = fl.widths.by_width(rates).levels(task, variables, example)

    def step(task):
        return jax.jit(jax.value_and_grad(task.loss, has_aux=True))

    drawn, known = set(), [(level, level.extract(variables), step(level.task)) for level in slices]
    together = step(widest.task)
    for seed in range(8):
        (value, aux), gradient = together(variables, example, jax.random.key(seed))
        losses = [run(held, example, KEY)[0][0] for _, held, run in known]
        choice = int(np.argmin(np.abs(np.asarray(losses) - value)))
        level, held, run = known[choice]
        (expected, statistics), slope = run(held, example, KEY)
        moved = jax.tree.map(
            jnp.subtract, statistics.statistics, {n: held[n] for n in statistics.statistics}
        )
        whole = level.embed(moved, variables)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(
            flat(gradient["params"]), flat(level.embed(slope, variables)["params"]), atol=1e-5
        )
        for name, new in aux.statistics.items():
            old = flat(variables[name])
            np.testing.assert_allclose(flat(new), old + flat(whole[name]), rtol=1e-4, atol=1e-6)
        drawn.add(choice)
    assert drawn == {0, 1, 2}


def test_a_narrow_model_computes_less():
    task, example, variables = prepared(fl.models.MLP(hidden=(64, 64)), (8,))
    levels = fl.widths.by_width([0.25, 0.5, 1.0]).levels(task, variables, example)
    macs = [sum(forward_macs(x.task, x.extract(variables), example).values()) for x in levels]
    assert macs == [8 * n + n * n + n * 10 for n in (16, 32, 64)]
    assert [level.name for level in levels] == ["width_0.25", "width_0.5", "width_1"]


def test_a_window_rolls_by_one_unit_a_round_and_wraps():
    orders = [fl.widths.rolling(KEY, jnp.int32(round), jnp.int32(0), 5) for round in (1, 2, 5, 6)]
    assert np.asarray(orders).tolist() == [
        [0, 1, 2, 3, 4],
        [1, 2, 3, 4, 0],
        [4, 0, 1, 2, 3],
        [0, 1, 2, 3, 4],
    ]


def test_random_units_differ_between_clients_and_rounds():
    def units(round, client):
        return np.asarray(fl.widths.drawn(KEY, jnp.int32(round), jnp.int32(client), 100))

    first = units(1, 0)
    assert sorted(first) == list(range(100))
    assert not np.array_equal(first, units(1, 1)) and not np.array_equal(first, units(2, 0))


def test_clients_are_assigned_by_shares_or_one_by_one():
    task = fl.classification(Steps())
    drawn = fl.widths.by_width([1.0, 0.25, 0.5], [0.5, 0.5, 0.0]).assign(task, KEY, 1000)
    counts = np.bincount(drawn, minlength=3)  # levels by ascending rate
    assert counts[1] == 0 and abs(counts[0] - 500) < 80
    given = fl.widths.by_width([1.0, 0.25, 0.5, 0.25]).assign(task, KEY, 4)
    assert given.tolist() == [2, 0, 1, 0]


@pytest.mark.slow
def test_a_model_wider_than_all_clients_is_tested_as_a_whole():
    data = dataset()
    clients = fl.partition.iid(data.train.labels, clients=4, seed=0)
    task = fl.classification(Steps(depth=1))
    one = fl.federated_dropout(task, widths=0.5, client_optimizer=optax.sgd(0.1), batch_size=15)
    result = fl.simulate(one, data, clients, rounds=2, cohort=2, plan=fl.Plan(1, 1))
    assert result.variables["params"]["hidden1"]["bias"].shape == (8,)
    assert [k for k in result.history.rows[0] if "width" in k] == []
    assert result.costs.total["upload_params"] == 2 * 2 * (4 * 4 + 4 + 4 * 3 + 3)


class Odd(nn.Module):
    """Its widths have other names."""

    width_rate: float = 1.0

    @nn.compact
    def __call__(self, x):
        units = max(int(8 * self.width_rate), 1)
        return nn.Dense(3)(nn.Dense(units, name=f"units{units}")(x.reshape(x.shape[0], -1)))


class Ragged(nn.Module):
    """Its widths are not blocks of units."""

    width_rate: float = 1.0

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(2 + int(9 * self.width_rate))(x.reshape(x.shape[0], -1))
        return nn.Dense(3)(x)


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (fl.models.Logistic(), "this model has no widths"),
        (Odd(), "does not exist in all widths"),
        (Ragged(), "are not blocks of units"),
    ],
    ids=["none", "names", "blocks"],
)
def test_a_model_without_widths_is_refused(module, sentence):
    task, example, variables = prepared(module, (4,))
    with pytest.raises(fl.FedLPError, match=sentence):
        fl.widths.by_width([0.5, 1.0]).levels(task, variables, example)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"widths": 0.0}, "widths"),
        ({"widths": [0.5, 1.5]}, "widths"),
        ({"widths": []}, "give 1 to 16"),
        ({"widths": list(np.linspace(0.1, 1, 17))}, "17 different rates; give 1 to 16"),
        ({"widths": [0.5, 1.0], "shares": [0.5, 0.4]}, "shares has shape .* and sum 0.9"),
        ({"widths": [0.5, 1.0], "aggregator": "median"}, "a robust rule"),
        ({"widths": 0.5, "upload": fl.top_k(0.1, error_feedback=True)}, "error feedback"),
        (
            {
                "widths": 0.5,
                "aggregator": "cohort_mean",
                "privacy": fl.Privacy(1.0, 1.0),
                "weighting": "uniform",
            },
            "privacy adds noise to whole layers",
        ),
    ],
    ids=["zero", "above", "none", "many", "shares", "robust", "feedback", "privacy"],
)
def test_settings_that_do_not_fit_are_refused(settings, sentence):
    with pytest.raises(fl.FedLPError, match=sentence):
        fl.heterofl(fl.classification(Steps()), client_optimizer=optax.sgd(0.1), **settings)


def test_widths_of_another_number_of_clients_are_refused():
    scheme = fl.widths.by_width([0.5, 1.0, 0.5])
    with pytest.raises(fl.FedLPError, match="give one per client"):
        scheme.assign(fl.classification(Steps()), KEY, 4)
    scaffold = {"submodels": scheme, "client_optimizer": optax.sgd(0.1)}
    with pytest.raises(fl.FedLPError, match="more than its update"):
        fl.scaffold(fl.classification(Steps()), **scaffold)
