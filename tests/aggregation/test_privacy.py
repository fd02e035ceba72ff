"""Client-level privacy: the mechanism against its equations, epsilon against dp-accounting."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Steps, dataset, flat, in_float64

import fedlp_jax as fl
from fedlp_jax.aggregation.privacy import accountant, clipped
from fedlp_jax.pruning.layers import layer_table
from fedlp_jax.simulation.cohorts import sample

dp = pytest.importorskip("dp_accounting", reason="the extra `privacy` is not installed")

DATA = dataset()
PARTS = fl.partition.quantity(DATA.train.labels, clients=12, alpha=4.0, seed=1)
KEEP = {"hidden1": 0.8, "hidden2": 0.5, "hidden3": 0.0}  # the head is always sent
PRIVATE = {"aggregator": "cohort_mean", "weighting": "uniform"}
COHORT, ROUNDS = 6, 3

pytestmark = pytest.mark.filterwarnings("ignore:keep=0 for hidden3")


def algorithm(privacy, rate=0.1, width=8, module=Steps, **settings):
    return fl.fedlp_homo(
        fl.classification(module(width=width)),
        keep=settings.pop("keep", KEEP),
        client_optimizer=optax.sgd(rate),
        batch_size=4,
        privacy=privacy,
        **(PRIVATE | settings),
    )


def run(algorithm, **settings):
    settings = {"rounds": ROUNDS, "cohort": COHORT, "seed": 2, "plan": fl.Plan(1, 1)} | settings
    return fl.simulate(algorithm, DATA, PARTS, **settings)


def alone(client, start):
    """One client's update in round 1, unclipped and of all layers."""
    result = run(algorithm(None, keep=1.0), cohort=lambda *_: [client], rounds=1, variables=start)
    return jax.tree.map(lambda a, b: np.asarray(a - b), result.variables, start)["params"]


def mask(client, layers):
    key = jax.random.key(2)
    for part in (1, client, 3):
        key = jax.random.fold_in(key, part)
    draw = np.asarray(jax.random.uniform(key, (len(layers),), jnp.float32))
    return {name: draw[i] < KEEP.get(name, 1.0) for i, name in enumerate(layers)}


@pytest.mark.parametrize("aggregator", ["cohort_mean", "inverse_probability"])
@pytest.mark.slow
def test_a_round_is_clip_sum_and_a_fixed_divisor(aggregator):
    """With hardly any noise; the cohort of six is heard but for those who drop out."""
    privacy = fl.Privacy(clip=0.1, noise_multiplier=1e-9)
    with jax.enable_x64(True):
        start = in_float64(run(algorithm(None), rounds=0).variables)
        result = run(
            algorithm(privacy, aggregator=aggregator),
            rounds=1,
            variables=start,
            faults=fl.Faults(dropout=0.4),
        )
        lost = result.history["dropped"][0]
        assert 0 < lost < COHORT
        total = jax.tree.map(np.zeros_like, start["params"])
        scales = []
        for client in sample(2, 1, 12, COHORT).tolist():
            key = jax.random.key(2)
            for part in (1, client, 11):
                key = jax.random.fold_in(key, part)
            if jax.random.uniform(key, (2,), jnp.float32)[0] < np.float32(0.4):
                continue
            update, sent = alone(client, start), mask(client, result.layers.names)
            kept = {name: update[name] for name in update if sent[name]}
            scales.append(min(1.0, 0.1 / np.linalg.norm(flat(kept))))
            for name, layer in kept.items():
                weight = scales[-1]
                if aggregator == "inverse_probability":
                    weight /= np.float32(KEEP.get(name, 1.0))
                for leaf, value in layer.items():
                    total[name][leaf] += weight * value / COHORT
    assert len(scales) == COHORT - lost
    assert min(scales) < 1  # somebody is clipped
    got = jax.tree.map(lambda a, b: np.asarray(a - b), result.variables, start)["params"]
    for name, layer in total.items():
        for leaf, value in layer.items():
            np.testing.assert_allclose(got[name][leaf], value, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("aggregator", "stretch"), [("cohort_mean", 0), ("inverse_probability", 1)]
)
@pytest.mark.parametrize("dropout", [0.0, 1.0])
@pytest.mark.slow
def test_noise_has_the_deviation_of_the_sensitivity(aggregator, stretch, dropout):
    """Nobody learns, so that only noise moves the model; it does so too if nobody arrives."""
    privacy = fl.Privacy(clip=0.5, noise_multiplier=1.2, delta=1e-3)
    private = algorithm(privacy, rate=0.0, width=64, aggregator=aggregator)
    start = run(private, rounds=0)
    result = run(private, rounds=1, cohort=10, faults=fl.Faults(dropout=dropout))
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), result.variables, start.variables)
    for name in ("hidden1", "hidden2"):
        noise = flat(moved["params"][name])
        want = 1.2 * 0.5 / 10 / (KEEP[name] if stretch else 1.0)
        # Four standard errors of a standard deviation.
        assert np.std(noise) == pytest.approx(want, rel=4 / np.sqrt(2 * noise.size)), name
        assert abs(np.mean(noise)) < 4 * want / np.sqrt(noise.size)
    assert not flat(moved["params"]["hidden3"]).any()  # outside all masks: not released
    again = run(private, rounds=2, cohort=10, faults=fl.Faults(dropout=dropout))
    later = flat(again.variables) - flat(result.variables)
    correlation = np.corrcoef(later, flat(moved))[0, 1]
    assert abs(correlation) < 4 / np.sqrt(later.size)  # a new draw each round


