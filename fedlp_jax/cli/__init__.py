"""`fedlp run`, `fedlp tune`, `fedlp info` and `fedlp reproduce`.

Exit codes: 0 done, 1 the run failed, 2 bad input (then nothing was written), 130 interrupted, and
saved if a round was done. Help stays fast because jax is imported only by a command that needs it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fedlp_jax import __version__
from fedlp_jax.cli import hosts as cli_hosts
from fedlp_jax.cli import reproduce as cli_reproduce
from fedlp_jax.cli import tune as cli_tune

_FAILED, _BAD_INPUT, _INTERRUPTED = 1, 2, 130
_ANY_FIELD = {"allow_extra_args": True, "ignore_unknown_options": True}

_RUN_EXAMPLES = """
Any field of the configuration can be set: [bold]--algorithm.keep 0.7[/bold],
[bold]--model.hidden "[64, 32]"[/bold], [bold]--partition.name dirichlet --partition.alpha
0.1[/bold].

Examples:

  fedlp run configs/quickstart.yaml

  fedlp run configs/mnist.yaml --rounds 5 --seed 1 --out results/mnist

  fedlp run configs/paper/homo-0.5-iid.yaml --algorithm.keep 0.9

Ctrl-C ends a run after the round in flight and saves it; this goes on with it:

  fedlp run runs/quickstart-1 --resume

Two processes, here or on two hosts; both get the same configuration:

  fedlp run configs/mnist.yaml --coordinator 10.0.0.1:1234 --num-processes 2 --process-id 0

  fedlp run configs/mnist.yaml --coordinator 10.0.0.1:1234 --num-processes 2 --process-id 1
"""
_INFO_EXAMPLES = """
Examples:

  fedlp info

  fedlp info configs/cifar10.yaml --algorithm.layers by_tensor
