"""Networks as flax linen modules: `(x, train: bool) -> logits`.

Images and vectors are `f32[B, ...]` and give `f32[B, classes]`. Sequences of tokens are `i32[B, T]`
and give `f32[B, T, classes]`.
"""

from fedlp_jax.nn.batch_norm import BatchNorm as BatchNorm
from fedlp_jax.nn.models.char_lstm import CharLSTM as CharLSTM
from fedlp_jax.nn.models.cnn import MNISTCNN as MNISTCNN
from fedlp_jax.nn.models.cnn import FedLPCNN as FedLPCNN
from fedlp_jax.nn.models.mlp import MLP as MLP
from fedlp_jax.nn.models.mlp import Logistic as Logistic
from fedlp_jax.nn.models.resnet import ResNet as ResNet
from fedlp_jax.nn.models.transformer import Transformer as Transformer
from fedlp_jax.nn.pooling import max_pool as max_pool

__all__ = [
    "MLP",
    "MNISTCNN",
    "BatchNorm",
    "CharLSTM",
    "FedLPCNN",
    "Logistic",
    "ResNet",
    "Transformer",
    "max_pool",
]
