"""Every algorithm through the same proofs. A new one adds a row, and its rule to the oracle.

The oracle is a plain NumPy loop written from the equations, array by array. It shares no code with
the package. All numbers are exact in float32.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import (
    BATCH,
    CLIENTS,
    COHORTS,
    EPOCHS,
    MASK,
    SEED,
    UPLOAD,
    first_head,
    forward,
    gradient,
    key,
    shuffled,
)
from flax import nnx
from small import Steps, dataset, flat, in_float64

import fedlp_jax as fl
from fedlp_jax.pruning.submodels import union_of_depths
from fedlp_jax.simulation.program import rounds_of
from fedlp_jax.tasks.exits import with_all_exits

RATE, KEEP, ROUNDS = 0.125, 0.375, 3
DATA = dataset()
POPULATION = fl.partition.dirichlet(
    DATA.train.labels, clients=CLIENTS, alpha=1.0, seed=1, min_size=2
)
TASK, DEEP = fl.classification(Steps(depth=1)), fl.classification(Steps(depth=3))
NORMED = fl.classification(Steps(depth=1, norm=True))
FLIGHT = 4  # clients in flight, where the server does not wait
UNITS, DRAWN_UNITS = 8, 17  # of the hidden layer; the purpose of their draws
TRAIN, DOWNLOAD = 2, 18  # purposes of draws
SERVER = 2**31 - 1  # the client id of the server's draws
DEPTHS = [1, 3, 2, 3, 1, 2, 3, 1, 2]  # of the clients


class Sent(NamedTuple):
    """What one client would send of one layer."""

    client: int
    weight: float
    update: Any  # of the layer, in one vector
    held: dict  # array -> the entries that the client holds
    parts: dict  # array -> update, and what is beside it
    bits: int


def leaves(layers):
    return [(layer, part) for layer in layers for part in (0, 1)]


class FedAvg:
    """The rules of an algorithm for one array; the others change some of them."""

    layers = ("head1", "hidden1")  # of the server and private ones, in the order of the masks
    rho = 0.0  # momentum of the clients' SGD
    buffer = 0  # arrivals that an update takes, where the server does not wait
    consistency = 0.0  # of exits
    own_classes = False  # a client heeds the logits of its own classes alone

    def __init__(self):
        self.server = defaultdict(float)  # by array

    def weight(self, round):
        """Of the divergence between exits."""
        return self.consistency

    def sends(self, layer, drawn, round):
        return drawn

    def receives(self, layer, client, round):
        return True

    def trains(self, layer, sends, number, steps):
        return True

    def gradient(self, leaf, g, w, x, own):
        return g

    def sent(self, leaf, d, own, steps):
        """Update, what is beside it, and the client's state if it sends the layer."""
        return d, 0.0, own

    def compressed(self, vector, sent, kept, draws):
        """What the server decodes of a layer, what the client keeps of it, and its bits."""
        return vector, kept, 32 * len(vector)

    def step(self, leaf, d, extra, senders):
        """What is added to the model, from the means over the senders."""
        return d

    def moves(self, x, steps):
        """What is added to the model, from the steps of the arrays that somebody sent."""
        return steps

    def asked(self, uploads):
        """Those of the uploads of a layer that the server asks for."""
        return uploads

    def exits(self, client):
        return [1]

    def held(self, client, round):
        """Array -> entries that a client holds; what outputs of hidden layers are divided by."""
        return dict.fromkeys(leaves(self.layers), ...), 1.0

    def narrowed(self, leaf, client, round, step):
        """1 for the entries of a client's array that a step trains; the others count as 0."""
        return 1.0

    def own(self, client, private):
        """The arrays that a client begins with and never sends."""
        return dict(private)


class FedProx(FedAvg):
    def gradient(self, leaf, g, w, x, own):
        return g + 0.25 * (w - x)


class FedAvgM(FedAvg):
    def step(self, leaf, d, extra, senders):
        self.server[leaf] = 0.75 * self.server[leaf] + d
        return 0.5 * self.server[leaf]


class Adaptive(FedAvg):
    eta, b1, b2, tau = 0.125, 0.5, 0.75, 2**-6

    def step(self, leaf, d, extra, senders):
        m, v = self.server[leaf] or (0.0, self.tau**2)
        m, v = self.b1 * m + (1 - self.b1) * d, self.second(v, d**2)
        self.server[leaf] = m, v
        return self.eta * m / (np.sqrt(v) + self.tau)


class FedAdagrad(Adaptive):
    def second(self, v, square):
        return v + square


class FedAdam(Adaptive):
    def second(self, v, square):
        return self.b2 * v + (1 - self.b2) * square


class FedYogi(Adaptive):
    def second(self, v, square):
        return v - (1 - self.b2) * square * np.sign(v - square)


class Scaffold(FedAvg):
    def gradient(self, leaf, g, w, x, own):
        return g - own + self.server[leaf]

    def sent(self, leaf, d, own, steps):
        new = own - self.server[leaf] - d / (steps * RATE)
        return d, new - own, new

    def step(self, leaf, d, extra, senders):
        self.server[leaf] = self.server[leaf] + senders / CLIENTS * extra
        return d


class FedNova(FedAvg):
    rho = 0.5

    def sent(self, leaf, d, own, steps):
        counter = a = 0.0
        for _ in range(steps):
            counter = self.rho * counter + 1
            a += counter
        return d / a, a, own

    def step(self, leaf, d, extra, senders):
        return extra * d


class FedDyn(FedAvg):
    alpha = 0.5

    def gradient(self, leaf, g, w, x, own):
        return g - own + self.alpha * (w - x)

    def sent(self, leaf, d, own, steps):
        return d, 0.0, own - self.alpha * d

    def step(self, leaf, d, extra, senders):
        self.server[leaf] = self.server[leaf] - self.alpha / CLIENTS * senders * d
        return d - self.server[leaf] / self.alpha


class FedCM(FedAvg):
    alpha = 0.25

    def gradient(self, leaf, g, w, x, own):
        return self.alpha * g + (1 - self.alpha) * self.server[leaf]

    def sent(self, leaf, d, own, steps):
        return d, steps, own

    def step(self, leaf, d, extra, senders):
        self.server[leaf] = -d / (RATE * extra)
        return d


