"""What the commands show: bars and lines on stderr, reports on stdout."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import jaxquant as jq
from jaxquant.tuning.trainer import Progress as Update

stderr = Console(stderr=True)
SEED = click.IntRange(0, 2**32 - 1)


@contextlib.contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[Any], None]]:
    """A progress bar on stderr; call what it gives once per step done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=stderr) as progress:
        task = progress.add_task(title, total=total)
        yield lambda _: progress.advance(task)


@contextlib.contextmanager
def usage() -> Iterator[None]:
    """A ValueError inside is the caller's: exit status 2."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def line(text: str) -> None:
    """A line on stderr as it is, above the bar."""
    stderr.print(text, highlight=False, markup=False, soft_wrap=True)


class Steps:
    """A step of the bar for every update; a line where the held-out loss was looked at."""

    def __init__(self, step: Callable[[Any], None]) -> None:
        self.step = step

    def __call__(self, done: Update) -> None:
        self.step(done)
        if done.validation is not None:
            line(
                f"{done.name:20} step {done.step:5}  loss {done.loss:.5f}  "
                f"held out {done.validation:.5f}"
            )


class Rows:
    """A line on stderr for every matrix done, and a step of the bar."""

    def __init__(self, step: Callable[[Any], None]) -> None:
        self.step = step

    def __call__(self, done: jq.Done) -> None:
        self.step(done)
        took = f"{done.seconds:6.1f} s" if done.seconds else "  (done before)"
        line(
            f"{done.index:4}/{done.total} {done.path:36} {done.method:10} "
            f"{done.bits_per_weight:6.3f} bits  loss {done.loss:.5f} {took}"
        )


def emit(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report))
        return
    for name, value in report.items():
        click.echo(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
