"""Uploads: what compression makes of an update, and how many bits it takes on the wire.

An `Upload` turns the update of one layer of ONE client, all its parameters in one vector, into what
the server decodes from the message. Batch statistics, and what an algorithm sends beside the
update, go as float32. Uploads are chained as optax chains transforms, and combine with any mask.

    top_k       the largest entries, each with its place        Aji and Heafield, arXiv:1704.05021
    quantize    levels of the layer's norm, coded by Elias      QSGD, arXiv:1610.02132
    cast        shorter floats, or int8 with a scale per layer

Bits are exact code lengths, counted in the program: of every level, place, norm and scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.errors import FedLPError, check_choice, check_number
from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.types import Array, PyTree

_FLOAT = 32  # bits of a float32
_MOST_BITS = 2**30  # expected, of a layer: half of what an i32 counts, as codes vary with values


class Message(NamedTuple):
    """A layer on its way to the server; n parameters."""

    values: Array  # f[n], as the server decodes them
    bits: Array  # i32[n], of each value; 0 = it is not in the message, and decoded as 0
    other_bits: Array  # i32[], of places, norms and scales


class Upload(NamedTuple):
    """A transform of messages, for one layer of ONE client.

    Attributes:
      apply: `(key, message, sent bool[], state) -> (message, state)`. Layers that the client does
        not send are transformed too, because their state may change; `sent` tells them apart.
      bits: `(n, bits of a value, n present) -> (bits of a value, n present, other bits)`, expected,
        on the host: for modelled traffic before a run.
      init: `(n, dtype) -> state` of a layer before the client's first round; None = no state.
      whole: what a message leaves out is sent later.
    """

    apply: Callable[[Array, Message, Array, PyTree], tuple[Message, PyTree]]
    bits: Callable[[int, float, float], tuple[float, float, float]]
    init: Callable[[int, np.dtype], PyTree] | None = None
    whole: bool = False


def chain(*uploads: Upload) -> Upload:
    """One upload after another: `chain(top_k(0.1), quantize(levels=15))`.

    Raises:
      FedLPError: one is no upload, or there is none.
    """
    if not uploads or not all(isinstance(upload, Upload) for upload in uploads):
        raise FedLPError(f"chain takes uploads such as fl.top_k(0.1), but got {uploads}.")

    def apply(key: Array, message: Message, sent: Array, state: PyTree) -> tuple[Message, PyTree]:
        new = []
        for i, (upload, own) in enumerate(zip(uploads, state or [()] * len(uploads), strict=True)):
            message, own = upload.apply(jax.random.fold_in(key, i), message, sent, own)
            new.append(own)
        return message, new if state else state

    def bits(n: int, each: float, present: float) -> tuple[float, float, float]:
        total = 0.0
        for upload in uploads:
            each, present, other = upload.bits(n, each, present)
            total += other
        return each, present, total

    def init(n: int, dtype: np.dtype) -> PyTree:
        return [() if upload.init is None else upload.init(n, dtype) for upload in uploads]

    stateful = any(upload.init is not None for upload in uploads)
    whole = all(upload.whole for upload in uploads)
    return Upload(apply, bits, init if stateful else None, whole)


def top_k(share: float, error_feedback: bool = False) -> Upload:
    """Sends the `ceil(share n)` largest entries of a layer, each with its place.

    A place takes `ceil(log2 n)` bits. With error feedback, what a client did not send is added to
    its next update (Seide et al., 2014; Karimireddy et al., arXiv:1901.09847): a model for each
    client lies on the devices.

    Args:
      share: of a layer's entries, in (0, 1].
      error_feedback: keep what is not sent.

    Raises:
      FedLPError: a share out of range.
    """
    share = check_number("share", share, gt=0, le=1)

    def apply(key: Array, message: Message, sent: Array, state: PyTree) -> tuple[Message, PyTree]:
        del key
        values = message.values + state if error_feedback else message.values
        count = _count(share, values.size)
        places = jax.lax.top_k(jnp.abs(values), count)[1]
        chosen = jnp.zeros(values.shape, bool).at[places].set(True)
        new = jnp.where(chosen, values, jnp.zeros_like(values))
        if error_feedback:
            state = values - jnp.where(sent, new, jnp.zeros_like(new))
        places_bits = count * _place_bits(values.size)
        bits = jnp.where(chosen, message.bits, 0)
        return Message(new, bits, message.other_bits + places_bits), state

    def bits(n: int, each: float, present: float) -> tuple[float, float, float]:
        count = _count(share, n)
        return each, min(count, present), count * _place_bits(n)

    whole = error_feedback or share == 1
    return Upload(apply, bits, _residual if error_feedback else None, whole)


def quantize(levels: int) -> Upload:
    """QSGD: random levels of the layer's norm, whose expectation is the update.

    `Q(x_i) = |x| sign(x_i) l_i / s`, s the levels, |x| the L2 norm of the layer, and `l_i` one of
    the two whole numbers next to `s |x_i| / |x|`, drawn so that its mean is that (Alistarh et al.,
    NeurIPS 2017). The message is the norm as a float32, s, and for each entry that is present
    `l_i + 1` in Elias' omega code and, unless it is 0, a sign.

    Args:
      levels: s, from 1 to 2**15.

    Raises:
      FedLPError: another number.
    """
    levels = check_number("levels", levels, ge=1, le=2**15, integer=True)
    lengths = np.array([len(elias(level + 1)) + (level > 0) for level in range(levels + 1)])
    header = _FLOAT + len(elias(levels))

    def apply(key: Array, message: Message, sent: Array, state: PyTree) -> tuple[Message, PyTree]:
        del sent
        x = message.values
        largest = jnp.abs(x).max()  # first, so that no square of a tiny or huge entry is lost
        scaled = x / jnp.where(largest > 0, largest, jnp.ones_like(largest))
        norm = jnp.sqrt((scaled**2).sum())
        place = levels * jnp.abs(scaled) / jnp.where(norm > 0, norm, jnp.ones_like(norm))
        low, draw = jnp.floor(place), jax.random.uniform(key, x.shape, jnp.float32)
        level = jnp.minimum(low + (draw < place - low), levels)
        values = largest * norm * jnp.sign(x) * level / levels
        of_each = jnp.asarray(lengths, jnp.int32)[level.astype(jnp.int32)]
        bits = jnp.where(message.bits > 0, of_each, 0)
        return Message(values, bits, message.other_bits + header), state

    def bits(n: int, each: float, present: float) -> tuple[float, float, float]:
        del each
        return _expected_bits(n, levels, lengths), present, header

    return Upload(apply, bits)


def cast(dtype: Literal["bfloat16", "float16", "int8"]) -> Upload:
    """Rounds every value to a shorter type; "int8" in steps of the layer's largest entry / 127.

    Raises:
      FedLPError: another type.
    """
    check_choice("dtype", dtype, ("bfloat16", "float16", "int8"))
    each, scale = (8, _FLOAT) if dtype == "int8" else (16, 0)

    def apply(key: Array, message: Message, sent: Array, state: PyTree) -> tuple[Message, PyTree]:
        del key, sent
        x = message.values
        if dtype == "int8":
            step = jnp.abs(x).max() / 127
            rounded = step * jnp.round(x / jnp.where(step > 0, step, jnp.ones_like(step)))
        else:
            rounded = x.astype(dtype).astype(x.dtype)
        bits = jnp.where(message.bits > 0, jnp.int32(each), 0)
        return Message(rounded, bits, message.other_bits + scale), state

    return Upload(apply, lambda n, before, present: (each, present, scale))


def plain_message(values: Array) -> Message:
    """A layer as it is: f[n] in float32."""
    n = values.size
    return Message(values, jnp.full(n, _FLOAT, jnp.int32), jnp.int32(0))


def first_state(upload: Upload, params: PyTree, layers: LayerTable) -> PyTree:
    """The state of ONE client, by layer; `params` are arrays or shapes."""
    assert upload.init is not None
    return {
        layers.names[layer]: upload.init(
            sum(math.prod(leaf.shape) for leaf in members), members[0].dtype
        )
        for layer, members in _by_layer(params, layers).items()
    }


def transmit(
    upload: Upload, key: Array, params: PyTree, mask: Array, state: PyTree, layers: LayerTable
) -> tuple[PyTree, PyTree, Array]:
    """Sends the update of ONE client, layer by layer.

    Args:
      upload: the transform.
      key: consumed.
      params: `x_k - x` of the parameters.
      mask: `f32[L]`, 0 = the layer is not sent.
      state: see `first_state`; () without one.
      layers: indexes `params`.

    Returns:
      What the server decodes, the new state, and `i32[L]`, the bits of each layer if it is sent.
    """
    leaves, treedef = jax.tree.flatten(params)
    index, new_state = jax.tree.leaves(layers.index["params"]), {}
    bits = jnp.zeros(len(layers), jnp.int32)
    for layer, members in _by_layer(params, layers).items():
        name = layers.names[layer]
        vector = jnp.concatenate([leaf.ravel() for leaf in members])
        message, new_state[name] = upload.apply(
            jax.random.fold_in(key, layer),
            plain_message(vector),
            mask[layer] > 0,
            state[name] if state else (),
        )
        bits = bits.at[layer].set(message.bits.sum(dtype=jnp.int32) + message.other_bits)
        # An update that is not finite stays so, and its client is left out.
        values = jnp.where(jnp.isfinite(vector).all(), message.values, jnp.nan)
        ends = np.cumsum([leaf.size for leaf in members])[:-1]
        parts = iter(jnp.split(values, ends))
        leaves = [
            next(parts).reshape(leaf.shape) if of == layer else leaf
            for leaf, of in zip(leaves, index, strict=True)
        ]
    return jax.tree.unflatten(treedef, leaves), new_state if state else state, bits


def expected_bits(upload: Upload, parameters: int) -> float:
    """Bits of a layer with so many parameters, before a run."""
    each, present, other = upload.bits(parameters, float(_FLOAT), float(parameters))
    return each * present + other if parameters else 0.0


def check_counted(upload: Upload, layers: LayerTable) -> None:
    """Refuses layers of more bits than a round counts.

    Raises:
      FedLPError: with the bits.
    """
    for name, parameters in zip(layers.names, layers.params.tolist(), strict=True):
        bits = expected_bits(upload, parameters)
        if bits > _MOST_BITS:
            raise FedLPError(
                f"the layer {name} with {parameters:,} parameters takes about {bits:,.0f} bits on "
                f"the wire, and a round counts up to {_MOST_BITS:,} in a layer; cut it by layers=, "
                "such as 'by_tensor', or omit upload=."
            )


def elias(number: int) -> str:
    """The omega code of a positive whole number, as text of 0 and 1 (Elias, 1975)."""
    code = "0"
    while number > 1:
        binary = f"{number:b}"
        code, number = binary + code, len(binary) - 1
    return code


def _by_layer(params: PyTree, layers: LayerTable) -> dict[int, list[Array]]:
    """The leaves of each layer that a submodel has."""
    found: dict[int, list[Array]] = {}
    index = jax.tree.leaves(layers.index["params"])
    for layer, leaf in zip(index, jax.tree.leaves(params), strict=True):
        found.setdefault(layer, []).append(leaf)
    return found


def _count(share: float, n: int) -> int:
    """`ceil(share n)`."""
    # A product such as .07 x 100 may lie a rounding error above a whole number.
    return math.ceil(share * n * (1 - 1e-12))


def _residual(n: int, dtype: np.dtype) -> Array:
    return jnp.zeros(n, dtype)


def _place_bits(n: int) -> int:
    return math.ceil(math.log2(n)) if n > 1 else 0


def _expected_bits(n: int, levels: int, lengths: np.ndarray) -> float:
    """Bits of an entry if the entries of a layer are normal draws: an estimate before a run."""
    probability = (np.arange(2000) + 0.5) / 2000
    place = np.minimum(levels * _normal_quantile(probability) / math.sqrt(n), levels)
    low = np.floor(place).astype(int)
    up = np.minimum(low + 1, levels)
    return float(((1 - (place - low)) * lengths[low] + (place - low) * lengths[up]).mean())


def _normal_quantile(probability: np.ndarray) -> np.ndarray:
    """Of the absolute value of a standard normal number."""
    from scipy.special import erfinv  # imported late, as everywhere

    quantile: np.ndarray = math.sqrt(2) * erfinv(probability)
    return quantile