class FedExP(FedAvg):
    epsilon = 2**-10

    def __init__(self):
        super().__init__()
        self.squares = {}

    def sent(self, leaf, d, own, steps):
        return d, (d**2).sum(), own

    def step(self, leaf, d, extra, senders):
        self.squares[leaf] = extra.mean(), (d**2).sum()
        return d

    def moves(self, x, steps):
        mean, of_mean = np.sum([self.squares[leaf] for leaf in steps], axis=0)
        eta = max(1.0, mean / (2 * (of_mean + self.epsilon)))
        return {leaf: eta * d for leaf, d in steps.items()}


class FedLPQ(FedAvg):
    levels = 4

    def compressed(self, vector, sent, kept, draws):
        norm = np.sqrt((vector**2).sum())
        place = self.levels * np.abs(vector) / norm
        level = np.floor(place) + (draws < place - np.floor(place))
        coded = {0: 1, 1: 3 + 1, 2: 3 + 1, 3: 6 + 1, 4: 6 + 1}  # Elias omega of 1 to 5, and signs
        bits = 32 + 6 + sum(coded[int(i)] for i in level)  # the norm, the levels, every entry
        return norm * np.sign(vector) * level / self.levels, kept, bits


class Freeze(FedAvg):
    def trains(self, layer, sends, number, steps):
        return sends[layer]


class FedPart(Freeze):
    def sends(self, layer, drawn, round):
        shallow_first = ("hidden1", "head1")
        return round == 1 or layer == shallow_first[round - 2]


class FedLUAR(FedAvg):
    def __init__(self):
        super().__init__()
        self.last, self.scores = {}, {}

    def sends(self, layer, drawn, round):
        draws = np.asarray(jax.random.uniform(key(round, SERVER, MASK), (2,), jnp.float32))
        times = dict(zip(self.layers, -np.log(1 - draws.astype(np.float64)), strict=True))
        return (
            layer not in sorted(self.scores, key=lambda name: times[name] * self.scores[name])[:1]
        )

    def moves(self, x, steps):
        self.last |= steps
        for layer in {layer for layer, _ in steps}:
            squares = [
                sum((array[layer, part] ** 2).sum() for part in (0, 1)) for array in (steps, x)
            ]
            self.scores[layer] = np.sqrt(squares[0] / squares[1])
        return self.last


class Download(FedAvg):
    def receives(self, layer, client, round):
        draws = jax.random.uniform(key(round, client, DOWNLOAD), (2,), jnp.float32)
        return np.asarray(draws)[self.layers.index(layer)] < 0.5


class FedLAMA(FedAvg):
    layers = ("head3", "hidden1", "hidden2", "hidden3")

    def __init__(self):
        super().__init__()
        self.lazy, self.spread, self.rounds, self.seen = set(), {}, 0, set()

    def exits(self, client):
        return [3]

    def receives(self, layer, client, round):
        self.seen.add((client, round))
        return round % 2 or (client, round - 1) not in self.seen or layer not in self.lazy

    def sends(self, layer, drawn, round):
        return round % 2 == 0 or layer not in self.lazy

    def sent(self, leaf, d, own, steps):
        return d, (d**2).sum(), own

    def step(self, leaf, d, extra, senders):
        self.spread[leaf] = extra.mean() - (d**2).sum()
        return d

    def moves(self, x, steps):
        self.rounds += 1
        if self.rounds % 2 == 0:
            spread, size = (
                {layer: of[layer, 0] + of[layer, 1] for layer in self.layers}
                for of in (self.spread, {leaf: array.size for leaf, array in x.items()})
            )
            spread = {n: value / (2 if n in self.lazy else 1) for n, value in spread.items()}
            self.lazy = set()
            for layer in sorted(self.layers, key=lambda name: spread[name] / size[name]):
                self.lazy.add(layer)
                others = sum(size[name] for name in self.layers if name not in self.lazy)
                share = sum(spread[name] for name in self.lazy) / sum(spread.values())
                if share > others / sum(size.values()):
                    break
        return steps


class FedBN(FedAvg):
    layers = ("head1", "hidden1", "norm1")


class FedBABU(FedAvg):
    def sends(self, layer, drawn, round):
        return drawn and layer != "head1"

    def trains(self, layer, sends, number, steps):
        return layer != "head1"


