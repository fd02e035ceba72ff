"""The command `fedlp`: new, run, info, plan, tune, compare, report, export and others.

Exit codes: 0 done, 1 the run failed, 2 bad input (nothing was written), 130 interrupted (and saved
if a round was done). Only a command that needs jax imports it, so help is fast.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated, Any, TextIO

import typer

from fedlp_jax import __version__
from fedlp_jax.cli import (
    algorithms,
    compare,
    export,
    info,
    new,
    plan,
    report,
    reproduce,
    run,
    sweep,
    tune,
)

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="fedlp",
    help="Federated learning with layer-wise pruning, simulated in JAX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_options = {"debug": False}


def main() -> None:
    """Entry point of the command `fedlp`."""
    sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)
    words = sys.argv[1:]
    debug = ["--debug"] * ("--debug" in words)  # in any position
    try:
        app([*debug, *(word for word in words if word != "--debug")], prog_name="fedlp")
    except SystemExit as ending:
        _end(int(ending.code or 0))


def _end(code: int) -> None:
    """Ends the command."""
    if code == 0:  # too late to interrupt anything
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    connected = False
    if "jax" in sys.modules:
        import jax

        connected = jax.distributed.is_initialized()
        if connected and code != FAILED:
            # Wait for the other processes: one that still reads the last exchange needs this one.
            jax.distributed.shutdown()
    if code == INTERRUPTED or (connected and code == FAILED):
        # Skip Python's clean-up, which crashes a compilation that still runs, and jax's, in which
        # a failed process and the others would wait for each other.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class _Output:
    """A stream that outlives its reader: `fedlp run ... | head` does not end a run."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"fedlp-jax {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    del version
    _options["debug"] = debug
    warnings.showwarning = _print_warning


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The one place that turns an error into a line on stderr and an exit code."""

    @functools.wraps(command)
    def guarded(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except typer.Exit:
            raise
        except (Exception, KeyboardInterrupt) as error:
            if _options["debug"]:
                traceback.print_exception(error)
            raise typer.Exit(_report(error)) from None

    return guarded


def _report(error: BaseException) -> int:
    """Prints what went wrong and returns the exit code."""
    from fedlp_jax.errors import FedLPError

    if isinstance(error, FedLPError):
        code, text = BAD_INPUT, str(error)
    elif isinstance(error, KeyboardInterrupt):
        code, text = INTERRUPTED, "interrupted."
    elif isinstance(error, RuntimeError | OSError):
        code, text = FAILED, f"the run failed: {error}"
    else:
        name = type(error).__name__
        code, text = FAILED, f"the run failed: {name}: {error}. The option --debug shows where."
    notes = () if code == BAD_INPUT else getattr(error, "__notes__", ())
    for line in (*text.splitlines(), *notes):  # notes say where the finished rounds are
        print(f"fedlp: {_printable(line)}", file=sys.stderr)
    return code


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"fedlp: warning: {_printable(str(message))}", file=sys.stderr)


def _printable(line: str) -> str:
    """Escapes characters that move the cursor or cannot be displayed."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


_any_field = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command(epilog=new.EXAMPLES)(_guarded(new.new))
app.command(context_settings=_any_field, epilog=run.EXAMPLES)(_guarded(run.run))
app.command(context_settings=_any_field, epilog=info.EXAMPLES)(_guarded(info.info))
app.command(context_settings=_any_field, epilog=plan.EXAMPLES)(_guarded(plan.plan))
app.command(context_settings=_any_field, epilog=sweep.EXAMPLES)(_guarded(sweep.sweep))
app.command(context_settings=_any_field, epilog=tune.EXAMPLES)(_guarded(tune.tune))
app.command(epilog=algorithms.EXAMPLES)(_guarded(algorithms.algorithms))
app.command(epilog=compare.EXAMPLES)(_guarded(compare.compare))
app.command(epilog=report.EXAMPLES)(_guarded(report.report))
app.command(epilog=export.EXAMPLES)(_guarded(export.export))
_reproduce = typer.Typer(no_args_is_help=True, help="Reproduce published results.")
_reproduce.callback()(lambda: None)  # without it typer makes the only command the group itself
_reproduce.command(epilog=reproduce.EXAMPLES)(_guarded(reproduce.paper))
app.add_typer(_reproduce, name="reproduce")
