"""One array as a stream of bytes, without loss: the chunks of an archive, without its head."""

import io
import math
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped, UInt8

from jaxquant.lossless import chunks
from jaxquant.lossless.archive_format import Section
from jaxquant.lossless.byte_planes import Record
from jaxquant.lossless.chunks import Damaged, Place, Stored
from jaxquant.lossless.pipeline import in_order


def record_of(dtype: str) -> Record:
    """Return the layout of the numbers of a dtype.

    Args:
      dtype: name of a dtype of NumPy or JAX whose numbers take whole bytes.

    >>> record_of("bfloat16").text, record_of("int32").text
    ('f2', 'u4')
    """
    rotated = {"bfloat16": "f2", "float32": "f4", "float64": "f8"}
    kind = np.dtype(dtype)
    if kind.kind == "c":
        return Record(f"2{record_of(f'float{4 * kind.itemsize}').text}")
    return Record(rotated.get(kind.name, f"u{kind.itemsize}"))


def codable(a: Any) -> bool:
    """Return whether an array can be coded here: its values are, and its numbers take whole bytes.

    Args:
      a: an array of NumPy or JAX.

    >>> codable(np.zeros(3)), codable(np.zeros(0))
    (True, False)
    """
    here = not isinstance(a, jax.Array) or a.is_fully_addressable
    narrow = a.dtype.name in ("int1", "uint1", "int2", "uint2", "int4", "uint4", "float4_e2m1fn")
    return here and a.size > 0 and not narrow


def encode_array(
    a: Shaped[np.ndarray, "..."], threads: int | None = None
) -> UInt8[np.ndarray, " b"]:
    """Return an array as a stream of bytes, which does not hold its dtype and shape.

    Args:
      a: the array, of a dtype whose numbers take whole bytes; it may be empty.
      threads: number of threads; by default, that of the processors.

    >>> a = np.linspace(0, 1, 4096, dtype=np.float32)
    >>> stream = encode_array(a)
    >>> len(stream) < a.nbytes, bool((decode_array(stream, "float32", (4096,)) == a).all())
    (True, True)
    """
    section = _section(a.dtype.name, a.shape)
    a = a.astype(a.dtype.newbyteorder("="), copy=False)
    data = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
    pieces = [data[p.start : p.start + p.nbytes].data for p in chunks.places([section])]
    coded = in_order(lambda piece: chunks.encode(piece, section.record, "rans"), pieces, threads)
    parts, crc = [], section.seed
    for piece, one in zip(pieces, coded, strict=True):
        crc = zlib.crc32(piece, crc)
        parts += [chunks.pack_head(len(piece), len(one), crc), one]
    return np.frombuffer(b"".join(parts), np.uint8)


def decode_array(
    stream: UInt8[np.ndarray, " b"],
    dtype: str,
    shape: tuple[int, ...],
    name: str = "the array",
    threads: int | None = None,
) -> Shaped[np.ndarray, "..."]:
    """Return the array of a stream that `encode_array` made.

    Args:
      stream: the stream.
      dtype, shape: those of the array.
      name: name of the array, for messages.
      threads: number of threads; by default, that of the processors.

    Raises:
      ValueError: the stream is damaged, truncated, or that of another dtype or shape.
    """
    section = _section(dtype, shape)
    try:
        chunks.check_total([section], len(stream))
        out, at = np.empty(section.nbytes, np.uint8), 0
        work = lambda pair: chunks.checked(pair[0], section.record, pair[1])
        for data in in_order(work, _stored(stream, section), threads):
            out[at : at + len(data)] = data
            at += len(data)
    except Damaged as error:
        raise ValueError(f"{name}: the stored bytes are damaged: {error}") from None
    return out.view(np.dtype(dtype)).reshape(shape)


def _stored(stream: UInt8[np.ndarray, " b"], section: Section) -> Iterator[tuple[Stored, int]]:
    """Yield the chunks of a stream, each with the checksum before it."""
    file, crc, start = io.BytesIO(stream.data), section.seed, 0
    while start < section.nbytes:
        place = Place(0, start, section.nbytes - start)
        one = chunks.read(file, len(stream), [section], place)
        yield one, crc
        start, crc = start + one.place.nbytes, one.crc
    if file.tell() != len(stream):
        raise Damaged(f"{len(stream) - file.tell()} bytes follow the last chunk")


def _section(dtype: str, shape: tuple[int, ...]) -> Section:
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    return Section(f"{dtype} {list(shape)}", nbytes, dtype, record_of(dtype))
