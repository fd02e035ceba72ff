"""Lowered convolutions: the numbers of lax, no convolution left, and any flax module."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from fedlp_jax.errors import FedLPError
from fedlp_jax.nn.conv import conv_general_dilated, recording, using
from fedlp_jax.nn.conv.winograd import toom
from fedlp_jax.nn.linen_layers import interceptor
from fedlp_jax.nn.nnx_layers import inject

RNG = np.random.default_rng(0)

# input [B, *spatial, in], kernel [*kernel, in, out], strides, padding, kernel dilation
TABLE = [
    ((2, 8, 8, 3), (3, 3, 3, 4), (1, 1), "SAME", (1, 1)),
    ((2, 8, 8, 3), (3, 3, 3, 4), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    ((2, 9, 7, 3), (3, 3, 3, 4), (2, 2), "SAME", (1, 1)),
    ((2, 9, 7, 3), (3, 3, 3, 4), (2, 2), ((1, 1), (1, 1)), (1, 1)),
    ((2, 9, 8, 3), (3, 2, 3, 4), (2, 1), "SAME_LOWER", (1, 1)),
    ((2, 12, 12, 1), (5, 5, 1, 10), (1, 1), "VALID", (1, 1)),
    ((2, 6, 6, 10), (5, 5, 10, 3), (1, 1), "SAME", (1, 1)),
    ((2, 7, 7, 4), (2, 2, 4, 5), (2, 2), "VALID", (1, 1)),
    ((2, 5, 6, 4), (1, 1, 4, 5), (1, 1), "SAME", (1, 1)),
    ((2, 5, 6, 4), (1, 1, 4, 5), (2, 3), "VALID", (1, 1)),
    ((2, 5, 6, 4), (1, 1, 4, 5), (1, 1), ((2, 0), (1, 1)), (1, 1)),
    ((2, 5, 6, 2), (1, 1, 2, 9), (1, 1), "VALID", (1, 1)),  # fewer inputs than outputs
    ((2, 9, 9, 3), (3, 3, 3, 4), (1, 1), "SAME", (2, 2)),
    ((2, 11, 9, 3), (3, 2, 3, 4), (2, 1), ((3, 2), (0, 4)), (2, 3)),
    ((2, 9, 9, 3), (3, 3, 3, 4), (1, 1), ((-1, -2), (2, -1)), (1, 1)),  # negative: crops
    ((2, 10, 3), (3, 3, 4), (1,), "SAME", (1,)),
    ((2, 11, 3), (5, 3, 4), (2,), ((4, 0),), (1,)),
    ((2, 4, 5, 6, 2), (3, 1, 2, 2, 3), (1, 2, 1), "SAME", (1, 1, 2)),
    ((1, 3, 3, 2), (3, 3, 2, 2), (4, 4), "VALID", (1, 1)),
    ((0, 4, 4, 2), (3, 3, 2, 2), (1, 1), "SAME", (1, 1)),
]


def channels_last(ndim):
    """Dimension numbers as flax passes them."""
    spec = (0, ndim - 1, *range(1, ndim - 1))
    kernel = (ndim - 1, ndim - 2, *range(ndim - 2))
    return lax.ConvDimensionNumbers(spec, kernel, spec)


def value_and_gradients(conv, x, w, *arguments, **keywords):
    """The result, and gradients by the input and the kernel of a sum with random weights."""

    def f(x, w):
        return conv(x, w, *arguments, dimension_numbers=channels_last(x.ndim), **keywords)

    out, pull = jax.vjp(f, x, w)
    weights = np.random.default_rng(1).normal(size=out.shape).astype(out.dtype)
    return out, *pull(jnp.asarray(weights))


def close(one, other, tolerance):
    """Largest difference against the largest number."""
    one, other = np.asarray(one), np.asarray(other)
    assert one.shape == other.shape and one.dtype == other.dtype
    assert np.abs(one - other).max(initial=0) <= tolerance * np.abs(other).max(initial=0)


def compare(dtype, tolerance, shape, kernel, strides, padding, dilation, lowering="patches"):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), dtype) for s in (shape, kernel))

    @jax.jit  # one program for both: what takes the time here is compiling
    def both(x, w):
        ours = functools.partial(conv_general_dilated, lowering=lowering)
        return [
            value_and_gradients(conv, x, w, strides, padding, rhs_dilation=dilation)
            for conv in (ours, lax.conv_general_dilated)
        ]

    for one, other in zip(*both(x, w), strict=True):
        close(one, other, tolerance)


def program(f, *arguments):
    """Names of all primitives of a traced function, and the text of its compiled form."""
    traced = jax.jit(f).trace(*arguments)
    return str(traced.jaxpr), traced.lower().compile().as_text()


def assert_no_convolution(f, *arguments):
    jaxpr, compiled = program(f, *arguments)
    assert "conv_general_dilated" not in jaxpr and "dot_general" in jaxpr
    assert " convolution(" not in compiled


# --- numbers --------------------------------------------------------------------------------


WINOGRAD_TABLE = [
    ((2, 8, 8, 3), (3, 3, 3, 4), (1, 1), "SAME", (1, 1)),
    ((2, 9, 7, 3), (3, 3, 3, 4), (1, 1), "VALID", (1, 1)),  # tiles that reach past the results
    ((2, 6, 10, 2), (3, 3, 2, 5), (1, 1), ((2, 0), (1, 3)), (1, 1)),
    ((1, 12, 11, 3), (3, 3, 3, 4), (1, 1), ((-1, -2), (2, -1)), (1, 1)),
    ((2, 9, 8, 3), (2, 3, 3, 4), (1, 1), "SAME", (1, 1)),
    ((2, 9, 9, 2), (5, 5, 2, 3), (1, 1), "SAME", (1, 1)),
    ((2, 9, 9, 2), (6, 3, 2, 3), (1, 1), "SAME", (1, 1)),  # too few points: patches
]
CASES = [(entry, "patches") for entry in TABLE]
CASES += [(entry, "winograd_4x4") for entry in WINOGRAD_TABLE]
# Strides, crops, dilation, 1-D and 3-D, no batch; tiles that reach past the results, crops.
FAST = [(TABLE[i], "patches") for i in (3, 13, 16, 17)]
FAST += [(WINOGRAD_TABLE[i], "winograd_4x4") for i in (1, 3)]


@pytest.mark.parametrize(
    ("entry", "lowering"),
    [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in CASES],
)
def test_value_and_both_gradients_are_those_of_lax(entry, lowering):
    with jax.enable_x64(True):
        compare(jnp.float64, 1e-12, *entry, lowering=lowering)


def test_float32_stays_float32():
    compare(jnp.float32, 1e-5, *TABLE[6])


def growth(tile):
    """How much F(tile, 3) enlarges the rounding errors of its products, against three summed."""
    data, kernel, inverse = toom(tile, 3)
    squares = np.square(kernel).sum(axis=1) * np.square(data).sum(axis=1)  # of random inputs
    return np.sqrt((np.square(inverse) @ squares).max() / 3)


# Inputs and kernel round when they are transformed, once an axis, and their products once: five
# roundings, each enlarged by 5.6 an axis, are a factor of 70. Over twenty seeds the errors were up
# to 14 times those of "patches", which were 4.5e-7 of the largest number at most.
@pytest.mark.slow
def test_rounding_of_tiles_grows_as_their_matrices_say():
    rng = np.random.default_rng(0)
    exact = [rng.normal(size=shape) for shape in ((4, 16, 16, 32), (3, 3, 32, 16))]

    def errors(lowering):
        ours = functools.partial(conv_general_dilated, lowering=lowering)
        short = jax.jit(lambda x, w: value_and_gradients(ours, x, w, (1, 1), "SAME"))(*rounded)
        assert {x.dtype for x in short} == {jnp.dtype(jnp.float32)}
        return [
            np.abs(np.asarray(x, np.float64) - y).max() / np.abs(y).max()
            for x, y in zip(short, true, strict=True)
        ]

    with jax.enable_x64(True):
        rounded = [jnp.asarray(x, jnp.float32) for x in exact]
        wide = [x.astype(jnp.float64) for x in rounded]
        true = value_and_gradients(lax.conv_general_dilated, *wide, (1, 1), "SAME")
        tiled, unfolded = errors("winograd_4x4"), errors("patches")
    bound = np.sqrt(5) * growth(4) ** 2
    assert growth(4) == pytest.approx(5.61, abs=0.01)
    for one, other in zip(tiled, unfolded, strict=True):
        assert 0 < other < 1e-6
        assert one <= bound * other


@pytest.mark.parametrize(
    ("tile", "kernel"), [(1, 3), (2, 3), (4, 3), (6, 3), (2, 5), (4, 5), (4, 2)]
)
def test_toom_matrices_are_those_of_a_filter(tile, kernel):
    data, evaluate, inverse = toom(tile, kernel)
    d, g = RNG.normal(size=tile + kernel - 1), RNG.normal(size=kernel)
    np.testing.assert_allclose(
        inverse @ ((evaluate @ g) * (data @ d)), np.correlate(d, g, "valid"), rtol=1e-9, atol=1e-10
    )


def test_tiles_stay_products_side_by_side():
    x, w = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 4))

    def gradients(x, w):
        tiled = functools.partial(conv_general_dilated, lowering="winograd_4x4")
        return value_and_gradients(tiled, x, w, (1, 1), "SAME")

    assert_no_convolution(gradients, x, w)
    assert_no_convolution(jax.vmap(gradients), jnp.stack([x] * 3), jnp.stack([w] * 3))


@pytest.mark.parametrize(
    ("backend", "precision", "wanted"),
    [
        ("cpu", None, None),
        ("gpu", None, "HIGHEST"),
        ("tpu", None, "HIGHEST"),
        ("tpu", "high", "HIGH"),
    ],
)
def test_tiles_are_multiplied_in_float32_whatever_a_device_does_by_default(
    monkeypatch, backend, precision, wanted
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x, w = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 4))
    with using("winograd_4x4"):
        text = str(
            jax.make_jaxpr(
                lambda x, w: conv_general_dilated(
                    x, w, (1, 1), "SAME", dimension_numbers=channels_last(4), precision=precision
                )
            )(x, w)
        )
    products = text.count("dot_general[")
    assert products == 36
    named = "Precision." if wanted is None else f"Precision.{wanted}, "
    assert text.count(named) == (0 if wanted is None else products)


def test_what_is_chosen_can_be_seen_and_changed():
    run = functools.partial(
        conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=channels_last(4),
    )
    few, many = (10, 32, 32, 3), (10, 32, 32, 32)
    with recording() as chosen:
        for shape in (few, many):
            jax.eval_shape(run, jnp.zeros(shape), jnp.zeros((3, 3, shape[-1], 32)))
    assert chosen == {
        "10x32x32x3 * 3x3x3x32": "patches",
        "10x32x32x32 * 3x3x32x32": "winograd_4x4",
    }
    with using("direct"), recording() as chosen:
        # Another function, as jax remembers what it has traced.
        jax.eval_shape(lambda *args: run(*args), jnp.zeros(many), jnp.zeros((3, 3, 32, 32)))
    assert list(chosen.values()) == ["direct"]
    with recording() as chosen:  # short floats keep their digits
        short = jnp.zeros(many, jnp.bfloat16)
        jax.eval_shape(run, short, jnp.zeros((3, 3, 32, 32), jnp.bfloat16))
    assert list(chosen.values()) == ["patches"]
    with (
        pytest.raises(FedLPError, match="lowering 'patch' is unknown; did you mean 'patches'"),
        using("patch"),
    ):
        pass


def test_products_of_short_floats_are_short_on_accelerators(monkeypatch):
    """They sum in float32 by themselves; asked to, they would write float32, forth and back."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    x, w = jnp.ones((2, 5, 5, 4), jnp.bfloat16), jnp.ones((3, 3, 4, 8), jnp.bfloat16)

    def gradients(x, w):
        arguments = (x, w, (1, 1), "SAME")
        return value_and_gradients(conv_general_dilated, *arguments)

    jaxpr = str(jax.make_jaxpr(gradients)(x, w))
    assert jaxpr.count("dot_general") == 3
    assert "f32" not in jaxpr


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_convolution_without_groups_is_that_of_lax(data):
    rank = data.draw(st.integers(1, 2))
    per_axis = functools.partial(st.lists, min_size=rank, max_size=rank)
    size = data.draw(per_axis(st.sampled_from([1, 2, 3, 5])))
    dilation = tuple(data.draw(per_axis(st.integers(1, 2))))
    image = [
        (k - 1) * d + data.draw(st.integers(1, 6)) for k, d in zip(size, dilation, strict=True)
    ]
    strides = tuple(data.draw(per_axis(st.integers(1, 3))))
    explicit = per_axis(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    padding = data.draw(st.one_of(st.sampled_from(["SAME", "VALID"]), explicit))
    channels, features = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    with jax.enable_x64(True):
        compare(
            jnp.float64,
            1e-12,
            (2, *image, channels),
            (*size, channels, features),
            strides,
            padding,
            dilation,
        )


def test_sums_of_short_floats_are_taken_in_float32():
    x, w = jnp.ones((1, 5, 5, 64), jnp.bfloat16), jnp.ones((5, 5, 64, 1), jnp.bfloat16)
    run = functools.partial(
        conv_general_dilated,
        window_strides=(1, 1),
        padding="VALID",
        dimension_numbers=channels_last(4),
    )
    out = run(x, w)
    assert out.dtype == jnp.bfloat16
    assert float(out.reshape(())) == 1600  # a sum in bfloat16 stops at 256
    one = x.at[0, 0, 0, 0].set(1 + 2**-7)  # lost in a result of bfloat16
    wide = run(one, w, preferred_element_type=jnp.float32)
    assert wide.dtype == jnp.float32 and float(wide.reshape(())) == 1600 + 2**-7
    gradient = jax.grad(lambda w: run(one, w).astype(jnp.float32).sum())(w)
    assert gradient.dtype == jnp.bfloat16
    assert float(gradient[0, 0, 0, 0]) == 1 + 2**-7


def test_forward_mode_is_that_of_lax():
    shape, kernel, strides, padding, dilation = TABLE[3]
    with jax.enable_x64(True):
        x, w, dx, dw = (jnp.asarray(RNG.normal(size=s)) for s in (shape, kernel, shape, kernel))
        tangents = []
        for conv in (conv_general_dilated, lax.conv_general_dilated):
            call = functools.partial(
                conv,
                window_strides=strides,
                padding=padding,
                rhs_dilation=dilation,
                dimension_numbers=channels_last(4),
            )
            tangents.append(jax.jvp(call, (x, w), (dx, dw))[1])
        close(*tangents, 1e-12)


# --- what remains of it ---------------------------------------------------------------------


@pytest.mark.parametrize("entry", [3, 15])
def test_no_convolution_is_left_alone_or_side_by_side(entry):
    """The point of it all: under vmap over kernels lax would make a grouped convolution."""
    shape, kernel, strides, padding, dilation = TABLE[entry]
    x, w = jnp.zeros(shape, jnp.float32), jnp.zeros(kernel, jnp.float32)

    def gradients(x, w):
        return value_and_gradients(
            conv_general_dilated, x, w, strides, padding, rhs_dilation=dilation
        )

    assert_no_convolution(gradients, x, w)
    assert_no_convolution(jax.vmap(gradients), jnp.stack([x] * 3), jnp.stack([w] * 3))


def test_side_by_side_equals_one_by_one():
    x, w = RNG.normal(size=(3, 2, 6, 6, 2)), RNG.normal(size=(3, 3, 3, 2, 4))
    with jax.enable_x64(True):
        x, w = jnp.asarray(x), jnp.asarray(w)

        def gradients(x, w):
            return value_and_gradients(conv_general_dilated, x, w, (1, 1), "SAME")

        together, one_by_one = jax.jit(jax.vmap(gradients)), jax.jit(gradients)
        for k in range(3):
            for one, all_of_them in zip(one_by_one(x[k], w[k]), together(x, w), strict=True):
                close(all_of_them[k], one, 1e-13)


FALLBACKS = {
    "groups": ((2, 6, 6, 4), (3, 3, 2, 6), {"feature_group_count": 2}),
    "batch groups": ((4, 6, 6, 2), (3, 3, 2, 6), {"batch_group_count": 2}),
    "input dilation": (
        (2, 6, 6, 2),
        (3, 3, 2, 3),
        {"lhs_dilation": (2, 1), "padding": ((1, 2), (0, 1))},
    ),
    "channels first": ((2, 2, 6, 6), (3, 2, 3, 3), {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}),
    "by request": ((2, 6, 6, 2), (3, 3, 2, 3), {"lowering": "direct"}),
    "larger than the image": ((2, 2, 6, 2), (3, 3, 2, 3), {}),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_anything_else_is_left_to_lax(case):
    shape, kernel, options = FALLBACKS[case]
    x, w = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in (shape, kernel))
    options = {"padding": "VALID", "dimension_numbers": channels_last(4), **options}
    ours = functools.partial(conv_general_dilated, window_strides=(1, 1), **options)
    options.pop("lowering", None)
    theirs = lax.conv_general_dilated(x, w, (1, 1), **options)
    np.testing.assert_array_equal(ours(x, w), theirs, strict=True)
    assert "conv_general_dilated" in str(jax.make_jaxpr(ours)(x, w))


def test_errors_are_those_of_lax():
    x, w = jnp.zeros((2, 6, 6, 3)), jnp.zeros((3, 3, 4, 5))
    for conv in (conv_general_dilated, lax.conv_general_dilated):
        with pytest.raises(ValueError, match="feature dimension size"):
            conv(x, w, (1, 1), "SAME", dimension_numbers=channels_last(4))
        with pytest.raises((TypeError, ValueError)):
            conv(x, w[:, :, :3], (1,), "SAME", dimension_numbers=channels_last(4))
        with pytest.raises((TypeError, ValueError)):
            conv(x, w[:, :, :3], (1, 1), ((1, 1),), dimension_numbers=channels_last(4))


def test_an_unknown_lowering_is_refused_with_the_nearest():
    x, w = jnp.zeros((2, 6, 6, 3)), jnp.zeros((3, 3, 3, 5))
    with pytest.raises(FedLPError, match="'patch' is unknown; did you mean 'patches'"):
        conv_general_dilated(x, w, (1, 1), "SAME", lowering="patch")


# --- into flax modules ----------------------------------------------------------------------


def own_conv(*arguments, **keywords):
    """A user's own function, which nobody may replace."""
    return 2 * lax.conv_general_dilated(*arguments, **keywords)


class User(nn.Module):
    """A user's network: convolutions in a compact method, in a field and in a list."""

    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        x = nn.Conv(4, (3,), padding="CAUSAL", name="line")(x)
        return nn.Sequential([self.inner, nn.Conv(2, (3, 3), 2, "CIRCULAR")])(x)


IMAGES = jnp.asarray(RNG.normal(size=(2, 8, 8, 3)), jnp.float32)


def some_variables(module):
    """Random ones: flax's own take seconds to compile."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), IMAGES)
    return jax.tree.map(lambda t: jnp.asarray(RNG.normal(size=t.shape), t.dtype), shapes)


def test_linen_modules_are_lowered_and_stay_as_they_are():
    inner = nn.Conv(4, (5, 5), padding=2)
    net = User(inner)
    variables = some_variables(net)

    def outputs(variables, x):
        with nn.intercept_methods(interceptor):
            return net.apply(variables, x)

    before = jax.jit(net.apply)(variables, IMAGES)
    after = jax.jit(outputs)(variables, IMAGES)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-3)
    assert_no_convolution(outputs, variables, IMAGES)
    assert inner.conv_general_dilated is None and net == User(nn.Conv(4, (5, 5), padding=2))
    # Outside the interceptor it is what it was.
    assert "conv_general_dilated" in str(jax.make_jaxpr(net.apply)(variables, IMAGES))


def test_a_bound_linen_module_is_never_changed():
    fields = []

    class Conv(nn.Conv):
        @nn.compact
        def __call__(self, x):
            fields.append(self.conv_general_dilated)
            fields.append(bound.conv_general_dilated)
            return super().__call__(x)

    conv = Conv(4, (3, 3))
    bound = conv.bind(some_variables(nn.Conv(4, (3, 3))))
    with nn.intercept_methods(interceptor):
        bound(IMAGES)
    assert fields == [conv_general_dilated, None]


def test_an_interceptor_of_the_module_itself_still_runs():
    def double(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        return 2 * y if isinstance(context.module, nn.Conv) else y

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            with nn.intercept_methods(double):
                return nn.Conv(4, (3, 3))(x)

    net = Net()
    variables = some_variables(net)
    with nn.intercept_methods(interceptor):
        inside = net.apply(variables, IMAGES)
    np.testing.assert_allclose(inside, net.apply(variables, IMAGES), rtol=1e-4, atol=1e-4)


def test_outputs_are_captured_once():
    net = nn.Sequential([nn.Conv(4, (3, 3))])
    variables = some_variables(net)
    with nn.intercept_methods(interceptor):
        _, state = net.apply(variables, IMAGES, capture_intermediates=True)
    assert len(state["intermediates"]["layers_0"]["__call__"]) == 1


@pytest.mark.parametrize("field", ["conv_general_dilated", "conv_general_dilated_cls"])
def test_the_own_function_of_a_linen_convolution_stays(field):
    own = own_conv if field == "conv_general_dilated" else lambda: own_conv
    conv = nn.Conv(4, (3, 3), use_bias=False, **{field: own})
    variables = some_variables(conv)
    with nn.intercept_methods(interceptor):
        out = conv.apply(variables, IMAGES)
    plain = nn.Conv(4, (3, 3), use_bias=False).apply(variables, IMAGES)
    np.testing.assert_array_equal(out, 2 * plain)


def test_other_linen_modules_are_left_alone():
    net = nn.Sequential([nn.ConvTranspose(3, (3, 3)), nn.ConvLocal(2, (3, 3)), nn.Dense(2)])
    variables = jax.eval_shape(net.init, jax.random.key(0), IMAGES)
    with nn.intercept_methods(interceptor):
        inside = jax.make_jaxpr(net.apply)(variables, IMAGES)
    assert str(inside) == str(jax.make_jaxpr(lambda v, x: net.apply(v, x))(variables, IMAGES))


class NnxUser(nnx.Module):
    """A user's nnx network; two of its convolutions are one object."""

    def __init__(self, rngs):
        conv = functools.partial(
            nnx.Conv, 3, 3, (3, 3), rngs=rngs, kernel_init=nnx.initializers.ones
        )
        self.first = conv()
        self.again = nnx.List([conv()])
        self.shared = self.again[0]
        self.own = conv(conv_general_dilated=own_conv)

    def __call__(self, x):
        return self.own(self.shared(self.again[0](nnx.relu(self.first(x)))))


def test_an_nnx_module_is_copied_and_the_copy_changed():
    net = NnxUser(nnx.Rngs(0))
    copy = inject(net)
    assert type(copy) is NnxUser and copy is not net
    assert net.first.conv_general_dilated is lax.conv_general_dilated
    assert net.again[0].conv_general_dilated is lax.conv_general_dilated
    assert copy.first.conv_general_dilated is conv_general_dilated
    assert copy.again[0].conv_general_dilated is conv_general_dilated
    assert copy.again[0] is copy.shared
    assert copy.own.conv_general_dilated is own_conv
    np.testing.assert_allclose(copy(IMAGES), net(IMAGES), rtol=1e-4, atol=1e-5)
    for one, other in zip(
        jax.tree.leaves(nnx.state(copy)), jax.tree.leaves(nnx.state(net)), strict=True
    ):
        assert one is other  # arrays are shared, not copied


def test_no_convolution_is_left_in_an_nnx_module():
    copy = inject(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)))  # the root itself is one
    graph, state = nnx.split(copy)

    def gradients(state, x):
        return jax.grad(lambda s, x: nnx.merge(graph, s)(x).sum(), (0, 1))(state, x)

    assert_no_convolution(gradients, state, IMAGES)
