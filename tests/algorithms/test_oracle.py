"""Whole rounds against a plain numpy loop written from the equations. It shares no code with the
package: only the rule for keys, (seed, round, client, purpose, step), is stated again here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import (
    BATCH,
    CLIENTS,
    COHORTS,
    DEPTH,
    EPOCHS,
    MASK,
    SEED,
    first_head,
    gradient,
    key,
    shuffled,
)
from small import Steps, dataset, in_float64

import fedlp_jax as fl

RATE, MOMENTUM, ROUNDS = 0.1, 0.9, 3
DEEPEST = 3


def train(weights, depth, data, rows, round, client):
    """Local SGD with momentum: v = momentum v + g; w = w - rate v."""
    weights = {name: [a.copy() for a in pair] for name, pair in weights.items()}
    speed = {name: [np.zeros_like(a) for a in pair] for name, pair in weights.items()}
    losses = 0.0
    for epoch in range(EPOCHS):
        order = shuffled(rows, round, client, epoch)
        for first in range(0, len(order), BATCH):
            batch = order[first : first + BATCH]
            x = data.train.inputs[batch].astype(np.float64)
            grads, loss = gradient(weights, [depth], x, data.train.labels[batch])
            losses += loss
            for name, pair in grads.items():
                for part, g in enumerate(pair):
                    speed[name][part] = MOMENTUM * speed[name][part] + g
                    weights[name][part] -= RATE * speed[name][part]
    return weights, losses


def oracle(data, clients, start, *, keep, by_tensor, weigh, depths, heads, server_momentum):
    """Runs all rounds; returns the server's weights, senders per layer and training losses."""
    server = {name: [a.copy() for a in pair] for name, pair in start.items()}
    units = [(n, p) for n in sorted(server) for p in ((1, 0) if by_tensor else ((0, 1),))]
    velocity = {name: [np.zeros_like(a) for a in pair] for name, pair in server.items()}
    private = {}
    sent_by, losses = [], []
    for round in range(1, ROUNDS + 1):
        total = {name: [0.0, 0.0] for name in server}
        weight = {name: [0.0, 0.0] for name in server}
        senders, loss, seen = np.zeros(len(units)), 0.0, 0
        for client in COHORTS[round]:
            depth, rows = depths[client], clients.rows(client)
            own = {f"hidden{i}": server[f"hidden{i}"] for i in range(1, depth + 1)}
            head = f"head{depth}"
            if head in server:
                own[head] = server[head]
            elif heads == "persist":
                own[head] = private.setdefault(client, first_head(depth, client))
            else:
                own[head] = first_head(depth, client)
            new, client_loss = train(own, depth, data, rows, round, client)
            loss, seen = loss + client_loss, seen + EPOCHS * len(rows)
            if heads == "persist" and head not in server:
                private[client] = new[head]
            draw = np.asarray(
                jax.random.uniform(key(round, client, MASK), (len(units),), jnp.float32)
            )
            a = len(rows) if weigh == "examples" else 1.0
            for unit, (name, parts) in enumerate(units):
                if name not in own or draw[unit] >= np.float32(keep):
                    continue
                senders[unit] += 1
                for part in np.atleast_1d(parts):
                    total[name][part] = total[name][part] + a * (
                        new[name][part] - server[name][part]
                    )
                    weight[name][part] += a
        for name in server:
            for part in (0, 1):
                if weight[name][part] > 0:
                    mean = total[name][part] / weight[name][part]
                    velocity[name][part] = server_momentum * velocity[name][part] + mean
                    server[name][part] = server[name][part] + velocity[name][part]
        sent_by.append(senders)
        losses.append(loss / seen)
    return server, sent_by, losses


def drawn_depths(probability):
    draws = [float(jax.random.uniform(key(0, k, DEPTH), (), jnp.float32)) for k in range(CLIENTS)]
    return [1 + int(np.searchsorted(np.cumsum(probability)[:-1], u, side="right")) for u in draws]


def as_pairs(variables):
    return {
        name: [np.asarray(layer["kernel"], np.float64), np.asarray(layer["bias"], np.float64)]
        for name, layer in variables["params"].items()
    }


CASES = {
    "fedavg": {},
    "homo": {"keep": 0.5},
    "homo-tensor-uniform": {"keep": 0.4, "by_tensor": True, "weigh": "uniform"},
    "homo-server-momentum": {"keep": 0.5, "server_momentum": 0.7},
    "hetero-persist": {"heads": "persist", "depth_probability": [0.4, 0.3, 0.3]},
    "hetero-reset": {"heads": "reset_to_init", "depth_probability": [0.4, 0.3, 0.3]},
    "hetero-side-by-side": {
        "heads": "persist",
        "depth_probability": [0.4, 0.3, 0.3],
        "levels": "side_by_side",
    },
    "hetero-shared-keep": {"heads": "shared", "keep": 0.6, "depth_probability": [0.4, 0.3, 0.3]},
}


@pytest.fixture(scope="module")
def compared(request):
    """Settings of a case, its clients, first variables and result: a fixture, for its compiling."""
    case = request.param
    settings = {"keep": 1.0, "by_tensor": False, "weigh": "examples", "server_momentum": 0.0}
    settings |= {"heads": None, "levels": "in_turn"} | CASES[case]
    plan = fl.Plan(2, 2, levels=settings.pop("levels"))
    probability = settings.pop("depth_probability", None)
    depths = drawn_depths(probability) if probability else [DEEPEST] * CLIENTS
    data = dataset()
    clients = fl.partition.dirichlet(
        data.train.labels, clients=CLIENTS, alpha=1.0, seed=1, min_size=2
    )
    assert len(set(clients.sizes % BATCH)) > 1  # partial batches and uneven clients are in it
    common = {
        "client_optimizer": optax.sgd(RATE, momentum=MOMENTUM),
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "weighting": settings["weigh"],
        "layers": "by_tensor" if settings["by_tensor"] else "by_module",
        "server_optimizer": optax.sgd(1.0, momentum=settings["server_momentum"] or None),
    }
    task = fl.classification(Steps())
    if probability:
        algorithm = fl.fedlp_hetero(
            task, depths=probability, heads=settings["heads"], keep=settings["keep"], **common
        )
    elif settings["keep"] < 1:
        algorithm = fl.fedlp_homo(task, keep=settings["keep"], **common)
    else:
        algorithm = fl.fedavg(task, **common)

    with jax.enable_x64(True):
        run = {"cohort": lambda seed, round, clients: COHORTS[round], "seed": SEED}
        start = in_float64(fl.simulate(algorithm, data, clients, rounds=0, **run).state.variables)
        result = fl.simulate(
            algorithm, data, clients, rounds=ROUNDS, variables=start, plan=plan, **run
        )
    return settings | {"depths": depths}, data, clients, start, result


SLOW = ("hetero-reset", "hetero-side-by-side", "hetero-shared-keep")


@pytest.mark.parametrize(
    "compared",
    [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in CASES],
    indirect=True,
)
def test_rounds_equal_a_plain_loop(compared):
    settings, data, clients, start, result = compared
    server, sent_by, losses = oracle(data, clients, as_pairs(start), **settings)
    got = as_pairs(result.state.variables)
    assert got.keys() == server.keys()
    for name, pair in server.items():
        for part in (0, 1):
            np.testing.assert_allclose(got[name][part], pair[part], rtol=1e-8, atol=1e-12)
    np.testing.assert_array_equal(np.stack(result.costs.senders), np.stack(sent_by))
    np.testing.assert_allclose(result.history["train_loss"], losses, rtol=1e-5)
