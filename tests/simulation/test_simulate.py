"""Runs as a user sees them: algebra of the method, repeatability, callbacks, what is refused."""

import dataclasses
import pickle
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Steps, dataset, flat

import fedlp_jax as fl
from fedlp_jax.execution import compilation
from fedlp_jax.simulation import loop
from fedlp_jax.simulation.program import rounds_of

DATA = dataset()
CLIENTS = fl.partition.iid(DATA.train.labels, clients=12, seed=0)
TASK = fl.classification(Steps())
COMMON = {"client_optimizer": optax.sgd(0.1), "epochs": 2, "batch_size": 2}
ONE = fl.Plan(devices=1, width=1)


def run(algorithm, data=DATA, clients=CLIENTS, **settings):
    settings = {"rounds": 2, "cohort": 4, "seed": 0, "plan": ONE} | settings
    return fl.simulate(algorithm, data, clients, **settings)


# --- algebra ------------------------------------------------------------------------------------


def test_keep_one_is_fedavg_bit_for_bit():
    homo = run(fl.fedlp_homo(TASK, keep=1.0, **COMMON))
    fedavg = run(fl.fedavg(TASK, **COMMON))
    assert np.array_equal(flat(homo.state.variables), flat(fedavg.state.variables))
    assert homo.costs.total == fedavg.costs.total


@pytest.mark.parametrize("server", [None, optax.adam(0.1), optax.adamw(0.1, weight_decay=0.5)])
def test_keep_zero_changes_no_bit(server):
    algorithm = fl.fedlp_homo(TASK, keep=0.0, server_optimizer=server, **COMMON)
    before, after = run(algorithm, rounds=0), run(algorithm, rounds=2)
    assert np.array_equal(flat(before.variables), flat(after.variables))
    assert after.costs.total["upload_params"] == 0
    assert after.costs.total["upload_bytes"] == 2 * 4 * 1  # the masks alone
    assert after.costs.total["download_params"] == 2 * 4 * flat(before.variables).size


@pytest.mark.slow
def test_one_uploader_gives_its_layer_to_one_ulp():
    keep = np.zeros((12, 4))
    keep[5] = 1.0
    together = run(fl.fedlp_homo(TASK, keep=keep, **COMMON), rounds=1, cohort=12)
    alone = run(fl.fedavg(TASK, **COMMON), rounds=1, cohort=lambda *_: [5])
    np.testing.assert_allclose(
        flat(together.variables), flat(alone.variables), rtol=3e-7, atol=1e-8
    )
    assert together.costs.senders[0].tolist() == [1, 1, 1, 1]


def test_inverse_probability_at_keep_one_is_fedavg():
    plain = run(fl.fedavg(TASK, **COMMON))
    other = run(fl.fedavg(TASK, aggregator="inverse_probability", **COMMON))
    np.testing.assert_allclose(flat(plain.variables), flat(other.variables), rtol=1e-6, atol=1e-8)


def test_fedavg_and_homo_are_one_program():
    """Keep probabilities, weights and the seed are arguments of the program, not constants."""
    texts = [
        _lowered(algorithm, seed)
        for algorithm, seed in (
            (fl.fedavg(TASK, **COMMON), 0),
            (fl.fedlp_homo(TASK, keep=0.3, **COMMON), 7),
            (fl.fedlp_homo(TASK, keep=0.9, client_schedule=None, **COMMON), 0),
        )
    ]
    assert texts[0] == texts[1] == texts[2]


def test_rates_are_arguments_of_the_program():
    texts = [_lowered(fl.fedavg(TASK, client_schedule=rate, **COMMON), 0) for rate in (0.5, 0.25)]
    assert texts[0] == texts[1]


def _lowered(algorithm, seed):
    prepared = fl.Simulation(algorithm, DATA, CLIENTS, rounds=1, cohort=4, seed=seed, plan=ONE)
    return (
        rounds_of(algorithm, prepared.plan).lower(*prepared.round_shapes(prepared.plan)).as_text()
    )


# --- repeatability ------------------------------------------------------------------------------


def test_two_runs_of_one_seed_are_equal_in_every_bit():
    algorithm = fl.fedlp_homo(TASK, keep=0.5, **COMMON)
    a, b, other = run(algorithm), run(algorithm), run(algorithm, seed=1)
    assert np.array_equal(flat(a.state.variables), flat(b.state.variables))
    assert [_timeless(row) for row in a.history] == [_timeless(row) for row in b.history]
    assert not np.array_equal(flat(a.variables), flat(other.variables))