"""

app = typer.Typer(
    name="fedlp",
    help="Federated learning with layer-wise pruning, simulated in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, as in configs/.")]
RunConfig = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="A YAML file, as in configs/, or with --resume a run directory."
    ),
]
Rounds = Annotated[str | None, typer.Option(help="Rounds to run.", metavar="N")]
Seed = Annotated[str | None, typer.Option(help="Seed of the run.", metavar="N")]
Cohort = Annotated[
    str | None, typer.Option(help="Clients of a round, or their share.", metavar="N")
]
Name = Annotated[str | None, typer.Option(help="Name of the run; otherwise that of the file.")]
Out = Annotated[str | None, typer.Option(help="Run directory; otherwise runs/NAME-N.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run in that directory.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the run in that directory, where it was saved.")
]


def main() -> None:
    """Entry point of the command `fedlp`."""
    # What goes wrong while a library clears away cannot be caught, and is no sentence.
    sys.unraisablehook = lambda unraisable: None
    try:
        app(prog_name="fedlp")
    except SystemExit as ending:
        cli_hosts.leave(int(ending.code or 0))
        if ending.code == _INTERRUPTED:
            # Without Python's own clean-up: a compilation that still runs would crash in it.
            cli_hosts.end(_INTERRUPTED)
        raise
    except Exception:  # a bug
        sys.excepthook(*sys.exc_info())
        cli_hosts.leave(_FAILED)
        sys.exit(_FAILED)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedlp-jax {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version


@app.command(context_settings=_ANY_FIELD, epilog=_RUN_EXAMPLES)
def run(
    context: typer.Context,
    config: RunConfig,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    rounds: Rounds = None,
    cohort: Cohort = None,
    seed: Seed = None,
    name: Name = None,
    coordinator: cli_hosts.Coordinator = None,
    num_processes: cli_hosts.NumProcesses = None,
    process_id: cli_hosts.ProcessId = None,
    distributed: cli_hosts.Distributed = False,
    connect_seconds: cli_hosts.ConnectSeconds = 120.0,
) -> None:
    """Train as a configuration says and write a run directory."""
    typed = {"rounds": rounds, "cohort": cohort, "seed": seed, "name": name}
    with _exit_codes():
        cli_hosts.join(coordinator, num_processes, process_id, distributed, connect_seconds)
        from fedlp_jax.cli.interruption import Interruption
        from fedlp_jax.cli.tables import result_table, show
        from fedlp_jax.config.experiment import execute
        from fedlp_jax.config.resumption import finished, run_directory
        from fedlp_jax.execution import processes as hosts
        from fedlp_jax.simulation.checkpoint import hush

        hush()
        with hosts.together("read"):
            path, settings = _settings([config, *context.args], typed)
            if resume:
                path, out = run_directory(path, out)
            loaded = _load(path, settings)
            done = finished(loaded, Path(out)) if resume and out else 0
        if hosts.anywhere("finished", done > 0):
            if done and hosts.is_first():
                typer.echo(f"{out} is finished: its {done} rounds are done.")
            return
        with Interruption() as stop:
            outcome = execute(
                loaded, out, overwrite=overwrite, resume=resume, progress=True, stop=stop
            )
        if hosts.is_first():
            show(result_table(outcome.summary, outcome.directory))


@app.command(context_settings=_ANY_FIELD, epilog=_INFO_EXAMPLES)
def info(context: typer.Context, config: ConfigFile = "") -> None:
    """Show versions and devices; with CONFIG also its settings, partition, layers and costs."""
    with _exit_codes():
        from fedlp_jax.cli import tables

        words = [config, *context.args] if config else context.args
        if not words:
            from fedlp_jax.execution.map_clients import setup

            setup()
            tables.show(tables.environment_table())
            return
        from fedlp_jax.config.build import build
        from fedlp_jax.config.overview import overview

        path, settings = _settings(words, {})
        loaded = _load(path, settings)
        arguments = build(loaded)
        tables.show(*tables.config_tables(loaded, overview(loaded, arguments)))


@app.command(context_settings=_ANY_FIELD, epilog=cli_tune.EXAMPLES)
def tune(
    context: typer.Context,
    config: ConfigFile,
    seconds: cli_tune.Seconds = 120.0,
    dry_run: cli_tune.DryRun = False,
    convolutions: cli_tune.Convolutions = False,
) -> None:
    """Measure plans (devices, width, data) for a configuration; write the best into its file."""
    with _exit_codes():
        path, settings = _settings([config, *context.args], {})
        loaded = _load(path, settings, every_device=True)
        if convolutions:
            cli_tune.tune_convolutions(loaded, seconds, dry_run)
        else:
            cli_tune.tune(loaded, path, seconds, dry_run)


def _load(path: str, settings: dict[str, Any], every_device: bool = False) -> Any:
    """The checked configuration; then, before jax is used for the first time, its settings."""
    from fedlp_jax.config.loading import load_config
    from fedlp_jax.execution import processes as hosts
    from fedlp_jax.execution.compilation import keep_programs
    from fedlp_jax.execution.map_clients import setup

    config = load_config(path, settings)
    setup(cpu_devices=None if every_device else hosts.share(config.plan.devices))
    keep_programs()
    return config


def _settings(words: Sequence[str], typed: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Sorts the words of a command line into the file and `--any.field VALUE` pairs.

    Args:
      words: CONFIG and everything that typer knows nothing about, in their order.
      typed: options that typer knows, None = not given.

    Returns:
      `(path, {dotted field: value})`; values are read as YAML.

    Raises:
      FedLPError: a field without a value, or not exactly one file.
    """
    from fedlp_jax.config.loading import parse_value
    from fedlp_jax.errors import FedLPError, shown

    files: list[str] = []
    settings: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            files.append(word)
            continue
        field, given, value = word[2:].partition("=")
        value = value if given else next(rest, "--")
        if value.startswith("--"):
            raise FedLPError(f"--{field[:100]} needs a value, as in --algorithm.keep 0.5.")
        settings[field] = parse_value(value)
    if len(files) != 1:
        raise FedLPError(
            f"one configuration is needed, but {len(files)} are given: {shown(files)}."
        )
    for field, value in typed.items():
        if value is not None:
            text = isinstance(value, str) and field != "name"
            settings[field] = parse_value(value) if text else value
    return files[0], settings


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """Turns what went wrong into a sentence on stderr and an exit code; bugs keep a traceback."""
    import warnings

    warnings.showwarning = _say_warning
    from fedlp_jax.errors import FedLPError

    try:
        yield
    except FedLPError as error:
        _leave(error, "", _BAD_INPUT)
    except KeyboardInterrupt as error:
        _leave(error, "interrupted.", _INTERRUPTED)
    except (RuntimeError, MemoryError, OSError) as error:
        if isinstance(error, NotImplementedError | RecursionError):
            raise
        _leave(error, "the run failed: ", _FAILED)


_reproduce = typer.Typer(no_args_is_help=True, help="Reproduce published results.")
app.add_typer(_reproduce, name="reproduce")
_reproduce.callback()(lambda: None)  # without it typer makes the only command the group itself
_reproduce.command(epilog=cli_reproduce.EXAMPLES)(_exit_codes()(cli_reproduce.paper))


def _leave(error: BaseException, what: str, code: int) -> None:
    for line in f"{what}{error}".splitlines():
        print(f"fedlp: {_printable(line)}", file=sys.stderr)
    if code != _BAD_INPUT:
        # Where the rounds so far are.
        for note in getattr(error, "__notes__", ()):
            print(f"fedlp: {note}", file=sys.stderr)
    raise typer.Exit(code) from None


def _say_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"fedlp: warning: {_printable(str(message))}", file=sys.stderr)


def _printable(line: str) -> str:
    """A line without what could move the cursor, or no terminal can show."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
