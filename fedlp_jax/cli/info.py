"""`fedlp info`."""

from __future__ import annotations

import typer

from fedlp_jax.cli.options import ConfigFile

EXAMPLES = """
Examples:

  fedlp info

  fedlp info configs/cifar10.yaml --algorithm.layers by_tensor
"""


def info(context: typer.Context, config: ConfigFile = "") -> None:
    """Show versions and devices; with CONFIG also its settings, partition, layers and costs."""
    from fedlp_jax.cli import tables
    from fedlp_jax.reporting.tables import show

    words = [config, *context.args] if config else context.args
    if not words:
        from fedlp_jax.execution.plan import setup

        setup()
        show(tables.environment_table())
        return
    from fedlp_jax.cli.run import load
    from fedlp_jax.config.build import build
    from fedlp_jax.config.loading import split_words
    from fedlp_jax.config.overview import overview

    loaded = load(*split_words(words))
    show(*tables.config_tables(loaded, overview(loaded, build(loaded))))
