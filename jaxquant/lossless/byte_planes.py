"""Byte planes: bytes that play the same part in every number are put side by side, and back.

The exponents of trained weights take few values, their mantissas nearly all of them. In a file the
two alternate, so that a coder of single bytes sees a mixture. Apart, each is coded as it deserves.

A file of numbers is a sequence of records of one length. A record is a float, or a block of a GGUF
type: `"2u2 16u1"` are two float16 numbers and 16 bytes of nibbles. The fields of a record are

    u1, u2, u4, u8   numbers of so many bytes, little-endian, whose bytes are the planes
    f2, f4, f8       bfloat16, float32, float64: the bits are first rotated left by one, so that the
                     exponent is not cut in two: [eeeeeeee][mmmmmmms] for bfloat16
    16u1             16 numbers in a row, whose planes are shared

and every field contributes as many planes as its numbers have bytes, the most significant first.
float16 is `u2`: its upper byte [seeeeemm] holds the exponent as it is.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

LONGEST = 4096  # bytes of a record
MOST_PLANES = 64
_FIELD = re.compile(r"([1-9][0-9]{0,3})?([uf])([1248])")


class Field(NamedTuple):
    """Numbers of a record that share their planes.

    Attributes:
      width: bytes of a number: 1, 2, 4 or 8.
      length: how many numbers there are in a row.
      rotated: whether their bits are rotated left by one.
    """

    width: int
    length: int
    rotated: bool


@dataclasses.dataclass(frozen=True)
class Record:
    """The layout of a record, written as in `"2u2 16u1"`.

    Attributes:
      text: the fields. "" is for bytes without any structure: one plane, one byte a record.
      numbers: how many numbers a record stands for, 1 to 65535; it is only reported. Default 1.

    Raises:
      ValueError: the text is not a layout, or a record is too long.

    >>> record = Record("2u2 16u1", numbers=32)
    >>> record.stride, record.planes
    (20, 3)
    """

    text: str = ""
    numbers: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.numbers < 1 << 16:
            raise ValueError(f"a record must stand for 1 to 65535 numbers, got {self.numbers}")
        if self.stride > LONGEST or self.planes > MOST_PLANES:
            raise ValueError(
                f"a record must have at most {LONGEST} bytes and {MOST_PLANES} planes, but "
                f"{self.text!r:.80} has {self.stride} and {self.planes}"
            )

    @functools.cached_property
    def fields(self) -> tuple[Field, ...]:
        """The fields in their order."""
        found = []
        for word in self.text.split(" ") if self.text else ():
            match = _FIELD.fullmatch(word)
            if match is None or match[2] + match[3] == "f1":
                raise ValueError(
                    f"a field of a record must be a count, u or f, and 1, 2, 4 or 8, such as 16u1 "
                    f"or f4; got {word!r:.40}"
                )
            found.append(Field(int(match[3]), int(match[1] or 1), match[2] == "f"))
        return tuple(found)

    @functools.cached_property
    def stride(self) -> int:
        """Bytes of a record."""
        return sum(field.width * field.length for field in self.fields) or 1

    @functools.cached_property
    def planes(self) -> int:
        """Number of planes, without the one of the bytes after the last whole record."""
        return sum(field.width for field in self.fields) or 1

    def counts(self, nbytes: int) -> list[int]:
        """Return the bytes of every plane of so many bytes; the last plane is the rest.

        Args:
          nbytes: number of bytes, of whole records and a rest.

        >>> Record("2u2 16u1").counts(47)
        [4, 4, 32, 7]
        """
        records, rest = divmod(nbytes, self.stride)
        each = [field.length for field in self.fields for _ in range(field.width)] or [1]
        return [*(records * count for count in each), rest]


BYTES = Record()


def split(data: UInt8[np.ndarray, " n"], record: Record) -> list[UInt8[np.ndarray, "..."]]:
    """Return the planes of some bytes; the last one holds those after the last whole record.

    Args:
      data: the bytes.
      record: the layout of a record.

    >>> split(np.array([1.0, -2.0], np.float32).view(np.uint8), Record("f4"))[0].tolist()
    [127, 128]
    """
    whole = len(data) // record.stride * record.stride
    rest = data[whole:]
    if not record.fields:
        return [data[:whole], rest]
    rows = data[:whole].reshape(-1, record.stride)
    planes, at = [], 0
    for field in record.fields:
        end = at + field.width * field.length
        numbers = np.ascontiguousarray(rows[:, at:end]).reshape(-1, field.width)
        if field.rotated:
            numbers = _rotated(numbers, left=1)
        planes += [np.ascontiguousarray(numbers[:, i]) for i in reversed(range(field.width))]
        at = end
    return [*planes, rest]


def merge(
    planes: Sequence[UInt8[np.ndarray, "..."]], record: Record, nbytes: int
) -> UInt8[np.ndarray, " nbytes"]:
    """Return the bytes that `split` has taken apart.

    Args:
      planes: the planes, as long as `Record.counts` says.
      record: the layout of a record.
      nbytes: number of bytes.

    >>> data = np.arange(47, dtype=np.uint8)
    >>> record = Record("f2 u2 16u1")
    >>> bool((merge(split(data, record), record, 47) == data).all())
    True
    """
    if not record.fields:
        return planes[0]
    out = np.empty(nbytes, np.uint8)
    whole = nbytes // record.stride * record.stride
    rows, at, used = out[:whole].reshape(-1, record.stride), 0, 0
    for field in record.fields:
        numbers = np.empty((len(rows) * field.length, field.width), np.uint8)
        for i in reversed(range(field.width)):
            numbers[:, i] = planes[used]
            used += 1
        if field.rotated:
            numbers = _rotated(numbers, left=8 * field.width - 1)
        end = at + field.width * field.length
        rows[:, at:end] = numbers.reshape(len(rows), end - at)
        at = end
    out[whole:] = planes[used]
    return out


def _rotated(numbers: UInt8[np.ndarray, "n width"], left: int) -> UInt8[np.ndarray, "n width"]:
    """Return little-endian numbers with their bits rotated left by `left` places."""
    width = numbers.shape[1]
    words = numbers.view(f"<u{width}")
    kind = words.dtype.type
    return ((words << kind(left)) | (words >> kind(8 * width - left))).view(np.uint8)
