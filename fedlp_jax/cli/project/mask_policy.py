"""Which layers a client sends. The arguments are fields of `algorithm.policy:` in config.yaml."""

import jax.numpy as jnp
import numpy as np

import fedlp_jax as fl


def small_layers_always(keep: float = 0.5, small: int = 1000):
    """Layers below `small` parameters are always sent, the others with probability `keep`."""

    def rates(layers, clients):
        """The probability of each of the L layers, `f32[1, L]`."""
        del clients  # the same for all
        return np.where(layers.params < small, 1.0, keep).astype(np.float32)[None]

    def init(layers, clients):
        """The state of the policy: numbers that the compiled round takes as arguments."""
        return jnp.asarray(rates(layers, clients))

    return fl.masks.bernoulli(keep)._replace(init=init, expected=rates)
