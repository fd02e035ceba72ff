"""Which runs are one program: by what their rounds are made of, or by their text."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from small import Steps, dataset

import fedlp_jax as fl
from fedlp_jax.simulation import structure
from fedlp_jax.simulation.run import Simulation
from fedlp_jax.simulation.structure import content, lasting, structures

DATA = dataset()
CLIENTS = fl.partition.iid(DATA.train.labels, clients=6, seed=0)
TASK = fl.classification(Steps(depth=1))
SGD = {"client_optimizer": optax.sgd(1.0), "batch_size": 4}


@pytest.fixture(autouse=True)
def of_the_package(monkeypatch):
    """`Steps` stands for a model of the package, which cannot read what changes meanwhile."""
    monkeypatch.setattr(Steps, "__module__", "fedlp_jax.nn.models")


def prepared(algorithm, seed=0, cohort=2):
    plan = fl.Plan(devices=1)
    return Simulation(algorithm, DATA, CLIENTS, rounds=1, cohort=cohort, seed=seed, plan=plan)


def scaled(by, then=None):
    def function(x):
        return x * by if then is None else then(x * by)

    return function


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A value that is a schedule."""

    by: float

    def __call__(self, round):
        return self.by / round


@dataclasses.dataclass(unsafe_hash=True)
class Mutable:
    """Has a hash, but its method may read what changes."""

    by: float


class Noted(Steps):
    """A linen module with an attribute that is not a field."""

    def __post_init__(self):
        self.note = object()
        super().__post_init__()


@pytest.fixture
def lowered(monkeypatch):
    """Counts the runs that are lowered."""
    runs, first = [], structure._text
    monkeypatch.setattr(structure, "_text", lambda run: runs.append(run) or first(run))
    return runs


def test_values_made_alike_have_one_content():
    for make in (
        lambda: scaled(2.0),
        lambda: scaled(np.arange(3)),
        lambda: scaled(1, scaled(2)),
        lambda: functools.partial(scaled, by=2),
        lambda: optax.adam(0.1),
        lambda: Steps(depth=2),
        lambda: Frozen(2.0),
        lambda: (float("nan"), "a", (1,)),
    ):
        assert content(make()) == content(make())
        assert hash(content(make())) == hash(content(make()))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (scaled(0.0), scaled(-0.0)),
        (scaled(1), scaled(1.0)),
        (scaled(1), scaled(True)),
        (scaled(np.zeros(2)), scaled(np.zeros((2, 1)))),
        (scaled(1, scaled(2)), scaled(1, scaled(3))),
        (functools.partial(scaled, 2), functools.partial(scaled, by=2)),
        (optax.sgd(0.1), optax.sgd(0.2)),
        (optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)),
        (Steps(depth=2), Steps(depth=3)),
        ([1], [1]),  # a function may change what it closes over
        (object(), object()),
        (Frozen(1), Frozen(2)),
        (Mutable(1), Mutable(1)),
        (Noted(), Noted()),
    ],
)
def test_values_that_differ_have_different_contents(one, other):
    assert content(one) != content(other)


def test_a_function_may_close_over_itself():
    def made(by):
        def function(x):
            return function(x - by) if x > 0 else x

        return function

    assert content(made(1)) == content(made(1)) != content(made(2))


def test_a_function_without_a_value_for_a_name_equals_itself_alone():
    def made(known):
        if known:
            by = 1
        return lambda x: x * by

    assert content(made(False)) != content(made(False))


ARGUMENTS = {
    "keep": lambda x: fl.fedlp_homo(TASK, keep=x, **SGD),
    "keeps of layers": lambda x: fl.fedlp_homo(TASK, keep={"head1": x}, **SGD),
    "rate": lambda x: fl.fedavg(TASK, client_schedule=x, **SGD),
    "mu": lambda x: fl.fedprox(TASK, mu=x, **SGD),
    "fixed": lambda x: fl.fedbabu(TASK, head="head1", keep=x, **SGD),
    "frozen": lambda x: fl.freeze(TASK, keep=x, **SGD),
    "turns": lambda x: fl.fedpart(TASK, full_rounds=int(8 * x), **SGD),
}


