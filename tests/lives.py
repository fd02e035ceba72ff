"""The command in processes that a test may kill: forked from one that has already imported jax.

They inherit the compilation cache of the tests, so only the first compiles.
"""

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
    from fedlp_jax import cli

    sys.argv = ["fedlp", *words]
    cli.main()
