"""Writing of archives: chunk by chunk, in bounded memory, continued after a kill."""

import contextlib
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from jaxquant.lossless import archive_format, chunks
from jaxquant.lossless.archive_format import CHUNK_HEAD, MAGIC, TRAILER, Section
from jaxquant.lossless.archive_read import Progress, naming, opened
from jaxquant.lossless.chunks import Damaged, Place
from jaxquant.lossless.pipeline import in_order
from jaxquant.lossless.plane_coding import CODINGS, Coding


class Written(NamedTuple):
    """What became of a file.

    Attributes:
      sections: its sections.
      coded: for each section, the bytes of its chunks in the archive.
      nbytes: bytes of the file.
      archive: bytes of the archive.
      sha256: SHA-256 of the file, in hexadecimal.
      kept: bytes of the file that were taken over from a run that was killed.
    """

    sections: tuple[Section, ...]
    coded: tuple[int, ...]
    nbytes: int
    archive: int
    sha256: str
    kept: int


class _Read(NamedTuple):
    """A chunk of the source.

    Attributes:
      place: where it belongs.
      crc: the checksum of its section up to its end.
      data: its bytes.
      stored: its coded planes, if they are in the archive already.
    """

    place: Place
    crc: int
    data: bytes
    stored: bytes


def write_archive(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    sections: Sequence[Section] | None = None,
    coding: Coding = "rans",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Written:
    """Write the archive of a file.

    An archive without an end, from a run that was killed, is completed: those of its chunks that
    decode to the bytes of the source are kept. The target is not complete before this function
    returns; `files.compress_file` lets it appear in one step.

    Args:
      source: the file.
      target: the archive to write, or to complete.
      sections: parts of the file that together cover it, in order. The default is one part without
        structure.
      coding: "rans", the shortest, or "huffman", which decodes faster.
      threads: number of threads; by default, that of the processors.
      progress: called after each chunk, in this thread.

    Returns:
      The bytes of each section, before and after.

    Raises:
      ValueError: the source is an archive already, or changes while it is read; the sections do not
        cover it; an argument is not as described.
      OSError: a file cannot be read or written.
    """
    if coding not in CODINGS:
        raise ValueError(f"coding must be one of {', '.join(CODINGS)}, got {coding!r}")
    source, target = Path(source), Path(target)
    with naming(target), open(source, "rb") as file, opened(target) as out, opened(target) as kept:
        parts = _checked(file, source, sections)
        head = archive_format.pack_head(parts)
        if kept.read(len(head)) != head:
            out.truncate(0)
        out.write(head)
        total, done = sum(part.nbytes for part in parts), 0
        digest, coded, taken = hashlib.sha256(), [0] * len(parts), 0
        reading = _chunks(file, source, parts, kept)
        for one, planes, known in in_order(lambda r: _coded(r, parts, coding), reading, threads):
            digest.update(one.data)
            out.write(chunks.pack_head(len(one.data), len(planes), one.crc))
            out.write(planes)
            coded[one.place.section] += CHUNK_HEAD.size + len(planes)
            done += len(one.data)
            taken += known * len(one.data)
            if progress:
                progress(done, total, parts[one.place.section].name)
        if file.read(1):
            raise ValueError(f"{source} became longer while it was read: compress it again")
        out.write(TRAILER.pack(total, digest.digest()))
        out.truncate(size := out.tell())
        out.flush()
        os.fsync(out.fileno())
    return Written(parts, tuple(coded), total, size, digest.hexdigest(), taken)


def _checked(
    file: BinaryIO, source: Path, sections: Sequence[Section] | None
) -> tuple[Section, ...]:
    """Return the sections of a source, once they are known to cover it."""
    size = os.fstat(file.fileno()).st_size
    if file.read(len(MAGIC)) == MAGIC:
        raise ValueError(f"{source} is an archive of jaxquant already; decompress it instead")
    file.seek(0)
    if sections is None:
        sections = [Section("", size)] if size else []
    if min((section.nbytes for section in sections), default=0) < 0:
        raise ValueError("a section must not have a negative number of bytes")
    if (total := sum(section.nbytes for section in sections)) != size:
        raise ValueError(f"the sections have {total} bytes, but {source} has {size}")
    return tuple(sections)


def _chunks(
    file: BinaryIO, source: Path, sections: Sequence[Section], kept: BinaryIO
) -> Iterator[_Read]:
    """Yield the chunks of the source, with what the target already holds of them."""
    end = kept.seek(0, os.SEEK_END)
    kept.seek(len(archive_format.pack_head(sections)))
    known, crc = True, 0
    for place in chunks.places(sections):
        data = file.read(place.nbytes)
        if len(data) < place.nbytes:
            raise ValueError(f"{source} became shorter while it was read: compress it again")
        crc = zlib.crc32(data, crc if place.start else sections[place.section].seed)
        stored = b""
        if known:
            with contextlib.suppress(Damaged):
                found = chunks.read(kept, end, sections, place)
                if found.crc == crc and found.place == place:
                    stored = found.coded
            known = bool(stored)
        yield _Read(place, crc, data, stored)


def _coded(one: _Read, sections: Sequence[Section], coding: Coding) -> tuple[_Read, bytes, bool]:
    """Return a chunk, its coded planes, and whether the target held them."""
    record = sections[one.place.section].record
    if one.stored:
        with contextlib.suppress(Damaged):
            if chunks.decode(one.stored, record, len(one.data)) == one.data:
                return one, one.stored, True
    return one, chunks.encode(one.data, record, coding), False