def _timeless(row):
    return {key: value for key, value in row.items() if key != "seconds"}


def test_a_longer_run_begins_like_a_shorter_one():
    algorithm = fl.fedlp_homo(TASK, keep=0.5, **COMMON)
    short, long = run(algorithm, rounds=1), run(algorithm, rounds=3)
    assert short.history["train_loss"][0] == long.history["train_loss"][0]
    assert short.costs.senders[0].tolist() == long.costs.senders[0].tolist()


def test_the_order_of_a_cohort_does_not_matter():
    algorithm = fl.fedlp_homo(TASK, keep=0.5, **COMMON)
    a = run(algorithm, cohort=lambda *_: [1, 5, 3, 9])
    b = run(algorithm, cohort=lambda *_: [9, 3, 1, 5])
    assert np.array_equal(flat(a.variables), flat(b.variables))


@pytest.mark.slow
def test_many_rounds_and_cohorts_are_one_compilation():
    algorithm = fl.fedlp_hetero(TASK, depths="uniform", **COMMON)
    clients = fl.partition.dirichlet(DATA.train.labels, clients=12, alpha=0.5, seed=0, min_size=1)
    traces = []
    counted = algorithm._replace(
        round=lambda *a: traces.append(1) or algorithm.round(*a)  # runs only while tracing
    )
    result = run(counted, clients=clients, rounds=6, plan=fl.Plan(2, 2))
    assert len(traces) == 1
    assert len(result.history) == 6


@pytest.mark.slow
def test_a_second_run_with_other_numbers_compiles_nothing(monkeypatch):
    """Seed, keep, weights and learning rate are arguments, and the process keeps its programs."""
    compiled, compile = [], compilation._compiled
    monkeypatch.setattr(compilation, "_compiled", lambda x: compiled.append(1) or compile(x))
    compilation._slot.cache_clear()
    for count, (keep, rate, seed) in ((2, (0.3, 0.5, 0)), (2, (0.7, 0.25, 5))):
        run(fl.fedlp_homo(TASK, keep=keep, client_schedule=rate, **COMMON), seed=seed)
        assert len(compiled) == count  # the round and the evaluation, once
    run(fl.fedlp_homo(TASK, keep=0.5, **COMMON | {"batch_size": 3}))
    assert len(compiled) == 3  # another round, the same evaluation


def test_the_same_algorithm_is_not_traced_again():
    algorithm, traces = fl.fedlp_homo(TASK, keep=0.5, **COMMON), []
    counted = algorithm._replace(round=lambda *a: traces.append(1) or algorithm.round(*a))
    one, other = run(counted), run(counted, seed=3, rounds=3)
    assert len(traces) == 1
    assert other.readings["round_trace_seconds"] == other.readings["test_compile_seconds"] == 0
    assert not np.array_equal(flat(one.variables), flat(other.variables))
    assert np.array_equal(flat(run(algorithm).variables), flat(one.variables))


# --- numbers, callbacks, evaluation ---------------------------------------------------------------


def test_a_row_has_what_users_rely_on():
    result = run(fl.fedlp_homo(TASK, keep=0.5, **COMMON), rounds=3, eval_every=2)
    required = "round train_loss upload_params download_params upload_bytes download_bytes seconds"
    for row in result.history:
        assert set(required.split()) <= set(row)
    assert result.history.rounds("test_accuracy").tolist() == [2, 3]
    assert result.history["round"].tolist() == [1, 2, 3]
    assert result.history["upload_bytes"].sum() == result.costs.total["upload_bytes"]
    with pytest.raises(KeyError, match="no round has 'acuracy'; there are: round, train_loss"):
        result.history["acuracy"]


@pytest.mark.slow
def test_evaluation_is_exact_for_any_split_size_and_plan():
    """37 test rows: no multiple of any batch."""
    for plan in (ONE, fl.Plan(3, 1)):
        result = run(fl.fedavg(TASK, **COMMON), plan=plan)
        logits = Steps().apply(result.variables, jnp.asarray(DATA.test.inputs), False)
        hits = np.asarray(logits).argmax(axis=1) == DATA.test.labels
        assert result.history["test_accuracy"][-1] == pytest.approx(hits.mean(), abs=1e-7)
        loss = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.asarray(DATA.test.labels, jnp.int32)
        ).mean()
        assert result.history["test_loss"][-1] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.slow
