"""The commands `jaxquant compress` and `jaxquant decompress`."""

import contextlib
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from jaxquant.lossless.archive_format import VERSION
from jaxquant.lossless.plane_coding import CODINGS, Coding
from jaxquant_models.cli.archive_output import ArchiveFolder
from jaxquant_models.cli.console import emit, stderr, usage_errors
from jaxquant_models.cli.output_file import OutputFile
from jaxquant_models.runs import archiving
from jaxquant_models.runs.archiving import Compressed, Row, Tree

MOST_ROWS = 40  # of a table that shows every tensor by itself
THREADS = click.option(
    "--threads",
    type=click.IntRange(1),
    default=None,
    help="Number of threads. The default is the number of processors.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print the report as one line of JSON.")


@click.command()
@click.argument("model")
@click.option(
    "--out",
    required=True,
    metavar="PATH",
    help="Archive to write; for a folder, the folder in which to write an archive for every file.",
)
@click.option(
    "--coding",
    type=click.Choice(CODINGS),
    default="rans",
    show_default=True,
    help="Entropy coding of the bytes: rans is the shortest, huffman decodes faster.",
)
@THREADS
@click.option(
    "--overwrite", is_flag=True, help="Replace an existing file, or a folder of archives."
)
@JSON
def compress(
    model: str, out: str, coding: Coding, threads: int | None, overwrite: bool, as_json: bool
) -> None:
    """Compress MODEL without loss; decompress gives the same bytes back.

    MODEL is the name smollm2-135m, a file, or a folder, whose files are all compressed.
    Tensors of .safetensors and .gguf files are split into exponents, mantissas, scales and codes,
    which are coded apart; other files are coded as text where that helps. Of a folder, every file
    becomes an archive with the suffix .jqz; links out of the folder are refused, and permissions
    and dates are not kept. For each tensor, the report shows its type, its bytes before and after,
    and the bits that a number takes. To resume an interrupted run, repeat the same command.
    """
    start = time.monotonic()
    with usage_errors():
        tree = archiving.tree_of(archiving.resolved(model))
        output = _output(tree, out, overwrite)
    output.hold()
    run = {"compress": str(tree.root.resolve()), "coding": coding, "version": VERSION}
    output.begin(run)
    new = output.place()
    with _bar(tree.nbytes) as tell:
        found = archiving.compress(tree, new, coding, threads, tell)
    output.put(new)
    report = {
        "out": out,
        "files": len(tree.files),
        "bytes": found.bytes,
        "archive_bytes": found.archive_bytes,
        "ratio": found.bytes / max(found.archive_bytes, 1),
        "seconds": time.monotonic() - start,
    }
    if as_json:
        rows = [{**row._asdict(), "bits_per_number": row.bits_per_number} for row in found.rows]
        emit({**report, "kept_bytes": found.kept_bytes, **_digests(found.sha256), "sections": rows},
             True)  # fmt: skip
        return
    _show(found)
    emit(report, False)


@click.command()
@click.argument("archive")
@click.option(
    "--out",
    required=True,
    metavar="PATH",
    help="File to write; for a folder of archives, the folder in which to write the files.",
)
@THREADS
@click.option("--overwrite", is_flag=True, help="Replace an existing file. No folder is replaced.")
@JSON
def decompress(archive: str, out: str, threads: int | None, overwrite: bool, as_json: bool) -> None:
    """Restore what compress has compressed, and verify every checksum.

    ARCHIVE is an archive, or a folder of archives. The output appears only once the checksum of
    every tensor and the SHA-256 of the whole file are verified. To resume an interrupted run,
    repeat the same command.
    """
    start = time.monotonic()
    with usage_errors():
        path = Path(archive)
        if not archiving.is_kind(Path.exists, path):
            raise ValueError(f"no archive {archive!r:.200}: there is no such file or folder")
        tree = archiving.tree_of(path)
        if overwrite and path.is_dir():
            raise ValueError("--overwrite replaces a file, never a folder; give another --out")
        total = archiving.archived_bytes(tree)
        output = _output(tree, out, overwrite, replaces=False)
    output.hold()
    output.begin({"decompress": str(tree.root.resolve()), "version": VERSION})
    new = output.place()
    with _bar(total) as tell:
        digests = archiving.decompress(tree, new, threads, tell)
    output.put(new)
    report = {
        "out": out,
        "files": len(tree.files),
        "bytes": total,
        "archive_bytes": tree.nbytes,
        "seconds": time.monotonic() - start,
    }
    emit({**report, **(_digests(digests) if as_json else {})}, as_json)


def _sum(name: str, dtype: str, group: Sequence[Row]) -> Row:
    """Return several sections as one."""
    fields = ("bytes", "coded_bytes", "numbers")
    return Row("", name, dtype, *(sum(getattr(row, f) for row in group) for f in fields))


def _output(tree: Tree, out: str, overwrite: bool, replaces: bool = True) -> OutputFile:
    if not out:
        raise ValueError("--out is empty; give the name of a file or folder")
    if tree.root.is_file():
        target = Path(out).resolve()
        if target.exists() and target.samefile(tree.root):
            raise ValueError(f"--out is {tree.root}, which is read; give another file")
        return OutputFile(out, overwrite)
    root, target = tree.root.resolve(), Path(out).resolve()
    if target.is_relative_to(root) or root.is_relative_to(target):
        raise ValueError(f"--out {out} must be neither inside {tree.root} nor a parent of it")
    return ArchiveFolder(out, overwrite, replaces)


def _digests(found: dict[str, str]) -> dict[str, object]:
    return {"sha256": found[""] if list(found) == [""] else found}


@contextlib.contextmanager
def _bar(total: int) -> Iterator[archiving.Progress]:
    """Show a bar of the bytes done, with the name of the tensor."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}", markup=False), console=stderr) as bars:
        task = bars.add_task("", total=total)
        yield lambda done, name: bars.update(task, completed=done, description=name[-40:])


def _show(found: Compressed) -> None:
    """Print a table of the sections; of many, those whose names differ in numbers are one row."""
    rows: Sequence[Row] = found.rows
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        name = row.name if row.dtype else " ".join(filter(None, (row.file, row.name))) or "(bytes)"
        key = re.sub(r"\d+", "*", name) if len(rows) > MOST_ROWS else name
        groups.setdefault((key, row.dtype), []).append(row)
    table = Table("tensor", "dtype")
    for title in ("tensors", "bytes", "coded bytes", "bits/number", "ratio"):
        table.add_column(title, justify="right")
    for (name, dtype), group in groups.items():
        one = _sum(name, dtype, group)
        bits = one.bits_per_number
        table.add_row(
            Text(name), dtype or "bytes", str(len(group)), f"{one.bytes:,}", f"{one.coded_bytes:,}",
            "" if bits is None else f"{bits:.3f}", f"{one.bytes / max(one.coded_bytes, 1):.3f}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 140).print(table)
