"""Files compressed and restored: the result appears in one step, and a killed run is continued."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from jaxquant.durable.publish import check_parent
from jaxquant.durable.store import Folder
from jaxquant.lossless.archive_format import Section
from jaxquant.lossless.archive_read import Head, Progress, extract, read_head
from jaxquant.lossless.archive_write import Written, write_archive
from jaxquant.lossless.plane_coding import Coding

WORK = "archive"  # name of the directory in which a file is written


def compress_file(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    sections: Sequence[Section] | None = None,
    coding: Coding = "rans",
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Compress a file; `decompress_file` gives the same bytes back.

    What is unfinished lies in the folder `OUT.partial`, and a further call continues from there.

    Args:
      source: the file.
      out: the archive to write.
      sections: the parts of the file, such as its tensors; together they cover it, in order. The
        default is one part without structure.
      coding: "rans", the shortest, or "huffman", which decodes faster. Default "rans".
      threads: number of threads; by default, that of the processors.
      overwrite: whether `out` may exist. Default False.
      progress: called after each chunk with the bytes done, the bytes of the file, and the name of
        the section.

    Returns:
      The bytes of each section, before and after.

    Raises:
      ValueError: the source is an archive already; the sections do not cover it; `out` exists, or
        another process writes it; an argument is not as described.
      OSError: a file cannot be read or written.

    >>> import tempfile, numpy as np
    >>> from jaxquant.lossless.byte_planes import Record
    >>> weights = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    >>> with tempfile.TemporaryDirectory() as place:
    ...     _ = Path(place, "w").write_bytes(weights.tobytes())
    ...     parts = [Section("w", weights.nbytes, "float32", Record("f4"))]
    ...     done = compress_file(f"{place}/w", f"{place}/w.jqz", sections=parts)
    ...     _ = decompress_file(f"{place}/w.jqz", f"{place}/again")
    ...     same = Path(place, "again").read_bytes() == weights.tobytes()
    ...     same, round(done.archive / done.nbytes, 1)
    (True, 0.8)
    """
    source, out = Path(source), Path(out)
    run = {"compress": str(source.resolve()), "coding": coding}
    with _placed(source, out, run, overwrite) as new:
        return write_archive(
            source, new, sections=sections, coding=coding, threads=threads, progress=progress
        )


def decompress_file(
    archive: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Head:
    """Restore a file from its archive, and verify all checksums before it appears.

    Args:
      archive: the archive.
      out: the file to write.
      threads: number of threads; by default, that of the processors.
      overwrite: whether `out` may exist. Default False.
      progress: as in `compress_file`.

    Returns:
      The sections, the size and the digest of the file.

    Raises:
      ValueError: the archive is of a newer version, truncated or damaged, and the message names the
        tensor; `out` exists, or another process writes it; the disk has too little room.
      OSError: a file cannot be read or written.
    """
    archive, out = Path(archive), Path(out)
    head = read_head(archive)
    run = {"decompress": str(archive.resolve()), "sha256": head.sha256.hex()}
    with _placed(archive, out, run, overwrite) as new:
        check_room(new, head.nbytes)
        return extract(archive, new, threads=threads, progress=progress)


def check_room(path: Path, nbytes: int) -> None:
    """Raise ValueError if a disk lacks the room for a file.

    Args:
      path: the file, of which a part may be written already.
      nbytes: bytes of the whole file.
    """
    there = path.stat().st_size if path.exists() else 0
    free = shutil.disk_usage(path.parent).free
    if nbytes - there > free:
        raise ValueError(
            f"{path} needs {nbytes - there} more bytes, but {free} are free: make room, or write "
            "elsewhere"
        )


@contextmanager
def _placed(source: Path, out: Path, run: Mapping[str, str], overwrite: bool) -> Iterator[Path]:
    """Yield the path at which to write a file, and move it to its place at the end."""
    target = out.resolve()
    if target.is_dir():
        raise ValueError(f"{out} is a directory; give the name of a file")
    if target.exists() and not overwrite:
        raise ValueError(f"{out} exists; allow to overwrite it, or name another file")
    if target.exists() and target.samefile(source):
        raise ValueError(f"{out} is the file that is read; name another file")
    check_parent(target)
    with Folder(target.with_name(f"{target.name}.partial"), run) as kept:
        folder = kept.directory(WORK)
        folder.mkdir(exist_ok=True)
        new = folder / "new"
        yield new
        os.replace(new, target)
        kept.remove()