def test_shared_heads_are_tested_at_every_depth():
    algorithm = fl.fedlp_hetero(TASK, depths="uniform", heads="shared", **COMMON)
    result = run(algorithm)
    last = result.history.rows[-1]
    for depth in (1, 2, 3):
        net = Steps(depth=depth)
        logits = net.apply(result.state.variables, jnp.asarray(DATA.test.inputs), False)
        accuracy = (np.asarray(logits).argmax(axis=1) == DATA.test.labels).mean()
        assert last[f"test_accuracy_depth_{depth}"] == pytest.approx(accuracy, abs=1e-7)
    assert last["test_accuracy"] == last["test_accuracy_depth_3"]
    assert "head1" in result.state.variables["params"]
    assert "head1" not in result.variables["params"]


def test_callbacks_come_once_a_round_with_a_usable_state():
    seen = []

    def callback(round, row, state):
        seen.append((round, row["round"], int(state.round), float(flat(state.variables).sum())))

    result = run(fl.fedavg(TASK, **COMMON), rounds=3, callbacks=[callback])
    assert [s[:3] for s in seen] == [(1, 1, 1), (2, 2, 2), (3, 3, 3)]
    assert seen[-1][3] == pytest.approx(float(flat(result.variables).sum()))
    quiet = run(fl.fedavg(TASK, **COMMON), rounds=3)
    assert np.array_equal(flat(quiet.variables), flat(result.variables))


def test_no_rounds_return_the_initial_model_and_given_variables_survive():
    algorithm = fl.fedavg(TASK, **COMMON)
    initial = run(algorithm, rounds=0)
    assert len(initial.history) == 0
    result = run(algorithm, variables=initial.variables)
    assert np.array_equal(flat(run(algorithm).variables), flat(result.variables))
    assert np.isfinite(flat(initial.variables)).all()  # not donated away


def test_legs_from_a_first_round_are_the_whole_run():
    algorithm = fl.fedlp_homo(TASK, keep=0.5, **COMMON)
    whole, state = run(algorithm, rounds=4, eval_every=2), None
    for first in (1, 3):
        leg = run(algorithm, rounds=2, variables=state, first_round=first)
        state = leg.state.variables
    assert np.array_equal(flat(state), flat(whole.state.variables))
    assert [_timeless(row) for row in leg.history] == [_timeless(r) for r in whole.history.rows[2:]]
    assert int(leg.state.round) == 4


@pytest.fixture
def listening():
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_a_run_after_the_round_in_flight_and_returns_it(listening):
    def press(round, row, state):
        if round == 2:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.warns(UserWarning, match="by Ctrl-C after round 2 of 9; the result holds the rou"):
        result = run(fl.fedavg(TASK, **COMMON), rounds=9, callbacks=[press])
    assert len(result.history) == int(result.state.round) == 2
    assert signal.getsignal(signal.SIGINT) is before
    two = run(fl.fedavg(TASK, **COMMON), rounds=2)
    assert np.array_equal(flat(result.variables), flat(two.variables))


def test_ctrl_c_twice_ends_at_once(listening):
    def press(round, row, state):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(fl.fedavg(TASK, **COMMON), rounds=9, callbacks=[press])


@pytest.mark.slow
def test_cohorts_of_changing_size_are_those_of_runs_of_that_size():
    sizes, asked = {1: [2, 5, 7], 2: [1], 3: [0, 3, 4, 6]}, []

    def cohort(seed, round, clients):
        asked.append(round)
        return sizes[round]

    algorithm = fl.fedlp_homo(TASK, keep=0.5, **COMMON)
    result = run(algorithm, rounds=3, cohort=cohort, max_cohort=4, plan=fl.Plan(2, 2))
    assert asked == [1, 2, 3]
    assert result.history["clients"].tolist() == [3, 1, 4]
    variables = None
    for round, ids in sizes.items():
        leg = run(
            algorithm,
            rounds=1,
            first_round=round,
            variables=variables,
            cohort=lambda *_, ids=ids: ids,
        )
        variables = leg.state.variables
    np.testing.assert_allclose(flat(result.variables), flat(variables), rtol=1e-5, atol=1e-6)


