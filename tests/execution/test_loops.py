"""Levels side by side: one loop for all of them, and the results of levels in turn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import Steps, dataset, in_float64

import fedlp_jax as fl
from fedlp_jax.algorithms.reference_draws import reference_draws
from fedlp_jax.execution.loops import Loops, run_loops, side_by_side
from fedlp_jax.execution.plan import Plan, checked
from fedlp_jax.execution.scheduling import lay_out, widths_by_level, with_even_chunks


def level(factor, epochs=2, steps=3):
    """Work of one client whose loops multiply by `factor` and add what client and step give."""

    def run(shared, x, active, run=run_loops):
        begin = lambda epoch: x + epoch  # noqa: E731
        step = lambda own, epoch, number, carry: factor * carry + own + shared + number  # noqa: E731
        end = run(Loops(epochs, lambda _: steps, begin, step), x)
        return jnp.where(active, end, 0.0), x

    return run


LANES = [  # three clients, one, and two, of which one is idle
    (jnp.float32([1, 2, 3]), jnp.ones(3, bool)),
    (jnp.float32([4]), jnp.ones(1, bool)),
    (jnp.float32([5, 6]), jnp.array([True, False])),
]


@pytest.mark.parametrize("epochs", [2, None])
def test_levels_of_different_widths_share_one_loop(epochs):
    runs = [level(factor, epochs) for factor in (0.5, 2.0, 3.0)]
    together = jax.jit(lambda shared: side_by_side(runs, shared, LANES))
    shared = jnp.float32(7)
    for run, lanes, result in zip(runs, LANES, together(shared), strict=True):
        expected = [run(shared, *(x[i] for x in lanes)) for i in range(len(lanes[0]))]
        for found, one in zip(result, zip(*expected, strict=True), strict=True):
            np.testing.assert_allclose(found, np.stack(one), rtol=1e-6)
    text = together.lower(shared).as_text()
    assert text.count("stablehlo.while") == (1 if epochs is None else 2)  # for all three levels


@pytest.mark.parametrize("levels", ["in_turn", "side_by_side"])
def test_widths_are_in_proportion_to_the_levels_of_the_population(levels):
    assigned = np.repeat([0, 1, 2], [60, 30, 10])
    plan = Plan(1, 12, levels=levels)
    assert widths_by_level(plan, assigned, 3) == (12, 6, 2)
    assert widths_by_level(plan, assigned, 4) == (12, 6, 2, 1)  # a level without clients
    assert widths_by_level(plan, np.zeros(9, int), 1) == ()
    assert widths_by_level(Plan(1, 1), assigned, 3) == ()


def test_padded_share_counts_the_lanes_of_all_levels():
    steps, levels = np.array([4, 3, 2, 5]), np.array([0, 0, 0, 1])
    plan = Plan(1, 2, levels="side_by_side")
    layout = lay_out(steps, levels, [1.0, 1.0], plan, widths=(2, 1))
    computed = 3 * 5 + 3 * 2  # the second chunk has one client, and none of the second level
    assert layout.padded_share == 1 - 14 / computed
    layout = lay_out(steps, levels, [1.0, 1.0], plan, None, np.array([2, 6]), (2, 1))
    assert layout.padded_share == 1 - 14 / (3 * 6 + 3 * 2)
    layout = lay_out(steps, levels, [1.0, 1.0], Plan(1, 2), widths=(2, 1))
    assert layout.padded_share == 1 - 14 / (2 * 4 + 2 * 2 + 1 * 5)  # level after level


@pytest.mark.parametrize(
    ("cohort", "narrow", "wide"),
    [(10, (0.22, 4.9), (0.59, 4.1)), (100, (0.0, 5), (0.65, 5))],
    ids=["10", "100"],
)
def test_narrow_levels_leave_few_lanes_idle(cohort, narrow, wide):
    """FedLP-Hetero(1) with the authors' draws: idle share of the steps, and chunks of a round."""
    draws = reference_draws(np.zeros(50_000, int), flag=1, cohort=cohort, rounds=200)
    level, cohorts = draws.depths - 1, draws.cohorts
    assert np.bincount(level).tolist() == [56, 9, 8, 11, 16]
    plan = with_even_chunks(Plan(1, cohort), cohort, level)

    def found(widths):
        idle, chunks = [], []
        for ids in cohorts:
            one = np.ones(cohort, int)
            layout = lay_out(one, level[np.sort(ids)], [1.0] * 5, plan, widths=widths)
            idle.append(layout.padded_share)
            chunks.append((-(-np.diff(layout.segment[0]) // np.array(widths or plan.width))).sum())
        return np.mean(idle), np.mean(chunks)

    near = {"rel": 0, "abs": 0.01}
    for widths, (share, chunks) in ((widths_by_level(plan, level, 5), narrow), ((), wide)):
        assert found(widths)[0] == pytest.approx(share, **near)
        assert found(widths)[1] == pytest.approx(chunks, rel=0, abs=0.05)


def test_unknown_orders_of_levels_are_refused():
    with pytest.raises(fl.FedLPError, match="plan.levels 'beside' is unknown.*side_by_side"):
        checked(Plan(levels="beside"))


TASK = fl.classification(Steps(norm=True))
SETTINGS = {"client_optimizer": optax.sgd(0.1, 0.9), "batch_size": 2}
ALGORITHMS = {
    "persistent heads": fl.fedlp_hetero(
        TASK, depths="uniform", heads="persist", keep=0.7, epochs=2, **SETTINGS
    ),
    "steps": fl.fedlp_hetero(TASK, depths="uniform", heads="reset_to_init", steps=3, **SETTINGS),
    "widths": fl.heterofl(TASK, widths=(1.0, 0.5), shares=(0.6, 0.4), epochs=1, **SETTINGS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("even", [True, False])
def test_levels_side_by_side_change_no_result(name, even):
    data = dataset()
    make = fl.partition.iid if even else fl.partition.quantity
    skew = {} if even else {"alpha": 1.0}
    clients = make(data.train.labels, clients=12, seed=0, **skew)
    settings = {"rounds": 3, "cohort": 7}
    results = []
    with jax.enable_x64(True):
        first = fl.simulate(ALGORITHMS[name], data, clients, rounds=0, cohort=1).variables
        for levels in ("in_turn", "side_by_side"):
            plan = fl.Plan(2, 2, levels=levels)
            settings |= {"plan": plan, "variables": in_float64(first)}
            results.append(fl.simulate(ALGORITHMS[name], data, clients, **settings))
    ours, theirs = results
    for column in ("upload_bytes", "train_accuracy"):
        np.testing.assert_array_equal(ours.history[column], theirs.history[column])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-12),
        ours.variables,
        theirs.variables,
    )