def test_what_is_sent_never_exceeds_the_bound():
    rng = np.random.default_rng(0)
    update = {"params": {name: {"w": rng.normal(size=(7, 3))} for name in "abc"}}
    table = layer_table(update)
    for scale in (1e-9, 1e-2, 1.0, 1e18):
        for sent in ([1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]):
            bad = {
                name: {"w": jnp.asarray(np.where(s, scale * layer["w"], np.nan), jnp.float32)}
                for (name, layer), s in zip(update["params"].items(), sent, strict=True)
            }
            small = clipped(
                {"params": bad}, jnp.asarray(sent, jnp.float32), jnp.float32(0.3), table
            )
            kept = [
                np.asarray(small["params"][n]["w"]) for n, s in zip("abc", sent, strict=True) if s
            ]
            norm = np.linalg.norm(np.ravel(kept))
            whole = scale * np.linalg.norm(
                [update["params"][n]["w"] for n, s in zip("abc", sent, strict=True) if s]
            ) if any(sent) else 0.0  # fmt: skip
            assert norm == pytest.approx(min(whole, 0.3), rel=1e-5)


@pytest.mark.slow
def test_norm_clipping_alone_is_the_mean_of_clipped_updates():
    with jax.enable_x64(True):
        start = in_float64(run(algorithm(None), rounds=0).variables)
        settings = {"rounds": 1, "variables": start, "cohort": lambda *_: [3, 7]}
        both = run(algorithm(None, keep=1.0, clip=0.05), **settings)
        updates = [flat(alone(k, start)) for k in (3, 7)]
    mean = np.mean([u * min(1, 0.05 / np.linalg.norm(u)) for u in updates], axis=0)
    got = flat(both.variables) - flat(start)
    np.testing.assert_allclose(got, mean, rtol=1e-6, atol=1e-10)


# --- accounting ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def private():
    return fl.Privacy(clip=1.0, noise_multiplier=3.0, delta=1e-3)


@pytest.mark.slow
def test_epsilon_is_that_of_dp_accounting(private):
    """Its own accountant, given the whole run as one event, with the sensitivity 2 S."""
    result = run(algorithm(private), rounds=3, faults=fl.Faults(
        profile=fl.Profile(1e6, 1e6, 1e6), over_selection=1.5))  # fmt: skip
    event = dp.SampledWithoutReplacementDpEvent(
        source_dataset_size=12, sample_size=9, event=dp.GaussianDpEvent(3.0 / 2)
    )
    for rounds, epsilon in enumerate(result.history["epsilon"], start=1):
        theirs = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
        theirs.compose(dp.SelfComposedDpEvent(event, rounds))
        assert epsilon == pytest.approx(theirs.get_epsilon(1e-3), rel=1e-9)
    assert (np.diff(result.history["epsilon"]) > 0).all()


def test_without_sampling_it_is_the_gaussian_mechanism_of_sensitivity_two(private):
    """Renyi divergence `alpha (2 S)^2 / (2 (z S)^2)` a round (Mironov, arXiv:1702.07476)."""
    orders = np.array([*np.arange(1.1, 11, 0.1), *range(11, 64), 128, 256, 512, 1024])
    for rounds in (1, 10):
        divergence = rounds * orders * 2**2 / (2 * 3.0**2)
        want, _ = dp.rdp.compute_epsilon(orders, divergence, 1e-3)
        everybody = accountant(private, clients=12, chosen=12)(rounds)
        somehow = accountant(private, clients=12, chosen=6, sampled=False)(rounds)
        assert everybody == pytest.approx(want, rel=1e-3)
        assert somehow == pytest.approx(want, rel=1e-3)


def test_what_would_leak_is_refused(monkeypatch, private):
    for settings in (
        {"aggregator": "masked_mean"},
        {"aggregator": "median"},
        {"weighting": "examples"},
        {"clip": 1.0},
    ):
        with pytest.raises(fl.FedLPError, match="privacy needs aggregator='cohort_mean'"):
            algorithm(private, **settings)
    with pytest.raises(fl.FedLPError, match="sends 6 tensors of batch statistics"):
        run(algorithm(private, module=lambda width: Steps(width=width, norm=True)))
    with pytest.raises(fl.FedLPError, match="delta=0.1 is not below 1 / K"):
        run(algorithm(fl.Privacy(1.0, 1.0, delta=0.1)))
    for bad in ((0.0, 1.0, 1e-5), (1.0, 0.0, 1e-5), (1.0, float("nan"), 1e-5), (1.0, 1.0, 1.0)):
        with pytest.raises(fl.FedLPError, match="must be a number"):
            algorithm(fl.Privacy(*bad))
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(fl.FedLPError, match="pip install 'fedlp-jax"):
        run(algorithm(private))
