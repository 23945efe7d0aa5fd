r"""The layout of an archive: one file, losslessly compressed. All numbers are little-endian.

    archive  = head, table, chunks of section 0, chunks of section 1, ..., trailer
    head     8 bytes  magic, b"\x89JQZ\r\n\x1a\n"
             u16      version, 1
             u16      coding of the table, a code of `plane_coding`
             u32      bytes of the table
             u32      bytes of the coded table
             u32      CRC-32 of the 20 bytes before and the coded table
    table    for each section, in the order of the file; together they cover all of its bytes:
             u16      length of the name, and the name in UTF-8
             u8       length of the name of the dtype, and this name in UTF-8
             u8       length of the layout of a record (`byte_planes`), and this layout in ASCII
             u16      numbers that a record stands for
             u64      bytes of the section
    chunk    u32      bytes of the file that it holds, 1 to 16 MiB
             u32      coded bytes, those that follow these 12
             u32      CRC-32 of the section from its first byte to the last one of this chunk,
                      begun with the CRC-32 of the entry of the section in the table
             planes   for each plane that is not empty, the most significant byte of the first field
                      first, the bytes after the last whole record last:
                      u8   coding
                      u32  coded bytes, and these bytes
    trailer  u64      bytes of the whole file
             32 bytes SHA-256 of the whole file

A section of 0 bytes has no chunk, and a file of 0 bytes no section. The CRC-32 of a chunk continues
that of the one before, so the last one is the checksum of its tensor, and chunks that change places
are found out. Nothing in an archive is a path: names are for reports and error messages.
"""

import dataclasses
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxquant.lossless import plane_coding
from jaxquant.lossless.byte_planes import BYTES, Record

