"""Every test runs under strict promotion, several CPU devices, and warnings as errors."""

import jax

# Before anything touches a device.
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
