"""Convolutions as matrix products, and how flax modules come by them.

XLA's CPU backend runs a convolution inside a loop without its threaded library, and under `vmap`
over kernels, as when clients train side by side, turns it into a grouped one; both are many times
slower than the same sums as matrix products. Its GPU backend has no fast grouped convolution
either. So convolutions are lowered here to dots, which `vmap` makes batched dots.
"""

from fedlp_jax.nn.conv.flax import conv_interceptor as conv_interceptor
from fedlp_jax.nn.conv.flax import inject as inject
from fedlp_jax.nn.conv.general import conv_general_dilated as conv_general_dilated
from fedlp_jax.nn.conv.lowering import LOWERINGS as LOWERINGS
from fedlp_jax.nn.conv.lowering import meeting as meeting
from fedlp_jax.nn.conv.lowering import recording as recording
from fedlp_jax.nn.conv.lowering import repeating as repeating
from fedlp_jax.nn.conv.lowering import settings as settings
from fedlp_jax.nn.conv.lowering import using as using
