"""Formulas against sums over every mask, and against rounds that were really run."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import fedlp_jax as fl
from benchmarks import theory as bench
from fedlp_jax import theory
from fedlp_jax.accounting.ledger import Ledger
from fedlp_jax.aggregation.reducer import Received, UploadInfo
from fedlp_jax.pruning.layers import LayerTable, layer_table
from fedlp_jax.types import Batch, Normalize

RNG = np.random.default_rng(0)
KEEP = np.array([0.0, 1e-9, 0.1, 0.35, 0.8, 1 - 1e-6])
LAYERS = LayerTable(
    tuple("abcdefghi"), {}, params=np.arange(1, 10), statistics=np.array([0, 2] + 7 * [0])
)


def masks(keep):
    """Every mask `[2^C, C]` and its probability `[2^C]`."""
    every = np.array(list(itertools.product([0.0, 1.0], repeat=len(keep))))
    return every, np.where(every > 0, keep, 1 - keep).prod(axis=1)


def alike(keep, clients):
    return np.full(clients, keep)


def test_senders_against_every_mask():
    every, chance = masks(KEEP)
    counted = np.bincount(every.sum(axis=1).astype(int), chance)
    np.testing.assert_allclose(theory.senders(KEEP), counted, rtol=1e-12)
    np.testing.assert_allclose(theory.updated(KEEP), 1 - counted[0], rtol=1e-12)
    n = np.arange(1, len(counted))
    rho = (counted[1:] / n).sum() / counted[1:].sum()
    np.testing.assert_allclose(theory.inverse_senders(KEEP), rho, rtol=1e-12)


@pytest.mark.parametrize("bits", [1, 10, 40])
def test_a_thousand_clients_against_whole_numbers(bits):
    """p = 2^-bits: a probability is a whole number over 2^(C bits), and 1/n one over their lcm."""
    clients, one = 1024, 2**bits
    ways = [math.comb(clients, n) * (one - 1) ** (clients - n) for n in range(clients + 1)]
    common = math.lcm(*range(1, clients + 1))
    inverse = sum(way * (common // n) for n, way in enumerate(ways) if n)
    q = sum(ways[1:]) / one**clients
    rho = inverse / (common * sum(ways[1:]))
    keep = alike(1 / one, clients)
    np.testing.assert_allclose(theory.updated(keep), q, rtol=1e-12)
    np.testing.assert_allclose(theory.inverse_senders(keep), rho, rtol=1e-12)
    moments = theory.masked_mean(keep)
    np.testing.assert_allclose(moments.mean.sum(), q, rtol=1e-12)
    np.testing.assert_allclose(np.trace(moments.second), q * rho, rtol=1e-12)


def test_nobody_and_everybody():
    assert theory.updated([0.0, 0.0]) == 0 and theory.updated([0.3, 1.0]) == 1
    assert np.isnan(theory.inverse_senders([0.0, 0.0]))
    assert theory.inverse_senders(alike(1.0, 8)) == 1 / 8
    assert theory.sampling_variance(1.0, 10, 10) == pytest.approx(0, abs=1e-15)
    assert theory.sampling_variance(1.0, 10, 100) == pytest.approx(90 / (10 * 99))
    assert theory.sampling_variance(1e-12, 10, 100) == pytest.approx(1)
    assert theory.sampling_variance(0.5, 1, 1) == 0


@pytest.mark.parametrize("name", ["masked_mean", "cohort_mean", "inverse_probability"])
@pytest.mark.parametrize("weight", [None, np.array([3.0, 1, 2000, 0.5, 1, 0])])
def test_moments_against_the_package_over_every_mask(name, weight):
    """The reducer itself is run on all 2^C masks, its updates being unit vectors."""
    reducer, clients = getattr(fl.aggregate, name)(), len(KEEP)
    table = layer_table({"params": {"a": {"x": jnp.zeros(clients)}}})
    a = np.ones(clients) if weight is None else weight

    def aggregate(mask):
        lifted = jax.vmap(
            lambda d, a, m, p: reducer.prepare(
                {"params": {"a": {"x": d}}},
                UploadInfo(a, m[None], p[None]),
                jnp.array(True),
                table,
            )
        )(jnp.eye(clients), jnp.asarray(a), mask, jnp.asarray(KEEP))
        total = jax.tree.map(lambda x: x.sum(axis=0), lifted)
        received = Received(total, None, None, None)
        return reducer.reduce(received, (), table, None).update["params"]["a"]["x"]

    every, chance = masks(KEEP)
    with jax.enable_x64(True):
        w = np.asarray(jax.jit(jax.vmap(aggregate))(jnp.asarray(every)))
    moments = getattr(theory, name)(KEEP, weight)
    np.testing.assert_allclose(moments.mean, chance @ w, rtol=1e-11, atol=1e-300)
    np.testing.assert_allclose(moments.second, (w.T * chance) @ w, rtol=1e-11, atol=1e-300)
    updates = RNG.normal(size=(clients, 3))
    sums = w @ updates
    variance = chance @ (sums - chance @ sums) ** 2
    np.testing.assert_allclose(moments.expected(updates), chance @ sums, rtol=1e-11)
    np.testing.assert_allclose(moments.variance(updates), variance, rtol=1e-11)
    fedavg = a @ updates / a.sum()
    np.testing.assert_allclose(moments.bias(updates), chance @ sums - fedavg, rtol=1e-9)


def test_masked_mean_favours_who_keeps_more_and_inverse_probability_nobody():
    keep = np.array([0.2, 0.4, 0.9])
    mean = theory.masked_mean(keep).mean
    assert (mean[1:] / mean[:-1] > keep[1:] / keep[:-1]).all()
    np.testing.assert_allclose(theory.inverse_probability(keep).mean, 1 / 3, rtol=1e-15)
    equal = theory.masked_mean(alike(0.3, 5))
    np.testing.assert_allclose(equal.mean, theory.updated(alike(0.3, 5)) / 5, rtol=1e-12)


def test_random_cohorts_against_every_cohort():
    population, cohort, keep = 6, 3, 0.4
    inside = theory.masked_mean(alike(keep, cohort))
    mean, second = np.zeros(population), np.zeros((population, population))
    chosen = list(itertools.combinations(range(population), cohort))
    for ids in chosen:
        mean[list(ids)] += inside.mean / len(chosen)
        second[np.ix_(ids, ids)] += inside.second / len(chosen)
    sampled = theory.sampled_masked_mean(keep, cohort, population)
    np.testing.assert_allclose(sampled.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(sampled.second, second, rtol=1e-12)
    updates = RNG.normal(size=(population, 2))
    apart = updates - updates.mean(axis=0)
    spread = theory.updated(alike(keep, cohort)) * theory.sampling_variance(
        keep, cohort, population
    )
    np.testing.assert_allclose(sampled.variance(apart), spread * (apart**2).mean(axis=0))


def test_uploads_are_given_by_layer():
    keep = RNG.uniform(size=(4, 9))
    found = theory.uploads(keep, 4, LAYERS)
    for layer, p in enumerate(keep.T):
        np.testing.assert_array_equal(found.distribution[layer], theory.senders(p))
        assert found.updated[layer] == theory.updated(p)
        assert found.inverse[layer] == theory.inverse_senders(p)
        np.testing.assert_allclose(found.expected[layer], p.sum())
    by_name = theory.uploads({"b": 0.0}, 4, LAYERS)
    assert by_name.updated.tolist() == [1, 0] + 7 * [1]
    assert np.isnan(by_name.inverse[1]) and by_name.inverse[0] == 1 / 4


def test_communication_is_the_ledger_s():
    """The expectation is linear, so the mean over all masks of a small case is exact."""
    keep = np.array([0.2, 0.7])
    every, chance = masks(keep)
    rows = []
    for mask in every:
        upload = np.repeat(mask[:, None], 9, axis=1)
        rows.append(list(Ledger(LAYERS, 2).add(np.arange(2), upload, np.ones((2, 9))).items()))
    expected = {row[0][0]: chance @ [value for _, value in row] for row in zip(*rows, strict=True)}
    assert theory.communication(keep, 2, LAYERS) == pytest.approx(expected, rel=1e-14)


def test_communication_of_the_published_table():
    """Thousands of parameters a client, up and down, of FedAvg and FedLP-Homo (FedLP's table)."""
    task = fl.classification(fl.models.FedLPCNN(num_classes=10))
    image = Batch(
        jnp.zeros((1, 32, 32, 3)),
        jnp.zeros(1, jnp.int32),
        None,
        Normalize(np.float32(1), np.float32(0)),
    )
    table = layer_table(jax.eval_shape(task.init, jax.random.key(0), image))
    published = {1.0: 1102.93, 0.1: 606.61, 0.3: 716.91, 0.5: 827.20, 0.7: 937.49}
    for keep, kparams in published.items():
        costs = theory.communication(keep, 10, table)
        each = (costs["upload_params"] + costs["download_params"]) / 10 / 1000
        assert round(each, 2) == kparams


def test_the_bound_holds_where_the_error_is_known_and_says_something():
    """Both sides exactly, for keep rates by layer, cohorts, local steps, rounds, learning rates."""
    curvature, population, layers = np.array([2.0, 1.0, 0.25]), 20, 2
    optima = RNG.normal(size=(layers, population, 3))
    start = np.full(3, 2.0)
    centre = optima.mean(axis=1, keepdims=True)
    gap = 0.5 * (curvature * (start - centre) ** 2).sum()
    dissimilarity = ((curvature * (optima - centre)) ** 2).sum(axis=(0, 2)).mean()
    slack = []
    for keep, cohort, steps, rounds, share in itertools.product(
        ([1.0, 1.0], [0.3, 0.3], [0.05, 0.6]), (1, 5, 20), (1, 5), (1, 30, 300), (1.0, 0.1)
    ):
        q = np.array([theory.updated(alike(p, cohort)) for p in keep])
        rate = share * np.sqrt(q.min() / q.max()) / (4 * curvature.max() * steps)
        gradients = 0.0
        for p, q_l, b in zip(keep, q, optima, strict=True):
            weights = theory.sampled_masked_mean(p, cohort, population)
            contraction = (1 - rate * curvature) ** steps
            _, square = theory.quadratic_error(weights, b, start, contraction, rounds - 1)
            gradients += q_l * (curvature**2 * square).sum(axis=1).mean()
        bound = theory.gradient_bound(
            keep=keep,
            cohort=cohort,
            population=population,
            gap=gap,
            smoothness=curvature.max(),
            learning_rate=rate,
            local_steps=steps,
            rounds=rounds,
            dissimilarity=dissimilarity,
        )
        slack.append(bound / gradients)
    assert min(slack) >= 1
    assert min(slack) < 20


@pytest.fixture(scope="module")
def homo():
    """FedLP-Homo on the quadratic problem: 2 layers at each of four keep rates, 60 episodes."""
    problem = bench.equal_rates(layers=2, episodes=60, rounds=25)
    return problem, bench.simulate(problem), bench.predict(problem)


@pytest.mark.parametrize("keep", bench.RATES)
def test_error_of_every_round_within_four_standard_errors(homo, keep):
    problem, simulated, (mean, square) = homo
    who = problem.keep[0] == keep
    for values, expected in ((simulated.error, mean), (simulated.error**2, square)):
        predicted, found, error = bench.compare(values, expected, who)
        np.testing.assert_allclose(found[0], predicted[0], rtol=1e-6)
        assert (np.abs(found - predicted)[1:] < 4 * error[1:]).all()
    # A test that could not tell these keep rates apart would show nothing.
    assert (error[1:] < 0.25 * predicted[1:]).all()


def test_unchanged_layers_at_keep_a_tenth_and_ten_clients(homo):
    """(1 - .1)^10 = .349 of them keep their bits, and all others do not."""
    problem, simulated, _ = homo
    np.testing.assert_array_equal(simulated.unchanged, simulated.senders == 0)
    unchanged = simulated.unchanged[..., problem.keep[0] == 0.1]
    expected = 1 - theory.updated(alike(0.1, 10))
    assert round(expected, 3) == 0.349
    sigma = np.sqrt(expected * (1 - expected) / unchanged.size)
    assert abs(unchanged.mean() - expected) < 4 * sigma


@pytest.mark.parametrize("keep", bench.RATES)
def test_numbers_of_senders_follow_their_distribution(homo, keep):
    problem, simulated, _ = homo
    counted = np.bincount(simulated.senders[..., problem.keep[0] == keep].ravel(), minlength=11)
    expected = counted.sum() * theory.senders(alike(keep, 10))
    assert (counted[expected == 0] == 0).all()
    usual = expected >= 10  # of the rest together, as a chi-square test wants it
    found = np.append(counted[usual], counted[~usual].sum())
    wanted = np.append(expected[usual], expected[~usual].sum())
    some = wanted > 0
    statistic = ((found - wanted)[some] ** 2 / wanted[some]).sum()
    # As unlikely as four standard deviations of a normal number.
    assert stats.chi2.sf(statistic, max(some.sum() - 1, 1)) > 2 * stats.norm.sf(4)


def test_uploads_cost_what_is_expected_on_average(homo):
    problem, simulated, _ = homo
    layers, width = problem.optima.shape[1:]
    table = LayerTable(
        tuple(f"layer{i}" for i in range(layers)),
        {},
        params=np.full(layers, width),
        statistics=np.zeros(layers, np.int64),
    )
    keep = np.broadcast_to(problem.keep, (problem.cohort, layers))
    expected = theory.communication(keep, problem.cohort, table)
    variance = problem.cohort * (keep[0] * (1 - keep[0]) * table.params**2).sum()
    sigma = np.sqrt(variance / len(simulated.costs))
    for name, scale in (("upload_params", 1), ("upload_bytes", 4)):
        mean = np.mean([row[name] for row in simulated.costs])
        assert abs(mean - expected[name]) < 4 * scale * sigma
    for name in ("download_params", "download_bytes"):
        assert {row[name] for row in simulated.costs} == {expected[name]}


@pytest.mark.slow
@pytest.mark.parametrize("aggregator", ["masked_mean", "inverse_probability"])
def test_unequal_clients_within_four_standard_errors(aggregator):
    problem = bench.unequal_clients(aggregator, layers=2, episodes=30, rounds=25)
    simulated, (mean, square) = bench.simulate(problem), bench.predict(problem)
    everyone = np.ones(problem.optima.shape[1], bool)
    for values, expected in ((simulated.error, mean), (simulated.error**2, square)):
        predicted, found, error = bench.compare(values, expected, everyone)
        assert (np.abs(found - predicted)[1:] < 4 * error[1:]).all()


def test_unequal_clients_draw_the_masked_mean_off_the_optimum():
    """In the long run by E v / q; inverse probability ends at the optimum on average."""
    keep, optima = np.array([0.1, 0.5, 0.9]), np.array([[0.0], [1.0], [5.0]])
    ends = []
    for weights in (theory.masked_mean(keep), theory.inverse_probability(keep)):
        mean, square = theory.quadratic_error(weights, optima, [0.0], 0.9, 2000)
        assert (square >= mean**2).all()
        ends.append(mean[-1, 0])
    limit = theory.masked_mean(keep).mean @ (optima - 2) / theory.updated(keep)
    assert limit > 1
    np.testing.assert_allclose(ends, [limit[0], 0], atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.senders(0.5), r"keep has shape \[\]; give one probability per client"),
        (lambda: theory.updated([0.5, 1.5]), r"keep=1.5 must be a number in \[0, 1\]"),
        (lambda: theory.updated([0.5, np.nan]), "keep=nan must be"),
        (lambda: theory.masked_mean([0.5, 0.5], [1.0]), r"2 numbers.*got shape \[1\]"),
        (lambda: theory.masked_mean([0.5], [0.0]), "not all 0"),
        (lambda: theory.inverse_probability([0.5], [-1.0]), "none negative"),
        (lambda: theory.sampled_masked_mean(0.5, 11, 10), "cohort of 11 cannot be drawn from 10"),
        (lambda: theory.sampling_variance(0.0, 5, 10), "never sent"),
        (lambda: theory.uploads(2.0, 4, LAYERS), "keep=2 must be"),
        (lambda: theory.communication([0.5] * 7, 4, LAYERS), r"one per client \(K=4\)"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(fl.FedLPError, match=message):
        call()


def test_a_learning_rate_too_large_for_the_bound_is_refused():
    with pytest.raises(fl.FedLPError, match="at most 0.05 for the bound to hold"):
        theory.gradient_bound(
            keep=0.5,
            cohort=5,
            population=10,
            gap=1.0,
            smoothness=1.0,
            learning_rate=0.06,
            local_steps=5,
            rounds=10,
        )
