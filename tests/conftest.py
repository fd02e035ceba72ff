"""Every test runs under strict promotion, four CPU devices, and warnings as errors.

`make test` leaves out what is marked slow, and fails a test that is slow and is not marked so.
"""

import atexit
import os
import shutil
import tempfile
import time
import zlib

import jax
import pytest

# Before anything touches a device.
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Many tests compile the same small round. The workers of one run, and the processes that tests
# start, share what was compiled; the cache of whoever runs the tests is left alone.
_PLACE = "FEDLP_TESTS_COMPILED"
if _PLACE not in os.environ:  # not a worker, which has inherited it
    os.environ[_PLACE] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ[_PLACE], ignore_errors=True)
for name, value in {
    "jax_compilation_cache_dir": os.environ[_PLACE],
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_enable_compilation_cache": True,
}.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)


def pytest_addoption(parser):
    parser.addoption("--tenth", type=int, help="of the slow tests run one tenth only: 0 to 9")
    parser.addoption("--limit", type=float, default=5.0, help="seconds a test not marked slow has")


def pytest_collection_modifyitems(config, items):
    tenth = config.getoption("--tenth")
    if tenth is None:
        return
    kept = [x for x in items if zlib.crc32(x.nodeid.encode()) % 10 == tenth % 10]
    config.hook.pytest_deselected(items=[x for x in items if x not in kept])
    items[:] = kept


def pytest_configure(config):
    # XLA's expensive passes take longer than the fast tests run. All programs of one process are
    # compiled alike, or equal programs would differ in their last bits.
    jax.config.update("jax_disable_most_optimizations", config.option.markexpr == "not slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before, start = os.times(), time.perf_counter()
    yield
    # The smaller of both: a neighbour on a busy machine makes a test wait, and XLA has threads.
    cpu = sum(os.times()[:4]) - sum(before[:4])
    seconds = min(time.perf_counter() - start, cpu)
    limit = item.config.getoption("--limit")
    if seconds > limit and not item.get_closest_marker("slow"):
        pytest.fail(
            f"took {seconds:.1f} s of CPU, where a test not marked slow has {limit:g}: "
            "share a compiled program, call the function instead of a run, or mark it slow.",
            pytrace=False,
        )
