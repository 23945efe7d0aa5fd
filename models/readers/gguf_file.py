"""The header of a GGUF file: its metadata, and the locations of its tensors.

Every count and length is checked against the remaining bytes before anything is looped over or
allocated; the reader of the `gguf` library trusts them.

Source: the specification of the format (ggml, docs/gguf.md), versions 2 and 3; block sizes and type
names are those of the `gguf` library.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
from pydantic import JsonValue

from jaxquant.core.fields import shown

MAGIC, VERSIONS = b"GGUF", (2, 3)
DEEPEST = 4  # maximum nesting of arrays
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_STRING, _ARRAY = 8, 9


class Tensor(NamedTuple):
    """A tensor of a GGUF file.

    Attributes:
      name: its name.
      kind: its quantization type.
      shape: its shape, outermost axis first.
      data: memory-mapped uint8 [*shape[:-1], bytes per row].
      start: its first byte in the file.
    """

    name: str
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray
    start: int


class _Cursor:
    """Reads values from a position in a buffer, never past its end."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def check(self, count: int, least: int, what: str) -> None:
        """Raise ValueError unless `count` items of at least `least` bytes can follow."""
        left = len(self.data) - self.at
        if count * least > left:
            raise ValueError(f"{what} ({count}) need more than the {left} bytes that are left")

    def number(self, kind: str) -> int | float | bool:
        size = struct.calcsize("<" + kind)
        self.check(1, size, "a number")
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += size
        return value

    def text(self) -> str:
        size = self.number("Q")
        self.check(size, 1, "bytes of a string")
        self.at += size
        return str(self.data[self.at - size : self.at], "utf-8")

    def value(self, kind: int, depth: int = 0) -> JsonValue:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array(depth)
        if kind not in _SCALARS:
            raise ValueError(f"metadata of type {kind} are not known")
        return self.number(_SCALARS[kind])

    def array(self, depth: int) -> list[JsonValue]:
        if depth == DEEPEST:
            raise ValueError(f"arrays are nested more than {DEEPEST} levels deep")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            one = "<" + _SCALARS[kind]
            self.check(count, struct.calcsize(one), "elements of an array")
            self.at += count * struct.calcsize(one)
            begin = self.at - count * struct.calcsize(one)
            return np.frombuffer(self.data, one, count, begin).tolist() if count else []
        self.check(count, 8 if kind == _STRING else 12, "elements of an array")
        return [self.value(kind, depth + 1) for _ in range(count)]


def open_gguf(path: Path) -> tuple[dict[str, JsonValue], dict[str, Tensor], int]:
    """Return the metadata, the memory-mapped tensors by name, and the size of the file in bytes.

    Args:
      path: the file.
    Raises:
      ValueError: the file cannot be read, or is not a complete GGUF file.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    try:
        return *_read(_Cursor(memoryview(data))), size
    except ValueError as error:  # includes invalid UTF-8
        raise ValueError(f"{path} is not a complete GGUF file ({error})") from None


def _read(cursor: _Cursor) -> tuple[dict[str, JsonValue], dict[str, Tensor]]:
    if bytes(cursor.data[:4]) != MAGIC:
        raise ValueError("it does not begin with the magic number GGUF")
    cursor.at = 4
    version, tensors, pairs = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in VERSIONS:
        raise ValueError(f"its version must be one of {VERSIONS} (little-endian), got {version}")
    cursor.check(pairs, 8 + 4 + 1, "metadata pairs")
    fields: dict[str, JsonValue] = {}
    for _ in range(pairs):
        key = cursor.text()
        if key in fields:
            raise ValueError(f"the key {shown(key)} appears twice")
        fields[key] = cursor.value(cursor.number("I"))
    cursor.check(tensors, 8 + 4 + 4 + 8, "tensors")
    heads = [_head(cursor) for _ in range(tensors)]
    start = _aligned(cursor.at, fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT))
    found = {head[0]: _tensor(cursor.data, start, *head) for head in heads}
    if len(found) < len(heads):
        raise ValueError("two tensors have the same name")
    return fields, found


def _head(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, rank = cursor.text(), cursor.number("I")
    if not 1 <= rank <= 4:
        raise ValueError(f"tensor {shown(name)} has {rank} dimensions, not 1 to 4")
    dims = tuple(cursor.number("Q") for _ in range(rank))
    return name, dims[::-1], cursor.number("I"), cursor.number("Q")


def _tensor(data: memoryview, start: int, name: str, shape: tuple, kind: int, at: int) -> Tensor:
    if kind not in gguf.GGML_QUANT_SIZES:
        raise ValueError(f"tensor {shown(name)} has an unknown type, {kind}")
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
    if min(shape) < 1 or shape[-1] % block:
        raise ValueError(
            f"tensor {shown(name)} must have a last axis in blocks of {block}, got "
            f"shape {list(shape)}"
        )
    row = shape[-1] // block * nbytes
    end = start + at + math.prod(shape[:-1]) * row
    if end > len(data):
        raise ValueError(
            f"tensor {shown(name)} ends at byte {end}, but the file at byte {len(data)}"
        )
    values = np.frombuffer(data, np.uint8, end - start - at, start + at)
    values = values.reshape(*shape[:-1], row)
    return Tensor(name, gguf.GGMLQuantizationType(kind), shape, values, start + at)


def _aligned(at: int, alignment: JsonValue) -> int:
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two, got {shown(alignment)}")
    return -(-at // alignment) * alignment
