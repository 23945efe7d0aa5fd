"""Frequencies of quantizer codes for a source of Student's t distribution, in exact integers.

Code k of quantizer q (`tcq`) is the value 2 k - q, in steps, and owns the source within one step
of it. Sources differ in scale, a quarter octave from class to class: class i > 0 has the scale
2**((i - UNIT) / 4). Class 0 is for what is not there: code 0, at no cost.

Codes up to 8 have a symbol each. Larger ones share one, four to the octave, and add plain bits:
symbol s is the codes BASE[s] ... BASE[s] + 2**BITS[s] - 1.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32

from pallas_kernels.codecs.rans import SLOTS

SHAPES = (6, 24)  # degrees of freedom, even; 24 is almost a Gaussian
# Mean of |x| at scale 1, and over the root mean square.
MEANS = tuple(
    2 * math.sqrt(nu / math.pi) * math.gamma((nu + 1) / 2) / math.gamma(nu / 2) / (nu - 1)
    for nu in SHAPES
)
PEAKS = tuple(m * math.sqrt(1 - 2 / nu) for m, nu in zip(MEANS, SHAPES, strict=True))
UNIT = 25  # the class whose scale is one step; class 1 has 2**-6
CLASSES = UNIT + 45  # up to 2**11 steps
CENTER = 51  # the symbol of code 0
SYMBOLS = 2 * CENTER + 1
REACH = 128  # codes that begin beyond so many scales have no symbol
_POINT = 60  # binary places of a probability


def _positive() -> tuple[np.ndarray, np.ndarray]:
    """Of the symbols from CENTER on: the least code, and the plain bits."""
    s = np.arange(CENTER + 1)
    bits = np.maximum(s // 4 - 1, 0)
    return (s - 4 * bits) << bits, bits


_LEAST, _BITS = _positive()
_MOST = _LEAST + (1 << _BITS) - 1
BASE = np.concatenate([-_MOST[:0:-1], _LEAST]).astype(np.int32)
BITS = np.concatenate([_BITS[:0:-1], _BITS]).astype(np.int32)
LARGEST = int(_MOST[-1])


def symbol(k: Int[Array, "..."]) -> Int32[Array, "..."]:
    """The symbol of a code, |k| <= LARGEST.

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
    """int32 [shapes, classes, 2, symbols]: slots of every symbol; a row sums to 2**14.

    >>> f = frequencies()
    >>> f.shape, bool((f.sum(-1) == SLOTS).all())
    ((2, 70, 2, 103), True)
    """
    shapes = [[[_row(i, q, nu) for q in (0, 1)] for i in range(CLASSES)] for nu in SHAPES]
    return np.array(shapes, np.int32)


@functools.lru_cache
def below() -> np.ndarray:
    """int32, as `frequencies`: slots before each symbol."""
    return (np.cumsum(frequencies(), -1) - frequencies()).astype(np.int32)


@functools.lru_cache
def prices() -> Float32[np.ndarray, "shapes classes 2 symbols"]:
    """Bits of a code with each symbol, plain bits included; a million where it has none."""
    bits = BITS - np.log2(np.maximum(frequencies(), 1) / SLOTS)
    return np.where(frequencies() > 0, bits, 1e6).astype(np.float32)


@functools.lru_cache
def limits() -> np.ndarray:
    """int32 [classes]: the largest |k| that has a symbol."""
    return np.array([_MOST[_reached(i)[CENTER:]].max() for i in range(CLASSES)], np.int32)


def _reached(index: int) -> np.ndarray:
    """Which symbols a class has: those that begin within REACH scales, and -1, 0, 1."""
    if index == 0:
        return np.arange(SYMBOLS) == CENTER
    scale = index - UNIT
    fourth = (REACH // 2) ** 4 << 64  # k = v / 2; fourth powers of 2**(1/4) are integers
    fourth = fourth << scale if scale > 0 else fourth >> -scale
    most = max(1, math.isqrt(math.isqrt(fourth)) >> 16)
    return _LEAST[np.abs(np.arange(SYMBOLS) - CENTER)] <= most


def _row(index: int, q: int, nu: int) -> np.ndarray:
    """Slots of a class and quantizer: one for every symbol it has, the others by probability."""
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
    """P(X < edge) 2**60 for X = 2**(scale / 4) t_nu.

    For even nu, with tan a = x / sqrt(nu), it is 1/2 + sin a / 2 sum_i binom(2i, i) (cos a / 2)^2i
    over i < nu / 2.
    """
    spread = math.isqrt(nu * nu << scale + 128)  # nu 2**(scale / 2), 64 binary places
    square = (spread << _POINT) // (spread + (edge * edge << 64))  # cos^2
    total = term = 1 << _POINT
    for i in range(1, nu // 2):
        term = (term * square >> _POINT) * (2 * i - 1) // (2 * i)
        total += term
    half = math.isqrt(((1 << _POINT) - square) << _POINT) * total >> _POINT + 1
    return (1 << _POINT - 1) + (half if edge > 0 else -half)
