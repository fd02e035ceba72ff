"""Shakespeare's plays for next-character prediction, one client per role.

The split is in the manner of LEAF (arXiv:1812.01097), but its roles and windows are its own, so
accuracies cannot be compared with published ones.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fedlp_jax.data.dataset import IDENTITY, Dataset, Split
from fedlp_jax.data.files import open_plain
from fedlp_jax.errors import FedLPError, check_number, shown, why

FILE = "roles.json.gz"
VARIABLE = "SHAKESPEARE_DIR"
_LIMIT = 200_000_000  # bytes of JSON


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Speeches(Dataset):
    """Windows of text, and what their numbers stand for."""

    characters: str = ""  # token i + 1 is characters[i]; token 0 is padding
    roles: tuple[str, ...] = ()  # of each client id
    test_client: np.ndarray | None = None  # i64[N], client id of each test window
    short_roles: int = 0  # roles left out because their text is too short

    def __repr__(self) -> str:
        whole = super().__repr__()[:-1]
        return (
            f"{whole}, {len(self.roles):,} roles; {self.short_roles:,} roles with too little text "
            "are left out)"
        )


def shakespeare(
    data_dir: str | os.PathLike[str] | None, *, length: int = 80, min_windows: int = 10
) -> Speeches:
    """Reads `roles.json.gz`, `{"play::ROLE": [speech, ...]}`, as windows of characters.

    A role's speeches are joined by line ends and cut into windows that do not overlap: inputs
    `i32[N, length]`, and as targets the characters one place later. Its last window ends in
    padding, token 0. The last tenth of its windows, rounded down, is tested on.

    Args:
      data_dir: directory of the file; None means `$SHAKESPEARE_DIR`.
      length: characters of a window.
      min_windows: roles with fewer windows are left out. From 10 on, every role has test windows.

    Returns:
      The data set, with a client id for each window and the roles in the order of ids.

    Raises:
      FedLPError: the directory or the file cannot be read, or no role has enough text.
    """
    check_number("shakespeare: length", length, ge=1, le=2**20, integer=True)
    check_number("shakespeare: min_windows", min_windows, ge=1, integer=True)
    texts = _read(_path(data_dir))
    characters = "".join(sorted(set().union(*texts.values())))
    codes = _codes(characters)
    windows = {role: -(-(len(text) - 1) // length) for role, text in sorted(texts.items())}
    roles = tuple(role for role, count in windows.items() if count >= min_windows)
    if not roles:
        raise FedLPError(
            f"shakespeare: none of the {len(texts):,} roles has min_windows={min_windows} windows "
            f"of length={length}; the longest has {max(windows.values(), default=0):,}. Lower one "
            "of them."
        )
    parts: list[tuple[Split, Split]] = []
    for role in roles:
        tokens = np.zeros(windows[role] * length + 1, np.int32)
        text = np.searchsorted(codes, _codes(texts[role])) + 1
        tokens[: len(text)] = text
        split = Split(tokens[:-1].reshape(-1, length), tokens[1:].reshape(-1, length))
        first = windows[role] - windows[role] // 10
        parts.append((Split(*(x[:first] for x in split)), Split(*(x[first:] for x in split))))
    train, test = (
        Split(*map(np.concatenate, zip(*x, strict=True))) for x in zip(*parts, strict=True)
    )
    if not len(test.inputs):
        raise FedLPError(
            f"shakespeare: no role has the ten windows of length={length} of which one is tested "
            "on; lower length."
        )
    owners = [
        np.repeat(np.arange(len(roles)), [len(part[k].inputs) for part in parts]) for k in (0, 1)
    ]
    return Speeches(
        name="shakespeare",
        train=train,
        test=test,
        num_classes=len(characters) + 1,
        normalize=IDENTITY,
        client=owners[0],
        characters=characters,
        roles=roles,
        test_client=owners[1],
        short_roles=len(texts) - len(roles),
    )


def _path(data_dir: str | os.PathLike[str] | None) -> Path:
    folder = data_dir or os.environ.get(VARIABLE)
    way_out = (
        f"data_dir or ${VARIABLE} names the directory of {FILE}, gzipped JSON of the form "
        '{"play::ROLE": [speech, ...]}'
    )
    if not folder:
        raise FedLPError(f"shakespeare: the data has to be given: {way_out}.")
    path = Path(os.path.expanduser(folder)) / FILE
    if not path.exists():
        raise FedLPError(f"shakespeare: there is no {path}; {way_out}.")
    return path


def _read(path: Path) -> dict[str, str]:
    """The text of each role."""
    try:
        with open_plain(path) as file, gzip.open(file) as content:
            raw = content.read(_LIMIT + 1)
        roles: Any = json.loads(raw) if len(raw) <= _LIMIT else None
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise FedLPError(
            f"{path} cannot be read as gzipped JSON ({why(error)}); copy it again."
        ) from None
    if roles is None:
        raise FedLPError(f"{path} unpacks to more than {_LIMIT:,} bytes; give fewer roles.")
    if not isinstance(roles, dict) or not roles:
        raise FedLPError(f"{path} holds {shown(roles)}; expected {{role: [speech, ...]}}.")
    for role, speeches in roles.items():
        if not isinstance(speeches, list) or not all(isinstance(s, str) for s in speeches):
            raise FedLPError(
                f"{path}: the role {shown(role)} has {shown(speeches)}; expected a list of texts."
            )
    return {role: "\n".join(speeches) for role, speeches in roles.items()}


def _codes(text: str) -> np.ndarray:
    """The code point of each character; a lone surrogate is one too."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
