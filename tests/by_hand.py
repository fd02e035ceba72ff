"""A run in NumPy: its draws and its network, restated from the rules without the package's code."""

import jax
import jax.numpy as jnp
import numpy as np
from small import Steps

SHUFFLE, MASK, HEAD, DEPTH, UPLOAD = 1, 3, 4, 5, 16
SEED, BATCH, EPOCHS = 3, 4, 2
CLIENTS = 9
COHORTS = {1: [0, 2, 5, 7], 2: [1, 2, 3, 8], 3: [2, 4, 5, 6], 4: [2, 4, 5, 8], 5: [0, 2, 4, 8]}


def key(round, client, purpose):
    k = jax.random.key(SEED)
    for part in (round, client, purpose):
        k = jax.random.fold_in(k, part)
    return k


def shuffled(rows, round, client, epoch):
    draw = jax.random.uniform(
        jax.random.fold_in(key(round, client, SHUFFLE), epoch), (len(rows),), jnp.float32
    )
    return rows[np.argsort(np.asarray(draw), kind="stable")]


def first_head(depth, client):
    """`[kernel, bias]` of the private exit head with which a client of `Steps` begins."""
    example = jnp.zeros((1, 4), jnp.float32)
    made = Steps(depth=depth).init({"params": key(0, client, HEAD)}, example, False)
    head = made["params"][f"head{depth}"]
    return [np.asarray(head["kernel"], np.float64), np.asarray(head["bias"], np.float64)]


def forward(weights, depth, x):
    """What each hidden layer returns, the input first, in a ReLU network.

    A layer with `weights["norm1"] = [scale, bias]` has a batch normalisation before its ReLU.
    """
    below = [x]
    for i in range(1, depth + 1):
        w, b = weights[f"hidden{i}"]
        z = below[-1] @ w + b
        if f"norm{i}" in weights:
            scale, shift = weights[f"norm{i}"]
            z = scale * standardised(z)[0] + shift
        below.append(np.maximum(z, 0))
    return below


def standardised(z):
    """Each unit with mean 0 and variance 1 over the rows of a batch, and its deviation before."""
    deviation = np.sqrt(z.var(axis=0) + 1e-5)
    return (z - z.mean(axis=0)) / deviation, deviation


def gradient(weights, exits, x, y, consistency=0.0, classes=None):
    """Of the mean over rows of the loss of a ReLU network with exits, by hand.

    The loss is `sum_i CE_i + consistency / (n - 1) sum_{j != i} KL(p_j || p_i)` over the n exits.

    Args:
      weights: `weights[name] = [kernel, bias]`.
      exits: the depths after which there are heads; the last is the deepest.
      x: `[B, features]`.
      y: `[B]`.
      consistency: weight of the divergence, whose first argument is a constant.
      classes: those whose logits are not replaced by 0; None = all.

    Returns:
      `(gradients like weights, sum over rows of the cross-entropy of the deepest exit)`.
    """
    below, probabilities = forward(weights, exits[-1], x), {}
    heeded = (
        1.0 if classes is None else np.isin(np.arange(weights[f"head{exits[-1]}"][1].size), classes)
    )
    for i in exits:
        logits = heeded * (below[i] @ weights[f"head{i}"][0] + weights[f"head{i}"][1])
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities[i] = p / p.sum(axis=1, keepdims=True)
    grads, back = {}, 0.0
    for i in range(exits[-1], 0, -1):
        if i in exits:
            p, others = probabilities[i], [q for j, q in probabilities.items() if j != i]
            of_logits = p - np.eye(p.shape[1])[y]
            for q in others:  # the gradient of sum q (log q - log p)
                of_logits = of_logits + consistency / len(others) * (p - q)
            of_logits = heeded * of_logits / len(y)
            grads[f"head{i}"] = [below[i].T @ of_logits, of_logits.sum(axis=0)]
            back = back + of_logits @ weights[f"head{i}"][0].T
        back = back * (below[i] > 0)
        if f"norm{i}" in weights:
            z, deviation = standardised(below[i - 1] @ weights[f"hidden{i}"][0])
            grads[f"norm{i}"] = [(back * z).sum(axis=0), back.sum(axis=0)]
            back = back - back.mean(axis=0) - z * (back * z).mean(axis=0)
            back = weights[f"norm{i}"][0] / deviation * back
        grads[f"hidden{i}"] = [below[i - 1].T @ back, back.sum(axis=0)]
        back = back @ weights[f"hidden{i}"][0].T
    return grads, -np.log(probabilities[exits[-1]][np.arange(len(y)), y]).sum()
