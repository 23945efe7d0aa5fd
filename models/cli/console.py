"""Output of the commands: progress bars and messages on stderr, reports on stdout."""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import jaxquant as jq
from jaxquant.tuning.trainer import Progress as Update
from jaxquant_models.runs.reporting import Step

stderr = Console(stderr=True)


@contextlib.contextmanager
def bar(title: str, total: int) -> Iterator[Step]:
    """Show a progress bar on stderr; the yielded function advances it by one step.

    Args:
      title: text before the bar.
      total: number of steps.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=stderr) as progress:
        task = progress.add_task(title, total=total)
        yield lambda _: progress.advance(task)


class Bars:
    """A `runs.reporting.Reporter` that shows a bar for every stage and prints lines above it."""

    @staticmethod
    @contextlib.contextmanager
    def stage(title: str, total: int) -> Iterator[Step]:
        """Show a bar while the stage lasts.

        Args:
          title: text before the bar.
          total: number of steps.
        """
        with bar(title, total) as advance:

            def step(done: object) -> None:
                advance(done)
                if text := line_of(done):
                    line(text)

            yield step

    @staticmethod
    def tell(text: str) -> None:
        """Print the text on stderr.

        Args:
          text: the text.
        """
        click.echo(text, err=True)


@functools.singledispatch
def line_of(done: object) -> str:
    """Return the line to print after a step, or "" if the progress bar is enough.

    It is chosen by the type of the step's report. Commands with other types of reports register a
    function for them.

    Args:
      done: the report of the step.
    """
    return ""


@line_of.register
def _(done: jq.ptq.Done) -> str:
    took = f"{done.seconds:6.1f} s" if done.seconds else "  (done before)"
    return (
        f"{done.index:4}/{done.total} {done.path:36} {done.method:10} "
        f"{done.bits_per_weight:6.3f} bits  loss {done.loss:.5f} {took}"
    )


@line_of.register
def _(option: jq.ptq.Option) -> str:
    return str(option)


@line_of.register
def _(done: Update) -> str:
    if done.validation is None:
        return ""
    return (
        f"{done.name:20} step {done.step:5}  loss {done.loss:.5f}  held out {done.validation:.5f}"
    )


def line(text: str) -> None:
    """Print a line verbatim on stderr, above the bar.

    Args:
      text: the line.
    """
    stderr.print(text, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Convert a ValueError into a usage error: one line, and exit status 2."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def emit(report: Mapping[str, object], as_json: bool) -> None:
    """Print a report on stdout, as JSON or as one line per value.

    Args:
      report: name -> value.
      as_json: whether to print JSON.
    """
    if as_json:
        click.echo(json.dumps(report))
        return
    for name, value in report.items():
        shown = f"{value:.6g}" if isinstance(value, float) else value
        click.echo(f"{name}: {'unknown' if shown is None else shown}")