MAGIC = b"\x89JQZ\r\n\x1a\n"
VERSION = 1
SUFFIX = ".jqz"
LARGEST = 1 << 24  # bytes of a chunk, and of a table
MOST_SECTIONS = 1 << 17
CHUNK = 1 << 22  # bytes of a chunk as it is written
NUMBERS = 1 << 20  # of plain numbers, whose sizes change from row to row: each has its own tables
HEAD = struct.Struct("<8sHHIII")
COUNT = struct.Struct("<H")
TAIL = struct.Struct("<HQ")
CHUNK_HEAD = struct.Struct("<III")
PLANE_HEAD = struct.Struct("<BI")
TRAILER = struct.Struct("<Q32s")
# Of a chunk with one constant plane, which can stand for `LARGEST` bytes.
LEAST_CHUNK = CHUNK_HEAD.size + PLANE_HEAD.size + 1


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a file whose records have one layout: a tensor, or the bytes between tensors.

    Attributes:
      name: the tensor's name, at most 65535 bytes of UTF-8; only for reports and errors.
      nbytes: its number of bytes.
      dtype: name of its dtype, at most 255 bytes; only for reports. Default "": no numbers.
      record: the layout of its records. The default is bytes without structure.
    """

    name: str
    nbytes: int
    dtype: str = ""
    record: Record = BYTES

    @property
    def numbers(self) -> int:
        """How many numbers it holds; 0 if its bytes have no structure."""
        if not self.record.fields:
            return 0
        return self.nbytes // self.record.stride * self.record.numbers

    @property
    def seed(self) -> int:
        """The CRC-32 that the checksum of the section begins with."""
        return zlib.crc32(_entry(self))

    @property
    def chunk(self) -> int:
        """Bytes of its chunks but the last, as they are written: whole records."""
        plain = self.record.fields and self.record.numbers == 1
        return (min(CHUNK, NUMBERS) if plain else CHUNK) // self.record.stride * self.record.stride


def pack_head(sections: Sequence[Section]) -> bytes:
    """Return the head and the table of an archive.

    Args:
      sections: the sections of the file.

    Raises:
      ValueError: a name is too long, or the table is.
    """
    if len(sections) > MOST_SECTIONS:
        raise ValueError(f"a file may have {MOST_SECTIONS} sections at most, got {len(sections)}")
    table = b"".join(map(_entry, sections))
    if len(table) > LARGEST:
        raise ValueError(f"the names of all sections take {len(table)} bytes, above {LARGEST}")
    code, coded = plane_coding.RAW, table
    if table:
        code, coded = plane_coding.encode(np.frombuffer(table, np.uint8), "rans", text=True)
    head = HEAD.pack(MAGIC, VERSION, code, len(table), len(coded), 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head + coded)) + coded


def check_magic(head: bytes, path: Path) -> None:
    """Raise ValueError unless a file begins as an archive of this version.

    Args:
      head: its first bytes, as many as `HEAD` has if there are so many.
      path: the file, for the message.
    """
    if not head.startswith(MAGIC):
        raise ValueError(
            f"{path} is not an archive of jaxquant: expected a file that `jaxquant compress` wrote"
        )
    if len(head) < HEAD.size:
        raise ValueError(f"{path} is truncated: it ends in the head of the archive")
    version = HEAD.unpack(head)[1]
    if version > VERSION:
        raise ValueError(
            f"{path} is an archive of version {version}, and this jaxquant reads version "
            f"{VERSION}: install a newer jaxquant"
        )
    if version < 1:
        raise ValueError(f"{path} is damaged: its head names version {version}")


def unpack_table(head: bytes, coded: bytes, path: Path) -> tuple[Section, ...]:
    """Return the sections of an archive.

    Args:
      head: the head, which `check_magic` has accepted.
      coded: the coded table.
      path: the file, for messages.

    Raises:
      ValueError: the head or the table is damaged.
    """
    _, _, code, nbytes, size, crc = HEAD.unpack(head)
    if size != len(coded) or zlib.crc32(head[:-4] + coded) != crc:
        raise ValueError(f"{path} is damaged: the checksum of its table of sections is wrong")
    try:
        if nbytes > LARGEST:
            raise ValueError(f"it claims {nbytes} bytes, above {LARGEST}")
        table = plane_coding.decode(code, memoryview(coded), nbytes) if nbytes else b""
        return tuple(_sections(bytes(table)))
    except (ValueError, struct.error) as error:
        raise ValueError(f"{path} has an invalid table of sections: {error}") from None


def _entry(section: Section) -> bytes:
    """Return the entry of a section in the table."""
    name, dtype, record = (
        text.encode() for text in (section.name, section.dtype, section.record.text)
    )
    if len(name) >= 1 << 16 or max(len(dtype), len(record)) >= 1 << 8:
        raise ValueError(
            f"the name of a section must have less than 65536 bytes, and those of its dtype and "
            f"record less than 256; got {len(name)}, {len(dtype)} and {len(record)}"
        )
    texts = COUNT.pack(len(name)) + name + bytes([len(dtype)]) + dtype
    return texts + bytes([len(record)]) + record + TAIL.pack(section.record.numbers, section.nbytes)


def _sections(table: bytes) -> list[Section]:
    found: list[Section] = []
    at = 0

    def text(size: int) -> str:
        nonlocal at
        if at + size > len(table):
            raise ValueError("it ends in the middle of a name")
        at += size
        return table[at - size : at].decode("utf-8")

    while at < len(table):
        if len(found) == MOST_SECTIONS:
            raise ValueError(f"it has more than {MOST_SECTIONS} sections")
        (length,) = COUNT.unpack_from(table, at)
        at += COUNT.size
        texts = [text(length)]
        for _ in range(2):
            at += 1
            texts.append(text(table[at - 1] if at <= len(table) else len(table)))
        numbers, nbytes = TAIL.unpack_from(table, at)
        at += TAIL.size
        name, dtype, record = texts
        found.append(Section(name, nbytes, dtype, Record(record, numbers)))
    return found
