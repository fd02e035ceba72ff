"""The network. Its arguments are fields of `model:` in config.yaml."""

import flax.linen as nn


class Net(nn.Module):
    """Three linear layers with ReLU between them. Each named layer is kept or pruned as one."""

    num_classes: int  # comes from the data
    width: int = 64

    @nn.compact
    def __call__(self, x):
        """`f32[B, ...] -> logits f32[B, num_classes]`."""
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.width, name="fc1")(x))
        x = nn.relu(nn.Dense(self.width // 2, name="fc2")(x))
        return nn.Dense(self.num_classes, name="out")(x)
