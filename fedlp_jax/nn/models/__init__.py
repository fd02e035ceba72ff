"""Networks as flax linen modules: `(x f32[B, ...], train: bool) -> logits f32[B, classes]`."""

from fedlp_jax.nn.batch_norm import BatchNorm as BatchNorm
from fedlp_jax.nn.models.cnn import MNISTCNN as MNISTCNN
from fedlp_jax.nn.models.cnn import FedLPCNN as FedLPCNN
from fedlp_jax.nn.models.mlp import MLP as MLP
from fedlp_jax.nn.models.mlp import Logistic as Logistic
from fedlp_jax.nn.models.resnet import ResNet as ResNet
from fedlp_jax.nn.pooling import max_pool as max_pool

__all__ = ["MLP", "MNISTCNN", "BatchNorm", "FedLPCNN", "Logistic", "ResNet", "max_pool"]
