"""The exact error of FedLP on a quadratic problem, predicted and simulated.

    python -m benchmarks.theory [--json FILE] [--plot FILE] [--smoke]

Client k has the loss `1/2 sum_i h_i (x_i - b_{k,i})^2`, with its optimum `b_k` as its one example,
so `fl.theory.quadratic_error` gives the error of every round. Layers do not interact and
have independent masks: many layers of one keep rate are that many repetitions, and all keep rates
share one run. An episode is that run from the start; the next one resets the model but not the
round number, so no draw is used twice. Errors are averaged over layers. Standard errors are over
episodes, which are independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import fedlp_jax as fl
from benchmarks import command
from fedlp_jax import theory
from fedlp_jax.tasks.supervised import mean_over_rows
from fedlp_jax.tasks.task import Aux, Task

RATES = (0.1, 0.3, 0.5, 1.0)  # p
CURVATURE = (2.0, 1.0, 0.5)  # h, of the numbers of a layer
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
LEARNING_RATE = 0.05
LOCAL_STEPS = 5
CONTRACTION = (1 - LEARNING_RATE * np.array(CURVATURE)) ** LOCAL_STEPS


@dataclass(frozen=True)
class Problem:
    """Clients' optima, and the layers' keep rates."""

    optima: np.ndarray  # f32[K, L, n]
    keep: np.ndarray  # f64[1 or K, L]
    cohort: int  # C
    episodes: int
    rounds: int  # T, of an episode
    aggregator: str = "masked_mean"


@dataclass(frozen=True)
class Simulated:
    """The episodes of a problem."""

    error: np.ndarray  # f64[episodes, T + 1, L, n], x - x*
    senders: np.ndarray  # i64[episodes, T, L]
    unchanged: np.ndarray  # bool[episodes, T, L], the layer kept its bits
    costs: list[dict[str, Any]]  # rows of the ledger, one a round


def main() -> None:
    """Prints a table of each problem, and draws both."""
    parser = command.parser(__doc__)
    parser.add_argument("--plot", metavar="FILE", help="draw them here, as docs/theory.png")
    options = parser.parse_args()
    size = (1, 4, 5) if options.smoke else (3, 150, 30)
    results = {"equal_rates": rates_table(*size), "unequal_clients": clients_table(*size)}
    for rows in results.values():
        _print(rows)
    if options.plot:
        draw(results, options.plot)
    command.write(options.json, results)


def rates_table(layers: int, episodes: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each keep rate: the layer's numbers, and its error after the last round."""
    problem = equal_rates(layers, episodes, rounds)
    simulated, (_, square) = simulate(problem), predict(problem)
    rows = []
    for p in RATES:
        who = problem.keep[0] == p
        cohort = np.full(problem.cohort, p)
        numbers = {
            "keep": p,
            "q": theory.updated(cohort),
            "unchanged": simulated.unchanged[..., who].mean(),
            "rho": theory.inverse_senders(cohort),
            "kappa": theory.sampling_variance(p, problem.cohort, len(problem.optima)),
        }
        rows.append(numbers | _row(simulated.error**2, square, who))
    return rows


def clients_table(layers: int, episodes: int, rounds: int) -> list[dict[str, Any]]:
    """A row for the mean error of each aggregator, and one for its square."""
    rows = []
    for aggregator in ("masked_mean", "inverse_probability"):
        problem = unequal_clients(aggregator, layers, episodes, rounds)
        simulated, (mean, square) = simulate(problem), predict(problem)
        everyone = np.ones(problem.optima.shape[1], bool)
        for what, values, expected in (
            ("e", simulated.error, mean),
            ("e^2", simulated.error**2, square),
        ):
            row = {"aggregator": aggregator, "of": what}
            rows.append(row | _row(values, expected, everyone))
    return rows


def equal_rates(layers: int, episodes: int, rounds: int) -> Problem:
    """`layers` layers at each keep rate; 20 clients, cohorts of 10."""
    optima = _optima(20, len(RATES) * layers)
    return Problem(optima, np.repeat(RATES, layers)[None], 10, episodes, rounds)


