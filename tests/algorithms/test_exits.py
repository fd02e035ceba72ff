"""InclusiveFL and DepthFL against a NumPy loop written from their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import BATCH, CLIENTS, COHORTS, EPOCHS, MASK, SEED, key, shuffled
from small import Steps, dataset, flat, in_float64

import fedlp_jax as fl
from fedlp_jax.data.batching import example_of
from fedlp_jax.types import Examples

RATE, KEEP, ROUNDS = 0.125, 0.625, 2
DEPTHS = [1, 3, 2, 3, 1, 2, 3, 1, 2]
DATA = dataset()
POPULATION = fl.partition.dirichlet(
    DATA.train.labels, clients=CLIENTS, alpha=1.0, seed=1, min_size=2
)
TASK = fl.classification(Steps())
EXAMPLE = example_of(Examples(DATA.train.inputs, DATA.train.labels, DATA.normalize))
LOCAL = {"client_optimizer": optax.sgd(RATE), "epochs": EPOCHS, "batch_size": BATCH}
LAYERS = ["head1", "head2", "head3", "hidden1", "hidden2", "hidden3"]  # the order of the masks
MAKERS = {
    "inclusivefl": (fl.inclusivefl, {}),
    "depthfl": (fl.depthfl, {}),
    "depthfl, consistent": (fl.depthfl, {"consistency": 0.5}),
}


def exits_of(name, depth):
    return [depth] if name == "inclusivefl" else list(range(1, depth + 1))


def gradient(weights, exits, x, y, consistency):
    """Of the sum over exits of the cross-entropy, and of the mean divergence from the others."""
    below, probabilities, deepest = [x], {}, max(exits)
    for i in range(1, deepest + 1):
        w, b = weights[f"hidden{i}"]
        below.append(np.maximum(below[-1] @ w + b, 0))
        if i in exits:
            w, b = weights[f"head{i}"]
            p = np.exp(below[-1] @ w + b)
            probabilities[i] = p / p.sum(axis=1, keepdims=True)
    grads, back = {}, 0.0
    for i in range(deepest, 0, -1):
        if i in exits:
            p, others = probabilities[i], [q for j, q in probabilities.items() if j != i]
            of_logits = p - np.eye(p.shape[1])[y]
            for q in others:  # the gradient of sum q (log q - log p)
                of_logits = of_logits + consistency / len(others) * (p - q)
            of_logits = of_logits / len(y)
            grads[f"head{i}"] = below[i].T @ of_logits, of_logits.sum(axis=0)
            back = back + of_logits @ weights[f"head{i}"][0].T
        back = back * (below[i] > 0)
        grads[f"hidden{i}"] = below[i - 1].T @ back, back.sum(axis=0)
        back = back @ weights[f"hidden{i}"][0].T
    return grads


def arrays(variables):
    """The parameters as `{layer: (kernel, bias)}`."""
    layers = variables["params"].items()
    return {name: (np.asarray(x["kernel"]), np.asarray(x["bias"])) for name, x in layers}


def plain(name, consistency=0.0):
    """The server's parameters after all rounds, senders of each layer, and bytes sent."""
    x, all_senders, uploaded = arrays(first()), [], []
    for round in range(1, ROUNDS + 1):
        sent, total_bytes = {layer: [] for layer in LAYERS}, 0
        for client in COHORTS[round]:
            exits, rows = exits_of(name, DEPTHS[client]), POPULATION.rows(client)
            held = [f"hidden{i}" for i in range(1, DEPTHS[client] + 1)]
            held += [f"head{i}" for i in exits]
            w = {layer: x[layer] for layer in held}
            for epoch in range(EPOCHS):
                order = shuffled(rows, round, client, epoch)
                for i in range(0, len(order), BATCH):
                    batch = order[i : i + BATCH]
                    inputs = DATA.train.inputs[batch].astype(np.float64)
                    labels = DATA.train.labels[batch]
                    g = gradient(w, exits, inputs, labels, consistency)
                    w = jax.tree.map(lambda a, b: a - RATE * b, w, g)
            draw = jax.random.uniform(key(round, client, MASK), (len(LAYERS),), jnp.float32)
            for layer, u in zip(LAYERS, np.asarray(draw), strict=True):
                if layer in held and u < np.float32(KEEP):
                    sent[layer].append(jax.tree.map(np.subtract, w[layer], x[layer]))
                    total_bytes += 4 * sum(a.size for a in x[layer])
            total_bytes += 1  # the mask: six bits
        for layer, updates in sent.items():
            if updates:
                mean = jax.tree.map(lambda *u: sum(u) / len(u), *updates)
                x = x | {layer: jax.tree.map(np.add, x[layer], mean)}
        all_senders.append([len(sent[layer]) for layer in LAYERS])
        uploaded.append(total_bytes)
    return x, all_senders, uploaded


