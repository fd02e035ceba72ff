"""Every test runs under strict promotion, several CPU devices, and warnings as errors."""

import atexit
import os
import shutil
import tempfile

import jax

# Before anything touches a device.
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Many tests compile the same small round: the workers of one test run share what they compiled.
_PLACE = "FEDLP_TESTS_COMPILED"
if _PLACE not in os.environ:  # not a worker, which has inherited it
    os.environ[_PLACE] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ[_PLACE], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ[_PLACE])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# Processes that tests start leave the cache of whoever runs the tests alone.
jax.config.update("jax_enable_compilation_cache", True)
# A table of convolutions that the user has measured changes what tests compile.
os.environ["FEDLP_CONV_TABLE"] = ""
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
