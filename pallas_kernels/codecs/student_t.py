"""Symbol frequencies for quantized Student's t sources, computed in exact integers.

Code k of quantizer q (`trellis_coded`) is the value 2 k - q, in steps, and represents the source
within one step of it. Sources are grouped in classes by scale, a quarter octave apart: class i > 0
has the scale 2**((i - UNIT) / 4). Class 0 is padding, whose only code 0 costs nothing.

Codes up to 8 have a symbol each. Larger codes share symbols, four per octave, and add plain bits:
symbol s covers the codes BASE[s] ... BASE[s] + 2**BITS[s] - 1.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32

from pallas_kernels.codecs.rans import SLOTS

SHAPES = (6, 24)  # degrees of freedom, even; 24 is almost Gaussian
# Mean of |x| at scale 1 (MEANS), and its ratio to the root mean square (PEAKS).
MEANS = tuple(
    2 * math.sqrt(nu / math.pi) * math.gamma((nu + 1) / 2) / math.gamma(nu / 2) / (nu - 1)
    for nu in SHAPES
)
PEAKS = tuple(m * math.sqrt(1 - 2 / nu) for m, nu in zip(MEANS, SHAPES, strict=True))
UNIT = 25  # class whose scale is one step; class 1 has 2**-6
CLASSES = UNIT + 45  # up to 2**11 steps
CENTER = 51  # the symbol of code 0
SYMBOLS = 2 * CENTER + 1
REACH = 128  # symbols that begin beyond this many scales are excluded
_POINT = 60  # fractional bits of a probability


def _positive() -> tuple[np.ndarray, np.ndarray]:
    """Return the least code and the number of plain bits of the symbols from CENTER on."""
    s = np.arange(CENTER + 1)
    bits = np.maximum(s // 4 - 1, 0)
    return (s - 4 * bits) << bits, bits


_LEAST, _BITS = _positive()
_MOST = _LEAST + (1 << _BITS) - 1
BASE = np.concatenate([-_MOST[:0:-1], _LEAST]).astype(np.int32)
BITS = np.concatenate([_BITS[:0:-1], _BITS]).astype(np.int32)
LARGEST = int(_MOST[-1])


def symbol(k: Int[Array, "..."]) -> Int32[Array, "..."]:
    """Return the symbol of each code, for |k| <= LARGEST.

    Args:
      k: integer codes.

    >>> codes = jnp.arange(-LARGEST, LARGEST + 1)
    >>> plain = codes - BASE[symbol(codes)]
    >>> bool(((plain >= 0) & (plain < 1 << BITS[symbol(codes)])).all())
    True
    """
    m = jnp.abs(k).astype(jnp.int32)
    bits = jnp.maximum(29 - jax.lax.clz(m), 0)
    return CENTER + jnp.sign(k).astype(jnp.int32) * (4 * bits + (m >> bits))


@functools.lru_cache
def frequencies() -> np.ndarray:
    """Return the slots of every symbol, int32 [shapes, classes, 2, symbols]; rows sum to 2**14.

    >>> f = frequencies()
    >>> f.shape, bool((f.sum(-1) == SLOTS).all())
    ((2, 70, 2, 103), True)
    """
    shapes = [[[_row(i, q, nu) for q in (0, 1)] for i in range(CLASSES)] for nu in SHAPES]
    return np.array(shapes, np.int32)


@functools.lru_cache
def below() -> np.ndarray:
    """Return the slots before each symbol, int32, in the shape of `frequencies`."""
    return (np.cumsum(frequencies(), -1) - frequencies()).astype(np.int32)


@functools.lru_cache
def prices() -> Float32[np.ndarray, "shapes classes 2 symbols"]:
    """Return the bits that a code of each symbol takes, plain bits included; 1e6 if excluded."""
    bits = BITS - np.log2(np.maximum(frequencies(), 1) / SLOTS)
    return np.where(frequencies() > 0, bits, 1e6).astype(np.float32)


@functools.lru_cache
def limits() -> np.ndarray:
    """Return the largest |k| that has a symbol in each class, int32 [classes]."""
    return np.array([_MOST[_reached(i)[CENTER:]].max() for i in range(CLASSES)], np.int32)


def _reached(index: int) -> np.ndarray:
    """Return which symbols a class has: those that begin within REACH scales, and -1, 0, 1."""
    if index == 0:
        return np.arange(SYMBOLS) == CENTER
    scale = index - UNIT
    fourth = (REACH // 2) ** 4 << 64  # k = v / 2; exact, since 2**(1/4) to the 4th is an integer
    fourth = fourth << scale if scale > 0 else fourth >> -scale
    most = max(1, math.isqrt(math.isqrt(fourth)) >> 16)
    return _LEAST[np.abs(np.arange(SYMBOLS) - CENTER)] <= most


def _row(index: int, q: int, nu: int) -> np.ndarray:
    """Return the slots of a class and quantizer: one per symbol, and the rest by probability."""
    reached = _reached(index)
    row = reached.astype(np.int64)
    if index:
        edges = [*(2 * BASE - q - 1), 2 * LARGEST - q + 1]
        under = [_distribution(int(edge), index - UNIT, nu) for edge in edges]
        spare = SLOTS - int(row.sum())
        share = [(b - a) * spare >> _POINT for a, b in itertools.pairwise(under)]
        row += np.where(reached, np.array(share, np.int64), 0)
    row[CENTER] += SLOTS - row.sum()
    return row


def _distribution(edge: int, scale: int, nu: int) -> int:
    """Return P(X < edge) 2**60 for X = 2**(scale / 4) t_nu.

    For even nu, with tan a = x / sqrt(nu), the probability is
    1/2 + sin a / 2 sum_i binom(2i, i) (cos a / 2)^2i over i < nu / 2.
    """
    spread = math.isqrt(nu * nu << scale + 128)  # nu 2**(scale / 2), with 64 fractional bits
    square = (spread << _POINT) // (spread + (edge * edge << 64))  # cos^2
    total = term = 1 << _POINT
    for i in range(1, nu // 2):
        term = (term * square >> _POINT) * (2 * i - 1) // (2 * i)
        total += term
    half = math.isqrt(((1 << _POINT) - square) << _POINT) * total >> _POINT + 1
    return (1 << _POINT - 1) + (half if edge > 0 else -half)
