"""A trained model as a file: `variables.npz`, one array per variable, named by its path."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fedlp_jax.data.files import replacing
from fedlp_jax.errors import FedLPError, shown, why
from fedlp_jax.types import Variables

VARIABLES = "variables.npz"  # its name in a run directory
_FLOATS = tuple(map(np.dtype, ("float16", "float32", "float64")))  # in this machine's byte order


def save_variables(path: str | Path, variables: Variables) -> None:
    """Writes a nested dictionary of arrays under flat names such as `params/fc1/kernel`.

    Args:
      path: the `.npz` file. It is replaced in one step: if the write fails, the old file stays.
      variables: such as `result.variables`.

    Raises:
      OSError: the file cannot be written.
    """
    save_with_note(path, variables, "")


def save_with_note(path: str | Path, variables: Variables, note: str) -> None:
    """As `save_variables`, with a note in the archive's comment, which readers of arrays ignore."""
    with replacing(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        archive.comment = note.encode()
        for name, array in flatten_dict(variables, sep="/").items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asarray(array), allow_pickle=False)


def note_of(path: str | Path) -> str | None:
    """The note of `save_with_note`; None = there is no such file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment.decode(errors="replace")
    except (OSError, zipfile.BadZipFile):
        return None


def load_variables(path: str | Path) -> Variables:
    """Reads a saved model: `fl.simulate(..., variables=fl.load_variables(path))` starts from it.

    Args:
      path: a run directory, or the `variables.npz` in it.

    Returns:
      `{"params": {"fc1": {"kernel": array, ...}, ...}, ...}` of numpy arrays, with the bits that
      the server held.

    Raises:
      FedLPError: there is no such file, or it is damaged or holds something else.
    """
    file = Path(path)
    file = file / VARIABLES if file.is_dir() else file
    if not file.is_file():
        raise FedLPError(f"there is no file {file}; a run writes it when it ends or diverges.")
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            flat = dict(archive)
        variables = unflatten_dict(flat, sep="/")
        if len(flatten_dict(variables)) < len(flat):
            raise ValueError("the name of one array lies within that of another")
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
