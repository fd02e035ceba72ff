"""The command in processes that are killed, forked from one that has imported jax already."""

import multiprocessing
import os
import signal
import sys

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["fedlp_jax.config.experiment", "orbax.checkpoint", "scipy.stats"])


def start(folder, *words, environment=()):
    """Starts `fedlp WORDS` in a folder; returns the process."""
    process = FORKS.Process(target=_live, args=(str(folder), words, dict(environment)))
    process.start()
    return process


def _live(folder, words, environment):
    os.chdir(folder)
    os.environ |= environment
    # A parent that ignores Ctrl-C, such as a script's background job, would hand that down.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    said = open("said.txt", "a", buffering=1)  # noqa: SIM115
    sys.stdout = sys.stderr = said
    import jax

    # Every life compiles the same two programs.
    jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    from fedlp_jax import cli

    sys.argv = ["fedlp", *words]
    cli.main()
