"""The networks: counts, names, initial values, batch normalisation and pooling."""

import functools
import os
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from small import in_float64

from fedlp_jax.errors import FedLPError
from fedlp_jax.nn import dense
from fedlp_jax.nn.models import MLP, MNISTCNN, BatchNorm, FedLPCNN, Logistic, ResNet, cnn
from fedlp_jax.nn.models import base as initial_values
from fedlp_jax.nn.pooling import max_pool
from fedlp_jax.tasks.flax_adapter import network

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
CIFAR, MNIST = (32, 32, 3), (28, 28, 1)
SHARED = {1: 10_272, 2: 28_896, 3: 65_952, 4: 140_064, 5: 551_466}
LOCAL = {1: 1_060_266, 2: 554_602, 3: 591_658, 4: 403_626, 5: 551_466}
DATA_DIR = os.environ.get("TFDS_DATA_DIR", "")


def shapes(module, shape, dtype=jnp.float32):
    """Shapes of a module's variables, without computing them."""
    return jax.eval_shape(lambda x: module.init(KEY, x, False), jnp.zeros((2, *shape), dtype))


def some_variables(module, *shape):
    """Well-scaled random variables: flax's own take seconds to compile."""

    def draw(path, leaf):
        name = path[-1]
        if name in ("scale", "var"):
            return RNG.uniform(0.5, 1.5, leaf.shape)
        fan_in = np.prod(leaf.shape[:-1]) if name == "kernel" else 100
        return RNG.normal(size=leaf.shape) / np.sqrt(fan_in)

    flat = flatten_dict(shapes(module, shape))
    values = {p: jnp.asarray(draw(p, leaf), jnp.float32) for p, leaf in flat.items()}
    return unflatten_dict(values)


def size(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def relative(one, other):
    """Largest difference of two trees, each leaf against the largest number of that leaf."""
    differences = jax.tree.map(
        lambda a, b: np.abs(a - b).max() / (np.abs(b).max() + 1e-300), one, other
    )
    return max(jax.tree.leaves(differences))


# --- counts and names -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "shape", "count"),
    [
        *((FedLPCNN(depth=depth), CIFAR, LOCAL[depth]) for depth in LOCAL),
        (MNISTCNN(), MNIST, 21_840),
        (MLP(), MNIST, 494_762),
        (MLP(hidden=()), MNIST, 7_850),
        (Logistic(), MNIST, 7_850),
        (ResNet(), CIFAR, 195_738),
    ],
)
def test_parameters(module, shape, count):
    assert size(shapes(module, shape)["params"]) == count


@pytest.mark.parametrize("depth", SHARED)
def test_depths_share_layers_by_name_and_heads_are_private(depth):
    whole = flatten_dict(shapes(FedLPCNN(), CIFAR))
    part = flatten_dict(shapes(FedLPCNN().clone(depth=depth), CIFAR))
    shared = {path: leaf for path, leaf in part.items() if path in whole}
    assert all(leaf.shape == whole[path].shape for path, leaf in shared.items())
    assert size({p: leaf for p, leaf in shared.items() if p[0] == "params"}) == SHARED[depth]
    private = {path[1] for path in part if path not in whole}
    assert private == (set() if depth == 5 else {f"exit{depth}_fc1", f"exit{depth}_fc2"})


def test_the_depth_of_an_mlp_follows_its_layers():
    assert network(MLP().clone(hidden=(9, 8))).depth == 2
    assert len(shapes(MLP(hidden=(9,)).clone(hidden=(9, 8)), (5,))["params"]) == 3


@pytest.mark.parametrize(
    ("whole", "shape"),
    [(MLP(hidden=(9, 8, 7)), (5,)), (ResNet(), (8, 8, 3))],
    ids=["mlp", "resnet"],
)
def test_depths_are_prefixes_with_an_exit_of_their_own(whole, shape):
    assert network(whole).depth == 3
    assert shapes(whole.clone(depth=3), shape).keys() == shapes(whole, shape).keys()
    one, two, three = (set(shapes(whole.clone(depth=d), shape)["params"]) for d in (1, 2, 3))
    assert (one - three, two - three) == ({"exit1_fc"}, {"exit2_fc"})
    assert one - {"exit1_fc"} < two - {"exit2_fc"} < three