def first(exits=(1, 2, 3)):
    """Variables of the server; the same numbers for any exits."""
    rng, layers = np.random.default_rng(0), {}
    for layer in LAYERS:
        shape = (8, 3) if layer.startswith("head") else (4 if layer == "hidden1" else 8, 8)
        kernel = rng.normal(size=shape) / np.sqrt(shape[0])
        layers[layer] = {"kernel": kernel, "bias": rng.normal(size=shape[1]) / 4}
    gone = [f"head{i}" for i in (1, 2, 3) if i not in exits]
    return {"params": {layer: x for layer, x in layers.items() if layer not in gone}}


def simulate(algorithm, exits=(1, 2, 3)):
    """A run in float64."""
    with jax.enable_x64(True):
        return fl.simulate(
            algorithm,
            DATA,
            POPULATION,
            rounds=ROUNDS,
            cohort=lambda seed, round, clients: COHORTS[round],
            seed=SEED,
            variables=in_float64(first(exits)),
            plan=fl.Plan(1, 2),
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_rounds_and_bytes_equal_a_plain_loop(name):
    make, settings = MAKERS[name]
    result = simulate(make(TASK, depths=DEPTHS, keep=KEEP, **LOCAL, **settings))
    expected, senders, uploaded = plain(name, **settings)
    got = arrays(result.state.variables)
    assert sorted(got) == LAYERS
    for layer, pair in expected.items():
        for part in (0, 1):
            np.testing.assert_allclose(got[layer][part], pair[part], rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(np.stack(result.costs.senders), senders)
    np.testing.assert_array_equal(result.history["upload_bytes"], uploaded)
    tested = [result.history[f"test_accuracy_depth_{d}"][-1] for d in (1, 2, 3)]
    assert len({*tested}) > 1  # by exits of their own
    assert tested[2] == result.history["test_accuracy"][-1]


@pytest.mark.slow
def test_the_full_depth_alone_is_fedavg_for_inclusivefl():
    result = simulate(fl.inclusivefl(TASK, depths=[3] * CLIENTS, **LOCAL))
    got = result.state.variables["params"]
    expected = simulate(fl.fedavg(TASK, weighting="uniform", **LOCAL), exits=(3,))
    for layer, pair in expected.state.variables["params"].items():
        np.testing.assert_allclose(flat(got[layer]), flat(pair), rtol=1e-9)
    for exit in ("head1", "head2"):
        np.testing.assert_array_equal(flat(got[exit]), flat(first()["params"][exit]))


@pytest.mark.slow
def test_depth_one_alone_is_the_same_for_both():
    one = simulate(fl.inclusivefl(TASK, depths=[1] * CLIENTS, **LOCAL))
    other = simulate(fl.depthfl(TASK, depths=[1] * CLIENTS, consistency=0.5, **LOCAL))
    np.testing.assert_array_equal(flat(one.state.variables), flat(other.state.variables))


def test_exits_update_the_statistics_they_share_once():
    task = fl.classification(Steps(norm=True))
    made = fl.depthfl(task, depths="uniform", **LOCAL)
    variables = made.init(jax.random.key(0), EXAMPLE, CLIENTS, None).variables
    batch = EXAMPLE._replace(inputs=DATA.train.inputs[:5], labels=DATA.train.labels[:5])
    level = made.levels(variables, EXAMPLE)[2]
    value, aux = level.task.loss(variables, batch, jax.random.key(1))
    parts = [task.at_depth(d).loss(variables, batch, jax.random.key(1)) for d in (1, 2, 3)]
    np.testing.assert_allclose(value, sum(loss for loss, _ in parts), rtol=1e-6)
    np.testing.assert_array_equal(flat(aux.statistics), flat(parts[2][1].statistics))
    np.testing.assert_array_equal(flat(aux.metrics), flat(parts[2][1].metrics))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(fl.FedLPError, match="consistency=-1 must be a number"):
        fl.depthfl(TASK, depths=1, consistency=-1, **LOCAL)
    with pytest.raises(fl.FedLPError, match="this model has no depths"):
        made = fl.depthfl(fl.classification(fl.models.Logistic()), depths=1, **LOCAL)
        fl.simulate(made, DATA, POPULATION, rounds=1, cohort=2)
    made = fl.depthfl(fl.regression(Steps()), depths=1, consistency=1, **LOCAL)
    values = fl.from_arrays(
        DATA.train.inputs,
        np.eye(3, dtype=np.float32)[DATA.train.labels],
        DATA.test.inputs,
        np.eye(3, dtype=np.float32)[DATA.test.labels],
        targets="values",
    )
    with pytest.raises(fl.FedLPError, match="use fl.classification, or consistency=0"):
        fl.simulate(made, values, POPULATION, rounds=1, cohort=2)
