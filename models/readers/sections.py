"""The sections of files of weights, for their lossless compression: tensors and what is between."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from jaxquant.core.fields import shown
from jaxquant.lossless import Record, Section
from jaxquant_models.readers.gguf_blocks import BLOCKS
from jaxquant_models.readers.gguf_file import open_gguf
from jaxquant_models.readers.safetensors import Tensors

# What DTYPES of `safetensors` names, and the types of that format that NumPy lacks.
RECORDS = {
    "F64": Record("f8"), "F32": Record("f4"), "BF16": Record("f2"), "F16": Record("u2"),
    "I64": Record("u8"), "U64": Record("u8"), "I32": Record("u4"), "U32": Record("u4"),
    "I16": Record("u2"), "U16": Record("u2"), "C64": Record("2f4"),
}  # fmt: skip
ONE_BYTE = Record("u1")  # of all other types: float8, int8, bool
HEADER, PADDING = "header", "padding"


class Span(NamedTuple):
    """The place of a tensor in a file.

    Attributes:
      start: its first byte.
      end: the byte after its last.
      name: its name.
      dtype: the name of its type, as in the file.
      record: the layout of its records.
    """

    start: int
    end: int
    name: str
    dtype: str
    record: Record


def sections_of(path: Path) -> list[Section] | None:
    """Return the sections of a `.gguf` or `.safetensors` file; None if its structure is not known.

    A file with such a name that cannot be read as one causes a warning, and is compressed as bytes.

    Args:
      path: the file.
    """
    spans = _SPANS.get(path.suffix)
    if spans is None or not path.stat().st_size:
        return None
    try:
        return covering(spans(path), path.stat().st_size)
    except ValueError as error:
        warnings.warn(f"{error}; it is compressed as bytes without structure", stacklevel=2)
        return None


def covering(spans: Iterable[Span], size: int) -> list[Section]:
    """Return sections that cover a file: the tensors, the header before and the bytes between them.

    Args:
      spans: the places of the tensors, in any order.
      size: bytes of the file.

    Raises:
      ValueError: tensors overlap, or one ends after the file.

    >>> [s.name for s in covering([Span(8, 16, "w", "F32", Record("f4"))], 20)]
    ['header', 'w', 'padding']
    """
    found, at = [], 0
    for span in sorted(spans):
        if not at <= span.start <= span.end <= size:
            raise ValueError(
                f"tensor {shown(span.name)} lies at bytes {span.start} to {span.end}, over "
                f"another one or beyond the {size} bytes of the file"
            )
        if span.start > at:
            found.append(Section(PADDING if found else HEADER, span.start - at))
        found.append(Section(span.name, span.end - span.start, span.dtype, span.record))
        at = span.end
    if at < size:
        found.append(Section(PADDING if found else HEADER, size - at))
    return found


def _of_gguf(path: Path) -> list[Span]:
    tensors = open_gguf(path)[1].values()
    return [
        Span(t.start, t.start + t.data.size, t.name, t.kind.name, BLOCKS.get(t.kind.name, ONE_BYTE))
        for t in tensors
    ]


def _of_safetensors(path: Path) -> list[Span]:
    return [
        Span(start, end, name, dtype, RECORDS.get(dtype, ONE_BYTE))
        for name, (dtype, start, end) in Tensors(path).spans().items()
    ]


_SPANS = {".gguf": _of_gguf, ".safetensors": _of_safetensors}
