"""Depth prefixes, and who is given which depth."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Steps, flat

import fedlp_jax as fl
from fedlp_jax.pruning import submodels as submodel
from fedlp_jax.pruning.submodels import assign_depths, depth_prefix, full, union_of_depths
from fedlp_jax.types import Batch, Normalize

EXAMPLE = Batch(
    jnp.zeros((1, 4)), jnp.zeros(1, jnp.int32), None, Normalize(np.ones(()), np.zeros(()))
)
KEY = jax.random.key(0)
TASK = fl.classification(Steps(norm=True))
WHOLE = TASK.init(KEY, EXAMPLE)


def test_a_prefix_shares_by_name_and_keeps_its_head():
    level = depth_prefix(TASK, 2, WHOLE, EXAMPLE)
    shared = level.extract(WHOLE)
    assert set(shared["params"]) == {"hidden1", "hidden2", "norm1", "norm2"}
    private = level.private(KEY, EXAMPLE)
    assert set(private["params"]) == {"head2"}
    whole = level.merge(shared, private)
    again = level.split(whole)
    assert np.array_equal(flat(again[0]), flat(shared))
    assert np.array_equal(flat(again[1]), flat(private))
    wide = level.embed(shared, WHOLE)
    assert jax.tree.structure(wide) == jax.tree.structure(WHOLE)
    assert not flat(wide["params"]["hidden3"]).any()
    assert np.array_equal(flat(wide["params"]["hidden2"]), flat(WHOLE["params"]["hidden2"]))


def test_the_whole_has_nothing_private():
    assert full(TASK).private(KEY, EXAMPLE) == {}
    deepest = depth_prefix(TASK, 3, WHOLE, EXAMPLE)
    assert not jax.tree.leaves(deepest.private(KEY, EXAMPLE))


@pytest.mark.parametrize("scheme", [submodel.whole(), submodel.by_depth("uniform")])
def test_personal_layers_are_private_at_every_level(scheme):
    kept = submodel.personal("norm|hidden2/bias", scheme)
    server = kept.init(TASK, KEY, EXAMPLE)
    assert set(server) == {"params"}
    assert set(server["params"]) == {"head3", "hidden1", "hidden2", "hidden3"}
    assert set(server["params"]["hidden2"]) == {"kernel"}
    for level in kept.levels(TASK, server, EXAMPLE):
        shared, private = level.extract(server), level.private(KEY, EXAMPLE)
        drawn = level.task.init(KEY, EXAMPLE)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), private)
        assert shapes == level.private_shapes
        model = level.merge(shared, private)
        assert jax.tree.structure(model) == jax.tree.structure(drawn)
        assert np.array_equal(flat(private["batch_stats"]), flat(drawn["batch_stats"]))
        again = level.split(model)
        assert np.array_equal(flat(again[0]), flat(shared))
        assert np.array_equal(flat(again[1]), flat(private))
        wide = level.embed(shared, server)
        assert jax.tree.structure(wide) == jax.tree.structure(server)


def test_clients_keep_what_they_are_given():
    kept = submodel.shared("head")
    (level,) = kept.levels(TASK, WHOLE, EXAMPLE)
    private = level.private(jax.random.key(5), EXAMPLE)
    assert np.array_equal(flat(level.merge(kept.of_server(WHOLE), private)), flat(WHOLE))
    wide = fl.classification(Steps(width=9, norm=True)).init(KEY, EXAMPLE)
    with pytest.raises(fl.FedLPError, match=r"norm1/mean of the given variables is \[9\]"):
        kept.levels(TASK, wide, EXAMPLE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: submodel.personal("fc"), "'fc': clients keep none of the 14 parameters, .* head3"),
        (lambda: submodel.personal("."), "share none of the 14 parameters"),
        (lambda: submodel.shared("."), "keep none of the 14"),
        (lambda: submodel.shared("fc"), "share none of the 14"),
        (lambda: submodel.personal("("), r"'\(' is not a regular expression"),
        (lambda: submodel.personal(3), "3 is not a regular expression"),
        (
            lambda: submodel.personal("head", submodel.by_depth(1, "reset_to_init")),
            "heads='reset_to_init' keeps nothing; choose",
        ),
    ],
)
def test_personal_layers_that_make_no_sense_are_refused(make, message):
    with pytest.raises(fl.FedLPError, match=message):
        make().init(TASK, KEY, EXAMPLE)


def test_a_union_has_the_head_of_every_depth():
    union = union_of_depths(TASK, KEY, EXAMPLE)
    assert {"head1", "head2", "head3"} <= set(union["params"])
    level = depth_prefix(TASK, 1, union, EXAMPLE)
    assert not jax.tree.leaves(level.private(KEY, EXAMPLE))


def test_shared_names_of_different_shape_are_refused():
    class Narrowing(nn.Module):
        depth: int = 2

        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(3, name="out")(nn.Dense(4 * self.depth, name="body")(x))

    task = fl.classification(Narrowing())
    with pytest.raises(fl.FedLPError, match=r"params/body/\w+ is \(\S+.*\) at depth 1 but"):
        depth_prefix(task, 1, task.init(KEY, EXAMPLE), EXAMPLE)


def test_a_model_without_depths_says_so():
    task = fl.classification(nn.Dense(3))
    with pytest.raises(fl.FedLPError, match="has no depths; give its module an integer field"):
        depth_prefix(task, 1, task.init(KEY, EXAMPLE), EXAMPLE)


def test_a_flag_gives_its_depth_to_six_in_ten():
    depths = assign_depths(4, KEY, 20_000, 5)
    share = np.bincount(depths, minlength=6)[1:] / 20_000
    expected = np.array([0.1, 0.1, 0.1, 0.6, 0.1])
    assert (np.abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 20_000)).all()


def test_depths_belong_to_the_client_not_to_the_population():
    few, many = (assign_depths("uniform", KEY, clients, 5) for clients in (10, 99))
    assert np.array_equal(few, many[:10])
    assert not np.array_equal(many, assign_depths("uniform", jax.random.key(1), 99, 5))


def test_probabilities_and_explicit_depths():
    assert (assign_depths([0, 0, 1, 0, 0], KEY, 50, 5) == 3).all()
    assert (assign_depths([0.0, 0.0, 0.0, 0.0, 1.0], KEY, 50, 5) == 5).all()
    assert assign_depths([1, 2, 3], KEY, 3, 5).tolist() == [1, 2, 3]


def test_the_flag_of_a_model_of_one_depth_is_for_all():
    assert (assign_depths(1, KEY, 5, 1) == 1).all()


@pytest.mark.parametrize(
    ("depths", "message"),
    [
        (6, "depths=6 is outside 1 to 5"),
        (0, "depths=0 is outside"),
        ("deep", "depths='deep' is unknown; give 'uniform'"),
        ([0.5, 0.5, 0.5, 0, 0], r"shape \[5\] and sum 1.5"),
        ([1, 2, 9], r"shape \[3\]"),
        ([float("nan")] * 5, "sum nan"),
        ([-1, 1, 1, 0, 0], "sum 1;"),
        ({"a": 1}, "cannot be read as numbers"),
    ],
)
def test_refusals(depths, message):
    with pytest.raises(fl.FedLPError, match=message):
        assign_depths(depths, KEY, 3, 5)


def test_private_variables_have_the_dtype_of_the_server():
    """Activations in bfloat16 leave parameters in float32."""
    task = fl.classification(fl.models.FedLPCNN(dtype="bfloat16"))
    image = Batch(jnp.zeros((1, 8, 8, 3)), jnp.zeros(1, jnp.int32), None, EXAMPLE.normalize)
    level = depth_prefix(task, 2, jax.eval_shape(task.init, KEY, image), image)
    head = jax.eval_shape(level.private, KEY, image)
    assert head == level.private_shapes
    assert {leaf.dtype for leaf in jax.tree.leaves(head)} == {jnp.dtype("float32")}


@pytest.mark.slow
@pytest.mark.parametrize("heads", ["persist", "shared"])
@pytest.mark.slow
def test_submodels_with_activations_in_bfloat16_train_and_keep_their_variables(heads):
    data = fl.load("synthetic", examples=64, shape=(8, 8, 3), num_classes=10, seed=0)
    run = fl.simulate(
        fl.fedlp_hetero(
            fl.classification(fl.models.FedLPCNN(dtype="bfloat16")),
            depths=[1, 2, 1, 2],
            heads=heads,
            client_optimizer=optax.sgd(0.01),
            batch_size=4,
        ),
        data,
        fl.partition.iid(data.train.labels, clients=4, seed=0),
        rounds=2,
        cohort=4,
        plan=fl.Plan(devices=1, width=2),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(run.variables)} == {jnp.dtype("float32")}
    assert np.isfinite(run.history["train_loss"]).all()
