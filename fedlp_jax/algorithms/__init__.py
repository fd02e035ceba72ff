"""Algorithms: short compositions of the same parts, or two functions written by hand."""

from fedlp_jax.algorithms.base import Algorithm as Algorithm
from fedlp_jax.algorithms.compose import compose as compose
from fedlp_jax.algorithms.fedavg import fedavg as fedavg
from fedlp_jax.algorithms.fedlp import fedlp_hetero as fedlp_hetero
from fedlp_jax.algorithms.fedlp import fedlp_homo as fedlp_homo
