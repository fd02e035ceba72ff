"""`fedlp reproduce paper`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

if TYPE_CHECKING:
    from fedlp_jax.paper.cells import Study
    from fedlp_jax.paper.published import Cell

EXAMPLES = """
Examples:

  fedlp reproduce paper --costs

  fedlp reproduce paper --scale smoke --out runs/smoke

  fedlp reproduce paper --scale small --rows fedavg,homo-0.5 --splits iid --estimate

  fedlp reproduce paper --out runs/paper    [dim]# the same command resumes it[/dim]

  fedlp reproduce paper --draws own --seeds 5 --out runs/paper
"""

_Draws = Annotated[
    str,
    typer.Option(
        help="reference: partition, depths, cohorts and masks of the published runs. own: this "
        "project's, for a claim about the method over many seeds."
    ),
]
_Data = Annotated[
    str | None,
    typer.Option(
        help="The data set as a file cifar10.npz, where tensorflow-datasets cannot be used.",
        metavar="FILE",
    ),
]


def paper(
    costs: Annotated[
        bool, typer.Option("--costs", help="Show Comm. and Comp. of the rows; train nothing.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="With --costs: print JSON.")] = False,
    rows: Annotated[
        str,
        typer.Option(
            help="Rows, such as fedavg,homo-0.5,hetero-u; all by default.", metavar="ROW,..."
        ),
    ] = "",
    splits: Annotated[
        str, typer.Option(help="Splits to run: iid, d-niid, m-niid.", metavar="SPLIT,...")
    ] = "",
    scale: Annotated[
        str,
        typer.Option(
            help="paper: the published protocol. small: the same for 20 rounds, about an hour per "
            "row on 2 cores. smoke: tiny, on embedded data, all cells in minutes."
        ),
    ] = "paper",
    seeds: Annotated[
        int, typer.Option(help="Runs of each cell, with seeds 25, 26, ...", min=1)
    ] = 1,
    draws: _Draws = "reference",
    rounds: Annotated[
        int | None, typer.Option(help="Rounds instead of the scale's.", min=1)
    ] = None,
    data: _Data = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Show expected time and cost; run no cell.")
    ] = False,
    out: Annotated[
        str | None, typer.Option(help="Directory of all cells. Cells in it are not run again.")
    ] = None,
) -> None:
    """Reproduce the result table of FedLP: its costs exactly, its accuracies by training."""
    from fedlp_jax.errors import FedLPError

    if json and not costs:
        raise FedLPError("--json belongs to --costs; a run writes table.json into its directory.")
    if costs:
        _show_costs(_words(rows), json)
        return
    if out is None and not estimate:
        raise FedLPError(
            "--out DIR is needed; the same command with the same DIR resumes where it stopped."
        )
    from fedlp_jax.execution.plan import setup
    from fedlp_jax.paper.cells import Study
    from fedlp_jax.paper.published import Draws, choose

    study = Study(Path(out or "").expanduser(), scale, rounds, data)
    cells = choose(_words(rows), _words(splits), seeds, cast(Draws, draws))
    study.config(cells[0])  # refused before jax is first used
    setup()
    if estimate:
        _show_estimate(study, cells)
    else:
        _run(study, cells)


def _run(study: Study, cells: Sequence[Cell]) -> None:
    import jax

    from fedlp_jax.cli.run import stop_signals
    from fedlp_jax.cli.sweep import SweepProgress
    from fedlp_jax.execution.compilation import keep_programs
    from fedlp_jax.paper.cells import unfinished
    from fedlp_jax.paper.results import result_tables, run_study
    from fedlp_jax.reporting.tables import show

    def say(line: str) -> None:
        typer.echo(line, err=True)

    todo = unfinished(study, cells)
    if not todo:
        say(f"all {len(cells)} cells have ended; nothing is run")
    with stop_signals() as stop:
        if jax.default_backend() == "cpu":  # one cell after another
            keep_programs()  # many share one
            done = run_study(study, cells, todo=todo, progress=True, say=say, stop=stop)
        else:
            with SweepProgress(len(todo), sum(study.config(x).rounds for x in todo)) as shown:
                done = run_study(study, cells, todo=todo, stop=stop, log=shown.update)
    table, figures = done
    show(*result_tables(table, study.out, figures))


def _show_estimate(study: Study, cells: Sequence[Cell]) -> None:
    from fedlp_jax.paper.cells import estimate, unfinished
    from fedlp_jax.paper.results import estimate_tables
    from fedlp_jax.reporting.tables import show

    todo = unfinished(study, cells)
    if todo:
        typer.echo("measuring three short rounds of FedAvg, once they are compiled ...", err=True)
    show(*estimate_tables(estimate(study, todo) if todo else {}))


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _show_costs(rows: Sequence[str], as_json: bool) -> None:
    from fedlp_jax.paper.costs import row_costs
    from fedlp_jax.paper.results import cost_tables
    from fedlp_jax.reporting.tables import show

    costs = row_costs(rows)
    if as_json:
        import json

        typer.echo(json.dumps([cost._asdict() for cost in costs], indent=2))
    else:
        show(*cost_tables(costs))
