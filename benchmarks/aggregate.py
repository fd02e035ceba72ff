"""The masked mean at the speed of memory: gigabytes per second of updates that it reads.

    python -m benchmarks.aggregate [--json FILE] [--smoke]

The devices hold a stack of updates, one per client, with a random layer mask for each. Contenders
take turns on the same memory:

* copy: adds one to the whole stack in place. What it reads and writes per second is the bandwidth.
* at once: sums each layer's mask times its updates over the clients, and divides by the sum of the
  mask, as one would write it for a stack.
* ours: the package's way, client after client: lift, add, one sum over devices, lower. A round
  needs no stack, because an update is added as soon as its client has trained.

The last two are compared before they are timed. Each reads the stack once, so its rate is the
stack's size over its time, which memory bounds by the copy's rate. Ours also reads and writes its
running sum for every client, which is memory traffic once a model exceeds the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import fedlp_jax as fl
from benchmarks import command
from benchmarks.timing import alternate, spread
from fedlp_jax.aggregation.means import masked_mean
from fedlp_jax.aggregation.reducer import Received, UploadInfo
from fedlp_jax.execution.map_clients import Level, map_sum
from fedlp_jax.execution.plan import Plan, over_clients, resolve
from fedlp_jax.pruning.layers import LayerTable, layer_table
from fedlp_jax.types import Array, Batch, Normalize, Variables

_TURN_SECONDS = 0.1
_TOLERANCE = 1e-4
_WIDE = fl.models.MLP(hidden=(2048, 2048, 1024), num_classes=10)


def models() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Name -> module and shape of an example, small to large."""
    narrow = fl.models.MLP(num_classes=10)
    return {
        "MLP": (narrow, (28, 28, 1)),
        "reference CNN": (fl.models.FedLPCNN(num_classes=10), (32, 32, 3)),
        "wide MLP": (_WIDE, (28, 28, 1)),
    }


def main() -> None:
    """Runs it."""
    parser = command.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="turns of each contender")
    options = parser.parse_args()
    fl.setup()
    cells = [(name, cohort) for name in models() for cohort in (10, 40)]
    repeats = options.repeats
    if options.smoke:
        cells, repeats = [("MLP", 4)], 1
    rows = []
    for name, cohort in cells:
        rows.append({"model": name, **measure(*models()[name], cohort, repeats)})
        print(_line(rows[-1]))
    command.write(options.json, {"aggregate": rows})


def measure(module: nn.Module, image: tuple[int, ...], cohort: int, repeats: int) -> dict[str, Any]:
    """Gigabytes per second of the three contenders.

    Args:
      module: model; its variables are averaged.
      image: shape of an example.
      cohort: C, rounded up to a multiple of the devices.
      repeats: turns of each.
    """
    plan = resolve(None, cohort)
    cohort = -(-cohort // (plan.devices or 1)) * (plan.devices or 1)
    batch = Batch(
        jnp.zeros((1, *image), jnp.uint8),
        jnp.zeros(1, jnp.int32),
        None,
        Normalize(np.float32(1), np.float32(0)),
    )
    shapes = jax.eval_shape(fl.classification(module).init, jax.random.key(0), batch)
    layers = layer_table(shapes, "by_module")
    split = over_clients(plan)
    stack = jax.jit(lambda: _stack(shapes, cohort), out_shardings=split)()
    random = np.random.default_rng(0).random((cohort, len(layers)))
    mask = jax.device_put((random < 0.5).astype(np.float32), split)
    at_once = jax.jit(lambda s, m: _at_once(s, m, layers))
    ours = jax.jit(lambda s, m: _ours(s, m, layers, plan, cohort))
    add_one = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    _compare(at_once(stack, mask), ours(stack, mask))

    def copy() -> None:
        nonlocal stack
        stack = jax.block_until_ready(add_one(stack))

    contenders = {
        "copy": copy,
        "at once": lambda: jax.block_until_ready(at_once(stack, mask)),
        "ours": lambda: jax.block_until_ready(ours(stack, mask)),
    }
    times = alternate({name: _timed(once) for name, once in contenders.items()}, repeats)
    size = sum(x.nbytes for x in jax.tree.leaves(stack))
    moved = {"copy": 2 * size, "at once": size, "ours": size}
    rates = {
        name: {
            "min": moved[name] / max(t) / 1e9,
            "median": moved[name] / spread(t)["median"] / 1e9,
            "max": moved[name] / min(t) / 1e9,
        }
        for name, t in times.items()
    }
    return {
        "parameters": int(layers.params.sum()),
        "cohort": cohort,
        "plan": {"devices": plan.devices, "width": plan.width},
        "megabytes": size / 1e6,
        "measured_ms": {name: spread(t, 1e3) for name, t in times.items()},
        "measured_gigabytes_per_second": rates,
        "ours_of_copy": rates["ours"]["median"] / rates["copy"]["median"],
    }


def _stack(shapes: Variables, cohort: int) -> Variables:
    """Updates `[C, ...]`, all different."""

    def one(x: Any) -> Array:
        count = jnp.arange(cohort * x.size, dtype=jnp.float32)
        return jnp.sin(count).reshape(cohort, *x.shape)

    return jax.tree.map(one, shapes)


def _at_once(stack: Variables, mask: Array, layers: LayerTable) -> Variables:
    def mean(x: Array, m: Array) -> Array:
        total = jnp.tensordot(m, x, axes=1)
        count = m.sum()
        return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.zeros_like(total))

    return jax.tree.map(mean, stack, jax.vmap(layers.expand)(mask))


def _ours(stack: Variables, mask: Array, layers: LayerTable, plan: Plan, cohort: int) -> Variables:
    reducer = masked_mean()

    def prepare(shared: Any, client: Any, own: Any, active: Array, bounds: Any) -> Any:
        update, sent = client
        upload = UploadInfo(jnp.ones((), jnp.float32), sent, jnp.ones_like(sent))
        return reducer.prepare(update, upload, active, layers), {}, own

    level = Level(prepare, bounds=lambda clients: (), embed=lambda shared, total: total)
    devices = plan.devices or 1
    segment = jnp.array([[0, cohort // devices]] * devices, jnp.int32)
    total, _, _ = map_sum([level], (), (stack, mask), segment, plan)
    unread: Any = None  # a mean needs the sums only
    return reducer.reduce(Received(total, unread, unread, unread), (), layers, plan).update


def _compare(expected: Variables, result: Variables) -> None:
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(result), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=_TOLERANCE)


def _timed(once: Callable[[], Any]) -> Callable[[], float]:
    """Seconds of one call, averaged over a turn of many."""
    once()
    start = time.perf_counter()
    once()
    loops = max(1, int(_TURN_SECONDS / (time.perf_counter() - start)))

    def turn() -> float:
        start = time.perf_counter()
        for _ in range(loops):
            once()
        return (time.perf_counter() - start) / loops

    return turn


def _line(row: dict[str, Any]) -> str:
    rates = ", ".join(
        f"{name} {rate['median']:.1f} ({rate['min']:.1f} to {rate['max']:.1f})"
        for name, rate in row["measured_gigabytes_per_second"].items()
    )
    return (
        f"{row['model']}, {row['cohort']} clients, {row['megabytes']:.0f} MB: GB/s {rates}; "
        f"ours at {row['ours_of_copy']:.0%} of the copy"
    )


if __name__ == "__main__":
    main()
