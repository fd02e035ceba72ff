"""`python -m fedlp_jax`: the command `fedlp` without its script."""

from fedlp_jax.cli import main

main()
