"""A model as a file: `variables.npz`, one array a variable, named by its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fedlp_jax.data.archive import read_npz
from fedlp_jax.data.files import replacing
from fedlp_jax.errors import FedLPError, shown, why
from fedlp_jax.types import Variables

VARIABLES = "variables.npz"  # its name in a run directory
_FLOATS = tuple(map(np.dtype, ("float16", "float32", "float64")))  # in this machine's byte order


def save_variables(path: Path, variables: Variables) -> None:
    """Writes a nested dictionary of arrays under flat names such as `params/fc1/kernel`.

    The file is whole at any time: where it cannot be written, the one before stays.
    """
    arrays: dict[str, Any] = {
        name: np.asarray(array) for name, array in flatten_dict(variables, sep="/").items()
    }
    with replacing(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


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
        flat = read_npz(file, lambda names: names)
        for name in flat:
            if any("/".join(name.split("/")[:i]) in flat for i in range(1, name.count("/") + 1)):
                raise ValueError(f"the name {shown(name)} lies within that of another array")
        variables = unflatten_dict(flat, sep="/")
    except FedLPError:
        raise
    except FileNotFoundError:
        raise FedLPError(
            f"{file} does not exist; a run writes it when it ends or diverges."
        ) from None
    except Exception as error:  # a damaged archive can raise almost anything
        raise FedLPError(f"{file} cannot be read as the model of a run: {why(error)}.") from error
    floats = all(array.dtype in _FLOATS for array in flat.values())
    if not isinstance(variables.get("params"), dict) or not floats:
        held = ", ".join(f"{shown(name)} of {a.dtype}" for name, a in list(flat.items())[:3])
        raise FedLPError(
            f"{file} holds {held or 'nothing'}; the model of a run has arrays of floats with names "
            "such as params/fc1/kernel."
        )
    return variables
