"""Convolutions as matrix products.

XLA's CPU backend runs a convolution inside a loop without its threaded library. Under `vmap` over
kernels, as when clients train together, it makes a grouped convolution. Both are many times slower
than the same sums as matrix products, and XLA's GPU backend has no fast grouped convolution either.
So this package lowers convolutions to dots, which `vmap` batches.
"""

from fedlp_jax.nn.conv.lowering import LOWERINGS as LOWERINGS
from fedlp_jax.nn.conv.lowering import conv_general_dilated as conv_general_dilated
from fedlp_jax.nn.conv.lowering import current as current
from fedlp_jax.nn.conv.lowering import recording as recording
from fedlp_jax.nn.conv.lowering import using as using
