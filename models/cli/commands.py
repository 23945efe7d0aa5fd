"""The command `jaxquant`: quantize, finetune, merge, train-bitnet, eval, generate, inspect, ..."""

from jaxquant_models.cli import interrupts

if __name__ == "__main__":
    interrupts.arm()  # before the heavy imports

import os
import sys
import warnings

import click

import jaxquant as jq
from jaxquant_models.cli.analyze import analyze_command
from jaxquant_models.cli.chat import chat
from jaxquant_models.cli.compress import compress, decompress
from jaxquant_models.cli.console import line
from jaxquant_models.cli.evaluate import evaluate_command
from jaxquant_models.cli.finetune import finetune
from jaxquant_models.cli.generate import generate
from jaxquant_models.cli.inspect import inspect
from jaxquant_models.cli.merge import merge
from jaxquant_models.cli.plan import plan
from jaxquant_models.cli.quantize import quantize
from jaxquant_models.cli.select import select
from jaxquant_models.cli.train_bitnet import train_bitnet


@click.group()
@click.version_option(jq.__version__)
def cli() -> None:
    """Quantize language models, then run and evaluate them."""


COMMANDS = (
    plan, quantize, finetune, merge, train_bitnet, evaluate_command, generate, chat, inspect,
    select, compress, decompress, analyze_command,
)  # fmt: skip
for command in COMMANDS:
    cli.add_command(command)


def main(args: list[str] | None = None) -> None:
    """Run the command, exiting with status 0, 1 (failed), 2 (bad usage) or 130 (interrupted).

    An error is reported in one line.

    Args:
      args: the arguments; None takes those of the process, which then belongs to the command.
    """
    warnings.showwarning = lambda message, *_, **__: line(f"warning: {message}")
    own = args is None
    # On SIGTERM a job cleans up after itself, as on an interrupt from the keyboard.
    with interrupts.working(own):
        try:
            sys.exit(cli.main(args, prog_name="jaxquant", standalone_mode=False) or 0)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except (KeyboardInterrupt, interrupts.Interrupted):
            _interrupted(own)
        except click.Abort as error:  # click raises it for EOFError too
            if isinstance(error.__cause__, EOFError):
                _fail(f"unexpected end of a file: {error.__cause__}", 1)
            _interrupted(own)
        except Exception as error:  # reported in one line; JAXQUANT_DEBUG=1 shows the traceback
            if os.environ.get("JAXQUANT_DEBUG"):
                raise
            expected = isinstance(error, ValueError | OSError) and str(error)
            _fail(str(error) if expected else f"{type(error).__name__}: {error}", 1)


def _interrupted(own: bool) -> None:
    if own:
        interrupts.leave()  # a normal exit would wait for running threads
    _fail(interrupts.message(), interrupts.STATUS)


def _fail(message: str, status: int) -> None:
    text = " ".join(message.split())
    click.echo(f"error: {text}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
