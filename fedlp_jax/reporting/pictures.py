"""The pictures of a run that is done."""

from __future__ import annotations

import warnings
from typing import Any

from fedlp_jax.data.partition import Partition
from fedlp_jax.reporting import plots
from fedlp_jax.reporting.run_directory import RunDirectory


def draw(
    directory: RunDirectory, name: str, clients: Partition, rows: list[dict[str, Any]]
) -> None:
    """Draws the plots of a run that is done; what fails here costs it nothing but a warning."""
    try:
        clients.plot(str(directory.plot_file("partition")))
        if any(row.get("test_accuracy") is not None for row in rows):
            timed = ("simulated_time",) if "simulated_time" in rows[0] else ()
            for x in ("round", "upload_megabytes", *timed):
                file = directory.plot_file(f"accuracy_by_{x}")
                plots.curves({name: rows}, path=str(file), x=x)
    except Exception as error:
        warnings.warn(
            f"the plots of {directory.path} are not complete: {error} All else is written.",
            stacklevel=2,
        )
