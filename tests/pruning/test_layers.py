"""Layer tables."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fedlp_jax as fl
from fedlp_jax import FedLPError
from fedlp_jax.pruning.layers import layer_table, order_of_use

VARIABLES = {
    "params": {
        "conv2": {"conv": {"kernel": jnp.zeros((3, 3, 2, 4)), "bias": jnp.zeros(4)}},
        "conv10": {"conv": {"kernel": jnp.zeros((3, 3, 4, 5))}, "norm": {"scale": jnp.zeros(5)}},
        "fc": {"kernel": jnp.zeros((6, 2))},
    },
    "batch_stats": {"conv10": {"norm": {"mean": jnp.zeros(5), "var": jnp.ones(5)}}},
}
EXAMPLE = fl.types.Batch(
    jnp.zeros((1, 4)),
    jnp.zeros(1, jnp.int32),
    None,
    fl.types.Normalize(jnp.ones(()), jnp.zeros(())),
)


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


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in ("stem", "block2", "block10"):
            x = nn.relu(nn.Dense(4, name=name)(x))
        return nn.Dense(3, name="fc")(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.fc, self.stem = (nnx.Linear(4, n, rngs=rngs) for n in (3, 4))
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.unused = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.fc(self.blocks[1](self.blocks[0](self.stem(x))))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (Linen(), ["stem", "block2", "block10", "fc"]),
        (Nnx(nnx.Rngs(0)), ["stem", "blocks/0", "blocks/1", "fc", "unused"]),
    ],
)
def test_the_order_of_use_is_that_of_the_forward_pass(model, names):
    task = fl.classification(model)
    table = layer_table(jax.eval_shape(task.init, jax.random.key(0), EXAMPLE))
    assert table.names[0] != "stem"
    assert [table.names[layer] for layer in order_of_use(task, table, EXAMPLE)] == names


def test_the_order_of_use_of_layers_that_enter_a_compiled_block_is_natural():
    task = fl.classification(Linen())
    compiled = task._replace(outputs=jax.jit(task.outputs))
    table = layer_table(jax.eval_shape(task.init, jax.random.key(0), EXAMPLE))
    assert order_of_use(compiled, table, EXAMPLE) == (0, 1, 2, 3)
