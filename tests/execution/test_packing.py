"""Trees of different structures in arrays of one shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlp_jax.execution.packing import pack, room, unpack


def test_packed_trees_of_several_dtypes_come_back():
    small = {"a": jnp.arange(3.0), "n": jnp.int32(7)}
    large = {"b": jnp.arange(6.0).reshape(2, 3), "c": jnp.ones(2, jnp.bfloat16)}
    wanted = room([small, large, {}])
    assert wanted == {"float32": 6, "int32": 1, "bfloat16": 2}
    for tree in (small, large, {}):
        packed = pack(tree, wanted)
        assert {k: x.size for k, x in packed.items()} == wanted
        shapes = jax.eval_shape(lambda tree=tree: tree)
        jax.tree.map(np.testing.assert_array_equal, unpack(packed, shapes), tree)


def test_what_has_no_room_is_not_dropped():
    wanted = room([{"a": jnp.zeros(3)}])
    with pytest.raises(AssertionError, match="int32"):
        pack({"a": jnp.zeros(2), "n": jnp.int32(1)}, wanted)
    with pytest.raises(TypeError):
        pack({"a": jnp.zeros(4)}, wanted)
