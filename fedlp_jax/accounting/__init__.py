"""Modelled parameters, bytes and multiply-accumulates; never a clock."""

from fedlp_jax.accounting.ledger import Ledger as Ledger
from fedlp_jax.accounting.macs import backward_macs as backward_macs
from fedlp_jax.accounting.macs import forward_macs as forward_macs
