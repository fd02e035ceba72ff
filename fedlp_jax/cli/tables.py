"""Tables for the terminal: the end of a run, the environment, what a configuration amounts to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from fedlp_jax.config.loading import dump_config
from fedlp_jax.config.overview import Overview, macs_by_layer
from fedlp_jax.config.schema import Config
from fedlp_jax.execution.plan import gpu_kernels
from fedlp_jax.reporting.environment import environment
from fedlp_jax.reporting.metrics import headline
from fedlp_jax.reporting.progress import duration
from fedlp_jax.reporting.tables import NumbersTable, two_columns


def result_table(summary: Mapping[str, Any], directory: Path) -> Table:
    """The end of a run: accuracy, traffic relative to FedAvg, time, and the run directory."""
    final, readings = summary["final"], summary["readings"]
    rows = {"test accuracy": "not evaluated"}
    if (key := headline(final)) is not None:
        rows = {key.replace("_", " "): f"{final[key]:.4f} after {summary['rounds']} rounds"}
    if summary["stopped"] is not None:
        rows["stopped early"] = summary["stopped"]
    for direction in ("upload", "download"):
        key = f"{direction}_bytes"
        rows[direction] = _against_fedavg(summary["total"][key], summary["fedavg"][key])
    if final.get("epsilon") is not None:
        rows["privacy"] = f"epsilon {final['epsilon']:.3g}"
    compiling = sum(s for name, s in readings.items() if name.endswith("compile_seconds"))
    rows["time"] = f"{duration(readings['total_seconds'])} ({duration(compiling)} compiling)"
    rows["written to"] = str(directory)
    return two_columns(rows, title=summary["name"])


def _against_fedavg(sent: float, fedavg: float) -> str:
    """Bytes sent, in MB and as a share of FedAvg's."""
    if not fedavg:
        return "nothing"
    return f"{sent / 1e6:.2f} MB, {sent / fedavg:.1%} of FedAvg's {fedavg / 1e6:.2f} MB"


def environment_table() -> Table:
    """Versions, devices, commit."""
    facts = environment()
    device = facts["device"]
    rows = {name.replace("_", "-"): version for name, version in facts["versions"].items()}
    rows["devices"] = f"{device['count']} x {device['kind']} ({device['platform']})"
    if device["platform"] == "gpu":
        kept = jax.config.values["jax_compilation_cache_dir"]
        rows["GPU kernels"] = f"{gpu_kernels()}; programs kept in {kept or 'no directory'}"
    rows["commit"] = facts["commit"] or "not a checkout"
    return two_columns(rows, title="fedlp-jax")


def config_tables(config: Config, view: Overview) -> list[RenderableType]:
    """Settings, partition, layers, submodels and the modelled traffic per round."""
    parts: list[RenderableType] = [
        escape(dump_config(config)),
        _partition_table(view),
        _layer_table(view),
    ]
    if len(view.levels) > 1:
        parts.append(_level_table(view))
    return [*parts, _cost_table(view)]


def _partition_table(view: Overview) -> Table:
    sizes, held = view.clients.sizes, (view.clients.histogram > 0).sum(axis=1)
    rows = {
        "clients": f"{view.clients.clients:,}, {view.cohort:,} per round",
        "examples per client": f"{sizes.min():,} to {sizes.max():,}, mean {sizes.mean():,.1f}",
        "classes per client": f"{held.min()} to {held.max()}, mean {held.mean():.1f}",
        "sha256": view.clients.hash[:16],
    }
    return two_columns(rows, title="Partition")


def _layer_table(view: Overview) -> NumbersTable:
    layers, macs = view.layers, view.levels[-1].macs
    by_layer = macs_by_layer(macs, layers)
    return NumbersTable(
        "Layers",
        ("layer", "parameters", "statistics", "MACs per example"),
        (
            (name, f"{params:,}", f"{statistics:,}", f"{count:,}" if count else "")
            for name, params, statistics, count in zip(
                layers.names, layers.params, layers.statistics, by_layer, strict=True
            )
        ),
        (
            f"{len(layers)} layers",
            f"{layers.params.sum():,}",
            f"{layers.statistics.sum():,}",
            f"{sum(macs.values()):,}",
        ),
    )


def _level_table(view: Overview) -> NumbersTable:
    return NumbersTable(
        "Submodels",
        ("submodel", "clients", "shared parameters", "held parameters", "MACs per example"),
        (
            (
                level.name.replace("_", " "),
                f"{level.clients:,}",
                f"{level.shared:,}",
                f"{level.held:,}",
                f"{sum(level.macs.values()):,}",
            )
            for level in view.levels
        ),
    )


def _cost_table(view: Overview) -> Table:
    rows = {
        "upload": _against_fedavg(view.upload_bytes, view.fedavg["upload_bytes"]),
        "download": _against_fedavg(view.download_bytes, view.fedavg["download_bytes"]),
    }
    if view.stacked_bytes is not None:
        rows["stacked updates"] = f"{view.stacked_bytes / 1e6:.1f} MB of memory, modelled"
    return two_columns(rows, title="Expected traffic per round")