def unequal_clients(aggregator: str, layers: int, episodes: int, rounds: int) -> Problem:
    """All of 10 clients take part; keep rates and optima rise from one to the next."""
    clients = 10
    keep = np.linspace(0.1, 1.0, clients)[:, None]
    optima = _optima(clients, layers) + 2 * keep[..., None].astype(np.float32)
    return Problem(optima, np.repeat(keep, layers, axis=1), clients, episodes, rounds, aggregator)


def simulate(problem: Problem) -> Simulated:
    """Runs the episodes with the package: one compiled round, its masks and its means."""
    run = _simulation(problem)
    layers = problem.optima.shape[1]
    centre = problem.optima.astype(np.float64).mean(axis=0)
    start = jax.device_get(run.state.variables)
    run.compile()
    states = []
    for episode in range(problem.episodes):
        run.state = run.state._replace(variables=jax.device_put(start))
        states.append([_stacked(start)])
        for round in range(1, problem.rounds + 1):
            run.read(run.dispatch(episode * problem.rounds + round))
            states[-1].append(_stacked(jax.device_get(run.state.variables)))
    x = np.asarray(states)  # f32[episodes, T + 1, L, n]
    return Simulated(
        x - centre,
        np.reshape(run.ledger.senders, (problem.episodes, problem.rounds, layers)),
        (x[:, 1:] == x[:, :-1]).all(axis=-1),
        run.history.rows,
    )


