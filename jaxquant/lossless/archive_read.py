"""Reading of archives: verified chunk by chunk, in bounded memory, continued after a kill."""

import contextlib
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from jaxquant.core.fields import shown
from jaxquant.lossless import archive_format, chunks
from jaxquant.lossless.archive_format import HEAD, TRAILER, Section
from jaxquant.lossless.chunks import Damaged, Place, Stored
from jaxquant.lossless.pipeline import in_order

Progress = Callable[[int, int, str], None]  # bytes done, bytes of all, name of the section


class Head(NamedTuple):
    """What is known of an archive before its chunks are read.

    Attributes:
      sections: the sections of the file.
      start: the first byte of the chunks.
      end: the byte after the last chunk.
      nbytes: bytes of the file.
      sha256: its SHA-256.
    """

    sections: tuple[Section, ...]
    start: int
    end: int
    nbytes: int
    sha256: bytes


def read_head(path: str | os.PathLike[str]) -> Head:
    """Return the sections, the size and the digest of the file that an archive holds.

    Args:
      path: the archive.

    Raises:
      ValueError: it is not an archive, of a newer version, truncated or damaged.
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return _head(file, Path(path))


def extract(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Head:
    """Write the file that an archive holds, and verify all of its checksums.

    Bytes that the target already holds, from a run that was killed, are verified by the checksums
    of their chunks and kept. The target is not complete before this function returns;
    `files.decompress_file` lets it appear in one step.

    Args:
      path: the archive.
      target: the file to write, or to complete.
      threads: number of threads; by default, that of the processors.
      progress: called after each chunk, in this thread.

    Returns:
      The head of the archive.

    Raises:
      ValueError: the archive is truncated or damaged; the message names the tensor and the file.
      OSError: a file cannot be read or written.
    """
    path, target = Path(path), Path(target)
    with naming(target), open(path, "rb") as file, opened(target) as out, opened(target) as kept:
        head = _head(file, path)
        done, digest = 0, hashlib.sha256()
        reading = _stored(file, head, path)
        pieces = ((one, before, _kept(kept, one, at)) for one, before, at in reading)
        for place, data, known in in_order(lambda p: _decoded(p, head, path), pieces, threads):
            digest.update(data)
            if known:
                out.seek(len(data), os.SEEK_CUR)
            else:
                out.write(data)
            done += len(data)
            if progress:
                progress(done, head.nbytes, head.sections[place.section].name)
        out.truncate(done)
        out.flush()
        os.fsync(out.fileno())
    if digest.digest() != head.sha256:
        raise ValueError(
            f"{path} is damaged: the checksums of all tensors are right, but the SHA-256 of the "
            "whole file is wrong"
        )
    return head


def _head(file: BinaryIO, path: Path) -> Head:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(HEAD.size)
    archive_format.check_magic(head, path)
    coded = HEAD.unpack(head)[4]
    room = size - HEAD.size - TRAILER.size - coded
    if room < 0:
        raise ValueError(
            f"{path} is truncated: its head, table and trailer take more than its {size} bytes"
        )
    sections = archive_format.unpack_table(head, file.read(coded), path)
    try:
        chunks.check_total(sections, room)
    except Damaged as error:
        raise ValueError(f"{path}: {error}") from None
    start = file.tell()
    file.seek(size - TRAILER.size)
    nbytes, sha256 = TRAILER.unpack(file.read(TRAILER.size))
    if nbytes != (total := sum(section.nbytes for section in sections)):
        raise ValueError(
            f"{path} is truncated or damaged: its sections have {total} bytes, and its trailer "
            f"names {nbytes}"
        )
    return Head(sections, start, size - TRAILER.size, nbytes, sha256)


def _stored(file: BinaryIO, head: Head, path: Path) -> Iterator[tuple[Stored, int, int]]:
    """Yield (chunk, checksum of its section before it, its first byte in the file) in order."""
    file.seek(head.start)
    at = 0
    for number, section in enumerate(head.sections):
        start, crc = 0, section.seed
        while start < section.nbytes:
            place = Place(number, start, section.nbytes - start)
            with _named(section, path):
                one = chunks.read(file, head.end, head.sections, place)
            yield one, crc, at
            crc = one.crc
            start += one.place.nbytes
            at += one.place.nbytes
    if file.tell() != head.end:
        extra = head.end - file.tell()
        raise ValueError(f"{path} is damaged: {extra} bytes follow its last chunk")


def _kept(file: BinaryIO, one: Stored, at: int) -> bytes:
    """Return the bytes that the target already holds at a chunk's place; b"" if it is shorter."""
    if file.seek(0, os.SEEK_END) < at + one.place.nbytes:
        return b""
    file.seek(at)
    return file.read(one.place.nbytes)


def _decoded(
    piece: tuple[Stored, int, bytes], head: Head, path: Path
) -> tuple[Place, bytes | memoryview, bool]:
    """Return the place of a chunk, its bytes, and whether the target holds them already."""
    one, before, kept = piece
    if kept and zlib.crc32(kept, before) == one.crc:
        return one.place, kept, True
    section = head.sections[one.place.section]
    with _named(section, path):
        return one.place, chunks.checked(one, section.record, before), False


@contextlib.contextmanager
def _named(section: Section, path: Path) -> Iterator[None]:
    """Name the tensor and the archive in errors."""
    try:
        yield
    except Damaged as error:
        name = shown(section.name)
        raise ValueError(f"{path}, section {name} ({section.dtype or 'bytes'}): {error}") from None


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the output in errors of the system that name no file, such as that of a full disk.

    Args:
      path: the output.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.strerror is None:
            raise
        raise OSError(f"could not complete {path}: {error.strerror}") from error


def opened(path: Path) -> BinaryIO:
    """Open a file for reading and writing, creating it if it does not exist."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    return os.fdopen(descriptor, "r+b")
