"""Runs a configuration: builds its parts, trains, and writes the run directory."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedlp_jax.accounting.ledger import fedavg_traffic
from fedlp_jax.accounting.macs import forward_macs
from fedlp_jax.config.build import build
from fedlp_jax.config.loading import dump_config, load_config, parse_config
from fedlp_jax.config.overview import macs_by_layer, whole_model
from fedlp_jax.config.resume import last_snapshot, run_checkpoint
from fedlp_jax.config.schema import Config
from fedlp_jax.data.batching import example_of
from fedlp_jax.data.partition import Partition
from fedlp_jax.errors import FedLPError, collecting
from fedlp_jax.execution import processes
from fedlp_jax.execution.plan import Plan
from fedlp_jax.prng import root_key
from fedlp_jax.reporting.environment import environment
from fedlp_jax.reporting.plots import draw_run, some_clients
from fedlp_jax.reporting.progress import say
from fedlp_jax.reporting.run_directory import (
    BEST,
    CLIENTS,
    PARTITION,
    PLOTS,
    PROFILE,
    TENSORBOARD,
    RunDirectory,
)
from fedlp_jax.reporting.sinks import Sink
from fedlp_jax.simulation.loop import Callback, simulate
from fedlp_jax.simulation.profiling import Trace, rounds_of
from fedlp_jax.simulation.result import DivergedError, Result
from fedlp_jax.simulation.staging import on_host


class Outcome(NamedTuple):
    """A finished run and its directory."""

    result: Result
    directory: Path
    summary: dict[str, Any]  # as in summary.json


class Extras(NamedTuple):
    """What a run has besides its configuration, see `run`."""

    profile: str | None = None
    callbacks: Sequence[Callback] = ()
    sinks: Sequence[Sink] = ()


def run(
    config: Config | str | Path | Mapping[str, Any],
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool | None = None,
    profile: str | None = None,
    callbacks: Sequence[Callback] = (),
    sinks: Sequence[Sink] = (),
) -> Result:
    """Runs a configuration and writes its run directory.

    Args:
      config: a configuration, the path of a YAML file, or a nested dictionary.
      out: the run directory; None = `runs/NAME-N` with the next free N.
      overwrite: replace the run that `out` already holds.
      resume: continue the run in `out` from its last checkpoint, or from the start without one.
      progress: show rounds as they end; None = on a terminal only.
      profile: a round or two, such as "5-8", that JAX's profiler records into `profile/`.
      callbacks: as for `fl.simulate`.
      sinks: as for `fl.simulate`, beside those of the configuration.

    Returns:
      What `simulate` returns.

    Raises:
      FedLPError: bad input; nothing has been written.
      DivergedError: no client of a round had a finite update; the rounds before it are written, and
        the model after them.
    """
    extras = Extras(profile, callbacks, sinks)
    return execute(
        config, out, overwrite=overwrite, resume=resume, progress=progress, extras=extras
    ).result


def execute(
    config: Config | str | Path | Mapping[str, Any],
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool | None = None,
    extras: Extras | None = None,
    stop: Callable[[], bool] | None = None,
) -> Outcome:
    """As `run`; also returns the directory and the summary.

    `stop` is called before every round. True saves the run and raises KeyboardInterrupt.
    """
    started = time.perf_counter()
    if resume and (overwrite or out is None):
        raise FedLPError("a run that is resumed needs its directory, and is not overwritten.")
    config = _config(config)
    out = None if out is None else Path(out).expanduser()
    processes.agree("configuration", _common(config) | {"resume": resume})
    with contextlib.ExitStack() as stack:
        said = stack.enter_context(collecting())
        directory: RunDirectory | None = None  # the first process alone writes
        with processes.together():
            if processes.is_first():
                directory = RunDirectory(out, config.name, overwrite, resume)
                stack.callback(directory.close)
        path = Path(processes.gather(str(directory.path) if directory else "")[0])
        with processes.together():
            start = last_snapshot(config, path) if resume else None
            if start is not None:
                plan = {k: v for k, v in config.plan.model_dump().items() if v is not None}
                config = with_plan(config, dataclasses.replace(start.plan, **plan))
            arguments = _arguments(config, path, extras or Extras(), progress)
        record = Record(config, directory, list(start.rows) if start is not None else [])
        try:
            result = simulate(
                **arguments,
                log=record.append,
                progress=_title(config.name, progress),
                checkpoint=run_checkpoint(config, path, overwrite),
                resume=start,
                stop=stop,
                compiled=record.compiled,
            )
            if len(result.history) < config.rounds and result.stopped is None:
                raise KeyboardInterrupt
            if directory is not None:
                record.compiled(result.plan)
                record.begin()
                save_arrays(directory, result, arguments["clients"])
        except BaseException as error:  # an interruption too leaves its summary
            if directory is not None:
                note_failure(error, directory, record.rows, said)
            raise
        result.warnings = said  # those of the data too
        summary = summarize(config.name, arguments, result)
        summary["readings"]["total_seconds"] = time.perf_counter() - started
        if directory is not None:
            directory.summarize(summary)
            draw_run(path / PLOTS, config.name, arguments["clients"], record.rows)
            directory.summarize(summary)  # which has a warning more if a plot failed
        processes.gather()  # no process leaves before everything is written
        return Outcome(result, path, summary)


def _title(name: str, progress: bool | None) -> str | bool:
    """The name that the progress shows; False = none is shown."""
    return name if (sys.stderr.isatty() if progress is None else progress) else False


def _arguments(config: Config, path: Path, extras: Extras, progress: bool | None) -> dict[str, Any]:
    """Says that the data are loaded, and builds the arguments of `simulate`."""
    if _title(config.name, progress) and processes.is_first():
        say(config.name, f"loading {config.data.name} ...")
    return build(config) | _beside(config, path, extras)


def _beside(config: Config, path: Path, extras: Extras) -> dict[str, Any]:
    """The arguments of `simulate` that no part of the algorithm needs."""
    trace = None if extras.profile is None else Trace(path / PROFILE, *rounds_of(extras.profile))
    best = None if config.keep_best is None else config.keep_best.build(path=path / BEST)
    return {
        "sinks": [*_sinks(config, path), *extras.sinks],
        "callbacks": extras.callbacks,
        "profile": trace,
        "keep_best": best,
    }


def _sinks(config: Config, directory: Path) -> list[Sink]:
    """The sinks of a configuration; TensorBoard's files lie in the run directory."""
    settings = config.model_dump(mode="json")
    made = []
    for section in config.sinks:
        elsewhere = getattr(section, "directory", None)
        there = {"directory": elsewhere or directory / TENSORBOARD}
        sink = section.build(**there if section.name == "tensorboard" else {})
        made.append(sink._replace(begin=lambda _, begin=sink.begin: begin(settings)))
    return made


