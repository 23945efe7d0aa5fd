"""What the console script `jaxquant` runs: signals are heeded before anything heavy is imported."""

import importlib

from jaxquant_models.cli import interrupts


def main() -> None:
    """Entry point; see `cli.commands.main`."""
    interrupts.arm()
    importlib.import_module("jaxquant_models.cli.commands").main()
