"""Several processes on the loopback interface, forked from one that has imported jax already."""

import contextlib
import os
import socket
import traceback

import lives


def free_port():
    """A port that nobody listens on; nothing keeps it so, but nobody else looks for one here."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


def fedlp(folder, number, *words, each=()):
    """Starts `fedlp WORDS` in a number of processes; `each` has further words of each process."""
    port = free_port()
    return [
        lives.start(
            folder,
            *words,
            *(each[i] if each else ()),
            *("--coordinator", f"127.0.0.1:{port}"),
            *("--num-processes", str(number), "--process-id", str(i)),
        )
        for i in range(number)
    ]


def slurm(folder, number, *words):
    """Starts `fedlp WORDS --distributed` in a number of processes as Slurm would on this host."""
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost"}
    processes = []
    for i in range(number):
        place = {"SLURM_NTASKS": str(number), "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
        places = job | place | {"JAX_COORDINATOR_PORT": job["SLURM_JOB_ID"]}
        processes.append(lives.start(folder, *words, "--distributed", environment=places))
    return processes


def call(folder, number, function, *arguments):
    """Runs `function(*arguments)` in processes that are connected and have 4 devices in all."""
    port = free_port()
    processes = [
        lives.FORKS.Process(target=_call, args=(str(folder), port, number, i, function, arguments))
        for i in range(number)
    ]
    for process in processes:
        process.start()
    return processes


def ended(processes, seconds=120):
    """The exit codes, once all have ended; who has not in time is killed, and has None."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _call(folder, port, number, index, function, arguments):
    os.chdir(folder)
    import jax

    import fedlp_jax as fl

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    try:
        fl.connect(f"127.0.0.1:{port}", number, index, seconds=60)
        fl.setup(cpu_devices=4 // number)
        function(*arguments)
        jax.distributed.shutdown()
    except BaseException:
        with open("said.txt", "a") as said:
            traceback.print_exc(file=said)
        os._exit(1)