def test_a_cohort_function_is_called_once_a_round():
    asked = []
    run(fl.fedavg(TASK, **COMMON), rounds=3, cohort=lambda s, r, k: asked.append(r) or [1, 2])
    assert asked == [1, 2, 3]


def test_a_cohort_may_be_a_share():
    assert run(fl.fedavg(TASK, **COMMON), cohort=0.5).history["clients"].tolist() == [6, 6]


def test_a_schedule_scales_by_round():
    frozen = run(
        fl.fedavg(TASK, client_schedule=lambda round: jnp.where(round < 2, 1.0, 0.0), **COMMON)
    )
    once = run(fl.fedavg(TASK, **COMMON), rounds=1)
    assert np.array_equal(flat(frozen.variables), flat(once.variables))


def test_an_optimizer_that_cannot_work_is_refused_and_one_that_never_steps_is_warned_of():
    def prepare(optimizer):
        algorithm = fl.fedavg(TASK, client_optimizer=optimizer, batch_size=64)
        fl.Simulation(algorithm, DATA, CLIENTS, rounds=1, cohort=4)

    with pytest.raises(fl.FedLPError, match="client_optimizer: lookahead needs parameters of its"):
        prepare(optax.lookahead(optax.sgd(0.1), 5, 0.5))
    with pytest.warns(UserWarning, match="the 1 local steps of a round it moves no parameter"):
        prepare(optax.MultiSteps(optax.sgd(0.1), 4))
    server = fl.fedavg(TASK, server_optimizer=optax.masked(optax.sgd(1.0), {"a": True}), **COMMON)
    with pytest.raises(fl.FedLPError, match="server_optimizer: masked cannot take the tree"):
        fl.Simulation(server, DATA, CLIENTS, rounds=1, cohort=4)


@pytest.mark.filterwarnings("ignore")
def test_a_result_has_the_warnings_of_its_run_and_of_its_data_each_once():
    bits = np.tile(np.array([[0], [1]], np.uint8), (6, 1))
    data = fl.from_arrays(bits, [0, 1] * 6, bits, [0, 1] * 6)
    clients = fl.partition.iid(data.train.labels, clients=2)
    task = fl.classification(nn.Sequential([lambda x: x[::-1], nn.Dense(2)]))  # mixes rows
    algorithm = fl.fedavg(
        task, client_optimizer=optax.MultiSteps(optax.sgd(0.1), 9), steps=2, batch_size=4
    )
    for _ in range(2):  # the second run traces nothing, and assumes as much
        warnings = run(algorithm, data, clients, rounds=1, cohort=2).warnings
        assert len(warnings) == 3
        assert "taken for pixels" in warnings[0] and "moves no parameter" in warnings[1]
        assert "rows of a batch" in warnings[2]
    assert run(fl.fedavg(TASK, **COMMON), rounds=1).warnings == []


def test_a_run_that_diverges_has_its_warnings_too():
    nothing = poisoned(range(12))
    optimizer = optax.MultiSteps(optax.sgd(0.1), 9)
    with (
        pytest.warns(UserWarning, match="moves no parameter"),
        pytest.raises(fl.DivergedError) as caught,
    ):
        run(fl.fedavg(TASK, client_optimizer=optimizer, steps=1), data=nothing, rounds=1)
    assert len(caught.value.result.warnings) in (1, 2)


# --- clients that fail ----------------------------------------------------------------------------


def poisoned(clients):
    """Data in which the given clients hold a NaN; loaders refuse it, so it is put in late."""
    inputs = DATA.train.inputs.copy()
    for client in clients:
        inputs[CLIENTS.rows(client)[0]] = np.nan
    return dataclasses.replace(DATA, train=DATA.train._replace(inputs=inputs))


def test_a_client_that_is_not_finite_is_left_out_counted_and_named():
    everyone = lambda *_: [1, 3, 5, 7]  # noqa: E731
    without = run(fl.fedavg(TASK, **COMMON), cohort=lambda *_: [1, 5, 7], rounds=1)
    with pytest.warns(RuntimeWarning, match="left out 1 of 4 clients .* not finite: 3"):
        result = run(fl.fedavg(TASK, **COMMON), data=poisoned([3]), cohort=everyone, rounds=1)
    assert result.history["clients_left_out"].tolist() == [1]
    np.testing.assert_allclose(flat(result.variables), flat(without.variables), rtol=1e-6)
    assert np.isfinite(result.history["train_loss"]).all()
    assert result.costs.clients == [4]  # it has sent all the same


