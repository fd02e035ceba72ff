"""Tasks of any targets and metrics: named means that add up, real targets, tokens."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedlp_jax as fl
from fedlp_jax.tasks.flax_adapter import network
from fedlp_jax.tasks.supervised import mean_over_rows, supervised

SGD = {"client_optimizer": optax.sgd(0.0), "batch_size": 4}


def accept(outputs, example, classes):
    """A check that refuses nothing."""


def squares(outputs, batch):
    error = outputs - batch.labels
    return {
        "loss": mean_over_rows(error**2, batch.valid),
        "size": mean_over_rows(jnp.abs(error), batch.valid),
    }


def fit(measure=squares, metrics=("loss", "size"), features=2):
    return supervised(network(nn.Dense(features)), measure, accept, metrics)


def pairs(examples=10, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, 3)).astype(np.float32)
    y = (x @ rng.normal(size=(3, 2))).astype(np.float32)
    return fl.from_arrays(x, y, x[:7], y[:7], targets="values")


def simulate(data, task, **options):
    clients = fl.partition.iid(data.train.labels, clients=2)
    algorithm = fl.fedavg(task, **SGD)
    return fl.simulate(algorithm, data, clients, rounds=1, cohort=2, **options)


def test_a_mean_counts_the_valid_rows_and_all_their_elements():
    values = jnp.array([[1.0, 2.0], [3.0, 4.0], [jnp.nan, 9.0]], jnp.float32)
    mean = mean_over_rows(values, jnp.array([True, True, False]))
    assert (float(mean.total), float(mean.weight)) == (10.0, 4.0)
    whole = mean_over_rows(values[:2], None)
    assert (float(whole.total), float(whole.weight)) == (10.0, 4.0)


@pytest.mark.parametrize("place", ["device", "host"])
def test_real_targets_and_metrics_of_any_name_are_reported(place):
    data = pairs()
    assert data.num_classes == 0 and repr(data).endswith("targets float32[2])")
    result = simulate(data, fit(), plan=fl.Plan(devices=1, data=place))
    kernel, bias = (np.asarray(result.variables["params"][name]) for name in ("kernel", "bias"))
    for which, split in (("train", data.train), ("test", data.test)):
        error = np.asarray(split.inputs @ kernel + bias - split.labels, np.float64)
        row = result.history.rows[0]
        assert row[f"{which}_loss"] == pytest.approx((error**2).mean(), rel=1e-5)
        assert row[f"{which}_size"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
    assert "test_accuracy" not in row
    assert result.plot().axes[0].get_ylabel() == "test loss"


def test_a_partition_of_real_targets_has_one_class():
    targets = pairs().train.labels
    clients = fl.partition.iid(targets, clients=3)
    assert clients.num_classes == 1 and clients.sizes.tolist() == [3, 3, 4]
    named = fl.partition.natural(targets, clients=["a"] * 4 + ["b"] * 6)
    assert named.sizes.tolist() == [4, 6]
    with pytest.raises(fl.FedLPError, match=r"labels are float32\[10, 2\]"):
        fl.partition.dirichlet(targets, clients=3, alpha=1.0)


def test_tokens_reach_the_model_as_they_are():
    seen = []

    class Ids(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            seen.append(tokens.dtype)
            return nn.Dense(5)(nn.Embed(300, 4)(tokens))

    tokens = np.arange(240, 300).reshape(12, 5)
    data = fl.from_arrays(tokens, tokens % 5, tokens, tokens % 5, targets="values")
    assert data.train.inputs.dtype == np.int32 and data.num_classes == 5
    assert "targets tokens of 5[5]" in repr(data)

    def measure(logits, batch):
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return {"loss": mean_over_rows(loss, batch.valid)}

    result = simulate(data, supervised(network(Ids()), measure, accept, ("loss",)))
    assert set(seen) == {jnp.dtype(jnp.int32)}
    assert 0.5 < result.history["test_loss"][0] < 4  # about log 5


def test_what_does_not_fit_the_task_is_refused():
    data = pairs()
    with pytest.raises(fl.FedLPError, match=r"needs class labels \[N\], .* float32\['N', 2\]"):
        simulate(data, fl.classification(nn.Dense(2)))
    with pytest.raises(fl.FedLPError, match="measures loss, size, but its `metrics` are loss; "):
        simulate(data, fit(metrics=("loss",)))
    flips = fl.Faults(corruption=fl.Corruption("label_flip", share=0.5))
    with pytest.raises(fl.FedLPError, match="'label_flip' needs class labels"):
        simulate(data, fit(), faults=flips)
    x = np.arange(6).reshape(3, 2)
    with pytest.raises(fl.FedLPError, match="integer inputs such as tokens are not normalised"):
        fl.from_arrays(x, [0, 1, 0], x, [0, 1, 0], normalize=(2, 0))
    with pytest.raises(fl.FedLPError, match=r"training targets are .*\[2\] but test targets"):
        fl.from_arrays(x, x / 2, x, x[:, :1] / 2, targets="values")
    with pytest.raises(fl.FedLPError, match="hold a NaN"):
        fl.from_arrays(x, x * np.nan, x, x / 2, targets="values")
    with pytest.raises(fl.FedLPError, match="'values', 'numbers'|targets"):
        fl.from_arrays(x, x, x, x, targets="numbers")