def predict(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """`E e` and `E e^2`, `f64[T + 1, L, n]`."""
    means, squares = [], []
    weights: dict[bytes, theory.EffectiveWeights] = {}
    for layer, keep in enumerate(problem.keep.T):
        if keep.tobytes() not in weights:
            weights[keep.tobytes()] = _weights(problem, keep)
        first, second = theory.quadratic_error(
            weights[keep.tobytes()],
            problem.optima[:, layer],
            np.zeros(len(CURVATURE)),
            CONTRACTION,
            problem.rounds,
        )
        means.append(first)
        squares.append(second)
    return np.stack(means, axis=1), np.stack(squares, axis=1)


def compare(
    values: np.ndarray, expected: np.ndarray, who: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums over the numbers of a layer, means over the layers `who`.

    Args:
      values: `f64[episodes, T + 1, L, n]`.
      expected: `f64[T + 1, L, n]`.
      who: `bool[L]`.

    Returns:
      Expected and simulated mean, and the standard error of the latter, `f64[T + 1]`.
    """
    episodes = values[:, :, who].sum(axis=-1).mean(axis=-1)
    error = episodes.std(axis=0, ddof=1) / np.sqrt(len(episodes))
    return expected[:, who].sum(axis=-1).mean(axis=-1), episodes.mean(axis=0), error


def draw(results: dict[str, list[dict[str, Any]]], path: str) -> None:
    """Predictions as lines, simulations as points with bars of four standard errors."""
    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    means = [row for row in results["unequal_clients"] if row["of"] == "e"]
    for axes, rows, name in (
        (left, results["equal_rates"], "keep {keep:g}"),
        (right, means, "{aggregator}"),
    ):
        for row, colour in zip(rows, COLOURS, strict=False):
            rounds = np.arange(len(row["predicted_by_round"]))
            axes.plot(rounds, row["predicted_by_round"], color=colour, label=name.format(**row))
            axes.errorbar(
                rounds, row["simulated_by_round"], 4 * np.array(row["error_by_round"]),
                color=colour, fmt="o", markersize=3, elinewidth=1,
            )  # fmt: skip
        axes.set(xlabel="round")
        axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    left.set(yscale="log", ylabel="mean squared error of a layer", title="FedLP-Homo")
    right.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    right.set(ylabel="mean error of a layer", title="clients with different keep rates")
    figure.savefig(path)


def quadratic_task(layers: int, width: int) -> Task:
    """`1/2 sum_i h_i (x_i - b_i)^2`, b the example; `width` numbers in each of the layers."""
    names = [f"layer{i}" for i in range(layers)]
    curvature = np.tile(np.asarray(CURVATURE[:width], np.float32), layers)

    def init(key: fl.types.Array, batch: fl.types.Batch) -> fl.types.Variables:
        del key, batch
        return {"params": {name: {"x": jnp.zeros(width, jnp.float32)} for name in names}}

    def evaluate(variables: fl.types.Variables, batch: fl.types.Batch) -> fl.types.Metrics:
        x = jnp.concatenate([variables["params"][name]["x"] for name in names])
        loss = 0.5 * (jnp.square(x[None] - batch.inputs) * curvature[None]).sum(axis=1)
        return {"loss": mean_over_rows(loss, batch.valid)}

    def loss(variables: fl.types.Variables, batch: fl.types.Batch, key: fl.types.Array) -> Any:
        del key
        metrics = evaluate(variables, batch)
        return metrics["loss"].total / metrics["loss"].weight, Aux({}, metrics)

    def outputs(variables: fl.types.Variables, batch: fl.types.Batch) -> fl.types.Array:
        del variables
        return jnp.zeros((batch.inputs.shape[0], 1))

    return Task(init, loss, evaluate, outputs, metrics=("loss",))


def _simulation(problem: Problem) -> fl.Simulation:
    clients, layers, width = problem.optima.shape
    rows, labels = problem.optima.reshape(clients, -1), np.zeros(clients, np.int32)
    data = fl.from_arrays(rows, labels, rows[:1], labels[:1], num_classes=1, name="quadratic")
    algorithm = fl.compose(
        quadratic_task(layers, width),
        client_optimizer=optax.sgd(LEARNING_RATE),
        steps=LOCAL_STEPS,
        batch_size=1,
        policy=fl.masks.bernoulli(problem.keep),
        aggregator=problem.aggregator,
    )
    return fl.Simulation(
        algorithm,
        data,
        fl.partition.natural(labels, clients=np.arange(clients)),
        rounds=problem.episodes * problem.rounds,
        cohort=problem.cohort,
        plan=fl.Plan(devices=1, width=problem.cohort),
    )


def _print(rows: list[dict[str, Any]]) -> None:
    """Prints a Markdown table of the columns that hold one number per row."""
    names = [name for name, value in rows[0].items() if not isinstance(value, list)]
    print("|", " | ".join(names), "|")
    print("|", " | ".join("---" for _ in names), "|")
    for row in rows:
        cells = (row[name] for name in names)
        print("|", " | ".join(c if isinstance(c, str) else f"{c:.4g}" for c in cells), "|")
    print()


def _row(values: np.ndarray, expected: np.ndarray, who: np.ndarray) -> dict[str, Any]:
    predicted, mean, error = compare(values, expected, who)
    return {
        "predicted": predicted[-1],
        "simulated": mean[-1],
        "standard_error": error[-1],
        "largest_z": float(np.abs((mean - predicted)[1:] / error[1:]).max()),
        "predicted_by_round": predicted.tolist(),
        "simulated_by_round": mean.tolist(),
        "error_by_round": error.tolist(),
    }


def _weights(problem: Problem, keep: np.ndarray) -> theory.EffectiveWeights:
    clients = len(problem.optima)
    if len(keep) == 1:
        return theory.sampled_masked_mean(float(keep[0]), problem.cohort, clients)
    if problem.aggregator == "masked_mean":
        return theory.masked_mean(keep)
    return theory.inverse_probability(keep)


def _optima(clients: int, layers: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(1, 1, size=(clients, layers, len(CURVATURE))).astype(np.float32)


def _stacked(variables: fl.types.Variables) -> np.ndarray:
    layers = variables["params"]
    return np.stack([layers[f"layer{i}"]["x"] for i in range(len(layers))])


if __name__ == "__main__":
    main()
