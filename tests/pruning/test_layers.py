"""Layer tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedlp_jax import FedLPError
from fedlp_jax.pruning.layers import layer_table

VARIABLES = {
    "params": {
        "conv2": {"conv": {"kernel": jnp.zeros((3, 3, 2, 4)), "bias": jnp.zeros(4)}},
        "conv10": {"conv": {"kernel": jnp.zeros((3, 3, 4, 5))}, "norm": {"scale": jnp.zeros(5)}},
        "fc": {"kernel": jnp.zeros((6, 2))},
    },
    "batch_stats": {"conv10": {"norm": {"mean": jnp.zeros(5), "var": jnp.ones(5)}}},
}


def test_by_module_joins_collections_and_counts():
    table = layer_table(VARIABLES)
    assert table.names == ("conv2", "conv10", "fc")  # natural order, not alphabetical
    assert table.params.tolist() == [3 * 3 * 2 * 4 + 4, 3 * 3 * 4 * 5 + 5, 12]
    assert table.statistics.tolist() == [0, 10, 0]
    assert table.index["batch_stats"]["conv10"]["norm"]["mean"] == 1


def test_by_tensor_gives_every_leaf_a_layer():
    table = layer_table(VARIABLES, "by_tensor")
    assert len(table) == len(jax.tree.leaves(VARIABLES)) == 7
    assert "conv10/norm/mean" in table.names
    assert int(table.params.sum() + table.statistics.sum()) == sum(
        x.size for x in jax.tree.leaves(VARIABLES)
    )


def test_a_mapping_takes_the_first_match_and_falls_back_to_the_module():
    table = layer_table(VARIABLES, {r"conv": "body", r"conv10": "never reached"})
    assert table.names == ("body", "fc")


def test_expand_puts_each_layers_number_on_its_leaves():
    table = layer_table(VARIABLES)
    tree = table.expand(jnp.array([1.0, 2.0, 3.0]))
    assert float(tree["params"]["conv2"]["conv"]["bias"]) == 1
    assert float(tree["batch_stats"]["conv10"]["norm"]["var"]) == 2
    assert float(tree["params"]["fc"]["kernel"]) == 3


def test_a_part_of_a_model_is_indexed_by_the_layers_of_the_whole():
    part = {"params": {"conv10": VARIABLES["params"]["conv10"]}}
    table = layer_table(part, names=layer_table(VARIABLES).names)
    assert table.covered.tolist() == [0, 1, 0]
    assert jax.tree.leaves(table.index) == [1, 1]


def test_bad_rules_are_refused():
    with pytest.raises(FedLPError, match="unknown layer rule 'by_layer'"):
        layer_table(VARIABLES, "by_layer")
    with pytest.raises(FedLPError, match="not a regular expression"):
        layer_table(VARIABLES, {"(": "x"})
    with pytest.raises(FedLPError, match="not among the 1"):
        layer_table(VARIABLES, names=["conv2"])


def test_shapes_are_enough():
    shapes = jax.eval_shape(lambda v: v, VARIABLES)
    assert np.array_equal(layer_table(shapes).params, layer_table(VARIABLES).params)


def test_modules_in_a_list_are_layers_of_their_own():
    """As of `nnx.Sequential`, whose path is ("layers", 0, "kernel"); a tensor may be a number."""
    tree = {
        "layers": {i: {"kernel": jnp.zeros(i + 1)} for i in (0, 2, 10)},
        "w": {"0": jnp.ones(3)},
    }
    table = layer_table({"params": tree})
    assert table.names == ("layers/0", "layers/2", "layers/10", "w")
    assert table.params.tolist() == [1, 3, 11, 3]
    named = layer_table({"params": tree}, {"^w": "own"})
    assert named.names == ("layers/0", "layers/2", "layers/10", "own")
