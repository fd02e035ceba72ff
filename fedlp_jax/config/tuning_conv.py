"""The forms of a model's own convolutions, measured on this device for the user's table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedlp_jax.errors import FedLPError
from fedlp_jax.nn import conv
from fedlp_jax.nn.conv import table
from fedlp_jax.nn.conv.lowering import FORMS, Convolution, quickest
from fedlp_jax.nn.conv.measure import forms_of, measure
from fedlp_jax.simulation.program import rounds_of
from fedlp_jax.simulation.run import Simulation
from fedlp_jax.simulation.tuning import check_seconds, without_plan


class Measured(NamedTuple):
    """A convolution and what its forms take."""

    shapes: str  # as "10x32x32x3 * 3x3x3x32"
    times: table.Times  # form -> milliseconds
    before: str  # the form it took until now
    now: str  # that it takes by these times


def convolutions(
    arguments: Mapping[str, Any],
) -> tuple[dict[str, Convolution], dict[str, str], int]:
    """The convolutions of a round that have a choice of forms, and the form that each takes.

    Args:
      arguments: of `simulate`, as from `experiment.build`.

    Returns:
      Both by shapes, as "10x32x32x3 * 3x3x3x32", and W, how many clients are vmapped at once.
    """
    run = Simulation(**without_plan(arguments), rounds=1)
    with conv.using("auto"), conv.meeting() as met, conv.recording() as taken:
        rounds_of(run.algorithm, run.plan).trace(*run.round_shapes(run.plan))
    met = {shapes: found for shapes, found in met.items() if len(forms_of(found)) > 1}
    return met, taken, run.plan.width or 1


def tune_convolutions(
    arguments: Mapping[str, Any],
    file: Path | None,
    seconds: float = 120.0,
    say: Callable[[Measured], None] = lambda measured: None,
    clock: Callable[..., table.Times] = measure,
) -> list[Measured]:
    """Measures a model's convolutions, and puts each into a table as soon as it is measured.

    Args:
      arguments: of `simulate`.
      file: the table, as from `table.path`; None = write nothing.
      seconds: no convolution is begun after so long, but the first always is.
      say: called after each.
      clock: `(convolution, forms, width=W) -> times`.

    Raises:
      FedLPError: the model has no convolution with a choice, `seconds` is no positive number, or
        the table cannot be written.
    """
    end = time.monotonic() + check_seconds(seconds)
    met, before, width = convolutions(arguments)
    if not met:
        raise FedLPError(
            "this model has no convolutions to measure: only those of two spatial axes, stride 1 "
            "and float32 have more than one form."
        )
    found: list[Measured] = []
    for shapes, convolution in met.items():
        if found and time.monotonic() > end:
            break
        times = clock(convolution, forms_of(convolution), width=width)
        measured = Measured(shapes, times, before[shapes], quickest(times))
        if file is not None:
            try:
                table.write(file, {shapes: times}, FORMS)
            except OSError as error:
                raise FedLPError(
                    f"the table of convolutions {file} cannot be written ({error}); name another "
                    f"place with {table.VARIABLE}."
                ) from error
        found.append(measured)
        say(measured)
    return found
