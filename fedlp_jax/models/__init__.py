"""Networks as flax linen modules, called as `(x f32[B, ...], train: bool) -> f32[B, classes]`."""

from fedlp_jax.models.cnn import MNISTCNN as MNISTCNN
from fedlp_jax.models.cnn import FedLPCNN as FedLPCNN
from fedlp_jax.models.mlp import MLP as MLP
from fedlp_jax.models.mlp import Logistic as Logistic
from fedlp_jax.models.norm import BatchNorm as BatchNorm
from fedlp_jax.models.pool import max_pool as max_pool
from fedlp_jax.models.resnet import ResNet as ResNet

__all__ = ["MLP", "MNISTCNN", "BatchNorm", "FedLPCNN", "Logistic", "ResNet", "max_pool"]