def test_a_run_whose_clients_all_fail_stops_with_the_last_good_model():
    cohorts = {1: [0, 1], 2: [2, 3], 3: [4, 5]}
    good = run(fl.fedavg(TASK, **COMMON), cohort=lambda s, r, k: cohorts[r], rounds=1)
    with pytest.raises(fl.DivergedError, match="round 2: none of the 2 clients") as caught:
        run(
            fl.fedavg(TASK, **COMMON),
            data=poisoned([2, 3]),
            cohort=lambda s, r, k: cohorts[r],
            rounds=3,
        )
    assert np.array_equal(flat(caught.value.result.variables), flat(good.variables))
    result = caught.value.result
    assert len(result.history) == 2
    assert int(result.state.round) == 1  # the state as a whole stands still, counters too
    caught.value.add_note("a note")
    sent = pickle.loads(pickle.dumps(caught.value))  # as a process pool does
    assert (str(sent), sent.__notes__) == (str(caught.value), ["a note"])
    assert np.array_equal(flat(sent.result.variables), flat(good.variables))
    assert sent.result.history.rows == result.history.rows
    assert sent.result.costs.total == result.costs.total and sent.result.plan == result.plan


@pytest.mark.parametrize(
    ("client", "server"),
    [(optax.sgd(1e38), None), (optax.sgd(0.1), optax.chain(optax.sgd(1e38), optax.scale(1e38)))],
)
def test_a_model_that_overflows_stops_the_run_with_the_last_good_one(client, server):
    algorithm = fl.fedavg(
        fl.classification(nn.Dense(3)), client_optimizer=client, steps=1, server_optimizer=server
    )
    before = run(algorithm, rounds=0)
    with pytest.raises(fl.DivergedError, match="round 1: ") as caught:
        run(algorithm)
    state = caught.value.result.state
    assert np.array_equal(flat(state.variables), flat(before.variables))
    assert int(state.round) == 0


def test_padding_of_a_batch_is_the_clients_own():
    """Example 0 is NaN; a batch padded with it would be too, for zero times NaN is NaN."""
    owner = next(k for k in range(12) if 0 in CLIENTS.rows(k))
    data = dataclasses.replace(DATA, train=DATA.train._replace(inputs=DATA.train.inputs.copy()))
    data.train.inputs[0] = np.nan
    algorithm = fl.fedavg(TASK, **COMMON | {"batch_size": 3})  # clients of 5: a padded batch each
    with pytest.warns(RuntimeWarning, match=f"left out 1 of 12 clients .* not finite: {owner}"):
        run(algorithm, data=data, cohort=12, rounds=1)


@pytest.mark.slow
def test_a_head_that_is_not_finite_counts_as_a_client_that_is_not():
    hetero = fl.fedlp_hetero(TASK, depths=[1, 3] * 6, **COMMON)
    with pytest.warns(RuntimeWarning, match="left out 1 of 4 clients .* not finite: 2"):
        result = run(hetero, data=poisoned([2]), cohort=lambda *_: [1, 2, 3, 4], rounds=1)
    assert result.history["clients_left_out"].tolist() == [1]


def test_evaluation_counts_every_row_of_a_model_in_short_floats():
    """bfloat16 has no odd whole number above 256."""
    labels = np.arange(9000) % 2
    inputs = np.stack([labels, 1 - labels], axis=1).astype(np.float32)
    data = fl.from_arrays(inputs[:60], labels[:60], inputs, labels, num_classes=2)
    eye = {"kernel": jnp.eye(2)[::-1], "bias": jnp.zeros(2)}
    task = fl.classification(nn.Dense(2, dtype=jnp.bfloat16))
    still = fl.fedavg(task, client_schedule=0.0, **COMMON)
    clients = fl.partition.iid(data.train.labels, clients=12, seed=0)
    result = run(still, data=data, clients=clients, variables={"params": eye}, rounds=1)
    assert result.history["test_accuracy"].tolist() == [1.0]
    assert abs(result.history["test_loss"][-1] - np.log(1 + np.exp(-1))) < 1e-3