def test_layers_are_the_first_names_below_the_collections():
    variables = shapes(FedLPCNN(), CIFAR)
    convolutions = [f"conv{i}" for i in range(1, 7)]
    assert sorted(variables["params"]) == [*convolutions, "fc1", "fc2"]
    assert sorted(variables["batch_stats"]) == convolutions
    assert set(variables["params"]["conv3"]) == {"conv", "norm"}
    assert set(variables["batch_stats"]["conv3"]["norm"]) == {"mean", "var"}
    blocks = [f"stage{s}_block{b}" for s in (1, 2, 3) for b in (1, 2)]
    assert sorted(shapes(ResNet(), CIFAR)["params"]) == sorted(["stem", *blocks, "fc"])


MODELS = {
    "fedlp_cnn": (FedLPCNN(num_classes=7, depth=2), (16, 8, 1)),
    "mnist_cnn": (MNISTCNN(num_classes=7), (17, 20, 1)),
    "mlp": (MLP(hidden=(9, 8), num_classes=7), (3, 2)),
    "logistic": (Logistic(num_classes=7), (5,)),
    "resnet": (ResNet(num_classes=7), (8, 9, 3)),
}


def _fast_compile(f):
    """Without optimisations, which take most of the time of these tests and change no meaning."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def training_step(module):
    """Gradients, logits and new statistics of one client, from its variables and a batch."""

    def step(variables, x):
        def loss(params):
            logits, updated = module.apply(
                {**variables, "params": params}, x, True, rngs={"dropout": KEY}, mutable=True
            )
            del updated["params"]
            return jnp.square(logits).sum(), (logits, updated)

        return jax.grad(loss, has_aux=True)(variables["params"])

    return step


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_float64_parameters_compute_in_float64(name):
    module, shape = MODELS[name]
    with jax.enable_x64(True):
        variables = in_float64(some_variables(module, *shape))
        x = jnp.zeros((4, *shape))
        made = jax.eval_shape(training_step(module), variables, x)
        logits = jax.eval_shape(lambda v: module.apply(v, x, False), variables)
        assert made[1][0].shape == logits.shape == (4, 7)
        assert {leaf.dtype for leaf in jax.tree.leaves((made, logits))} == {np.dtype("float64")}


@pytest.mark.parametrize("name", [pytest.param("fedlp_cnn", marks=pytest.mark.slow), "mlp"])
def test_clients_side_by_side_are_each_as_if_alone(name):
    module, shape = MODELS[name]
    with jax.enable_x64(True):
        clients = [in_float64(some_variables(module, *shape)) for _ in range(3)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *clients)
        x = jnp.asarray(RNG.normal(size=(3, 4, *shape)))
        together = _fast_compile(jax.vmap(training_step(module)))(stacked, x)
        alone = _fast_compile(training_step(module))(clients[1], x[1])
        assert relative(jax.tree.map(lambda t: t[1], together), alone) < 1e-10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedLPCNN(init="pytoch"), "init 'pytoch' is unknown; did you mean 'pytorch'"),
        (lambda: MLP(init="he"), "init 'he' is unknown. Known: flax, pytorch"),
        (lambda: FedLPCNN(depth=6), "depth=6 must be an integer from 1 to 5"),
        (lambda: FedLPCNN(depth=2.0), "depth=2.0 must be"),
        (lambda: MLP(hidden=(9, 8), depth=3), r"depth=3 must be a whole number in \[1, 2\]"),
        (lambda: ResNet(depth=0), r"depth=0 must be a whole number in \[1, 3\]"),
        (lambda: shapes(FedLPCNN(), MNIST), r"multiples of 8, not \[2, 28, 28, 1\]"),
        (lambda: shapes(FedLPCNN(depth=1), (784,)), r"images .* not \[2, 784\]"),
        (lambda: shapes(MNISTCNN(), (15, 28, 1)), r"16 or more, not \[2, 15, 28, 1\]"),
        (lambda: shapes(ResNet(), (784,)), r"images .* not \[2, 784\]"),
    ],
)
def test_errors_say_the_numbers(make, message):
    with pytest.raises(FedLPError, match=message):
        make()


def test_dropout_drops_whole_channels_while_training_only():
    module = MNISTCNN()
    variables = some_variables(module, *MNIST)
    x = jnp.asarray(RNG.normal(size=(2, *MNIST)), jnp.float32)

    @functools.partial(jax.jit, static_argnums=1)
    def run(key, train):
        return module.apply(
            variables, x, train, rngs={"dropout": key}, capture_intermediates=True, mutable=True
        )

    logits, state = run(KEY, True)
    dropped = np.asarray(state["intermediates"]["Dropout_0"]["__call__"][0]) == 0
    assert (dropped.all(axis=(1, 2)) == dropped.any(axis=(1, 2))).all()
    assert 0 < dropped.mean() < 1
    assert not np.array_equal(logits, run(jax.random.key(1), True)[0])
    np.testing.assert_array_equal(run(KEY, False)[0], run(jax.random.key(1), False)[0])


# --- initial values -------------------------------------------------------------------------


def test_pytorch_initialisation_is_uniform_in_kernels_and_biases():
    module = MNISTCNN(init="pytorch")
    params = _fast_compile(lambda: module.init(KEY, jnp.zeros((1, *MNIST)), False))()
    bounds = {"conv1": 1 / 5, "conv2": 1 / 250**0.5, "fc1": 1 / 320**0.5, "fc2": 1 / 50**0.5}
    for layer, bound in bounds.items():
        for name, values in params["params"][layer].items():
            scaled = np.sort(np.ravel(values)) / bound
            n = len(scaled)
            # Kolmogorov-Smirnov against the uniform distribution on (-1, 1), at level 1e-4.
            empirical = np.arange(1, n + 1) / n
            assert np.abs(scaled).max() <= 1 + 1e-6, (layer, name)
            assert np.abs((scaled + 1) / 2 - empirical).max() < 2.23 / n**0.5, (layer, name)


def test_flax_initialisation_is_that_of_flax():
    made = jax.jit(lambda: Logistic().init(KEY, jnp.zeros((1, 5)), False))()

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(10, name="fc")(x)

    plain = jax.jit(lambda: Plain().init(KEY, jnp.zeros((1, 5))))()
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), made, plain))


def test_init_survives_a_clone():
    module = FedLPCNN(init="pytorch").clone(depth=2)
    assert (module.depth, module.initial) == (2, "pytorch")
    assert FedLPCNN(10, 2, init="pytorch") == module


# --- batch normalisation --------------------------------------------------------------------


def run_norm(x, mask=None, old=(0.25, 2.0), **fields):
    """Output, gradients of a weighted sum by (x, scale, bias), and new statistics, in jit."""
    channels = x.shape[-1]
    dtype = x.dtype
    stats = {"mean": jnp.full(channels, old[0], dtype), "var": jnp.full(channels, old[1], dtype)}
    params = {"scale": jnp.linspace(0.5, 2, channels), "bias": jnp.linspace(-1, 1, channels)}
    params = jax.tree.map(lambda t: t.astype(dtype), params)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), dtype)
    if mask is not None:
        weights = jnp.where(jnp.broadcast_to(mask, x.shape), weights, 0)
    module = fields.pop("module", BatchNorm)(use_running_average=False, **fields)

    @jax.jit
    def run(x, params):
        def f(x, params):
            out, updated = module.apply(
                {"params": params, "batch_stats": stats}, x, mask=mask, mutable=["batch_stats"]
            )
            kept = out if mask is None else jnp.where(mask, out, 0)
            return (kept * weights).sum(), (out, updated["batch_stats"])

        (_, aux), gradients = jax.value_and_grad(f, (0, 1), has_aux=True)(x, params)
        return *aux, gradients

    return run(x, params)


def test_batch_normalisation_is_the_formula():
    with jax.enable_x64(True):
        x = RNG.normal(3, 2, size=(4, 3, 2, 5))
        out, stats, _ = run_norm(jnp.asarray(x))
        mean, var, n = x.mean((0, 1, 2)), x.var((0, 1, 2)), 24
        want = (x - mean) / np.sqrt(var + 1e-5) * np.linspace(0.5, 2, 5) + np.linspace(-1, 1, 5)
        np.testing.assert_allclose(out, want, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(stats["mean"], 0.9 * 0.25 + 0.1 * mean, rtol=1e-12)
        np.testing.assert_allclose(stats["var"], 0.9 * 2 + 0.1 * var * n / (n - 1), rtol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_its_biased_form_and_all_gradients_are_those_of_flax(masked):
    with jax.enable_x64(True):
        x = jnp.asarray(RNG.normal(3, 2, size=(6, 3, 2, 5)))
        mask = jnp.asarray([1, 1, 0, 1, 0, 1], bool).reshape(6, 1, 1, 1) if masked else None
        ours = run_norm(x, mask, unbiased=False)
        flax = functools.partial(nn.BatchNorm, momentum=0.9, use_fast_variance=False)
        with jax.numpy_dtype_promotion("standard"):  # which flax needs
            theirs = run_norm(x, mask, module=flax)
        assert relative(ours, theirs) < 1e-12


def test_masked_rows_stay_out():
    with jax.enable_x64(True):
        x = jnp.asarray(RNG.normal(3, 2, size=(4, 3, 2, 5)))
        padded = jnp.concatenate([x, jnp.full((2, 3, 2, 5), 1e3)])
        mask = (jnp.arange(6) < 4).reshape(6, 1, 1, 1)
        (out, stats, gradients), short = run_norm(padded, mask), run_norm(x)
        # The weights of the summed outputs are the same for the first four rows.
        whole = (out[:4], stats, (gradients[0][:4], gradients[1]))
        assert relative(whole, short) < 1e-12
        assert (gradients[0][4:] == 0).all()


@pytest.mark.parametrize("shape", [(6, 1), (6, 5), (5,)])
def test_any_mask_that_broadcasts_counts_right(shape):
    with jax.enable_x64(True):
        x = RNG.normal(size=(6, 5))
        mask = RNG.random(shape) < 0.6
        mask.flat[0] = True
        _, stats, _ = run_norm(jnp.asarray(x), jnp.asarray(mask), old=(0.0, 0.0))
        for channel in range(5):
            kept = x[np.broadcast_to(mask, x.shape)[:, channel], channel]
            want = (kept.mean(), kept.var(ddof=min(1, len(kept) - 1))) if len(kept) else (0, 0)
            np.testing.assert_allclose(stats["mean"][channel], 0.1 * want[0], rtol=1e-10)
            np.testing.assert_allclose(stats["var"][channel], 0.1 * want[1], rtol=1e-10)


def test_one_row_and_no_row():
    x = jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32)
    one = run_norm(x, jnp.asarray([[True], [False]]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one))
    np.testing.assert_allclose(one[0][0], [-1, 0, 1], atol=1e-6)  # the bias: no spread at all
    np.testing.assert_allclose(one[1]["var"], 0.9 * 2, rtol=1e-6)
    none = run_norm(x, jnp.asarray([[False], [False]]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(none))
    np.testing.assert_array_equal(none[1]["mean"], np.full(3, 0.25, np.float32))
    np.testing.assert_array_equal(none[1]["var"], np.full(3, 2, np.float32))


def test_a_large_mean_costs_no_digits():
    """The mean of squares less the square of the mean would leave nothing here."""
    x = RNG.normal(size=(64, 2))
    shifted = jnp.asarray(x + 4096, jnp.float32)
    out, _, _ = run_norm(shifted)
    x = np.asarray(shifted, np.float64) - 4096
    want = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * [0.5, 2] + [-1, 1]
    np.testing.assert_allclose(out, want, atol=1e-3)


def test_statistics_of_short_floats_are_float32():
    module = BatchNorm(use_running_average=False, param_dtype=jnp.bfloat16)
    x = jnp.asarray(RNG.normal(5, 1, size=(512, 2)), jnp.bfloat16)
    out, variables = module.init_with_output(KEY, x)
    assert out.dtype == jnp.bfloat16
    assert variables["batch_stats"]["mean"].dtype == jnp.float32
    _, updated = module.apply(variables, x, mutable=["batch_stats"])
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * exact.mean(0), rtol=1e-5)
    # float32 parameters with a short input: the wider dtype, as flax has it
    wide = BatchNorm(use_running_average=False).init_with_output(KEY, x)[0]
    assert wide.dtype == jnp.float32


def test_evaluation_uses_running_statistics_and_leaves_them():
    x = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
    variables = {
        "params": {"scale": jnp.full(3, 2.0), "bias": jnp.full(3, 1.0)},
        "batch_stats": {"mean": jnp.full(3, 0.5), "var": jnp.full(3, 4.0)},
    }
    module = BatchNorm()
    out, updated = module.apply(variables, x, use_running_average=True, mutable=["batch_stats"])
    np.testing.assert_allclose(out, (x - 0.5) / np.sqrt(4 + 1e-5) * 2 + 1, rtol=1e-5, atol=1e-6)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: (a == b).all(), updated["batch_stats"], variables["batch_stats"])
    )
    fresh = BatchNorm(use_running_average=False).init(KEY, x)["batch_stats"]
    assert (fresh["mean"] == 0).all() and (fresh["var"] == 1).all()


# --- pooling --------------------------------------------------------------------------------


def gradient_of(pool, x):
    out, pull = jax.vjp(pool, x)
    weights = np.random.default_rng(1).normal(size=out.shape)
    return out, pull(jnp.asarray(weights, out.dtype))[0]


@pytest.mark.parametrize("window", [(2, 2), (3, 2), (1, 1), (12, 12)])
def test_pooling_and_its_gradient_are_those_of_flax(window):
    """Bit for bit, with many ties; 7 and 13 leave rows and columns over."""
    x = jnp.asarray(np.maximum(RNG.integers(-9, 4, (3, 13, 26, 5)), 0), jnp.float32)
    ours = jax.jit(functools.partial(gradient_of, functools.partial(max_pool, window=window)))(x)
    flax = jax.jit(lambda x: gradient_of(lambda x: nn.max_pool(x, window, window), x))(x)
    for one, other in zip(ours, flax, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_pooling_in_forward_mode_and_side_by_side():
    x, dx = (jnp.asarray(RNG.normal(size=(3, 2, 4, 6, 5)), jnp.float32) for _ in range(2))
    both = jax.jit(lambda x, dx: jax.jvp(jax.vmap(max_pool), (x,), (dx,)))(x, dx)
    flat = jax.jit(lambda x, dx: jax.jvp(lambda t: nn.max_pool(t, (2, 2), (2, 2)), (x,), (dx,)))(
        x.reshape(6, 4, 6, 5), dx.reshape(6, 4, 6, 5)
    )
    for one, other in zip(both, flat, strict=True):
        np.testing.assert_array_equal(one.reshape(other.shape), other)


@pytest.mark.parametrize("place", range(4))
def test_not_a_number_is_the_largest(place):
    x = np.arange(4, dtype=np.float32)
    x[place] = np.nan
    out, gradient = gradient_of(max_pool, jnp.asarray(x.reshape(1, 2, 2, 1)))
    assert np.isnan(out).all()
    assert np.flatnonzero(gradient).tolist() == [place]


def test_an_image_without_a_batch_is_no_input_of_a_pooling():
    with pytest.raises(FedLPError, match=r"\[B, H, W, channels\], not \[8, 8, 3\]"):
        max_pool(jnp.zeros((8, 8, 3)))


def test_a_pooling_is_computed_once():
    """XLA computed it, and what came before, for every weight of the dense layer behind it."""
    x = jnp.asarray(RNG.normal(size=(4, 8, 8, 16)), jnp.float32)
    parameters = {
        "scale": jnp.ones((1, 1, 1, 16)),
        "kernel": jnp.asarray(RNG.normal(size=(256, 32)), jnp.float32),
    }

    def loss(p):
        pooled = max_pool(jnp.sin(x) * p["scale"] + 1)
        return jnp.square(dense.outer(pooled.reshape(4, -1), p["kernel"])).sum()

    def train(p):
        def step(_, p):
            return jax.tree.map(lambda p, g: p - 1e-3 * g, p, jax.grad(loss)(p))

        return lax.fori_loop(0, 10, step, p)

    text = jax.jit(train).lower(parameters).compile().as_text()
    shape_of = dict(re.findall(r"%([\w.-]+) = \w+\[([\d,]*)\]", text))
    steps = re.findall(r"= f32\[256,32\]\S* fusion\(([^)]*)\)", text)
    assert steps
    for operands in steps:
        shapes_read = [shape_of[name] for name in re.findall(r"%([\w.-]+)", operands)]
        sizes = [np.prod([int(n) for n in shape.split(",") if n]) for shape in shapes_read]
        assert 256 * 32 in sizes  # the kernel
        assert x.size not in sizes


# --- the whole network ----------------------------------------------------------------------


def images(source):
    """Six normalised images as they are stored: integers from 0 to 255."""
    if source == "made up":
        pixels = RNG.integers(0, 4, (6, *CIFAR)) * 85  # flat regions tie
    else:
        from fedlp_jax.data.loading import load

        pixels = load("cifar10").test.inputs[:6]
    return pixels / 255 * 2 - 1


@functools.cache
def step_of(form):
    """Gradients and statistics of a training step: "ours", or of flax's and lax's own parts."""
    module = FedLPCNN()

    @jax.jit
    def step(variables, x):
        def loss(params):
            logits, updated = module.apply({**variables, "params": params}, x, True, mutable=True)
            return nn.log_softmax(logits)[:, 3].sum(), (logits, updated["batch_stats"])

        return jax.grad(loss, has_aux=True)(variables["params"])

    with pytest.MonkeyPatch.context() as patch:
        if form == "plain":
            pool = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
            norm = functools.partial(nn.BatchNorm, momentum=0.9, use_fast_variance=False)
            patch.setattr(cnn, "max_pool", pool)
            patch.setattr(cnn, "BatchNorm", norm)
            patch.setattr(initial_values, "conv_general_dilated", lax.conv_general_dilated)
        variables = in_float64(shapes_as_ones(module))
        with jax.numpy_dtype_promotion("strict" if form == "ours" else "standard"):
            return step.lower(variables, jnp.ones((6, *CIFAR))).compile()


def shapes_as_ones(module):
    return jax.tree.map(lambda t: np.ones(t.shape), shapes(module, CIFAR))


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        "made up",
        pytest.param(
            "real",
            marks=[
                pytest.mark.real_data,
                pytest.mark.skipif(
                    not DATA_DIR or not (Path(DATA_DIR) / "cifar10").is_dir(),
                    reason="cifar10 is not prepared under TFDS_DATA_DIR",
                ),
            ],
        ),
    ],
)
def test_the_jitted_network_has_the_gradient_of_plain_flax(source):
    """Convolution, pooling and normalisation together, where a third of the windows tie."""
    with jax.enable_x64(True):
        x = jnp.asarray(images(source))
        variables = in_float64(some_variables(FedLPCNN(), *CIFAR))
        gradients, (logits, stats) = step_of("ours")(variables, x)
        plain_gradients, (plain_logits, plain_stats) = step_of("plain")(variables, x)
        assert relative(logits, plain_logits) < 1e-11
        assert relative(gradients, plain_gradients) < 1e-10
        for layer, statistics in stats.items():
            n = 6 * 32 * 32 / 4 ** ((int(layer[-1]) - 1) // 2)
            old = variables["batch_stats"][layer]["norm"]["var"]
            biased = (statistics["norm"]["var"] - 0.9 * old) * (n - 1) / n + 0.9 * old
            plain = plain_stats[layer]["norm"]
            np.testing.assert_allclose(biased, plain["var"], rtol=1e-10)
            np.testing.assert_allclose(statistics["norm"]["mean"], plain["mean"], rtol=1e-9)


@pytest.mark.parametrize(
    "module", [FedLPCNN, functools.partial(FedLPCNN, depth=2), MNISTCNN, ResNet, MLP, Logistic]
)
def test_activations_of_a_short_dtype_leave_variables_in_float32(module):
    """And every layer in between puts out that dtype."""
    image = MNIST if module is MNISTCNN else CIFAR
    short, x = module(dtype="bfloat16"), jnp.zeros((2, *image))
    rngs = {"params": KEY, "dropout": KEY}
    variables = jax.eval_shape(lambda: short.init(rngs, x, True))
    assert variables == jax.eval_shape(lambda: module().init(rngs, x, True))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}

    def outputs(variables):
        mutable = ["batch_stats", "intermediates"]
        return short.apply(
            variables, x, True, rngs=rngs, capture_intermediates=True, mutable=mutable
        )

    out, updated = jax.eval_shape(outputs, variables)
    between = jax.tree.leaves(updated["intermediates"])
    assert len(between) > 1
    assert {y.dtype for y in (out, *between)} == {jnp.dtype(jnp.bfloat16)}
    assert updated.get("batch_stats", {}) == variables.get("batch_stats", {})


@pytest.mark.slow
def test_a_short_dtype_computes_the_same_to_its_digits():
    module, image = functools.partial(FedLPCNN, depth=1), (8, 8, 3)
    variables = some_variables(module(), *image)
    x = jnp.asarray(RNG.normal(size=(4, *image)), jnp.float32)
    wide, short = (
        jax.jit(lambda v, d=d: module(dtype=d).apply(v, x, False))(variables)
        for d in (None, "bfloat16")
    )
    error = np.linalg.norm(short.astype(jnp.float32) - wide) / np.linalg.norm(wide)
    assert 1e-4 < error < 0.03


@pytest.mark.parametrize("dtype", ["bfloat", "int32", 3])
def test_a_dtype_that_is_no_float_is_refused(dtype):
    with pytest.raises(FedLPError, match=f"dtype={dtype!r} is not a floating-point type; use 'bf"):
        MLP(dtype=dtype)
