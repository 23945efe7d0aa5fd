"""The command `jaxquant`: quantize, finetune, train-bitnet, eval, generate, inspect."""

from jaxquant_models.cli import interrupts

if __name__ == "__main__":
    interrupts.arm()  # before anything heavy is imported

import os
import sys
import warnings

import click

import jaxquant as jq
from jaxquant_models.cli.console import line
from jaxquant_models.cli.evaluate import evaluate_command
from jaxquant_models.cli.finetune import finetune
from jaxquant_models.cli.generate import generate
from jaxquant_models.cli.inspect import inspect
from jaxquant_models.cli.quantize import quantize
from jaxquant_models.cli.train_bitnet import train_bitnet


@click.group()
@click.version_option(jq.__version__)
def cli() -> None:
    """Quantize language models, and run and measure them."""


for command in (quantize, finetune, train_bitnet, evaluate_command, generate, inspect):
    cli.add_command(command)


def main(args: list[str] | None = None) -> None:
    """Entry point: exit status 0, 1 (failed), 2 (bad usage) or 130 (told to stop).

    An error is one line. Without arguments they, and the process, are the command's own.
    """
    warnings.showwarning = lambda message, *_, **__: line(f"warning: {message}")
    own = args is None
    # A job told to stop cleans up after itself, as one interrupted from the keyboard does.
    with interrupts.working(own):
        try:
            sys.exit(cli.main(args, prog_name="jaxquant", standalone_mode=False) or 0)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except (KeyboardInterrupt, interrupts.Interrupted):
            _interrupted(own)
        except click.Abort as error:  # what click makes of an EOFError, too
            if isinstance(error.__cause__, EOFError):
                _fail(f"unexpected end of a file: {error.__cause__}", 1)
            _interrupted(own)
        except Exception as error:  # a user gets a line whatever it is; JAXQUANT_DEBUG=1 says where
            if os.environ.get("JAXQUANT_DEBUG"):
                raise
            expected = isinstance(error, ValueError | OSError) and str(error)
            _fail(str(error) if expected else f"{type(error).__name__}: {error}", 1)


def _interrupted(own: bool) -> None:
    if own:
        interrupts.leave()  # threads that are still at work would be waited for
    _fail(interrupts.message(), interrupts.STATUS)


def _fail(message: str, status: int) -> None:
    text = " ".join(message.split())
    click.echo(f"error: {text}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
