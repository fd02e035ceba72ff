"""A workload in terms of this package."""

from __future__ import annotations

import flax.linen as nn
import optax

import fedlp_jax as fl
from benchmarks.workloads import Workload


class SmallCNN(nn.Module):
    """Two 3 x 3 convolutions without padding, max-pooling, two linear layers."""

    @nn.compact
    def __call__(self, x: fl.types.Array, train: bool) -> fl.types.Array:
        """`f32[B, H, W, channels] -> logits f32[B, 10]`."""
        del train
        x = nn.relu(nn.Conv(32, (3, 3), padding="VALID", name="conv1")(x))
        x = nn.relu(nn.Conv(64, (3, 3), padding="VALID", name="conv2")(x))
        x = fl.models.max_pool(x)  # its gradient avoids select-and-scatter, which is slow on CPU
        x = nn.relu(nn.Dense(128, name="fc1")(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, name="fc2")(x)


def module(workload: Workload) -> nn.Module:
    """The flax model; a user's module such as `SmallCNN` gets the fast convolutions too."""
    if workload.model == "mlp":
        return fl.models.MLP(num_classes=10, init="pytorch", dtype=workload.dtype)
    if workload.model == "fedlp_cnn":
        return fl.models.FedLPCNN(num_classes=10, init="pytorch", dtype=workload.dtype)
    if workload.dtype is not None:
        raise ValueError(f"{workload.model} computes in float32, not {workload.dtype}.")
    return SmallCNN()


def optimizer(workload: Workload) -> optax.GradientTransformation:
    """The client optimizer."""
    if workload.optimizer == "adam":
        chosen = optax.adam(workload.learning_rate)
    else:
        chosen = optax.sgd(workload.learning_rate, workload.momentum or None)
    return optax.flatten(chosen) if workload.flat else chosen


def dataset(workload: Workload) -> fl.Dataset:
    """The images: a data set, or generated ones."""
    if workload.data == "synthetic":
        examples = workload.clients * workload.per_client
        return fl.load("synthetic", examples=examples, shape=workload.image, num_classes=10, seed=0)
    return fl.load(workload.data)


def partition(workload: Workload, data: fl.Dataset) -> fl.Partition:
    """Even and iid; the workloads differ only in sizes."""
    return fl.partition.iid(data.train.labels, clients=workload.clients, seed=0)


def algorithm(workload: Workload) -> fl.Algorithm:
    """FedAvg, which is the same program as FedLP-Homo."""
    return fl.fedavg(
        fl.classification(module(workload)),
        client_optimizer=optimizer(workload),
        epochs=1,
        batch_size=workload.batch_size,
    )
