"""The command `jaxquant select`."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from jaxquant.selection.compression import CODECS
from jaxquant.selection.json_lines import JsonLines
from jaxquant.selection.zip_selection import Progress
from jaxquant_models.cli.console import emit, line, stderr, usage_errors
from jaxquant_models.cli.output_file import OutputFile
from jaxquant_models.runs import selecting
from jaxquant_models.runs.selecting import Counter, SelectionRequest


@click.command("select")
@click.argument("file")
@click.option(
    "--budget",
    type=click.IntRange(1),
    required=True,
    metavar="TOKENS",
    help="Number of tokens to select. It is never exceeded. With --faithful, it is the number of "
    "items instead, and is exceeded up to the next multiple of --k3. If the budget covers FILE, "
    "every item is selected.",
)
@click.option(
    "--out",
    required=True,
    metavar="FILE",
    help="File to write the selected lines to, in the order of their selection. They are unchanged "
    "but for their ends, which are line feeds.",
)
@click.option(
    "--field",
    default=None,
    metavar="NAME",
    help="Field of every object that holds its text. The default is all strings in a line, except "
    "the names of fields; with --faithful, the whole line.",
)
@click.option(
    "--tokenizer",
    default=None,
    metavar="MODEL",
    help="Model whose tokenizer counts the tokens: smollm2-135m, a .gguf file, a model folder, a "
    "checkpoint, or a folder with a tokenizer.json. The default counts one token for every 4 bytes "
    "of UTF-8 text, which is about right for English.",
)
@click.option(
    "--codec",
    type=click.Choice(list(CODECS)),
    default="zlib",
    show_default=True,
    help="Codec of the compression ratios. lzma sees repeats at any distance, but compresses the "
    "whole selection for every candidate, so it suits selections up to about 100 kB.",
)
@click.option(
    "--faithful",
    is_flag=True,
    help="Select what the code of ZIP's authors selects, index for index, including its "
    "deviations: rejected items do not come back, and repeats beyond 32 KiB are not seen.",
)
@click.option(
    "--k1",
    type=click.IntRange(1),
    default=SelectionRequest.k1,
    show_default=True,
    help="Number of items that are scored anew in each round.",
)
@click.option(
    "--k2",
    type=click.IntRange(1),
    default=SelectionRequest.k2,
    show_default=True,
    help="Number of these among which a round selects.",
)
@click.option(
    "--k3",
    type=click.IntRange(1),
    default=SelectionRequest.k3,
    show_default=True,
    help="Number of items that a round selects.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing --out file.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one line of JSON.")
def select(
    file: str, out: str, tokenizer: str | None, overwrite: bool, as_json: bool, **options: Any
) -> None:
    """Select the part of the JSON Lines file FILE that is least redundant (ZIP).

    The report gives compression ratios (raw bytes over compressed bytes; higher is more redundant)
    of the selection, of FILE, and of 5 random draws of the same size. FILE is read line by line:
    memory holds the lines of a round (--k1) and of the selection. To resume an interrupted run,
    repeat the same command; the result is the same as that of an uninterrupted run.
    """
    start = time.monotonic()
    with usage_errors():
        request = SelectionRequest(**options)
        output = OutputFile(out, overwrite)
        if os.path.exists(file) and os.path.exists(out) and os.path.samefile(file, out):
            raise ValueError(f"--out is {file}, which is read; give another file")
    output.hold()
    with JsonLines(file) as lines:
        counter = Counter.of(tokenizer)
        finished = output.begin(selecting.fingerprint(request, lines, counter))
        with _bars() as tell:
            sizes = selecting.sizes_of(lines, request, counter, tell, finished)
            found = selecting.select(lines, request, sizes, tell, finished)
        if found.whole:
            line("the budget covers the whole file, so every item is selected")
        line("compressing the selection, the file and random draws")
        report = selecting.report_of(lines, request, sizes, found)
        output.write(lines.line(i) for i in found.indices)
    emit({"out": out, **report, "seconds": time.monotonic() - start}, as_json)


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[Progress], None]]:
    """Show a bar for every stage, from the first report of it on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bars(*columns, TimeElapsedColumn(), console=stderr) as bars:
        tasks = {}

        def tell(done: Progress) -> None:
            if done.stage not in tasks:
                tasks[done.stage] = bars.add_task(done.stage, total=done.total)
            bars.update(tasks[done.stage], completed=done.done)

        yield tell
