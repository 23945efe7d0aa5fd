"""The coding of one plane of bytes: constant, raw, Huffman, rANS or LZMA, whichever is shortest.

The code of a coding, one byte in an archive:

    0 constant   one byte, which all bytes of the plane equal
    1 raw        the bytes as they are
    2 huffman    `byte_streams`, canonical Huffman in independent lanes: decodes fastest
    3 rans       `byte_streams`, interleaved rANS: shortest
    4 lzma       LZMA2 without a container, its dictionary as large as the plane; for text, which
                 repeats itself and does not only favour some bytes

Planes of numbers are never tried with LZMA, which is slow and finds next to nothing in them.
"""

import lzma
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import UInt8

from pallas_kernels import byte_streams

Coding = Literal["rans", "huffman"]
CODINGS: tuple[Coding, ...] = get_args(Coding)
CONSTANT, RAW, HUFFMAN, RANS, LZMA = range(5)
_CODES: dict[Coding, int] = {"huffman": HUFFMAN, "rans": RANS}
_NAMES: dict[int, Coding] = {code: name for name, code in _CODES.items()}
SAMPLE, SAMPLES = 1 << 15, 4  # bytes of a sample, and how many tell whether LZMA is worth its time
WORTH = 0.95  # of the bytes of the samples
LEAST_DICTIONARY = 4096  # bytes; LZMA knows none smaller
# A text repeats at any distance, and its bytes lie at no multiple of two or four.
_TEXT: dict[str, Any] = {"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 4, "lp": 0, "pb": 0}


def encode(
    plane: UInt8[np.ndarray, " n"], coding: Coding, *, text: bool = False
) -> tuple[int, bytes]:
    """Return a plane's shortest coding and its coded bytes, never more than the plane has.

    Args:
      plane: the bytes, at least one.
      coding: the entropy coding to use where one helps.
      text: whether the bytes have no known structure, so that LZMA is tried.
    """
    counts = byte_streams.histogram(plane, threads=1)
    if counts.max() == len(plane):
        return CONSTANT, plane[:1].tobytes()
    best = RAW, plane.tobytes()
    if byte_streams.size(counts, coding) < len(plane):
        coded = byte_streams.encode(plane, coding, threads=1)
        if len(coded) < len(plane):
            best = _CODES[coding], coded
    if text and _repeats(plane, len(best[1])):
        coded = lzma.compress(plane.tobytes(), lzma.FORMAT_RAW, filters=[_filter(len(plane))])
        if len(coded) < len(best[1]):
            best = LZMA, coded
    return best


def decode(code: int, data: memoryview, count: int) -> UInt8[np.ndarray, " count"]:
    """Return a plane.

    Args:
      code: its coding.
      data: its coded bytes.
      count: its number of bytes, at least one.

    Raises:
      ValueError: the coded bytes are not such a plane.
    """
    if code == CONSTANT:
        if len(data) != 1:
            raise ValueError(f"a constant plane must have 1 byte, got {len(data)}")
        return np.full(count, data[0], np.uint8)
    if code == RAW:
        if len(data) != count:
            raise ValueError(f"a raw plane of {count} bytes has {len(data)}")
        return np.frombuffer(data, np.uint8)
    if code in _NAMES:
        return byte_streams.decode(data, count, _NAMES[code], threads=1)
    if code == LZMA:
        return _text(data, count)
    raise ValueError(f"a plane has the unknown coding {code}")


def _filter(count: int) -> dict[str, Any]:
    return {**_TEXT, "dict_size": max(LEAST_DICTIONARY, count)}


def _repeats(plane: UInt8[np.ndarray, " n"], coded: int) -> bool:
    """Return whether samples say that LZMA shrinks a plane below an entropy coder's bytes."""
    if len(plane) <= SAMPLE * SAMPLES:
        return True
    starts = np.linspace(0, len(plane) - SAMPLE, SAMPLES).astype(int)
    sample = np.concatenate([plane[at : at + SAMPLE] for at in starts])
    fast = [{"id": lzma.FILTER_LZMA2, "preset": 0}]
    share = len(lzma.compress(sample.tobytes(), lzma.FORMAT_RAW, filters=fast)) / len(sample)
    return share < WORTH * coded / len(plane)


def _text(data: memoryview, count: int) -> UInt8[np.ndarray, " count"]:
    """Return a plane that LZMA has coded; it is never given room for more than its bytes."""
    decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[_filter(count)])
    try:
        found = decoder.decompress(data, max_length=count)
        # The mark at the end is read only by a further call, which must find nothing more.
        more = b"" if decoder.eof else decoder.decompress(b"", max_length=1)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"a plane cannot be decoded by LZMA ({error})") from None
    if len(found) != count or more or not decoder.eof or decoder.unused_data:
        raise ValueError(f"a plane of {count} bytes ends elsewhere in LZMA's stream")
    return np.frombuffer(found, np.uint8)
