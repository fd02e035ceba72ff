"""A run in NumPy: its draws and its network, restated from the rules without the package's code."""

import jax
import jax.numpy as jnp
import numpy as np

SHUFFLE, MASK, HEAD, DEPTH, UPLOAD = 1, 3, 4, 5, 16
SEED, BATCH, EPOCHS = 3, 4, 2
CLIENTS = 9
COHORTS = {1: [0, 2, 5, 7], 2: [1, 2, 3, 8], 3: [2, 4, 5, 6]}


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


def gradient(weights, depth, x, y):
    """Mean cross-entropy of a ReLU network, by hand. `weights[name] = [kernel, bias]`."""
    names = [f"hidden{i}" for i in range(1, depth + 1)] + [f"head{depth}"]
    inputs = [x]
    for name in names[:-1]:
        w, b = weights[name]
        inputs.append(np.maximum(inputs[-1] @ w + b, 0))
    logits = inputs[-1] @ weights[names[-1]][0] + weights[names[-1]][1]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    loss = -np.log(p[np.arange(len(y)), y]).sum()
    back = (p - np.eye(p.shape[1])[y]) / len(y)
    grads = {}
    for name, below in zip(reversed(names), reversed(inputs), strict=True):
        grads[name] = [below.T @ back, back.sum(axis=0)]
        back = (back @ weights[name][0].T) * (below > 0)
    return grads, loss