class Record:
    """Collects the rows of a run and writes them; the first one begins the directory."""

    def __init__(self, config: Config, directory: RunDirectory | None, rows: list[dict[str, Any]]):
        self.rows = rows
        self._config, self._directory, self._done = config, directory, tuple(rows)

    def compiled(self, plan: Plan) -> None:
        """Sets the plan that is written."""
        self._config = with_plan(self._config, plan)

    def begin(self) -> None:
        """Writes the configuration, once."""
        if self._directory is not None and not self._directory.begun:
            self._directory.begin(dump_config(self._config), self._done)

    def append(self, row: dict[str, Any]) -> None:
        """Writes a round."""
        self.begin()
        if self._directory is not None:
            self._directory.append(row)
        self.rows.append(row)


def summarize(name: str, arguments: Mapping[str, Any], result: Result) -> dict[str, Any]:
    """The content of `summary.json` for a finished run.

    `fedavg` is the cost of the same rounds under FedAvg, in which every client receives and sends
    the whole model. It is modelled from the layer table, not run.
    """
    clients: Partition = arguments["clients"]
    algorithm, senders = arguments["algorithm"], sum(result.costs.clients)
    whole = whole_model(algorithm, arguments["data"], result.variables, result.layers)
    faulty = (row for row in result.history if "chosen" in row)
    lost = sum(row["chosen"] - row["unavailable"] - row["arrived"] for row in faulty)
    return {
        "name": name,
        "status": "done",
        "rounds": len(result.history),
        "best": None if result.best is None else result.best._replace(variables=None)._asdict(),
        "stopped": result.stopped,  # why `early_stop` ended the run
        "final": result.history.rows[-1] if len(result.history) else {},
        "total": result.costs.total,
        "fedavg": fedavg_traffic(*whole, senders=senders, receivers=senders + lost),
        "layers": _layer_costs(arguments, result),
        "partition": {
            "clients": clients.clients,
            "smallest": clients.sizes.min(),
            "largest": clients.sizes.max(),
            "sha256": clients.hash,
        },
        "readings": dict(result.readings),
        "lowerings": result.lowerings,
        "warnings": result.warnings,
    } | environment()


