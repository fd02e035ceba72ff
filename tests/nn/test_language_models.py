"""The Transformer and the character LSTM: counts, causality, oracles, and clients side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from fedlp_jax.errors import FedLPError
from fedlp_jax.nn.embedding import Embedding
from fedlp_jax.nn.models import CharLSTM, Transformer, char_lstm
from fedlp_jax.tasks.flax_adapter import network
from fedlp_jax.tasks.padding import mixes_rows

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
V, T = 11, 6
MODELS = {
    "transformer": Transformer(V, width=8, depth=2, heads=2, length=T),
    "char_lstm": CharLSTM(V, embedding=3, hidden=4),
}
both = pytest.mark.parametrize("module", MODELS.values(), ids=MODELS.keys())


def shapes(module, length=T):
    return jax.eval_shape(lambda x: module.init(KEY, x, False), jnp.zeros((2, length), jnp.int32))


def some_variables(module, dtype=np.float32):
    flat = flatten_dict(shapes(module))
    drawn = {path: RNG.normal(size=x.shape) / 2 for path, x in flat.items()}
    return unflatten_dict({path: x.astype(dtype) for path, x in drawn.items()})


def tokens(*shape):
    return jnp.asarray(RNG.integers(0, V, shape), jnp.int32)


def size(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def training_step(module):
    """Logits, and gradients of a sum of squares, of one client."""

    def step(variables, x):
        def loss(params):
            logits = module.apply({"params": params}, x, True)
            return jnp.square(logits).sum(), logits

        return jax.grad(loss, has_aux=True)(variables["params"])

    return step


def fast_compile(f):
    """Without optimisations, which take most of the time of these tests and change no meaning."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def largest_difference(one, other):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), one, other)))


def test_parameters_are_those_of_the_formulas():
    width, length, depth = 64, 80, 3
    made = shapes(Transformer(77, width, depth, 4, length), length)["params"]
    assert sorted(made) == ["block1", "block2", "block3", "embed", "head"]
    assert size(made["embed"]) == 77 * width + length * width
    assert size(made["block2"]) == 12 * width**2 + 13 * width
    assert size(made["head"]) == 2 * width + width * 77 + 77
    lstm = shapes(CharLSTM(77), 80)["params"]
    assert sorted(lstm) == ["embed", "head", "lstm1", "lstm2"]
    assert size(lstm) == 265 * 77 + 796_672


def test_depths_share_blocks_and_have_a_head_of_their_own():
    whole = Transformer(V, width=8, depth=3, heads=2, length=T)
    part = whole.clone(depth=2)
    assert sorted(shapes(part)["params"]) == ["block1", "block2", "embed", "exit2_head"]
    assert (part.deepest, part.clone(depth=3)) == (3, whole)
    assert sorted(shapes(part.clone(depth=3))["params"]) == sorted(shapes(whole)["params"])
    offered = network(whole)
    assert offered.depth == 3
    assert offered.at_depth is not None


@both
def test_a_position_reads_itself_and_what_is_before_it(module):
    variables, x = some_variables(module), tokens(2, T)
    other = x.at[:, 3].set((x[:, 3] + 1) % V)
    run = jax.jit(lambda t: module.apply(variables, t, False))
    one, two = np.asarray(run(x)), np.asarray(run(other))
    np.testing.assert_array_equal(one[:, :3], two[:, :3])
    assert (one[:, 3:] != two[:, 3:]).any(axis=(0, 2)).all()


@both
def test_clients_side_by_side_are_each_as_if_alone(module):
    with jax.enable_x64(True):
        clients = [some_variables(module, np.float64) for _ in range(3)]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *clients)
        x = np.asarray(tokens(3, 4, T))
        together = fast_compile(jax.vmap(training_step(module)))

        def second(variables, x):
            return jax.tree.map(lambda t: np.asarray(t)[1], together(variables, x))

        found = second(stacked, x)
        alone = fast_compile(training_step(module))(clients[1], x[1])
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float64")}
        assert largest_difference(found, alone) < 1e-11
        # Another client's variables and tokens do not reach a bit of this one.
        factors = np.array([np.nan, 1, 3])
        mad = jax.tree.map(lambda t: t * factors.reshape(3, *[1] * (t.ndim - 1)), stacked)
        again = second(mad, x * np.array([1, 1, 0])[:, None, None].astype(np.int32))
        jax.tree.map(np.testing.assert_array_equal, found, again)


@both
def test_rows_of_a_batch_do_not_meet(module):
    net, variables, x = network(module), some_variables(module), tokens(4, T)
    assert not mixes_rows(lambda v, x: net.apply(v, x, KEY, None)[0], variables, x)
    mad = x.at[2:].set(-1)
    run = jax.jit(lambda t: module.apply(variables, t, True))
    np.testing.assert_array_equal(run(x)[:2], run(mad)[:2])


def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def linear(x, p):
    return x @ p["kernel"] + p["bias"]


def attention(x, p, heads):
    """Each row of the batch, head and position by itself."""
    q, k, v = np.split(linear(x, p["attention_in"]), 3, axis=-1)
    out = np.zeros_like(q)
    d = x.shape[-1] // heads
    for row, head, t in np.ndindex(x.shape[0], heads, x.shape[1]):
        one = slice(head * d, (head + 1) * d)
        score = k[row, : t + 1, one] @ q[row, t, one] / np.sqrt(d)
        share = np.exp(score - score.max())
        out[row, t, one] = share / share.sum() @ v[row, : t + 1, one]
    return linear(out, p["attention_out"])


