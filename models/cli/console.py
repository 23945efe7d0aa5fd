"""What the commands show: bars and lines on stderr, reports on stdout."""

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
    """A progress bar on stderr; call what it gives once per step done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=stderr) as progress:
        task = progress.add_task(title, total=total)
        yield lambda _: progress.advance(task)


class Bars:
    """A `runs.reporting.Reporter` that draws a bar for every stage and prints lines above it."""

    @staticmethod
    @contextlib.contextmanager
    def stage(title: str, total: int) -> Iterator[Step]:
        """Draw a bar as long as the stage lasts."""
        with bar(title, total) as advance:

            def step(done: object) -> None:
                advance(done)
                if text := line_of(done):
                    line(text)

            yield step

    @staticmethod
    def tell(text: str) -> None:
        """Print the text on stderr."""
        click.echo(text, err=True)


@functools.singledispatch
def line_of(done: object) -> str:
    """The line that is printed after a step, by the kind of its report; "" if the bar is enough.

    A command whose steps have reports of another kind registers a line for them.
    """
    return ""


@line_of.register
def _(done: jq.Done) -> str:
    took = f"{done.seconds:6.1f} s" if done.seconds else "  (done before)"
    return (
        f"{done.index:4}/{done.total} {done.path:36} {done.method:10} "
        f"{done.bits_per_weight:6.3f} bits  loss {done.loss:.5f} {took}"
    )


@line_of.register
def _(option: jq.Option) -> str:
    return str(option)


@line_of.register
def _(done: Update) -> str:
    if done.validation is None:
        return ""
    return (
        f"{done.name:20} step {done.step:5}  loss {done.loss:.5f}  held out {done.validation:.5f}"
    )


def line(text: str) -> None:
    """Print a line on stderr as it is, above the bar."""
    stderr.print(text, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn a ValueError inside into a usage error: one line, and exit status 2."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def emit(report: Mapping[str, object], as_json: bool) -> None:
    """Print a report on stdout: as JSON, or a line for each figure."""
    if as_json:
        click.echo(json.dumps(report))
        return
    for name, value in report.items():
        click.echo(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
