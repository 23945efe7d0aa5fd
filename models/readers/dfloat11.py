"""Folders of Hugging Face whose weights are compressed by DFloat11 (arXiv:2504.11651).

The weights of a module are joined into one stream of `pallas_kernels.codecs.dfloat11_stream`, whose
arrays are the tensors MODULE.luts, MODULE.encoded_exponent and so on. `pattern_dict`, in the
`dfloat11_config` of config.json, maps a pattern of the names of modules to the submodules whose
weights are joined, in order; an empty list means the weight of the module itself. What the package
dfloat11 0.2.0 to 0.5.0 writes is read; 0.1.0 wrote pickles.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from pydantic import JsonValue

from jaxquant.core.fields import shown
from jaxquant_models.readers.safetensors import Tensors
from jaxquant_models.schemas.files import DFloat11Config
from jaxquant_models.schemas.strict import checked
from pallas_kernels.codecs.dfloat11_stream import Stream, decode

CONFIG = "dfloat11_config"  # key of config.json
MARK = ".encoded_exponent"  # ends the name of a tensor of every compressed module
BYTES = ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps")
SPLIT = "split_positions"
# What patterns of modules consist of; others, which may take forever to match, are refused.
_PARTS = {r"\d+": r"\d++", "[0-9]+": "[0-9]++", r"\d": r"\d", r"\.": r"\.", ".": "."}
_TOKEN = re.compile("|".join(map(re.escape, _PARTS)) + r"|[\w-]")


class _Place(NamedTuple):
    """Where a weight is: in the stream of a module, from number `begin` to `end`."""

    module: str
    begin: int
    end: int


class DFloat11Tensors:
    """The tensors of a folder by name, as `readers.safetensors.Tensors`; weights are decoded.

    Attributes:
      shapes: shape of every tensor. A compressed weight has only a length: the files do not hold
        its shape.
      nbytes: total size of the files.

    Args:
      folder: the folder, of which every file *.safetensors is read.
      config: `dfloat11_config` of its config.json.
    Raises:
      ValueError: the configuration or a file is not as expected; the message names it.
    """

    def __init__(self, folder: Path, config: JsonValue) -> None:
        self._config = checked(DFloat11Config, config, str(folder / "config.json"), CONFIG + ".")
        files = [Tensors(path) for path in sorted(folder.glob("*.safetensors"))]
        if not files:
            raise ValueError(f"{folder} has no safetensors files")
        self.nbytes = sum(file.nbytes for file in files)
        self._files: dict[str, Tensors] = {}
        for file in files:
            for name in file.shapes:
                other = self._files.setdefault(name, file)
                if other is not file:
                    raise ValueError(f"tensor {shown(name)} is in {other.path} and in {file.path}")
        patterns = {_pattern(text): parts for text, parts in self._config.pattern_dict.items()}
        modules = [n.removesuffix(MARK) for n in self._files if n.endswith(MARK)]
        held = {f"{module}.{field}" for module in modules for field in (*BYTES, SPLIT)}
        self._places: dict[str, _Place] = {}
        for module in modules:
            for name, place in self._weights(module, patterns):
                if name in self._places or name in self._files:
                    raise ValueError(f"tensor {shown(name)} is in the folder twice")
                self._places[name] = place
        plain = {n: file.shapes[n] for n, file in self._files.items() if n not in held}
        self.shapes = plain | {n: (p.end - p.begin,) for n, p in self._places.items()}

    def shaped(self, name: str, expected: tuple[int, ...] | None) -> tuple[int, ...]:
        """Return the shape of a tensor; for a compressed weight the expected one, if it fits.

        Args:
          name: a key of `shapes`.
          expected: the shape that the model gives to the tensor; None if it does not know it.
        """
        own = self.shapes[name]
        if name in self._places and expected is not None and math.prod(expected) == own[0]:
            return expected
        return own

    def read(self, name: str) -> np.ndarray:
        """Return a tensor; a compressed weight is bfloat16 [weights].

        Args:
          name: a key of `shapes`.
        Raises:
          ValueError: the tensor, or a stream with it, is damaged or of an unsupported type.
        """
        if name not in self._places:
            return self._files[name].read(name)
        module, begin, end = self._places[name]
        luts, encoded, sign_mantissa, positions, gaps = (
            self._typed(f"{module}.{field}", np.uint8) for field in BYTES
        )
        if positions.ndim != 1 or positions.size % 4:
            raise ValueError(f"tensor {module}.output_positions must hold uint32 numbers as bytes")
        try:
            threads = self._config.threads_per_block[0]
            ends = positions.view("<u4")
            stream = Stream(luts, encoded, sign_mantissa, ends, gaps, threads)
            return decode(stream, begin, end).view(ml_dtypes.bfloat16)
        except ValueError as error:
            raise ValueError(
                f"the DFloat11 stream of {shown(module)} is damaged: {error}"
            ) from None

    def prefetch(self, name: str) -> None:
        """Ask the system to read a tensor into its cache, where it can be asked.

        Args:
          name: a key of `shapes`.
        """
        place = self._places.get(name)
        for part in [f"{place.module}.{field}" for field in BYTES] if place else [name]:
            self._files[part].prefetch(part)

    def _weights(
        self, module: str, patterns: Mapping[re.Pattern[str], list[str]]
    ) -> list[tuple[str, _Place]]:
        """Return the weights that are joined in the stream of a module."""
        for field in (*BYTES, SPLIT):
            if f"{module}.{field}" not in self._files:
                raise ValueError(f"tensor {shown(f'{module}.{field}')} is missing")
        matches = [parts for pattern, parts in patterns.items() if pattern.fullmatch(module)]
        if len(matches) != 1:
            raise ValueError(
                f"{CONFIG}.pattern_dict must have one pattern for the compressed module "
                f"{shown(module)}, but {len(matches)} match"
            )
        names = [f"{module}.{part}.weight" for part in matches[0]] or [f"{module}.weight"]
        shape = self._files[f"{module}.sign_mantissa"].shapes[f"{module}.sign_mantissa"]
        splits = self._typed(f"{module}.{SPLIT}", np.int64)
        if len(shape) != 1 or splits.shape != (len(names) - 1,):
            raise ValueError(
                f"{CONFIG}.pattern_dict joins {len(names)} weights in {shown(module)}, so "
                f"split_positions must have shape [{len(names) - 1}] and sign_mantissa one axis; "
                f"got {list(splits.shape)} and {list(shape)}"
            )
        bounds = [0, *splits.tolist(), shape[0]]
        if bounds != sorted(bounds):
            raise ValueError(
                f"{module}.split_positions must rise from 0 to at most {shape[0]} weights"
            )
        each = zip(names, bounds, bounds[1:], strict=False)
        return [(name, _Place(module, begin, end)) for name, begin, end in each]

    def _typed(self, name: str, dtype: type[np.generic]) -> np.ndarray:
        value = self._files[name].read(name)
        if value.dtype != dtype:
            raise ValueError(f"tensor {name} must be {np.dtype(dtype)}, got {value.dtype}")
        return value


def _pattern(text: str) -> re.Pattern[str]:
    r"""Return a pattern of names of modules, which takes a time linear in the name to match.

    >>> bool(_pattern(r"model\.layers\.\d+").fullmatch("model.layers.12"))
    True
    """
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != text:
        raise ValueError(
            rf"{CONFIG}.pattern_dict must have patterns of names, '\.', '.', '\d' and '\d+'; got "
            f"{shown(text)}"
        )
    return re.compile("".join(_PARTS.get(token, token) for token in tokens))