def test_the_transformer_is_its_equations():
    module = MODELS["transformer"]
    with jax.enable_x64(True):
        variables = some_variables(module, np.float64)
        p, ids = variables["params"], tokens(2, T)
        x = p["embed"]["token"][np.asarray(ids)] + p["embed"]["position"]
        for block in (p["block1"], p["block2"]):
            x = x + attention(norm(x, block["attention_norm"]), block, heads=2)
            y = linear(norm(x, block["mlp_norm"]), block["mlp_in"])
            gelu = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
            x = x + linear(gelu, block["mlp_out"])
        want = linear(norm(x, p["head"]["norm"]), p["head"]["linear"])
        np.testing.assert_allclose(module.apply(variables, ids, False), want, rtol=1e-10)


def test_the_lstm_is_its_equations():
    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    module = MODELS["char_lstm"]
    with jax.enable_x64(True):
        variables = some_variables(module, np.float64)
        p, ids = variables["params"], tokens(2, T)
        x = p["embed"]["token"][np.asarray(ids)]
        for layer in (p["lstm1"], p["lstm2"]):
            h = c = np.zeros((2, 4))
            states = []
            for t in range(T):
                z = linear(x[:, t], layer["input"]) + h @ layer["recurrent"]
                i, f, g, o = np.split(z, 4, axis=-1)
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
                states.append(h)
            x = np.stack(states, 1)
        want = linear(x, p["head"])
        np.testing.assert_allclose(module.apply(variables, ids, False), want, rtol=1e-10)


def test_the_recurrent_gradient_is_that_of_the_scan():
    with jax.enable_x64(True):
        arguments = (
            jnp.asarray(RNG.normal(size=(4, 16))),
            jnp.asarray(RNG.normal(size=(T, 3, 16))),
        )
        weights = jnp.asarray(RNG.normal(size=(T, 3, 4)))

        def gradients(states):
            return jax.grad(lambda k, z: (states(k, z) * weights).sum(), (0, 1))(*arguments)

        ours, scan = gradients(char_lstm.recur), gradients(char_lstm._scan)
        assert largest_difference(ours, scan) < 1e-12


@both
def test_activations_of_a_short_dtype_leave_variables_in_float32(module):
    short = module.clone(dtype="bfloat16")
    variables = shapes(short)
    assert variables == shapes(module)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    out, between = jax.eval_shape(
        lambda v: short.apply(
            v, jnp.zeros((2, T), jnp.int32), True, capture_intermediates=True, mutable=True
        ),
        variables,
    )
    kept = jax.tree.leaves(between["intermediates"])
    assert len(kept) > 3
    assert {y.dtype for y in (out, *kept)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("init", ["flax", "pytorch"])
def test_initial_values_of_an_lstm(init):
    draw = jax.jit(lambda: char_lstm.LSTM(16, init).init(KEY, jnp.zeros((1, 2, 3))))
    params = jax.tree.map(np.asarray, draw()["params"])
    if init == "flax":
        for gate in np.split(params["recurrent"], 4, axis=1):
            np.testing.assert_allclose(gate @ gate.T, np.eye(16), atol=1e-5)
    else:
        for values in (params["recurrent"], *params["input"].values()):
            assert 0.2 < np.abs(values).max() <= 0.25  # 1 / sqrt(16)


def test_an_embedding_is_a_look_up():
    embed, ids = Embedding(V, 4), tokens(3, T)
    table = RNG.normal(size=(V, 4)).astype(np.float32)
    found = embed.apply({"params": {"token": table}}, ids)
    np.testing.assert_array_equal(found, table[np.asarray(ids)])
    assert not embed.apply({"params": {"token": table}}, jnp.array([[-1, V]])).any()
    jaxpr = jax.make_jaxpr(lambda: embed.apply({"params": {"token": table}}, ids))()
    (product,) = (e for e in jaxpr.eqns if e.primitive.name == "dot_general")
    assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


@pytest.mark.parametrize(("init", "scale"), [("flax", 1 / 8), ("pytorch", 1)])
def test_initial_values_of_an_embedding(init, scale):
    draw = jax.jit(lambda: Embedding(40, 64, T, init).init(KEY, jnp.zeros((1, T), jnp.int32)))
    for name in ("token", "position"):
        np.testing.assert_allclose(np.std(draw()["params"][name]), scale, rtol=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Transformer(width=10, heads=4), "width=10 must be a multiple of heads=4; 12 is"),
        (lambda: Transformer(depth=0), "depth=0 must be a whole number of at least 1"),
        (lambda: Transformer(depth=2).clone(depth=3), "depth=3 is more than the 2 of the model"),
        (lambda: CharLSTM(hidden=2.5), "hidden=2.5 must be a whole number"),
        (lambda: shapes(Transformer(length=5)), "length=5 positions, but the sequences have 6"),
        (
            lambda: CharLSTM().init(KEY, jnp.zeros((2, 3)), False),
            r"CharLSTM needs sequences of tokens, integers \[B, T\], not float32\[2, 3\]",
        ),
        (
            lambda: Transformer().init(KEY, jnp.zeros((2, 3, 1), jnp.int32), False),
            r"integers \[B, T\], not int32\[2, 3, 1\]",
        ),
    ],
)
def test_errors_say_the_numbers(make, message):
    with pytest.raises(FedLPError, match=message):
        make()
