"""Chunks of an archive: pieces of a section, each coded plane by plane."""

import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from jaxquant.lossless import archive_format, byte_planes, plane_coding
from jaxquant.lossless.archive_format import CHUNK_HEAD, LARGEST, PLANE_HEAD, Section
from jaxquant.lossless.byte_planes import Record
from jaxquant.lossless.plane_coding import Coding


class Place(NamedTuple):
    """Where a chunk belongs.

    Attributes:
      section: number of its section.
      start: its first byte, counted from the first one of the section.
      nbytes: its number of bytes.
    """

    section: int
    start: int
    nbytes: int


class Stored(NamedTuple):
    """A chunk as an archive holds it.

    Attributes:
      place: where it belongs.
      crc: the checksum of its section up to its end.
      coded: its coded planes.
    """

    place: Place
    crc: int
    coded: bytes


class Damaged(ValueError):
    """The bytes of a chunk are not what was written, or not all there."""


def places(sections: Sequence[Section]) -> Iterator[Place]:
    """Yield the places of all chunks, as an archive is written.

    Args:
      sections: the sections of the file.
    """
    for number, section in enumerate(sections):
        for start in range(0, section.nbytes, section.chunk):
            yield Place(number, start, min(section.chunk, section.nbytes - start))


def encode(data: bytes | memoryview, record: Record, coding: Coding) -> bytes:
    """Return the coded planes of a chunk.

    Args:
      data: its bytes, 1 to 16 MiB.
      record: the layout of its records.
      coding: the entropy coding to use where one helps.
    """
    text = not record.fields
    parts = []
    for plane in byte_planes.split(np.frombuffer(data, np.uint8), record):
        if len(plane):
            code, coded = plane_coding.encode(plane, coding, text=text)
            parts += [PLANE_HEAD.pack(code, len(coded)), coded]
    return b"".join(parts)


def decode(coded: bytes, record: Record, nbytes: int) -> memoryview:
    """Return the bytes of a chunk.

    Args:
      coded: its coded planes.
      record: the layout of its records.
      nbytes: its number of bytes.

    Raises:
      Damaged: the coded planes are not those of such a chunk.
    """
    view, planes = memoryview(coded), []
    for count in record.counts(nbytes):
        if count == 0:
            planes.append(np.zeros(0, np.uint8))
            continue
        if len(view) < PLANE_HEAD.size:
            raise Damaged("it ends before its last plane")
        code, size = PLANE_HEAD.unpack_from(view)
        view = view[PLANE_HEAD.size :]
        if size > min(len(view), count):
            raise Damaged(f"a plane of {count} bytes claims {size}, and {len(view)} are left")
        try:
            planes.append(plane_coding.decode(code, view[:size], count))
        except ValueError as error:
            raise Damaged(str(error)) from None
        view = view[size:]
    if len(view):
        raise Damaged(f"{len(view)} bytes follow its last plane")
    return byte_planes.merge(planes, record, nbytes).data


def pack_head(nbytes: int, coded: int, crc: int) -> bytes:
    """Return the head of a chunk."""
    return CHUNK_HEAD.pack(nbytes, coded, crc)


def read(file: BinaryIO, end: int, sections: Sequence[Section], place: Place) -> Stored:
    """Read the next chunk of an archive.

    Nothing is allocated before the numbers of its head are checked.

    Args:
      file: the archive, at the head of the chunk.
      end: the byte of the archive before which all chunks end.
      sections: the sections of the file.
      place: where the chunk belongs; its `nbytes` is the number of bytes that may follow at most.

    Raises:
      Damaged: there is no such chunk.
    """
    left = end - file.tell() - CHUNK_HEAD.size
    if left < 0 or len(head := file.read(CHUNK_HEAD.size)) < CHUNK_HEAD.size:
        raise Damaged("the archive is truncated: a chunk is missing")
    nbytes, size, crc = CHUNK_HEAD.unpack(head)
    if not 1 <= nbytes <= min(place.nbytes, LARGEST):
        raise Damaged(f"a chunk claims {nbytes} bytes, and {place.nbytes} are left of it")
    if size > left:
        raise Damaged(f"the archive is truncated: a chunk of {size} bytes has {left}")
    planes = sections[place.section].record.planes + 1
    if size > nbytes + planes * PLANE_HEAD.size:
        raise Damaged(f"a chunk of {nbytes} bytes claims {size} coded ones")
    coded = file.read(size)
    if len(coded) < size:
        raise Damaged("the archive became shorter while it was read")
    return Stored(place._replace(nbytes=nbytes), crc, coded)


def checked(stored: Stored, record: Record, before: int) -> memoryview:
    """Return the bytes of a chunk, once their checksum is verified.

    Args:
      stored: the chunk.
      record: the layout of its records.
      before: the checksum of its section before it.

    Raises:
      Damaged: they are not what was written.
    """
    data = decode(stored.coded, record, stored.place.nbytes)
    if zlib.crc32(data, before) != stored.crc:
        raise Damaged("its checksum is wrong")
    return data


def check_total(sections: Sequence[Section], room: int) -> None:
    """Raise Damaged if an archive is too short for what its table claims.

    Args:
      sections: the sections of the file.
      room: bytes of all chunks.
    """
    least = sum(-(-section.nbytes // LARGEST) for section in sections)
    if least * archive_format.LEAST_CHUNK > room:
        total = sum(section.nbytes for section in sections)
        raise Damaged(f"the archive is truncated: {room} bytes cannot hold {total}")
