"""HuffmanLanes: the bits of floats without loss, with Huffman-coded exponents."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt, UInt8, UInt16

from jaxquant.core.fields import check_fields, check_positive
from jaxquant.formats.exact_format import Dtype, ExactFormat, check_dtype
from jaxquant.formats.tiled_format import TiledFormat
from pallas_kernels import byte_coders
from pallas_kernels.codecs import float_fields, huffman_lanes, prefix_code
from pallas_kernels.codecs.huffman_lanes import LANE

_GUESS = 3  # bits of an exponent, where this has to be guessed


@dataclasses.dataclass(frozen=True)
class HuffmanLanes(ExactFormat, TiledFormat):
    """Floats stored without loss: exponents in a Huffman code, signs and mantissas as they are.

    The exponents of a matrix, column after column, are one plane of
    `pallas_kernels.codecs.huffman_lanes`. A bfloat16 weight takes about 10.7 bits. A product
    first decodes all exponents, one byte each: use `FloatPlanes` where speed counts.

    Attributes:
      dtype: dtype of the weights; None for their own, which `quantize` and `jaxquant.lossless` fill
        in. `encode` casts to it (to float32 if it is None).
      words: number of 32-bit words of Huffman code for a matrix. `quantize` and `jaxquant.lossless`
        set it to the number that is needed.

    >>> w = jnp.array([[1.5, 0.0], [jnp.inf, 0.25]])
    >>> f = HuffmanLanes().settled("float32", jax.lax.bitcast_convert_type(w[None], jnp.uint32))
    >>> f.words, f.decode(f.encode(w), 2).tolist()
    (1, [[1.5, 0.0], [inf, 0.25]])
    """

    dtype: Dtype | None = None
    words: int = 1

    tile: ClassVar[tuple[int, int]] = (1, 1)
    sized: ClassVar[str] = "words"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dtype is not None:
            check_dtype(self.dtype)
        check_positive(self, "words")

    def settled(self, dtype: Any, u: UInt[Array, "l k n"]) -> "HuffmanLanes":
        """Return the format with the dtype of these matrices and as many words as they need."""
        check_dtype(dtype, self.dtype)
        float_fields.check_size(*u.shape[1:])
        if isinstance(u, jax.core.Tracer | jax.ShapeDtypeStruct):
            words = huffman_lanes.lanes(u.shape[1] * u.shape[2]) * LANE * _GUESS // 32
        else:
            words = max((len(_coded(one, dtype)[2]) for one in u), default=1)
        return dataclasses.replace(self, dtype=dtype, words=max(1, words))

    def encode_bits(self, u: UInt[Array, "k n"]) -> dict[str, Array]:
        """Return the arrays of a matrix given by its bits; traced, they decode to NaN.

        Args:
          u: the bits of the floats, of an unsigned integer dtype of their size.

        Raises:
          ValueError: the matrix needs more words than the format has.
        """
        k, n = u.shape
        lanes = huffman_lanes.lanes(k * n)
        if isinstance(u, jax.core.Tracer):  # a Huffman code depends on values
            zeros = jnp.zeros((self.words,), jnp.uint32), jnp.zeros((lanes,), jnp.uint16)
            rest = jnp.full((float_fields.rest_words(k, self.own), n), -1, jnp.int32)
            last = (1 << float_fields.DTYPES[self.own][0]) - 1
            return self._data(rest, *zeros, jnp.zeros(256, jnp.uint8).at[last].set(1))
        lengths, sizes, words = _coded(u, self.own)
        if len(words) > self.words:
            raise ValueError(
                f"the matrix takes {len(words)} words, but words = {self.words}; give the format "
                f"words={len(words)}, or use jaxquant.lossless.encode"
            )
        words = np.pad(words, (0, self.words - len(words)))
        return self._data(_packed_rests(u, self.own), words, sizes, lengths)

    def _data(self, rest: Array, words: Any, sizes: Any, lengths: Any) -> dict[str, Array]:
        arrays = map(jnp.asarray, (words, sizes, lengths))
        return {"codes": rest, **dict(zip(("words", "sizes", "lengths"), arrays, strict=True))}

    # --- decoding -------------------------------------------------------------------------------

    @property
    def spans(self) -> Mapping[str, int]:
        return {"codes": 1, "exponent": 1}

    def decode_bits(self, data: dict[str, Array], k: int) -> UInt[Array, "k n"]:
        """Return the bits of the floats of one matrix, or of some of its columns.

        Args:
          data: the packed arrays; for some of the columns, their exponents too, "exponent" [k, n].
          k: number of rows.
        """
        exponent = data["exponent"] if "exponent" in data else self._exponents(data, k)
        rest = float_fields.rests(data["codes"], self.own, k)
        return float_fields.joined(exponent.astype(jnp.int32), rest, self.own)

    def _exponents(self, data: dict[str, Array], k: int) -> UInt8[Array, "k n"]:
        n, table = data["codes"].shape[-1], decoding_table(data["lengths"])
        plane = huffman_lanes.decode(data["words"], data["sizes"], table, count=k * n)
        return plane.reshape(n, k).T

    def _exponents_of(self, data: dict[str, Array], column: Array, k: int) -> UInt8[Array, " k"]:
        """Return the exponents of one column, decoding only the lanes that hold them."""
        starts = huffman_lanes.starts(data["sizes"])
        lanes = min(huffman_lanes.lanes(k) + 1, len(starts))
        lane = jnp.minimum(column * k // LANE, len(starts) - lanes)
        first = jax.lax.dynamic_slice_in_dim(starts, lane, lanes)
        symbols = huffman_lanes.decode_lanes(data["words"], first, decoding_table(data["lengths"]))
        return jax.lax.dynamic_slice_in_dim(symbols.reshape(-1), column * k - lane * LANE, k)

    def matmul(
        self, x: Float[Array, "m k"], data: dict[str, Array], activations: str = "float"
    ) -> Float[Array, "m n"]:
        return super().matmul(x, self._sliced(data, x.shape[-1]), activations)

    def matmul_transposed(
        self, x: Float[Array, "m n"], data: dict[str, Array], k: int
    ) -> Float[Array, "m k"]:
        return super().matmul_transposed(x, self._sliced(data, k), k)

    def columns(self, data: dict[str, Array], ids: Array, k: int) -> Float[Array, "k i"]:
        one = lambda column: self._exponents_of(data, column, k)
        exponent = jax.vmap(one, out_axes=1)(ids.astype(jnp.int32))
        return self.decode({"codes": data["codes"][:, ids], "exponent": exponent}, k)

    def _sliced(self, data: dict[str, Array], k: int) -> dict[str, Array]:
        """Return arrays that can be cut along columns: one byte a weight for the exponent."""
        return {"codes": data["codes"], "exponent": self._exponents(data, k)}

    def kernel(self) -> str:
        """Return what computes products."""
        return "all exponents are decoded first; jaxquant.lossless.encode converts to planes"


def decoding_table(lengths: UInt8[Array, " 256"]) -> UInt16[Array, " 4096"]:
    """Return `prefix_code.table` for 12 bits, computed inside of `jit`.

    Args:
      lengths: the lengths of the code words, 0 for absent symbols.

    >>> of = np.zeros(256, np.uint8)
    >>> of[[3, 5, 9]] = 1, 2, 2
    >>> bool((np.tile(prefix_code.table(of), 1024) == decoding_table(jnp.asarray(of))).all())
    True
    """
    limit = prefix_code.LIMIT
    of = lengths.astype(jnp.int32)
    order = jnp.argsort(jnp.where(of > 0, of, limit + 1), stable=True)
    ends = jnp.cumsum(jnp.where(of[order] > 0, 1 << limit - of[order], 0))
    at, word = np.arange(1 << limit), np.zeros(1 << limit, np.int64)
    for bit in range(limit):  # the first bit of a code word is the lowest one of the stream
        word |= (at >> bit & 1) << limit - 1 - bit
    symbol = order[jnp.searchsorted(ends, word, side="right") % 256]
    symbol = jnp.where(word >= ends[-1], order[0], symbol)  # a single symbol owns all words
    return (symbol | of[symbol] << 8).astype(jnp.uint16)


def _coded(u: UInt[Array, "k n"], dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the lengths of the code words of exponents, the sizes of the lanes and their words."""
    exponent, _ = float_fields.fields(u, dtype)
    plane = np.asarray(exponent.T.reshape(-1).astype(jnp.uint8))
    lengths = prefix_code.lengths(np.bincount(plane, minlength=256))
    if np.count_nonzero(lengths) == 1:
        return lengths, huffman_lanes.sizes(plane, lengths), np.zeros(0, np.uint32)
    sizes, pieces = byte_coders.encode_lanes(plane, lengths, os.cpu_count() or 1)
    return lengths, sizes, np.concatenate(pieces).view("<u4").astype(np.uint32)


def _packed_rests(u: UInt[Array, "k n"], dtype: str) -> Array:
    _, rest = float_fields.fields(u, dtype)
    return float_fields.packed_rests(rest, dtype)
