"""A whole study: its cells, its table, its pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import jax

from fedlp_jax.execution.compilation import keep_programs
from fedlp_jax.nn import conv
from fedlp_jax.paper.cells import Study, run_cells
from fedlp_jax.paper.figures import draw_figures
from fedlp_jax.paper.published import Cell
from fedlp_jax.paper.results import Table, make_table, write_table

_SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_disable_most_optimizations",
)


def run_study(
    study: Study,
    cells: Sequence[Cell],
    *,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] | None = None,
) -> tuple[Table, list[str]]:
    """Runs what is left of some cells; the table is written anew after each.

    Args:
      study: where, and at which scale.
      cells: which.
      progress: of the rounds within a cell, as in `experiment.execute`.
      say: is told which cell begins.
      stop: as in `run_cells`.

    Returns:
      The table of all that the directory holds, and the names of the pictures in it.

    Raises:
      FedLPError: as `run_cells`; then nothing has been written.
    """
    make_table(study)  # refuses another study's directory
    with _compiled_once(tiny=study.scale == "smoke"):
        try:
            for _ in run_cells(study, cells, progress=progress, say=say, stop=stop):
                write_table(make_table(study), study.out)
        finally:
            figures = draw_figures(study)
    table = make_table(study)
    write_table(table, study.out)
    return table, figures


@contextlib.contextmanager
def _compiled_once(tiny: bool) -> Iterator[None]:
    """Keeps compiled programs on disk, since many cells share one, and so do runs of a cell.

    Where a program runs for seconds, it is also compiled without most optimisations, and its
    convolutions take the form of the fewest operations.
    """
    before = {name: jax.config.values[name] for name in _SETTINGS}
    keep_programs()
    if tiny:
        jax.config.update("jax_disable_most_optimizations", True)
    try:
        with conv.using("patches") if tiny else contextlib.nullcontext():
            yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
