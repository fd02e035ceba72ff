"""Data sets, their partitions over clients, and the batches of one client."""

from fedlp_jax.data import partition as partition
from fedlp_jax.data.loading import Dataset as Dataset
from fedlp_jax.data.loading import Split as Split
from fedlp_jax.data.loading import from_arrays as from_arrays
from fedlp_jax.data.loading import load as load