def _layer_costs(arguments: Mapping[str, Any], result: Result) -> dict[str, dict[str, int]]:
    """Parameters of each layer, its bytes in the uploads of all rounds, and MACs of an example."""
    task, data = arguments["algorithm"].task, arguments["data"]
    example = example_of(on_host(data.train, data.normalize))
    held = jax.eval_shape(task.init, root_key(0), example)
    macs = macs_by_layer(forward_macs(task, held, example), result.layers)
    sent = -(-result.costs.layer_upload_bits // 8)
    layers = zip(result.layers.names, result.layers.params, sent, macs, strict=True)
    return {
        name: {"params": int(p), "upload_bytes": int(b), "forward_macs": m}
        for name, p, b, m in layers
    }


def _config(config: Config | str | Path | Mapping[str, Any]) -> Config:
    """The configuration of one run."""
    if isinstance(config, Mapping):
        config = parse_config(dict(config))
    elif not isinstance(config, Config):
        config = load_config(config)
    if config.sweep is not None:
        raise FedLPError(
            f"the configuration '{config.name}' has a section sweep; run it with fedlp sweep, or "
            "delete the section to run it once."
        )
    return config


def _common(config: Config) -> dict[str, Any]:
    """The settings that all processes must share; each may have its own `data_dir`."""
    return config.model_dump(mode="json", exclude={"name": True, "data": {"data_dir"}})


def with_plan(config: Config, plan: Plan) -> Config:
    """The configuration with a plan that is resolved."""
    section = config.plan.model_copy(update=dataclasses.asdict(plan))
    return config.model_copy(update={"plan": section})


def save_arrays(directory: RunDirectory, result: Result, clients: Partition | None = None) -> None:
    """Writes what a run leaves in arrays."""
    directory.save(result.state.variables)
    directory.save_arrays(CLIENTS, result.clients.columns())
    if clients is not None:
        directory.save_arrays(PARTITION, _partition_arrays(clients))


def _partition_arrays(clients: Partition) -> dict[str, Any]:
    """What `partition.npz` has: the sizes of all clients, and the labels that some hold."""
    drawn = some_clients(clients.clients)
    labels = [
        np.bincount(clients.labels[clients.rows(int(k))], minlength=clients.num_classes)
        for k in drawn
    ]
    return {"sizes": clients.sizes, "client": drawn, "labels": np.stack(labels)}


def note_failure(
    error: BaseException,
    directory: RunDirectory,
    rows: list[dict[str, Any]],
    said: Sequence[str],
) -> None:
    """Writes the summary of an unfinished run, and adds notes for its user to the error."""
    if directory.begun:
        statuses = {KeyboardInterrupt: "interrupted", DivergedError: "diverged"}
        status = statuses.get(type(error), "failed")
        summary: dict[str, Any] = {"status": status, "rounds": len(rows), "error": str(error)}
        with contextlib.suppress(OSError, RuntimeError):  # which the error reports
            summary |= {"final": rows[-1] if rows else {}, "warnings": said}
            directory.summarize(summary | environment())
        if directory.path.is_dir():
            error.add_note(f"{directory.path} holds the first {len(rows)} rounds.")
    else:
        error.add_note("Nothing was written.")
    if isinstance(error, DivergedError):
        save_arrays(directory, error.result)
    elif directory.has_checkpoint:
        error.add_note(f"Resume with: fedlp run {directory.path} --resume")
