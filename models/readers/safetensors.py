"""Tensors of a safetensors file: shapes from its header, values from a memory map.

The `safetensors` library checks the file, but its arrays are not used because NumPy has no float8.
"""

import math
import os
from pathlib import Path
from typing import Annotated

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from pydantic import Field
from safetensors import SafetensorError, safe_open

from jaxquant.core.fields import shown
from jaxquant_models.schemas.strict import Schema, checked, parse_json

DTYPES: dict[str, DTypeLike] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu, "BOOL": np.bool_,
    **{f"{kind}{bits}": np.dtype(f"{name}{bits}")
       for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}  # fmt: skip
Whole = Annotated[int, Field(ge=0)]


class _Entry(Schema):
    """The header entry of a tensor."""

    dtype: str
    shape: list[Whole]
    data_offsets: Annotated[list[Whole], Field(min_length=2, max_length=2)]


class Tensors:
    """The tensors of a safetensors file by name.

    Attributes:
      shapes: shape of each tensor by name.
      dtypes: name of the dtype of each, as the file has it.
    """

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
          ValueError: the file is missing or incomplete.
        """
        self.path = path
        try:
            with safe_open(path, framework="numpy"):
                pass
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = parse_json(file.read(size), str(path))
            self.nbytes = path.stat().st_size
        except FileNotFoundError:
            raise ValueError(f"{path} is missing") from None
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is not a complete safetensors file: {reason}") from None
        header.pop("__metadata__", None)
        self._start = 8 + size
        self._entries = {
            name: checked(_Entry, entry, f"{path}, tensor {shown(name)}")
            for name, entry in header.items()
        }
        self.shapes = {name: tuple(entry.shape) for name, entry in self._entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in self._entries.items()}

    def read(self, name: str) -> np.ndarray:
        """Return a memory-mapped tensor; float8 types are those of `ml_dtypes`.

        Args:
          name: a key of `shapes`.
        Raises:
          ValueError: the type of the tensor is not supported, or its size does not match its shape.
        """
        entry = self._entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(f"tensor {name} has type {entry.dtype}, which is not supported")
        kind = np.dtype(DTYPES[entry.dtype])
        raw = self.raw(name)
        if math.prod(entry.shape) * kind.itemsize != raw.size:
            raise ValueError(
                f"tensor {name} has {raw.size} bytes, which does not match its shape "
                f"{list(entry.shape)}"
            )
        return raw.view(kind).reshape(entry.shape)

    def raw(self, name: str) -> np.ndarray:
        """Return the memory-mapped bytes of a tensor of any type, uint8 [bytes].

        Args:
          name: a key of `shapes`.
        """
        begin, end = self._entries[name].data_offsets
        if begin == end:  # nothing cannot be mapped
            return np.zeros(0, np.uint8)
        return np.asarray(np.memmap(self.path, np.uint8, "r", self._start + begin, (end - begin,)))

    def spans(self) -> dict[str, tuple[str, int, int]]:
        """Return the type of every tensor, its first byte in the file and the byte after its last.

        Types are named as in the file; those that `read` does not support are among them.
        """
        return {
            name: (entry.dtype, self._start + entry.data_offsets[0],
                   self._start + entry.data_offsets[1])
            for name, entry in self._entries.items()
        }  # fmt: skip

    def shaped(self, name: str, expected: tuple[int, ...] | None) -> tuple[int, ...]:
        """Return the shape of a tensor, whatever is expected.

        Args:
          name: a key of `shapes`.
          expected: the shape that the model gives to the tensor; not used.
        """
        return self.shapes[name]

    def prefetch(self, name: str) -> None:
        """Ask the system to read a tensor into its cache, where it can be asked.

        Args:
          name: a key of `shapes`.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        begin, end = self._entries[name].data_offsets
        with self.path.open("rb") as file:
            os.posix_fadvise(
                file.fileno(), self._start + begin, end - begin, os.POSIX_FADV_WILLNEED
            )
