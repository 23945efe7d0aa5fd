"""Bits that lossless codes take for counted symbols and for floats, with all their tables."""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int, UInt

from jaxquant.core.arguments import check_arguments
from pallas_kernels import byte_streams
from pallas_kernels.codecs import float_fields, float_planes, prefix_code

CHUNK = 1 << 22  # number of weights whose windows are chosen at a time


def coded_bits(counts: Int[np.ndarray, " a"], coding: str, stored: float = 8.0) -> float:
    """Return the bits of symbols with these counts, coded, or as they are where that is less.

    Args:
      counts: how often each symbol occurs, int [a], a <= 256.
      coding: "huffman" or "rans", as `pallas_kernels.byte_streams` has them: tables, the sizes of
        lanes and padding are included.
      stored: bits that a symbol takes uncoded. Default: 8.
    Returns:
      The bits of all symbols.
    Raises:
      ValueError: there are more than 256 counts, or the coding is another one.

    >>> coded_bits(np.array([1000, 24]), "rans") / 1024 < 0.3
    True
    """
    check_arguments(coded_bits, locals())
    if counts.ndim != 1 or len(counts) > prefix_code.SYMBOLS:
        raise ValueError(f"counts must be those of 256 symbols at most, got {list(counts.shape)}")
    padded = np.zeros(prefix_code.SYMBOLS, np.int64)
    padded[: len(counts)] = counts
    return min(stored * float(padded.sum()), 8.0 * byte_streams.size(padded, coding))


def plane_bits(bits: UInt[np.ndarray, "n k"], dtype: DTypeLike) -> int:
    """Return the bits of a matrix of floats in planes of fixed length, the form for serving.

    The window of exponents has 3 or 4 bits, whichever is smaller; lists of escapes are included.

    Args:
      bits: the patterns of the floats, unsigned [n, k], in which k is the axis of the inputs.
      dtype: dtype of the floats.
    Returns:
      The bits of the whole matrix, at most what it takes uncoded.
    Raises:
      ValueError: the dtype has no planes.

    >>> w = np.random.default_rng(0).normal(size=(64, 512)).astype(jnp.bfloat16)
    >>> round(plane_bits(w.view(np.uint16), "bfloat16") / w.size, 2)
    11.27
    """
    check_arguments(plane_bits, locals())
    name = jnp.dtype(dtype).name
    if name not in float_fields.DTYPES:
        raise ValueError(f"the dtype must be one of {', '.join(float_fields.DTYPES)}, got {name}")
    n, k = bits.shape
    rows = max(1, CHUNK // k)
    listed = dict.fromkeys(float_planes.BITS, 0)
    for at in range(0, n, rows):
        columns = jnp.asarray(bits[at : at + rows].T)
        for width in listed:
            listed[width] += int(float_planes.missing(columns, name, width))
    sizes = [float_planes.nbytes(k, n, name, width, e) for width, e in listed.items()]
    return 8 * min(*sizes, bits.nbytes)
