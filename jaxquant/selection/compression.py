"""Compression ratios of datasets, and streams to which candidates are appended.

The compression ratio of a dataset is a measure of its redundancy: R = raw bytes / compressed bytes.
"""

import lzma
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from jaxquant.core.arguments import check_arguments, described

LEVEL = 9  # of zlib, as in the authors' code
LARGEST_DICTIONARY = 1 << 26  # bytes, for lzma, which takes 12 times as many bytes of memory


class Stream(ABC):
    """Data that is compressed once, and the size it would have with a candidate at its end.

    Attributes:
      raw: number of bytes appended so far.
      window: largest distance in bytes at which the codec finds a repeat; None: any distance.
    """

    window: int | None

    def __init__(self) -> None:
        self.raw = 0

    @abstractmethod
    def append(self, data: bytes) -> None:
        """Append data for good."""

    @abstractmethod
    def size_with(self, data: bytes) -> int:
        """Return the compressed size in bytes of the stream followed by `data`, unchanged by it."""


class ZlibStream(Stream):
    """zlib at level 9 (DEFLATE, RFC 1951), which finds no repeat at a distance above 32 KiB.

    A candidate costs the compression of its own bytes: the state of the compressor is copied. The
    size is that of the whole compressed in one call, byte for byte, since the output of zlib does
    not depend on how its input is cut.
    """

    window = 1 << 15

    def __init__(self) -> None:
        super().__init__()
        self._state = zlib.compressobj(LEVEL)
        self._written = 0

    def append(self, data: bytes) -> None:
        """Append data for good."""
        self._written += len(self._state.compress(data))
        self.raw += len(data)

    def size_with(self, data: bytes) -> int:
        """Return the compressed size in bytes of the stream followed by `data`."""
        state = self._state.copy()
        return self._written + len(state.compress(data)) + len(state.flush())


class LzmaStream(Stream):
    """LZMA2 without a container, with a dictionary as large as the data (up to 64 MiB).

    It finds repeats at any distance within the dictionary. Its state cannot be copied, so every
    candidate costs the compression of the whole stream.
    """

    window = None

    def __init__(self) -> None:
        super().__init__()
        self._data = bytearray()

    def append(self, data: bytes) -> None:
        """Append data for good."""
        self._data += data
        self.raw += len(data)

    def size_with(self, data: bytes) -> int:
        """Return the compressed size in bytes of the stream followed by `data`."""
        whole = bytes(self._data) + data
        wanted = 1 << max(12, (len(whole) - 1).bit_length())  # liblzma asks for 4 KiB or more
        filters = [
            {
                "id": lzma.FILTER_LZMA2,
                "preset": 9,
                "dict_size": min(wanted, LARGEST_DICTIONARY),
            }
        ]
        return len(lzma.compress(whole, lzma.FORMAT_RAW, filters=filters))


CODECS: dict[str, type[Stream]] = {"zlib": ZlibStream, "lzma": LzmaStream}
# What begins a dataset, stands between its items, and ends it.
SERIALIZATIONS = {"repr": (b"[", b", ", b"]"), "text": (b"", b"\n", b"")}


def compression_ratio(items: Sequence[Any], codec: str = "zlib", serialize: str = "repr") -> float:
    """Return the compression ratio of a dataset, R = raw bytes / compressed bytes.

    A higher ratio means more redundancy. Ratios are comparable only for one codec, one
    serialization and similar numbers of bytes: a codec needs some data before it finds repeats, and
    "zlib" finds none beyond 32 KiB. Two equal halves of 20 kB of random bytes have a ratio of 1.97,
    two of 60 kB a ratio of 1.00; with "lzma" both have 1.97.

    Args:
      items: the items of the dataset, one or more, in their order.
      codec: "zlib" (level 9, the authors' choice) or "lzma" (repeats at any distance up to 64 MiB;
        slower, and it takes up to 0.8 GB of memory for large data).
      serialize: "repr" writes the items as Python prints a list of them, `str(list(items))`, keys
        of dicts included, which is what the authors compress; "text" joins items, strings or bytes,
        by line feeds.

    Returns:
      The ratio, in raw bytes per compressed byte.

    Raises:
      ValueError: there are no items or no bytes, an argument is unknown, or an item is not a string
        with "text".

    Source: Entropy Law (arXiv:2407.06645) and the code of its authors.

    >>> f"{compression_ratio([{'text': 'a' * 100}] * 3):.2f}"
    '11.40'
    >>> compression_ratio(["to be or not to be"] * 8, serialize="text") > 4
    True
    """
    check_arguments(compression_ratio, locals())
    start, between, end = serialization(serialize)
    if not len(items):
        raise ValueError("compression_ratio needs at least one item, got none")
    stream = new_stream(codec)
    stream.append(start)
    for i in range(len(items)):
        stream.append((between if i else b"") + encoded(items[i], serialize, i))
    stream.append(end)
    if not stream.raw:
        raise ValueError("the items hold no text, so they have no compression ratio")
    return stream.raw / stream.size_with(b"")


def new_stream(codec: str) -> Stream:
    """Return an empty stream; raise ValueError if the codec is unknown.

    Args:
      codec: a key of `CODECS`.
    """
    if codec not in CODECS:
        raise ValueError(f"codec must be one of {', '.join(CODECS)}, got {codec!r}")
    return CODECS[codec]()


def serialization(name: str) -> tuple[bytes, bytes, bytes]:
    """Return what begins a dataset, stands between its items and ends it.

    Args:
      name: a key of `SERIALIZATIONS`; another raises ValueError.
    """
    if name not in SERIALIZATIONS:
        raise ValueError(f"serialize must be one of {', '.join(SERIALIZATIONS)}, got {name!r}")
    return SERIALIZATIONS[name]


def encoded(item: Any, serialize: str, index: int) -> bytes:
    """Return the bytes of one item.

    Args:
      item: the item; a string or bytes with "text".
      serialize: as in `compression_ratio`.
      index: its place in the dataset, for the error message.
    """
    if serialize == "repr":
        return repr(item).encode()
    if isinstance(item, str):
        return item.encode("utf-8", "surrogatepass")  # JSON can hold lone surrogates
    if isinstance(item, bytes):
        return item
    raise ValueError(
        f'serialize="text" takes strings or bytes, but item {index} is {described(item)}: pass '
        'the texts of the items, or use serialize="repr"'
    )