@pytest.mark.parametrize("make", ARGUMENTS.values(), ids=ARGUMENTS)
def test_rounds_with_other_arguments_are_one_structure_untraced(make, lowered):
    runs = [prepared(make(x), seed) for x in (0.25, 0.5) for seed in (0, 1)]
    assert len(set(structures(runs))) == 1
    assert not lowered


@pytest.mark.slow
@pytest.mark.parametrize("make", ARGUMENTS.values(), ids=ARGUMENTS)
def test_rounds_of_one_content_have_one_text(make):
    one, other = (structure._text(prepared(make(x))) for x in (0.25, 0.5))
    assert one == other


def test_rounds_of_different_contents_are_one_structure_if_their_texts_are_equal(lowered):
    optimizers = {
        "sgd": optax.sgd(0.5),
        "the same": optax.chain(optax.sgd(0.5)),
        "faster": optax.sgd(1.0),
    }
    runs = [prepared(fl.fedavg(TASK, client_optimizer=o)) for o in optimizers.values()]
    sgd, same, faster = structures(runs)
    assert sgd == same != faster
    assert len(lowered) == 3


def test_rounds_of_other_shapes_are_another_structure_untraced(lowered):
    algorithm = ARGUMENTS["keep"](0.5)
    assert len(set(structures([prepared(algorithm), prepared(algorithm, cohort=3)]))) == 2
    assert not lowered


def test_a_round_that_calls_python_is_a_structure_of_its_own():
    def counting(calls):
        def update(updates, state, params=None):
            jax.debug.callback(lambda: calls.append(1))
            return updates, state

        return optax.chain(
            optax.GradientTransformation(lambda params: optax.EmptyState(), update), optax.sgd(0.5)
        )

    runs = [prepared(fl.fedavg(TASK, client_optimizer=counting([]))) for _ in range(2)]
    assert len(set(structures(runs))) == 2


@pytest.mark.parametrize("make", ARGUMENTS.values(), ids=ARGUMENTS)
def test_algorithms_made_alike_have_one_lasting_key(make):
    key = lasting(make(0.25))
    assert key is not None
    assert key == lasting(make(0.5)) and hash(key) == hash(lasting(make(0.5)))


def test_the_lasting_key_is_of_all_constants():
    others = [
        fl.fedavg(TASK, client_optimizer=optax.sgd(1.0), batch_size=4),
        fl.fedavg(TASK, client_optimizer=optax.sgd(0.5), batch_size=4),
        fl.fedavg(TASK, client_optimizer=optax.sgd(1.0), batch_size=5),
        fl.fedavg(TASK, client_optimizer=optax.sgd(1.0), batch_size=4, aggregator="median"),
        fl.fedavg(fl.classification(Steps(depth=1)), client_optimizer=optax.sgd(1.0), batch_size=4),
    ]
    keys = [lasting(algorithm) for algorithm in others]
    assert None not in keys
    assert len(set(keys)) == len(others)


def test_a_module_of_the_user_has_no_lasting_key(monkeypatch):
    algorithm = fl.fedavg(TASK, client_optimizer=optax.sgd(1.0))
    assert lasting(algorithm) is not None
    monkeypatch.setattr(Steps, "__module__", "mine")  # its call may read a variable of that file
    assert lasting(algorithm) is None


RATE = 0.5


@pytest.mark.parametrize(
    "schedule",
    [
        lambda round: RATE / round,  # which may be another by the next sweep
        functools.partial(optax.constant_schedule(1.0), [1]),
        optax.piecewise_constant_schedule(1.0, {3: 0.1}),
        functools.partial(optax.constant_schedule(1.0), np.zeros(3)),
        functools.partial(optax.constant_schedule(1.0), jax.numpy.zeros(3)),
        Frozen(1.0),
    ],
    ids=["function", "list", "dictionary", "array", "array of a device", "object"],
)
def test_what_may_change_or_may_be_large_has_no_lasting_key(schedule):
    assert lasting(ARGUMENTS["rate"](schedule)) is None