def test_shared_heads_go_on_from_the_servers_variables_and_say_so():
    shared = fl.fedlp_hetero(TASK, depths="uniform", heads="shared", **COMMON)
    first = run(shared, rounds=1)
    again = run(shared, rounds=0, variables=first.state.variables)
    assert np.array_equal(flat(again.state.variables), flat(first.state.variables))
    with pytest.raises(fl.FedLPError, match=r"head1.* has shape nothing but .*state\.variables"):
        run(shared, rounds=0, variables=first.variables)


# --- what is refused ------------------------------------------------------------------------------


class Wants2D(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Conv(4, (3, 3))(x).reshape(x.shape[0], -1)[:, :3] @ jnp.ones((5, 3))


class OneLogitAPosition(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(x)[:, None]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": -1}, "rounds=-1 must be a whole number of at least 0"),
        ({"rounds": 1.5}, "rounds=1.5"),
        ({"eval_every": 0}, "eval_every=0 must be a whole number of at least 1"),
        ({"seed": -3}, "seed=-3"),
        ({"cohort": 13}, "cohort=13 exceeds the 12 clients in this partition"),
        ({"cohort": 0}, "cohort=0 must be at least 1"),
        ({"cohort": 1.5}, "neither a whole number of clients nor a share"),
        ({"cohort": "four"}, "must be a number of clients"),
        ({"cohort": lambda *_: [1, 99]}, "ids 1 to 99 in round 1; clients are 0 to 11"),
        ({"cohort": lambda *_: [1, 1]}, "a client twice"),
        ({"cohort": lambda *_: []}, "return client ids"),
        ({"plan": fl.Plan(devices=64)}, "plan.devices=64 but jax sees 4"),
        ({"plan": fl.Plan(width=0)}, "plan.width=0 must be a whole number of at least 1"),
        ({"variables": {"params": {"hidden1": {"kernel": jnp.zeros((4, 9))}}}}, "has shape"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(fl.FedLPError, match=message):
        run(fl.fedavg(TASK, **COMMON), **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fl.fedavg(TASK, **COMMON | {"epochs": 0}), "epochs=0 must be a whole number"),
        (lambda: fl.fedavg(TASK, steps=3, **COMMON), "give either epochs or steps"),
        (lambda: fl.fedavg(TASK, weighting="size", **COMMON), "weighting 'size' is unknown"),
        (
            lambda: fl.fedavg(TASK, aggregator="masked_means", **COMMON),
            "did you mean 'masked_mean'",
        ),
        (
            lambda: fl.fedlp_hetero(TASK, depths=1, heads="keep", **COMMON),
            "heads 'keep' is unknown",
        ),
        (lambda: run(fl.fedlp_hetero(TASK, depths=4, **COMMON)), "depths=4 is outside 1 to 3"),
        (
            lambda: run(fl.fedlp_hetero(TASK, depths=[0.5, 0.4], **COMMON)),
            r"depths has shape \[2\]",
        ),
        (lambda: run(fl.fedlp_homo(TASK, keep=2.0, **COMMON)), "keep=2 must be"),
        (
            lambda: run(fl.fedlp_hetero(TASK, depths=1, layers={"hidden": "body"}, **COMMON)),
            "layer 'body' is only partly in the submodel of depth 1",
        ),
        (
            lambda: run(fl.fedavg(fl.classification(Steps(classes=2)), **COMMON)),
            "the model has 2 outputs but the data set has 3 classes",
        ),
        (
            lambda: run(fl.fedavg(fl.classification(Wants2D()), **COMMON)),
            r"the model cannot take the inputs of 'arrays', of shape \[4\]",
        ),
        (
            lambda: run(
                fl.fedavg(TASK, **COMMON),
                clients=fl.partition.iid(np.zeros(30, np.int64), clients=3),
            ),
            "made for 30 examples but the training split of 'arrays' has 60",
        ),
        (lambda: fl.classification("resnet"), "a model must be a flax linen module"),
        (lambda: fl.fedavg(Steps(), **COMMON), r"task is a Steps; wrap a model as fl.classif"),
        (
            lambda: fl.fedavg(TASK, client_optimizer="adam"),
            "client_optimizer='adam' is not an optax",
        ),
        (
            lambda: fl.fedavg(TASK, server_optimizer=1, **COMMON),
            "server_optimizer=1 is not an optax",
        ),
        (lambda: fl.fedavg(TASK, **COMMON | {"epochs": 2.0}), "epochs=2.0 must be a whole"),
        (lambda: run(fl.fedavg(TASK, layers=["a"], **COMMON)), r"unknown layer rule \['a'\]"),
        (
            lambda: run(fl.fedavg(TASK, layers={"hiden": "a"}, **COMMON)),
            "the layer rule 'hiden' matches none of the 8 tensors",
        ),
        (
            lambda: run(fl.fedlp_homo(TASK, keep=lambda r: jnp.ones(3), **COMMON)),
            r"the keep schedule returns an array of shape \[3\]",
        ),
        (
            lambda: run(fl.fedlp_homo(TASK, keep=lambda r: 2 * r, **COMMON)),
            "the keep schedule in round 1=2 must be",
        ),
        (
            lambda: run(fl.fedlp_homo(TASK, keep=lambda r: 1.0 if r < 3 else 0.5, **COMMON)),
            "the keep schedule cannot be traced .* jnp.where",
        ),
        (
            lambda: run(fl.fedavg(fl.classification(OneLogitAPosition()), **COMMON)),
            r"outputs have shape \[1, 1, 3\] for a batch of one, but logits must be \[batch, cl",
        ),
    ],
)
def test_refusals_of_algorithms(make, message):
    with pytest.raises(fl.FedLPError, match=message):
        make()


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({}, {"cohort": 99}),
        ({"keep": 1.5}, {}),
        ({"keep": lambda r: 1.5}, {}),
        ({"layers": {"nothing like this": "a"}}, {}),
        ({}, {"variables": {"hidden1": {"kernel": jnp.zeros((4, 8))}}}),
    ],
)
def test_nothing_is_compiled_before_a_refusal(caplog, settings, what):
    with jax.log_compiles(True), pytest.raises(fl.FedLPError):
        run(fl.fedlp_homo(TASK, **{"keep": 1.0} | settings, **COMMON), **what)
    assert not [r for r in caplog.records if "ompil" in r.getMessage()]
    with jax.log_compiles(True):
        run(fl.fedavg(TASK, **COMMON), rounds=1)
    assert [r for r in caplog.records if "ompil" in r.getMessage()]  # the log would have shown it


