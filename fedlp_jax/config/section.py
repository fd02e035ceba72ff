"""The sections of a configuration: one class for every kind of partition, model, algorithm, ...

Field names are the names of the arguments they become. A section of several kinds says in `name`
which one it is.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedlp_jax.algorithms.presets import BEHAVIOURS, DEFAULT
from fedlp_jax.config.fault import Aggregator, Clip, Privacy
from fedlp_jax.config.field import (
    Checked,
    Count,
    Decay,
    Flag,
    NotNegative,
    OptionalCount,
    OwnSeed,
    Positive,
    Section,
    Share,
    choice,
    mapping,
    optional,
    real,
    refuse,
    several,
    text,
    whole,
    without,
)
from fedlp_jax.errors import shown

_PRESET = BEHAVIOURS[DEFAULT]
_HIDDEN = (512, 128, 128, 64, 32)  # of the MLP

# DATA


class Data(Section):
    """Which images; the arguments of `fl.load`."""

    name: Annotated[str, Checked(text)]  # one of tensorflow-datasets, digits, synthetic, FILE.npz
    data_dir: Annotated[str | None, Checked(optional(text))] = None  # null = TFDS_DATA_DIR
    # Further arguments, as that data set takes them.
    options: Annotated[dict[str, Any], Checked(without("name", "data_dir"))] = Field(
        default_factory=dict
    )


# PARTITION


class IID(Section):
    """Shuffled and dealt evenly."""

    name: Literal["iid"]
    clients: Count
    seed: OwnSeed = None


class Dirichlet(Section):
    """Shares of every class drawn from a Dirichlet distribution; a small alpha is very uneven."""

    name: Literal["dirichlet"]
    clients: Count
    alpha: Positive
    seed: OwnSeed = None
    min_size: OptionalCount = None
    reference: Flag = _PRESET.reference  # dealt as the authors' code does


class Shards(Section):
    """Sorted by label, cut into shards, a few shards for every client."""

    name: Literal["shards"]
    clients: Count
    shards_per_client: Count = 2
    seed: OwnSeed = None


class Mixed(Section):
    """A share `ratio` dealt as shards, the rest evenly."""

    name: Literal["mixed"]
    clients: Count
    ratio: Share = 0.95
    seed: OwnSeed = None
    reference: Flag = _PRESET.reference  # with the overlaps of the authors' code


class Quantity(Section):
    """Sizes drawn from a Dirichlet distribution, labels alike everywhere."""

    name: Literal["quantity"]
    clients: Count
    alpha: Positive
    seed: OwnSeed = None
    min_size: Count = 1


class Natural(Section):
    """The clients that the data set itself names."""

    name: Literal["natural"]


Partition = Annotated[
    IID | Dirichlet | Shards | Mixed | Quantity | Natural, Field(discriminator="name")
]


# MODEL


class Network(Section):
    """What all of them have."""

    name: str
    init: Annotated[str, Checked(choice("flax", "pytorch"))] = _PRESET.init
    dtype: Annotated[str, Checked(choice("float32", "bfloat16"))] = "float32"  # of activations


class FedLPCNN(Network):
    """The reference CNN of FedLP, with exits at depths 1 to 5."""

    name: Literal["fedlp_cnn"]
    depth: Annotated[int, Checked(whole(1, 5))] = 5


class MNISTCNN(Network):
    """Two convolutions and two dense layers."""

    name: Literal["mnist_cnn"]


class MLP(Network):
    """Dense layers with ReLU between them."""

    name: Literal["mlp"]
    hidden: Annotated[tuple[int, ...], Checked(several(whole(1), minimum=0))] = _HIDDEN


class ResNet(Network):
    """Three stages of two blocks with 16, 32 and 64 channels."""

    name: Literal["resnet"]


class Logistic(Network):
    """One dense layer."""

    name: Literal["logistic"]


Model = Annotated[FedLPCNN | MNISTCNN | MLP | ResNet | Logistic, Field(discriminator="name")]


# OPTIMIZER, of the clients and of the server


class SGD(Section):
    """Gradient descent, with momentum and an L2 penalty if wanted."""

    name: Literal["sgd"]
    learning_rate: NotNegative
    momentum: Decay = 0.0
    nesterov: Flag = False
    weight_decay: NotNegative = 0.0


class Adam(Section):
    """Adam."""

    name: Literal["adam"]
    learning_rate: NotNegative
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Positive = 1e-8


class AdamW(Section):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"]
    learning_rate: NotNegative
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Positive = 1e-8
    weight_decay: NotNegative = 1e-4


class Yogi(Section):
    """Adam with a second moment that grows slowly."""

    name: Literal["yogi"]
    learning_rate: NotNegative
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Positive = 1e-3


class Adagrad(Section):
    """Steps divided by the root of all squared gradients so far."""

    name: Literal["adagrad"]
    learning_rate: NotNegative
    eps: Positive = 1e-7


Optimizer = Annotated[SGD | Adam | AdamW | Yogi | Adagrad, Field(discriminator="name")]


# ALGORITHM


def _depths(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return several(real(0))(value)
    if value == "uniform" or (type(value) is int and 1 <= value <= 5):
        return value
    raise refuse(
        f"is {shown(value)}, but must be 1 to 5 (six clients in ten have that depth, one in ten "
        "each other), uniform, or a list of one probability for each depth"
    )


def _layers(value: Any) -> Any:
    if not isinstance(value, dict):
        return choice("by_module", "by_tensor")(value)
    if not value or not all(isinstance(v, str) and v for v in value.values()):
        raise refuse(f"is {shown(value)}, but must map regular expressions to names of layers")
    return mapping(text)(value)


class _Local(Section):
    """What all algorithms have in common: how clients train and how their updates are combined."""

    name: str
    client_optimizer: Optimizer
    epochs: OptionalCount = None  # 1, unless steps are given
    steps: OptionalCount = None  # instead of epochs
    batch_size: Annotated[int, Checked(whole(1, 1_000_000))] = 32
    weighting: Annotated[str, Checked(choice("examples", "uniform"))] = _PRESET.weighting
    layers: Annotated[str | dict[str, str], Checked(_layers)] = _PRESET.layers
    aggregator: Aggregator = "masked_mean"  # a name, or a section of a name and its settings
    clip: Clip = None  # largest norm of what a client sends
    privacy: Privacy | None = None
    server_optimizer: Optimizer | None = None  # null = take the mean as it is
    train_loss: Annotated[str, Checked(choice("examples", "batches"))] = _PRESET.train_loss

    @model_validator(mode="after")
    def _epochs_or_steps(self) -> _Local:
        if self.epochs is not None and self.steps is not None:
            both = f"{self.epochs} epochs and {self.steps} steps"
            raise refuse(f"has {both}, but takes only one of them; set the other to null")
        return self


def _keep(value: Any) -> Any:
    rate = real(0, 1)
    if isinstance(value, dict) and value:
        return mapping(rate)(value)
    if isinstance(value, list | tuple) and any(isinstance(row, list | tuple) for row in value):
        return several(several(rate))(value)
    return several(rate, alone=True)(value)


Matrix = tuple[tuple[float, ...], ...]
Keep = Annotated[float | tuple[float, ...] | Matrix | dict[str, float], Checked(_keep)]


class FedAvg(_Local):
    """Every client sends everything."""

    name: Literal["fedavg"]


class FedLPHomo(_Local):
    """One model for all; a client sends each layer with probability `keep`."""

    name: Literal["fedlp_homo"]
    keep: Keep  # one number; one for every client or layer, or a matrix; or layer name -> number


class FedLPHetero(_Local):
    """Every client trains the model down to its own depth."""

    name: Literal["fedlp_hetero"]
    depths: Annotated[str | int | tuple[float, ...], Checked(_depths)]
    heads: Annotated[str, Checked(choice("persist", "reset_to_init", "shared"))] = _PRESET.heads
    keep: Keep = 1.0


Algorithm = Annotated[FedAvg | FedLPHomo | FedLPHetero, Field(discriminator="name")]
