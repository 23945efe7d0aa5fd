"""What the console script `jaxquant` runs: signals are heeded before anything heavy is imported."""

import importlib

from models import interrupts


def main() -> None:
    """Entry point; see `models.cli.main`."""
    interrupts.arm()
    importlib.import_module("models.cli").main()
