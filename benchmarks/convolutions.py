"""Every lowering of 3 x 3 convolutions by shape, and the table that `auto` chooses from.

    python -m benchmarks.convolutions [--json FILE] [--write] [--smoke]

A convolution with both its gradients, repeated in a loop on every device at once, as clients train:
one of them on a CPU, on an accelerator as many as are vmapped there.
`--write` puts the times of this backend into the package's own table. (`fedlp tune CONFIG
--convolutions` measures the shapes of one model, for a table of your own.)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax

import fedlp_jax as fl
from benchmarks.machine import machine
from fedlp_jax.execution.map_clients import resolve
from fedlp_jax.nn.conv.lowering import Convolution
from fedlp_jax.nn.conv.measure import FORMS, measure
from fedlp_jax.nn.conv.window import Window

_LOWERINGS = FORMS
_CHANNELS = ((3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128))
_SIZES = (8, 16, 32)
_BATCH = 10
_TABLE = Path(fl.__file__).parent / "conv" / "table.json"
_TARGET_SECONDS = 0.15


def main() -> None:
    """Measures all shapes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--write", action="store_true", help="into the package's table")
    parser.add_argument("--smoke", action="store_true", help="one small shape")
    options = parser.parse_args()
    fl.setup()
    shapes = [(size, *channels) for size in _SIZES for channels in _CHANNELS]
    width = resolve(None, 10**6).width or 1  # clients vmapped at once: one on a CPU
    rows = []
    for size, channels, features in [(8, 3, 32)] if options.smoke else shapes:
        convolution = Convolution(
            (_BATCH, size, size, channels),
            (3, 3, channels, features),
            Window((1, 1), ((1, 1), (1, 1)), (1, 1)),
        )
        repeats = 2 if options.smoke else 5
        times = measure(convolution, _LOWERINGS, repeats, _TARGET_SECONDS, width)
        row = {"pixels": _BATCH * size * size, "channels": channels, "features": features}
        rows.append(row | {"milliseconds": times})
        print(json.dumps(rows[-1]), flush=True)
    result = {"backends": {jax.default_backend(): rows}} | machine()
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    if options.write:
        if _TABLE.exists():
            result["backends"] = json.loads(_TABLE.read_text())["backends"] | result["backends"]
        _TABLE.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
