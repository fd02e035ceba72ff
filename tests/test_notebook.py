"""Notebooks show progress, figures and readable values; an interrupt returns what was done."""

import asyncio
import re
import threading
import time

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

FIRST = """
import optax
import fedlp_jax as fl
data = fl.load("digits")
clients = fl.partition.iid(data.train.labels, clients=20)
algorithm = fl.fedavg(
    fl.classification(fl.models.Logistic()), client_optimizer=optax.sgd(0.1), batch_size=40
)
def run(rounds, **options):
    return fl.simulate(
        algorithm, data, clients, rounds=rounds, cohort=2, plan=fl.Plan(devices=1), **options
    )
result = run(3, eval_every=1, progress="digits")
result
"""
LONG = "long = run(10**6, progress='long', callbacks=[lambda *_: __import__('time').sleep(0.02)])"


def texts(cell, name):
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's event loop
def test_a_notebook_shows_a_run_and_an_interrupt_keeps_its_rounds():
    cells = [FIRST, "result.plot()", LONG, "print(len(long.history), long.warnings)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            if cell.source == LONG:
                threading.Thread(target=interrupt_once_running, args=(client, cell)).start()
            client.execute_cell(cell, index)
    first, plot, long, after = notebook.cells
    assert "round 3/3" in texts(first, "stderr") and "accuracy" in texts(first, "stderr")
    assert re.search(r"Result\(3 rounds, test accuracy", first.outputs[-1]["data"]["text/plain"])
    assert "image/png" in plot.outputs[-1]["data"]
    assert "round 1/1000000" in texts(long, "stderr")
    rounds, warning = texts(after, "stdout").split(maxsplit=1)
    assert 0 < int(rounds) < 10**6 and "interrupted by Ctrl-C" in warning


def interrupt_once_running(client, cell):
    """Presses the stop button after the first round was shown."""
    deadline = time.monotonic() + 120
    while "round 1/" not in texts(cell, "stderr") and time.monotonic() < deadline:
        time.sleep(0.1)
    asyncio.run(client.km.interrupt_kernel())
