"""Entry point of the console script, which handles signals before the heavy imports run."""

import importlib
import os
import sys

from jaxquant_models.cli import interrupts
from jaxquant_models.readers.packages import missing_package


def main() -> None:
    """Run the command; see `cli.commands.main`."""
    interrupts.arm()
    try:
        commands = importlib.import_module("jaxquant_models.cli.commands")
    except ModuleNotFoundError as error:
        message = missing_package(error)
        if not message or os.environ.get("JAXQUANT_DEBUG"):
            raise
        sys.stderr.write(f"error: {message}\n")
        sys.exit(1)
    commands.main()
