"""Small models and data that several test files share."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import fedlp_jax as fl
from fedlp_jax.types import Cohort

# A configuration that trains within a second.
DIGITS = {
    "data": {"name": "digits"},
    "partition": {"name": "iid", "clients": 20},
    "model": {"name": "logistic"},
    "algorithm": {
        "name": "fedavg",
        "batch_size": 40,
        "client_optimizer": {"name": "sgd", "learning_rate": 0.1},
    },
    "cohort": 2,
    "plan": {"devices": 1},
}
HOMO = DIGITS | {
    "algorithm": {
        "name": "fedlp_homo",
        "keep": 0.5,
        "client_optimizer": {"name": "sgd", "learning_rate": 0.1},
    },
    "rounds": 2,
    "cohort": 4,
}


class Steps(nn.Module):
    """A network with depths: `depth` hidden layers that depths share, then a head of its own."""

    depth: int = 3
    width: int = 8
    classes: int = 3
    norm: bool = False
    width_rate: float = 1.0

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(x.shape[0], -1)
        for i in range(1, self.depth + 1):
            x = nn.Dense(math.ceil(self.width_rate * self.width), name=f"hidden{i}")(x)
            if self.norm:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.8, name=f"norm{i}")(x)
            x = nn.relu(x)
        return nn.Dense(self.classes, name=f"head{self.depth}")(x)


def dataset(examples=60, features=4, classes=3, seed=0):
    """Well-scaled float inputs of shape [N, features]."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, features))

    def split(n):
        labels = rng.integers(0, classes, n)
        labels[:classes] = np.arange(classes)
        return (centres[labels] + rng.normal(size=(n, features))).astype(np.float32), labels

    return fl.from_arrays(*split(examples), *split(37), num_classes=classes)


def cohort_of(ids):
    """Clients without examples, for mask policies."""
    ids = jnp.asarray(ids, jnp.int32)
    zero = jnp.zeros_like(ids)
    return Cohort(ids, zero, zero, zero.reshape(-1, 1), jnp.zeros((1, 2), jnp.int32))


def in_float64(variables):
    """The same numbers in float64; needs `jax.enable_x64`."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), variables)


def round_arguments(run):
    """The arguments of `algorithm.round` but for the plan, as shapes where that is enough."""
    private, examples, cohorts = run.stage.shapes()
    cohort = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0], *x.shape[2:]), x.dtype), cohorts
    )
    return run.state, private, examples, cohort, run.stage.key


def flat(tree):
    """All numbers of a tree in one vector."""
    return np.concatenate([np.ravel(np.asarray(x)) for x in jax.tree.leaves(tree)])
