"""Data frames: the rows of runs for pandas, and as CSV or Parquet files.

pandas is imported by the first frame; it is the extra `fedlp-jax[frames]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlp_jax.data.files import replacing
from fedlp_jax.errors import FedLPError, why
from fedlp_jax.reporting.compare import experiments
from fedlp_jax.reporting.run_directory import CLIENTS, read_metrics

if TYPE_CHECKING:
    from pandas import DataFrame

SUFFIXES = (".csv", ".parquet")


def frame(rows: Iterable[Mapping[str, Any]] | Mapping[str, Any]) -> DataFrame:
    """A data frame with a column for each key, in the order in which the keys first appear.

    Args:
      rows: as in metrics.jsonl, or columns of equal length by name. A row without a key, or with
        None, has NaN there.

    Raises:
      FedLPError: pandas is not installed.
    """
    pandas = _pandas()
    return pandas.DataFrame(dict(rows) if isinstance(rows, Mapping) else list(rows))


def clients_frame(columns: Mapping[str, np.ndarray]) -> DataFrame:
    """A table of clients, as in `clients.npz`, with a column `kept_LAYER` for each layer.

    Raises:
      FedLPError: pandas is not installed.
    """
    flat = {key: column for key, column in columns.items() if key not in ("kept", "layers")}
    names = columns["layers"].tolist()
    return frame(flat | {f"kept_{name}": columns["kept"][:, i] for i, name in enumerate(names)})


def runs_frame(paths: Sequence[str | Path], clients: bool = False) -> DataFrame:
    """All rounds of several run directories in one table.

    Args:
      paths: of run directories.
      clients: a row for each client of each round, instead of one for each round.

    Returns:
      The columns of metrics.jsonl, or of `clients_frame`, after three that say whose row it is:
      `experiment`, labelled as by `fl.compare`; `seed`; and `directory`.

    Raises:
      FedLPError: a path holds no run or no table of clients, or pandas is not installed.
    """
    pandas = _pandas()
    parts = []
    for label, members in experiments(paths).items():
        for path, settings in members:
            rows = _clients_of(path) if clients else frame(read_metrics(path))
            whose = {"experiment": label, "seed": settings.get("seed", 0), "directory": str(path)}
            for place, (name, value) in enumerate(whose.items()):
                rows.insert(place, name, value)
            parts.append(rows)
    return pandas.concat(parts, ignore_index=True)


def write(table: DataFrame, path: str | Path) -> None:
    """Writes a table as `.csv` or `.parquet`, in one step.

    Raises:
      FedLPError: another suffix, pyarrow is missing, or the file cannot be written.
    """
    place = Path(path).expanduser()
    if place.suffix not in SUFFIXES:
        raise FedLPError(f"{place} must end in {' or '.join(SUFFIXES)}, which says the format.")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as file:
            if place.suffix == ".csv":
                table.to_csv(file, index=False)
            else:
                table.to_parquet(file, index=False)
    except ImportError as error:
        raise FedLPError(_missing("a Parquet file", "pyarrow")) from error
    except OSError as error:
        raise FedLPError(f"{place} cannot be written: {why(error)}.") from error


def _clients_of(path: Path) -> DataFrame:
    try:
        with np.load(path / CLIENTS, allow_pickle=False) as archive:
            return clients_frame(dict(archive))
    except (OSError, ValueError, KeyError) as error:
        raise FedLPError(
            f"{path} has no readable {CLIENTS} ({why(error)}); a run writes it when it ends."
        ) from error


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise FedLPError(_missing("a data frame", "pandas")) from error
    return pandas


def _missing(what: str, module: str) -> str:
    return f"{what} needs {module}: pip install 'fedlp-jax[frames]'."