def test_progress_says_what_it_does_before_it_takes_long(monkeypatch, capsys):
    def prepare(*_, **__):
        assert capsys.readouterr().err == f"{DATA.name}: preparing data and model ...\n"
        raise InterruptedError

    monkeypatch.setattr(loop, "Simulation", prepare)
    with pytest.raises(InterruptedError):
        run(fl.fedavg(TASK, **COMMON), progress=True)


def test_rounds_of_a_simulation_start_at_one_and_after_compiling():
    arguments = {"rounds": 1, "cohort": 4, "plan": ONE}
    simulation = fl.Simulation(fl.fedavg(TASK, **COMMON), DATA, CLIENTS, **arguments)
    with pytest.raises(fl.FedLPError, match="round 1 cannot be started before compile()"):
        simulation.dispatch(1)
    simulation.compile()
    with pytest.raises(fl.FedLPError, match="round 0 cannot be started: the first is round 1"):
        simulation.dispatch(0)
    assert simulation.read(simulation.dispatch(1))["round"] == 1


@pytest.mark.slow
def test_variables_in_numpys_float64_become_what_jax_computes_in():
    hetero = fl.fedlp_hetero(TASK, depths="uniform", **COMMON)
    given = run(hetero, rounds=0).variables
    double = jax.tree.map(lambda x: np.asarray(x, np.float64), given)
    one, other = (run(hetero, variables=v).variables for v in (given, double))
    assert np.array_equal(flat(one), flat(other)) and flat(other).dtype == np.float32


def test_a_model_in_short_floats_moves_as_far_with_many_clients_as_with_few():
    class Short(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)(x)

    data = dataset(examples=600)
    same = fl.Partition(np.zeros(600, np.int32), np.arange(601), data.train.labels, 3, True)
    algorithm = fl.fedavg(fl.classification(Short()), client_optimizer=optax.sgd(1.0), batch_size=1)
    start = run(algorithm, data, same, rounds=0)
    few, many = (
        run(algorithm, data, same, rounds=1, cohort=c, variables=start.variables) for c in (1, 600)
    )
    assert few.variables["params"]["Dense_0"]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        flat(few.variables).astype(np.float32), flat(many.variables).astype(np.float32)
    )
