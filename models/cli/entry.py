"""Entry point of the console script, which handles signals before the heavy imports run."""

import importlib

from jaxquant_models.cli import interrupts


def main() -> None:
    """Run the command; see `cli.commands.main`."""
    interrupts.arm()
    importlib.import_module("jaxquant_models.cli.commands").main()