class FedRep(FedAvg):
    rho = 0.5

    def trains(self, layer, sends, number, steps):
        return (layer == "head1") == (number < steps // 2)


class TopK(FedAvg):
    def compressed(self, vector, sent, kept, draws):
        vector, count = vector + kept, int(np.ceil(0.25 * len(vector)))
        chosen = np.zeros(len(vector), bool)
        chosen[np.argsort(-np.abs(vector), kind="stable")[:count]] = True
        new = np.where(chosen, vector, 0)
        places = int(np.ceil(np.log2(len(vector))))
        return new, vector - new * sent, count * (32 + places)


class FedLDF(FedAvg):
    def sends(self, layer, drawn, round):
        return True

    def asked(self, uploads):
        return sorted(uploads, key=lambda sent: -np.linalg.norm(sent.update))[:2]


class InclusiveFL(FedAvg):
    layers = ("head1", "head2", "head3", "hidden1", "hidden2", "hidden3")

    def exits(self, client):
        return [DEPTHS[client]]

    def held(self, client, round):
        names = [f"hidden{i}" for i in range(1, DEPTHS[client] + 1)]
        names += [f"head{i}" for i in self.exits(client)]
        return dict.fromkeys(leaves(names), ...), 1.0


class DepthFL(InclusiveFL):
    consistency = 0.5

    def exits(self, client):
        return list(range(1, DEPTHS[client] + 1))


class DepthFLWithFedDyn(DepthFL, FedDyn):
    own_classes = True

    def weight(self, round):
        return self.consistency * np.exp(-5 * (1 - min(round, 2) / 2) ** 2)


class FedLPHetero(InclusiveFL):
    layers = ("head3", "hidden1", "hidden2", "hidden3")

    def own(self, client, private):
        depth = DEPTHS[client]
        head = dict(zip(leaves([f"head{depth}"]), first_head(depth, client), strict=True))
        return head if depth < 3 else {}


class OwnClasses(FedAvg):
    own_classes = True


class HeteroFL(FedAvg):
    rescales = own_classes = True

    def held(self, client, round):
        units, rate = self.units(client, round)
        return held_entries(units), rate

    def first(self, client, round):
        return 0

    def units(self, client, round):
        """Those that a client holds of the hidden layer, and what their outputs are divided by."""
        rate = WIDTHS[client]
        held = (self.first(client, round) + np.arange(int(np.ceil(rate * UNITS)))) % UNITS
        return np.sort(held), rate if self.rescales else 1.0


class FedRolex(HeteroFL):
    def first(self, client, round):
        return round - 1


class Fjord(HeteroFL):
    rescales = own_classes = False

    def narrowed(self, leaf, client, round, step):
        draw = jax.random.fold_in(jax.random.fold_in(key(round, client, TRAIN), step), DRAWN_UNITS)
        widths = sorted({width for width in WIDTHS if width <= WIDTHS[client]})
        width = widths[jax.random.randint(draw, (), 0, len(widths), jnp.int32)]
        trained, held = int(np.ceil(width * UNITS)), int(np.ceil(WIDTHS[client] * UNITS))
        mask = 1.0 * (np.arange(held) < trained)
        return {("head1", 0): mask[:, None], ("head1", 1): 1.0}.get(leaf, mask)


class FederatedDropout(HeteroFL):
    own_classes = False

    def units(self, client, round):
        draw = jax.random.fold_in(key(round, client, DRAWN_UNITS), UNITS)
        order = np.argsort(np.asarray(jax.random.uniform(draw, (UNITS,), jnp.float32)))
        return np.sort(order[: int(np.ceil(0.375 * UNITS))]), 1.0


class FedBuff(FedAvg):
    buffer = 2

    def aged(self, d, tau, behind):
        """What an update counts that began `tau` versions ago, at the newest model + `behind`."""
        return d / np.sqrt(1 + tau)


class FedAsync(FedAvg):
    buffer = 1

    def aged(self, d, tau, behind):
        return 0.75 / (2 * max(tau - 1, 0) + 1) * (d + behind)


class Row(NamedTuple):
    make: Any
    oracle: Any
    settings: dict  # as in the oracle
    other: dict | None = None  # other numbers, for the same program
    neutral: dict | None = None  # numbers with which it is FedAvg; None = it never is
    weigh: str = "examples"
    up: int = 1  # how often the parameters of a layer are sent
    down: int = 1
    numbers: int = 0  # that a client sends besides
    private: tuple = ()  # layers that stay with the client
    still: tuple = ()  # layers of the server that do not travel
    plan: tuple = (2, 2)  # devices and width; frozen layers are left out at width 1
    task: Any = TASK
    alone: Any = None  # the task of FedAvg with the neutral setting; None = `task`
    rounds: int = ROUNDS


ADAPTIVE = {"server_learning_rate": 0.125, "b1": 0.5, "tau": 2**-6}
# A huge tau makes the step eta d / (2 tau) or eta d / tau.
WIDTHS = [1.0 if client in (1, 6) else 0.375 for client in range(CLIENTS)]
SPEEDS = {"compute": 1e3, "download": 1e4, "upload": 1e4}
FLAT = {"server_learning_rate": 2.0**16, "b1": 0.0, "tau": 2.0**15}
SAME = {"batch_size": BATCH}  # as in all
ROWS = {
    "fedprox": Row(fl.fedprox, FedProx, {"mu": 0.25}, {"mu": 0.5}, {"mu": 0.0}),
    "fedavgm": Row(
        fl.fedavgm,
        FedAvgM,
        {"server_learning_rate": 0.5, "beta": 0.75},
        {"server_learning_rate": 0.25, "beta": 0.5},
        {"server_learning_rate": 1.0, "beta": 0.0},
    ),
    "fedadagrad": Row(fl.fedadagrad, FedAdagrad, ADAPTIVE, FLAT, FLAT),
    "fedadam": Row(fl.fedadam, FedAdam, ADAPTIVE | {"b2": 0.75}, FLAT, FLAT | {"b2": 1.0}),
    "fedyogi": Row(fl.fedyogi, FedYogi, ADAPTIVE | {"b2": 0.75}, FLAT, FLAT | {"b2": 1.0}),
    "scaffold": Row(fl.scaffold, Scaffold, {}, weigh="uniform", up=2, down=2),
    "fednova": Row(fl.fednova, FedNova, {}, numbers=1),
    "fedlp_q": Row(fl.fedlp_q, FedLPQ, {"levels": 4}),
    "fedlp_homo": Row(fl.fedlp_homo, FedAvg, {}, SAME, SAME),
    "fedldf": Row(fl.fedldf, FedLDF, {"senders": 2}, {"senders": 3}, {"senders": 4}, numbers=2),
    "top_k": Row(fl.fedlp_homo, TopK, {"upload": fl.top_k(0.25, error_feedback=True)}),
    "feddyn": Row(fl.feddyn, FedDyn, {"alpha": 0.5}, {"alpha": 0.25}, weigh="uniform"),
    "fedcm": Row(
        fl.fedcm, FedCM, {"alpha": 0.25}, {"alpha": 0.5}, {"alpha": 1.0}, down=2, numbers=1
    ),
    "fedexp": Row(
        fl.fedexp,
        FedExP,
        {"epsilon": 2**-10},
        {"epsilon": 2**-4},
        {"epsilon": 2**15},
        weigh="uniform",  # updates cancel out enough for a longer step
    ),
    "fedper": Row(fl.fedper, FedAvg, {"head": "head1"}, private=("head1",)),
    "lg_fedavg": Row(fl.lg_fedavg, FedAvg, {"head": "head1"}, private=("hidden1",)),
    "fedbn": Row(fl.fedbn, FedBN, {}, private=("norm1",), task=NORMED),
    "fedrep": Row(
        fl.fedrep,
        FedRep,
        {"head": "head1", "head_epochs": 1, "epochs": 1},
        private=("head1",),
        plan=(2, 1),
    ),
    "fedbabu": Row(fl.fedbabu, FedBABU, {"head": "head1"}, still=("head1",), plan=(2, 1)),
    "freeze": Row(fl.freeze, Freeze, {}, SAME, SAME, plan=(2, 1)),
    "fedpart": Row(
        fl.fedpart,
        FedPart,
        {"full_rounds": 1, "group_rounds": 1},
        {"full_rounds": 2, "group_rounds": 3},
        {"full_rounds": ROUNDS},
        plan=(2, 1),
    ),
    "download": Row(
        fl.fedlp_homo, Download, {"download": 0.5}, {"download": 0.25}, {"download": 1.0}
    ),
    "fedlama": Row(
        fl.fedlama,
        FedLAMA,
        {"interval": 2},
        {"interval": 3},
        {"interval": 1},
        task=DEEP,
        rounds=5,
    ),
    "fedluar": Row(fl.fedluar, FedLUAR, {"recycled": 1}, {"recycled": 0}, {"recycled": 0}),
    "personal": Row(fl.fedprox, FedProx, {"mu": 0.25, "personal": "head"}, private=("head1",)),
    "fedlp_hetero": Row(
        fl.fedlp_hetero,
        FedLPHetero,
        {"depths": DEPTHS},
        {"depths": DEPTHS[::-1]},
        {"depths": [3] * CLIENTS},
        task=DEEP,
    ),
    "inclusivefl": Row(
        fl.inclusivefl,
        InclusiveFL,
        {"depths": DEPTHS},
        {"depths": DEPTHS[::-1]},
        {"depths": [3] * CLIENTS},
        weigh="uniform",
        task=DEEP,
    ),
    "depthfl": Row(
        fl.depthfl,
        DepthFL,
        {"depths": DEPTHS, "consistency": 0.5},
        {"depths": DEPTHS[::-1]},
        {"depths": [3] * CLIENTS, "consistency": 0.0},
        weigh="uniform",
        task=DEEP,
        alone=with_all_exits(DEEP),
    ),
    "depthfl_feddyn": Row(
        fl.depthfl,
        DepthFLWithFedDyn,
        {"depths": DEPTHS, "consistency": 0.5, "ramp": 2, "alpha": 0.5, "own_classes": True},
        {"depths": DEPTHS[::-1], "alpha": 0.25},
        weigh="uniform",
        task=DEEP,
    ),
    "own_classes": Row(
        fl.fedlp_homo,
        OwnClasses,
        {"own_classes": True},
        neutral={"own_classes": False},
    ),
    "heterofl": Row(
        fl.heterofl,
        HeteroFL,
        {"widths": WIDTHS},
        neutral={"widths": 1.0, "own_classes": False},
    ),
    "fedrolex": Row(fl.fedrolex, FedRolex, {"widths": WIDTHS}, weigh="uniform"),
    "fjord": Row(fl.fjord, Fjord, {"widths": WIDTHS}, neutral={"widths": 1.0}),
    "federated_dropout": Row(
        fl.federated_dropout, FederatedDropout, {"widths": 0.375}, neutral={"widths": 1.0}
    ),
    "fedbuff": Row(
        fl.fedbuff, FedBuff, {"buffer": 2, "profile": fl.Profile(**SPEEDS)}, weigh="uniform"
    ),
    "fedasync": Row(
        fl.fedasync,
        FedAsync,
        {
            "profile": fl.Profile(**SPEEDS),
            "discount": "hinge",
            "alpha": 0.75,
            "slope": 2.0,
            "grace": 1.0,
        },
        {"alpha": 0.5, "slope": 3.0, "grace": 2.0},
        weigh="uniform",
    ),
}
LOCAL = {"client_optimizer": optax.sgd(RATE), "epochs": EPOCHS, "batch_size": BATCH}


def algorithm(name, **settings):
    row = ROWS[name]
    settings = {"keep": KEEP} | row.settings | settings
    if name in ("fedlama", "fedldf", "fedluar", "fedpart"):
        settings = {k: v for k, v in settings.items() if k != "keep"}
    settings.setdefault("weighting", row.weigh)
    sgd = optax.sgd(RATE, momentum=row.oracle.rho or None)
    return row.make(row.task, **LOCAL | {"client_optimizer": sgd} | settings)


def simulate(made, plan, rounds=ROUNDS, **more):
    """The first rounds, in float64."""
    run = {"cohort": lambda seed, round, clients: COHORTS[round], "seed": SEED}
    if made.asynchrony is not None:
        run["cohort"] = FLIGHT
    with jax.enable_x64(True):
        init = union_of_depths if made.shared_heads else lambda task, *rest: task.init(*rest)
        start = in_float64(init(made.task, jax.random.key(9), example()))
        result = fl.simulate(
            made,
            DATA,
            POPULATION,
            rounds=rounds,
            variables=start,
            plan=fl.Plan(*plan),
            **run,
            **more,
        )
    return start, result


def example():
    inputs, labels = jnp.asarray(DATA.train.inputs[:1]), jnp.zeros(1, jnp.int32)
    return fl.types.Batch(inputs, labels, None, fl.types.Normalize(jnp.ones(()), jnp.zeros(())))


def arrays(variables):
    """The parameters as `{(layer, part): array}`."""
    layers = variables["params"]
    parts = {n: ("scale" if n.startswith("norm") else "kernel", "bias") for n in layers}
    return {(n, p): np.asarray(layers[n][parts[n][p]], np.float64) for n, p in leaves(layers)}


def held_entries(units):
    """The index of the entries of each array that belong to these units."""
    inputs, classes = np.arange(DATA.train.inputs.shape[1]), np.arange(DATA.num_classes)
    of_head = {("head1", 0): np.ix_(units, classes), ("head1", 1): classes}
    return of_head | {("hidden1", 0): np.ix_(inputs, units), ("hidden1", 1): units}


def trained(rule, x, own, client, round, rate, private, sends):
    """What ONE client makes of the model, and the steps it takes."""
    w, steps = {leaf: a.copy() for leaf, a in x.items()}, 0
    factor = {leaf: 1 / rate if leaf[0].startswith("hidden") else 1.0 for leaf in w}
    speed = {leaf: np.zeros_like(a) for leaf, a in x.items()}
    rows = POPULATION.rows(client)
    whole = EPOCHS * -(-len(rows) // BATCH)
    for epoch in range(EPOCHS):
        order = shuffled(rows, round, client, epoch)
        for first in range(0, len(order), BATCH):
            batch = order[first : first + BATCH]
            mask = {leaf: rule.narrowed(leaf, client, round, steps) * factor[leaf] for leaf in w}
            pairs = {n: [w[n, i] * mask[n, i] for i in (0, 1)] for n, _ in w}
            inputs = DATA.train.inputs[batch].astype(np.float64)
            labels = DATA.train.labels[batch]
            classes = DATA.train.labels[rows] if rule.own_classes else None
            exits = rule.exits(client)
            grads, _ = gradient(pairs, exits, inputs, labels, rule.weight(round), classes)
            moving = [leaf for leaf in w if rule.trains(leaf[0], sends, steps, whole)]
            for leaf in moving:
                g = mask[leaf] * grads[leaf[0]][leaf[1]]
                if leaf not in private:
                    g = rule.gradient(leaf, g, w[leaf], x[leaf], own[leaf])
                speed[leaf] = rule.rho * speed[leaf] + g
            for leaf in moving:
                w[leaf] = w[leaf] - RATE * speed[leaf]
            steps += 1
    return w, steps


def arrivals(buffer, keep=KEEP):
    """The clients of each update and the versions they are behind, where the server does not wait.

    Found by going through all clients at each moment, without a queue.
    """
    numbers, macs = 4 * UNITS + UNITS + UNITS * 3 + 3, 4 * UNITS + UNITS * 3
    seconds = [
        4 * numbers / SPEEDS["download"]
        + 3 * macs * EPOCHS * len(POPULATION.rows(client)) / SPEEDS["compute"]
        + (4 * numbers * keep + 1) / SPEEDS["upload"]
        for client in range(CLIENTS)
    ]
    now, drawn, flying, landed = 0.0, 0, {}, []
    for version in range(ROUNDS):
        taken = {}
        while len(taken) < buffer:
            if not landed:
                while len(flying) < FLIGHT:
                    draws = np.random.Generator(np.random.Philox(key=[SEED, 2**33 + drawn]))
                    client = draws.integers(CLIENTS)
                    while client in flying or client in taken:
                        client = draws.integers(CLIENTS)
                    flying[client], drawn = (now + seconds[client], version), drawn + 1
                now = min(end for end, _ in flying.values())
                landed = sorted(client for client, (end, _) in flying.items() if end == now)
                begun = {client: flying.pop(client)[1] for client in landed}
            client = landed.pop(0)
            taken[client] = version - begun[client]
        yield dict(sorted(taken.items()))


def averaged(leaf, like, uploads):
    """The means of the updates of an array, and of what is beside them, over its holders."""
    total, d, extra = np.zeros((3, *like.shape))
    for sent in uploads:
        place, (update, beside) = sent.held[leaf], sent.parts[leaf]
        total[place] += sent.weight
        d[place] += sent.weight * update
        extra[place] += sent.weight * beside
    total = np.where(total > 0, total, 1.0)
    return d / total, extra / total


def plain(name, start, keep=KEEP):
    """All rounds.

    Returns the model, the senders of each layer, the bytes of all uploads and downloads, and the
    private arrays of each client.
    """
    row, x = ROWS[name], arrays(start)
    ends = {}  # the model of each client after its last round
    rule, kept, senders = row.oracle(), defaultdict(lambda: defaultdict(float)), []
    shared = [layer for layer in rule.layers if layer not in row.private]
    private = {leaf: x.pop(leaf) for leaf in leaves(row.private)}
    mine = {client: rule.own(client, private) for client in range(CLIENTS)}
    residual, uploaded, downloaded = defaultdict(float), [], []
    cohorts = [dict.fromkeys(COHORTS[round], 0) for round in range(1, row.rounds + 1)]
    cohorts, models = list(arrivals(rule.buffer)) if rule.buffer else cohorts, []
    for round, cohort in enumerate(cohorts, 1):
        models.append(x.copy())
        uploads, steps_of, received = defaultdict(list), {}, 0
        for client, tau in cohort.items():
            own, old = kept[client], models[-1 - tau]
            held, rate = rule.held(client, round)
            start = {leaf: old[leaf][held[leaf]] for leaf in x if leaf in held}
            had = ends.get(client, {})
            begin = {
                leaf: part if rule.receives(leaf[0], client, round) else had.get(leaf, part)
                for leaf, part in start.items()
            }
            travels = [
                leaf for leaf in start if leaf[0] not in row.still and begin[leaf] is start[leaf]
            ]
            received += 4 * row.down * sum(start[leaf].size for leaf in travels)
            draw = jax.random.uniform(key(round, client, MASK), (len(shared),), jnp.float32)
            drawn = dict(zip(shared, np.asarray(draw) < np.float32(keep), strict=True))
            sending = {layer: rule.sends(layer, d, round) for layer, d in drawn.items()}
            w, steps = trained(
                rule, begin | mine[client], own, client, round, rate, mine[client], sending
            )
            ends[client] = w
            mine[client] = {leaf: w[leaf] for leaf in mine[client]}
            a = len(POPULATION.rows(client)) if row.weigh == "examples" else 1.0
            for index, layer in enumerate(shared):
                sends, both = sending[layer], ((layer, 1), (layer, 0))
                if both[0] not in start:
                    continue
                update = {leaf: w[leaf] - start[leaf] for leaf in both}
                vector = np.concatenate([update[leaf].ravel() for leaf in both])
                draws = jax.random.fold_in(key(round, client, UPLOAD), index)
                draws = np.asarray(jax.random.uniform(draws, (len(vector),), jnp.float32))
                vector, residual[client, layer], bits = rule.compressed(
                    vector, sends, residual[client, layer], draws
                )
                if not sends:
                    continue
                bits += 32 * (row.up - 1) * len(vector)
                sent = Sent(client, a, vector, held, {}, bits)
                for leaf, part in zip(both, np.split(vector, [update[layer, 1].size]), strict=True):
                    part = part.reshape(update[leaf].shape)
                    if rule.buffer:
                        part = rule.aged(part, tau, old[leaf] - x[leaf])
                    *sent.parts[leaf], own[leaf] = rule.sent(leaf, part, own[leaf], steps)
                uploads[layer].append(sent)
        downloaded.append(received)
        bits_of = dict.fromkeys(cohort, 0)
        for layer in shared:
            uploads[layer] = rule.asked(uploads[layer])
            for sent in uploads[layer]:
                bits_of[sent.client] += sent.bits
            for leaf in leaves([layer]) if uploads[layer] else ():
                d, extra = averaged(leaf, x[leaf], uploads[layer])
                steps_of[leaf] = rule.step(leaf, d, extra, len(uploads[layer]))
        for leaf, step in rule.moves(x, steps_of).items():
            x[leaf] = x[leaf] + step
        uploaded.append(sum(-(-n // 8) + 1 + 4 * row.numbers for n in bits_of.values()))
        senders.append([len(uploads[layer]) for layer in shared])
    return x, np.array(senders), uploaded, downloaded, mine


@pytest.fixture(scope="module")
def made(request, runs={}):  # noqa: B006, shared by the tests of this file
    """An algorithm, its first variables and its result: a fixture, for its compiling."""
    name = request.param
    if name not in runs:
        one = algorithm(name)
        runs[name] = one, *simulate(one, ROWS[name].plan, ROWS[name].rounds)
    return name, *runs[name]


SLOW = (
    "fjord",
    "inclusivefl",
    "fedlp_hetero",
    "depthfl_feddyn",
)  # as heterofl, depthfl and test_oracle.py


def rows(names, slow):
    return [pytest.param(x, marks=pytest.mark.slow) if x in slow else x for x in names]


each = pytest.mark.parametrize("made", rows(ROWS, SLOW), indirect=True)


def close(result, expected, rtol=1e-9):
    got = arrays(result.state.variables)
    assert got.keys() == expected.keys()
    for leaf in expected:
        np.testing.assert_allclose(got[leaf], expected[leaf], rtol=rtol, atol=1e-12)


@each
def test_rounds_equal_a_plain_loop(made):
    name, _, start, result = made
    expected, senders, _, _, mine = plain(name, start)
    if name != "fedldf":  # which always has senders
        assert 0 in senders or len(senders[0]) == 1  # a layer that nobody sent is in it
    close(result, expected)
    by_level = np.stack(result.costs.senders).reshape(len(senders), -1, senders.shape[1])
    np.testing.assert_array_equal(by_level.sum(axis=1), senders)
    for client in range(CLIENTS) if ROWS[name].private else ():
        got = arrays(result.models[client])
        for leaf, array in (expected | mine[client]).items():
            np.testing.assert_allclose(got[leaf], array, rtol=1e-9, atol=1e-12)


@each
def test_the_ledger_books_what_the_definition_sends(made):
    name, _, start, result = made
    _, _, uploaded, downloaded, _ = plain(name, start)
    np.testing.assert_array_equal(result.history["upload_bytes"], uploaded)
    np.testing.assert_array_equal(result.history["download_bytes"], downloaded)


@pytest.mark.parametrize("made", ["fedbn"], indirect=True)
def test_batch_statistics_stay_with_their_client(made):
    _, _, start, result = made
    assert [*result.state.variables["params"]] == ["head1", "hidden1"]
    assert not jax.tree.leaves(result.state.variables.get("batch_stats", {}))
    statistics = [flat(each["batch_stats"]).tobytes() for each in (start, *result.models)]
    assert len(set(statistics)) == 1 + CLIENTS  # all took part, and none has another's


class Normed(nn.Module):
    named: str | None = None

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4)(x.reshape(x.shape[0], -1))
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train, name=self.named)(x))


@pytest.mark.parametrize("named", [None, "bn1", "my_norm", "fc2_bn", "stem_BN"])
def test_fedbn_finds_normalisations_by_name(named):
    made = fl.fedbn(fl.classification(Normed(named)), client_optimizer=optax.sgd(RATE))
    variables = made.init(jax.random.key(0), example(), CLIENTS).variables
    assert [*variables] == ["params"] and sorted(variables["params"]) == ["Dense_0", "Dense_1"]


class PreNorm(nn.Module):
    """A block whose name has "norm" in it, though it holds a dense layer."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(4)(nn.BatchNorm(use_running_average=not train)(x))


class Blocks(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(PreNorm()(x.reshape(x.shape[0], -1), train))


def test_fedbn_shares_the_dense_layer_of_a_block_named_after_its_normalisation():
    task, sgd = fl.classification(Blocks()), optax.sgd(RATE)
    made = fl.fedbn(task, client_optimizer=sgd)
    variables = made.init(jax.random.key(0), example(), CLIENTS).variables
    assert [*variables] == ["params"]
    assert {*variables["params"]} == {"PreNorm_0", "Dense_0"}
    assert [*variables["params"]["PreNorm_0"]] == ["Dense_0"]
    with pytest.raises(fl.FedLPError, match="'PreNorm' also finds PreNorm_0/Dense_0/kernel with"):
        fl.fedbn(task, client_optimizer=sgd, norm="PreNorm").init(
            jax.random.key(0), example(), CLIENTS
        )


class Listed(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.List([nnx.Linear(4, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)])
        self.out = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.body[1](self.body[0](x.reshape(x.shape[0], -1))))


def test_fedbn_names_layers_of_a_list_and_refuses_statistics_that_it_does_not_find():
    task, sgd = fl.classification(Listed(nnx.Rngs(0))), optax.sgd(RATE)
    with pytest.raises(
        fl.FedLPError, match="statistics body/1/mean, body/1/var; name them in norm"
    ):
        fl.fedbn(task, client_optimizer=sgd).init(jax.random.key(0), example(), CLIENTS)
    made = fl.fedbn(task, client_optimizer=sgd, norm="body/1")
    variables = made.init(jax.random.key(0), example(), CLIENTS).variables
    assert [*variables] == ["params"] and [*variables["params"]["body"]] == [0]


class Two(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](nnx.relu(self.layers[0](x.reshape(x.shape[0], -1))))


@pytest.mark.parametrize(
    ("name", "settings", "trained"),
    [
        ("fedrep", {"head": "layers/1", "head_epochs": 1}, [True, True]),  # steps have gates
        ("fedbabu", {"head": "layers/1"}, [True, False]),  # layers have
    ],
)
def test_modules_in_a_list_are_told_apart_in_training(name, settings, trained):
    task = fl.classification(Two(nnx.Rngs(0)))
    made = getattr(fl, name)(task, client_optimizer=optax.sgd(RATE), batch_size=64, **settings)
    result = fl.simulate(made, DATA, POPULATION, rounds=1, cohort=CLIENTS, seed=0)
    model = result.variables if result.models is None else result.models[0]
    start, end = (x["params"]["layers"] for x in (task.init(jax.random.key(0), example()), model))
    assert [bool((start[i]["kernel"] != end[i]["kernel"]).any()) for i in (0, 1)] == trained


@pytest.mark.slow
def test_fedrep_trains_the_exit_head_of_a_shallow_client_before_its_body():
    """The body takes one step from its start, under the head that the client ends with."""
    task = fl.classification(Steps(depth=2))
    made = fl.fedrep(
        task,
        head="head2",
        head_epochs=1,
        submodels=fl.submodel.by_depth([1], "persist"),
        client_optimizer=optax.sgd(RATE),
        batch_size=64,
    )
    one = fl.partition.iid(DATA.train.labels, clients=1, seed=0)
    start = made.init(jax.random.key(0), example(), 1).variables
    result = fl.simulate(made, DATA, one, rounds=1, cohort=1, variables=start)
    end = result.models[0]["params"]
    begun = {"hidden1": start["params"]["hidden1"], "head1": end["head1"]}
    batch = example()._replace(inputs=DATA.train.inputs, labels=DATA.train.labels)
    slope = jax.grad(lambda x: task.at_depth(1).loss({"params": x}, batch, jax.random.key(0))[0])
    expected = flat(begun["hidden1"]) - RATE * flat(slope(begun)["hidden1"])
    np.testing.assert_allclose(flat(end["hidden1"]), expected, rtol=1e-5, atol=1e-6)


def test_fedrep_refuses_a_head_that_some_depths_lack():
    scheme = fl.submodel.by_depth("uniform", "shared")
    settings = {"client_optimizer": optax.sgd(RATE), "submodels": scheme}
    made = fl.fedrep(fl.classification(Steps()), head="head3", **settings)
    with pytest.raises(fl.FedLPError, match="head='head3' finds nothing in depth_1, depth_2; name"):
        made.init(jax.random.key(0), example(), CLIENTS)
    fl.fedrep(fl.classification(Steps()), head="head", **settings).init(
        jax.random.key(0), example(), CLIENTS
    )


@pytest.mark.parametrize("schedule", [None, lambda round: jnp.where(round == 1, 0.5, 0.1)])
def test_what_fedcm_sends_on_is_a_gradient_whatever_the_rate(schedule):
    """Of one step of one client from x: Delta is the gradient at x."""
    settings = {"client_optimizer": optax.sgd(RATE), "steps": 1, "batch_size": 64}
    one = fl.fedcm(TASK, alpha=1.0, client_schedule=schedule, **settings)
    whole = fl.partition.iid(DATA.train.labels, clients=1, seed=0)
    start = one.init(jax.random.key(0), example(), 1).variables
    result = fl.simulate(one, DATA, whole, rounds=1, cohort=1, variables=start)
    moved = flat(start["params"]) - flat(result.variables["params"])
    rate = RATE if schedule is None else RATE * 0.5
    delta = flat(result.state.algorithm.trees["delta"])
    np.testing.assert_allclose(delta, moved / rate, rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(delta) > 0.1


def test_fedbn_refuses_a_model_without_normalisation():
    made = fl.fedbn(TASK, client_optimizer=optax.sgd(RATE))
    with pytest.raises(fl.FedLPError, match="the model has none: .*hidden1/kernel.*use fl.fedavg"):
        made.init(jax.random.key(0), example(), CLIENTS)


@pytest.mark.slow
@pytest.mark.parametrize("made", ["inclusivefl", "depthfl"], indirect=True)
def test_every_exit_is_tested(made):
    _, _, _, result = made
    layers = result.state.variables["params"].items()
    weights = {n: [np.asarray(x["kernel"]), np.asarray(x["bias"])] for n, x in layers}
    for depth in (1, 2, 3):
        kernel, bias = weights[f"head{depth}"]
        logits = forward(weights, depth, DATA.test.inputs)[depth] @ kernel + bias
        accuracy = (logits.argmax(axis=1) == DATA.test.labels).mean()
        tested = result.history[f"test_accuracy_depth_{depth}"][-1]
        np.testing.assert_allclose(tested, accuracy, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:rounds=2 end within the first block")
@each
def test_a_run_resumes_to_the_bit(made, tmp_path):
    name, one, _, whole = made
    plan, checkpoint = ROWS[name].plan, fl.Checkpoint(tmp_path, every=2, minutes=None)
    simulate(one, plan, rounds=2, checkpoint=checkpoint)
    rest = {"rounds": ROWS[name].rounds, "resume": checkpoint.latest()}
    _, resumed = simulate(one, plan, checkpoint=checkpoint, **rest)
    np.testing.assert_array_equal(flat(resumed.state), flat(whole.state))


@pytest.mark.parametrize(
    "made",
    rows(ROWS, {*ROWS} - {"scaffold"}),
    indirect=True,
)
def test_a_plan_changes_no_more_than_the_order_of_sums(made):
    name, one, _, expected = made
    _, other = simulate(one, (1, 3 - ROWS[name].plan[1]), ROWS[name].rounds)
    np.testing.assert_allclose(flat(other.state), flat(expected.state), rtol=1e-9, atol=1e-12)


def program(one):
    run = fl.Simulation(one, DATA, POPULATION, rounds=1, cohort=4, plan=fl.Plan(2, 2))
    return rounds_of(one, run.plan).trace(*run.round_shapes(run.plan)).lower().as_text()


@pytest.mark.parametrize("name", rows([x for x in ROWS if ROWS[x].other], (*SLOW, "depthfl")))
def test_other_numbers_are_the_same_program(name):
    assert program(algorithm(name)) == program(algorithm(name, keep=0.25, **ROWS[name].other))


def test_rounds_know_what_is_exchanged():
    """Transfers are modelled within rounds, from parts that have lost their beginnings."""
    model = {n: {"kernel": jnp.zeros((4, 8)), "bias": jnp.zeros(8)} for n in FedAvg.layers}
    table = fl.layers.layer_table({"params": model})
    for name in ROWS:
        one = algorithm(name)
        np.testing.assert_equal(one.round.args[0].wire(table), one.wire(table), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.neutral])
def test_its_neutral_setting_is_fedavg(name):
    row = ROWS[name]
    plain = fl.fedavg(row.alone or row.task, weighting=row.weigh, **LOCAL)
    _, expected = simulate(plain, row.plan)
    start, result = simulate(algorithm(name, keep=1.0, **row.neutral), row.plan)
    close(result, arrays(start) | arrays(expected.state.variables), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scaffold", "fednova"])
def test_without_anything_to_correct_it_is_fedavg(name):
    """SCAFFOLD in its first round, FedNova where all clients take as many steps."""
    uniform = {"weighting": "uniform", "epochs": None, "steps": 3}
    momentum = optax.sgd(RATE, momentum=ROWS[name].oracle.rho or None)
    plain = fl.fedlp_homo(TASK, keep=KEEP, client_optimizer=momentum, batch_size=BATCH, **uniform)
    _, expected = simulate(plain, (2, 2), rounds=1)
    _, result = simulate(algorithm(name, **uniform), (2, 2), rounds=1)
    close(result, arrays(expected.state.variables))


# The hyperparameters with which each is run on the digits, for 20 rounds of 10 of 100 clients.
LEARNS = {
    "fedprox": {"mu": 0.01},
    "fedavgm": {"beta": 0.5},
    "fedadagrad": {},
    "fedadam": {"server_learning_rate": 0.05},
    "fedyogi": {"server_learning_rate": 0.05},
    "scaffold": {},
    "fednova": {},
    "fedlp_q": {"keep": 0.7, "levels": 15},
    "fedlp_homo": {"keep": 0.7},
    "fedldf": {"senders": 3},
    "top_k": {"keep": 0.7, "upload": fl.top_k(0.1, error_feedback=True)},
    "feddyn": {"alpha": 0.1},
    "fedcm": {"alpha": 0.1},
    "fedexp": {},
    "fedper": {"head": "fc2"},
    "lg_fedavg": {"head": "fc2"},
    "fedbn": {},
    "fedrep": {"head": "fc2", "head_epochs": 5, "epochs": 2},
    "fedbabu": {"head": "fc2"},
    "freeze": {"keep": 0.7},
    "fedpart": {"full_rounds": 5},
    "download": {"keep": 0.7, "download": 0.9},
    "fedlama": {"interval": 2},
    "fedluar": {"recycled": 1},
    "personal": {"mu": 0.01, "personal": "fc2/bias"},
    "fedlp_hetero": {"depths": "uniform"},
    "inclusivefl": {"depths": "uniform"},
    "depthfl": {"depths": "uniform", "consistency": 0.1},
    "depthfl_feddyn": {"depths": "uniform", "consistency": 0.1, "ramp": 5, "alpha": 0.1},
    "own_classes": {"keep": 0.7, "own_classes": True},
    "heterofl": {"widths": [1.0, 0.5]},
    "fedrolex": {"widths": [1.0, 0.5]},
    "fjord": {"widths": [1.0, 0.5]},
    "federated_dropout": {"widths": 0.75},
    "fedbuff": {"buffer": 5, "profile": fl.Profile(1e6, 1e5, 1e5, spread=0.5)},
    "fedasync": {"profile": fl.Profile(1e6, 1e5, 1e5, spread=0.5)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_it_learns_the_digits(name):
    data = fl.load("digits")
    clients = fl.partition.dirichlet(data.train.labels, clients=50, alpha=0.5, seed=0)
    of_layers = {"depths", "download", "full_rounds", "head", "interval"}
    of_layers |= {"personal", "recycled", "widths"}
    deep = of_layers & {*LEARNS[name]}
    hidden = (64, 64) if "depths" in deep else (64,)
    model = fl.models.MLP(hidden=hidden) if deep else fl.models.Logistic()
    if ROWS[name].task is NORMED:
        model = Steps(depth=1, width=64, classes=10, norm=True)
    task = fl.classification(model)
    sgd = optax.sgd(0.1)
    common = {"client_optimizer": sgd, "epochs": 2, "batch_size": 10}
    one = ROWS[name].make(task, **common | LEARNS[name])
    rounds = 20 * 10 // (ROWS[name].oracle.buffer or 10)  # for as many clients
    result = fl.simulate(one, data, clients, rounds=rounds, cohort=10, seed=0)
    accuracy = "test_accuracy_personal" if ROWS[name].private else "test_accuracy"
    assert result.history[accuracy][-1] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedprox", "scaffold", "fednova", "feddyn", "fedcm", "top_k"])
def test_submodels_with_heads_of_their_own_take_part(name):
    """A head that only a client has is trained without corrections, and kept beside its state."""
    task = fl.classification(Steps())
    sgd = optax.sgd(RATE)
    common = {"batch_size": BATCH, "client_optimizer": sgd, "keep": 0.8}
    scheme = fl.submodel.by_depth([0.4, 0.3, 0.3], "persist")
    one = ROWS[name].make(task, submodels=scheme, **common | ROWS[name].settings)
    result, plan = [], {"rounds": 3, "cohort": 6, "seed": 2}
    for devices in (1, 2):
        result.append(
            fl.simulate(one, DATA, POPULATION, plan=fl.Plan(devices=devices, width=1), **plan)
        )
    np.testing.assert_allclose(
        flat(result[0].state.variables), flat(result[1].state.variables), rtol=1e-4, atol=1e-5
    )
    plain = fl.fedlp_hetero(task, depths=[0.4, 0.3, 0.3], **common)
    other = fl.simulate(plain, DATA, POPULATION, plan=fl.Plan(devices=1, width=1), **plan)
    assert not np.array_equal(flat(other.state.variables), flat(result[0].state.variables))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("download", {"clip": 1.0}, "clip needs clients that begin with the server's model"),
        ("download", {"upload": fl.quantize(levels=3)}, "upload needs clients"),
        (
            "download",
            {"privacy": fl.Privacy(1.0, 1.0, 1e-5), "aggregator": "cohort_mean"},
            "privacy",
        ),
        ("fedluar", {"privacy": fl.Privacy(1.0, 1.0, 1e-5)}, "fedluar applies updates again"),
        ("fedlama", {"aggregator": "median"}, "masked mean, .* omit aggregator"),
        ("fedexp", {"aggregator": "median"}, "it has no aggregator of the user's choice"),
        (
            "fedexp",
            {"privacy": fl.Privacy(1.0, 1.0, 1e-5)},
            "it has no privacy of the user's choice",
        ),
        (
            "fedexp",
            {"submodels": fl.widths.by_width(WIDTHS)},
            "it has no submodels of several widths",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(name, settings, message):
    with pytest.raises(fl.FedLPError, match=message):
        algorithm(name, weighting="uniform", **settings)


def test_layers_that_the_cohort_does_not_hold_do_not_rest():
    """Of a round's clients only those of the first have the deep layers, which then stay."""
    made = fl.fedluar(
        fl.classification(Steps(depth=2)),
        recycled=0,
        submodels=fl.submodel.by_depth([2] + [1] * (CLIENTS - 1), "reset_to_init"),
        **LOCAL,
    )
    hidden = []

    def look(round, row, state):
        layers = state.variables["params"]
        hidden.append([np.array(layers[f"hidden{i}"]["kernel"]) for i in (1, 2)])

    fl.simulate(
        made,
        DATA,
        POPULATION,
        rounds=2,
        cohort=lambda seed, round, clients: (round - 1, round),
        plan=fl.Plan(1, 1),
        callbacks=[look],
    )
    (shallow, deep), (shallow_after, deep_after) = hidden
    np.testing.assert_array_equal(deep_after, deep)
    assert not np.array_equal(shallow_after, shallow)


def test_own_classes_need_classes():
    with pytest.raises(fl.FedLPError, match="use fl.classification, or own_classes=False"):
        fl.heterofl(fl.regression(Steps()), widths=0.5, **LOCAL)
    with pytest.raises(fl.FedLPError, match="own_classes='yes' must be true or false"):
        fl.fedavg(TASK, own_classes="yes", **LOCAL)
