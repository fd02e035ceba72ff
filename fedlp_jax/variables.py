"""A model as a file: `variables.npz`, one array a variable, named by its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fedlp_jax.types import FedLPError, Variables

VARIABLES = "variables.npz"  # its name in a run directory


def save_variables(path: Path, variables: Variables) -> None:
    """Writes a nested dictionary of arrays under flat names such as `params/fc1/kernel`."""
    arrays: dict[str, Any] = {
        name: np.asarray(array) for name, array in flatten_dict(variables, sep="/").items()
    }
    np.savez(path, allow_pickle=False, **arrays)


def load_variables(path: str | Path) -> Variables:
    """The model of a run, to go on from: `fl.simulate(..., variables=fl.load_variables(path))`.

    Args:
      path: a run directory, or the `variables.npz` in it.

    Returns:
      `{"params": {"fc1": {"kernel": array, ...}, ...}, ...}` of numpy arrays, with the bits that
      the server held.

    Raises:
      FedLPError: there is no such file, or it is damaged or something else.
    """
    file = Path(path)
    file = file / VARIABLES if file.is_dir() else file
    try:
        with file.open("rb") as raw, np.load(raw, allow_pickle=False) as stored:
            flat = {name: stored[name] for name in stored.files}
        variables = unflatten_dict(flat, sep="/")
    except FileNotFoundError:
        raise FedLPError(
            f"{file} does not exist; a run writes it when it ends or diverges."
        ) from None
    except Exception as error:  # a damaged archive can raise almost anything
        raise FedLPError(f"{file} cannot be read as the model of a run: {error}.") from error
    floats = all(np.issubdtype(array.dtype, np.floating) for array in flat.values())
    if not isinstance(variables.get("params"), dict) or not floats:
        raise FedLPError(
            f"{file} holds {', '.join(list(flat)[:3]) or 'nothing'}; the model of a run has arrays "
            "of floats with names such as params/fc1/kernel."
        )
    return variables
