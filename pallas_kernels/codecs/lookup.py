"""Vector codebooks: storage of the codes, sums of codebook entries, and nearest-entry search.

A vector of d weights is the sum of one row of each table [K, d]. Tables may differ in size.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from pallas_kernels.codecs import layout

CHUNK = 1 << 22  # number of distances held at a time


def digit(bits: int) -> int:
    """Return the width of the equal parts in which a code is stored, one that `layout` can pack.

    Args:
      bits: number of bits per code.
    Raises:
      ValueError: bits is not a multiple of 2 or 3 from 2 to 16.

    >>> digit(16), digit(12), digit(9)
    (8, 4, 3)
    """
    fits = [width for width in (8, 4, 3, 2) if bits % width == 0]
    if not fits or not 2 <= bits <= 16:
        raise ValueError(f"bits must be a multiple of 2 or 3 between 2 and 16, got {bits}")
    return fits[0]


def pack(codes: Int[Array, "... g m n"], bits: int) -> Int32[Array, "... w n"]:
    """Return int32 words holding g groups of m codes, as one dense bit stream down each column.

    Args:
      codes: [..., g, m, n], each in [0, 2**bits).
      bits: number of bits per code.

    >>> pack(jnp.array([[[1], [0x203]]]), 16).tolist()
    [[33751041]]
    """
    width = digit(bits)
    parts = codes[..., None, :] >> width * np.arange(bits // width)[:, None]
    return layout.pack(parts.reshape(*codes.shape[:-3], -1, codes.shape[-1]), width)


def unpack(
    words: Int32[Array, "... w n"], bits: int, groups: int, m: int
) -> Int32[Array, "... g m n"]:
    """Return the codes [..., groups, m, n] that `pack` packed.

    Args:
      words: int32 [..., w, n].
      bits: number of bits per code.
      groups: number of groups.
      m: number of codes per group.

    >>> unpack(jnp.array([[33751041]]), 16, 1, 2).ravel().tolist()
    [1, 515]
    """
    width = digit(bits)
    count = bits // width
    parts = layout.unpack(words, width, groups * m * count) & ((1 << width) - 1)
    parts = parts.reshape(*words.shape[:-2], groups, m, count, words.shape[-1])
    return jnp.sum(parts << width * np.arange(count)[:, None], axis=-2)


def take(
    words: Int32[Array, "w n"], ids: Int[Array, "i"], bits: int, m: int
) -> Int32[Array, "i m n"]:
    """Return the codes [i, m, n] of groups `ids`, unpacking only the words that hold them.

    Args:
      words: int32 words [w, n] made by `pack`.
      ids: group indices [i].
      bits: number of bits per code.
      m: number of codes per group.

    >>> words = pack(jnp.arange(12).reshape(4, 3, 1), 4)
    >>> take(words, jnp.array([2]), 4, 3).ravel().tolist()
    [6, 7, 8]
    """
    run = math.lcm(bits * m, 32 * layout.unit(digit(bits))[1])  # bits of whole groups and words
    per, held = run // 32, run // (bits * m)
    # Indices past the last word hold no group and may read any word.
    at = jnp.minimum(ids[:, None] // held * per + np.arange(per), len(words) - 1)
    codes = unpack(words[at], bits, held, m)
    return jnp.take_along_axis(codes, (ids % held)[:, None, None, None], axis=1)[:, 0]


def total(
    codes: Int[Array, "m ..."], tables: Sequence[Float[Array, "K d"]]
) -> Float[Array, "... d"]:
    """Return the float32 sum of the rows that codes[0], codes[1], ... select in the tables.

    Args:
      codes: [m, ...], one index per table.
      tables: m tables [K, d].
    Returns:
      [..., d].

    >>> total(jnp.array([[1], [0]]), (jnp.array([[0.0], [1.0]]), jnp.array([[0.5]]))).tolist()
    [[1.5]]
    """
    return sum(t.astype(jnp.float32)[c] for c, t in zip(codes, tables, strict=True))


def dequantize(
    codes: Int32[Array, "w n"],
    codebooks: Float[Array, "m K d"],
    scale: Float[Array, "1 n"],
    *,
    bits: int,
    group: int,
    k: int,
) -> Float[Array, "k n"]:
    """Return the float32 weights of additive codes: scale times a sum of codebook vectors.

    Args:
      codes: int32 words made by `pack`, k / group groups of m codes.
      codebooks: [m, K, group] with K = 2**bits.
      scale: [1, n], the scale of each column.
      bits: number of bits per code.
      group: number of rows d of a vector.
      k: number of rows, a multiple of group.
    Returns:
      [k, n].

    >>> books = jnp.array([[[0.0], [1.0], [0.0], [0.0]]])
    >>> dequantize(jnp.array([[1]]), books, jnp.array([[3.0]]), bits=2, group=1, k=2).tolist()
    [[3.0], [0.0]]
    """
    m = len(codebooks)
    q = total(jnp.moveaxis(unpack(codes, bits, k // group, m), 1, 0), list(codebooks))
    return jnp.swapaxes(q, 1, 2).reshape(k, -1) * scale.astype(jnp.float32)


def nearest(
    targets: Float[Array, "d n"], tables: Sequence[Float[Array, "K d"]], beam: int
) -> Int32[Array, "m n"]:
    """Return codes whose sum of table rows is near each column of targets, by beam search.

    After each table, the `beam` best partial sums are kept. The search is exact for one table, and
    for two if `beam` is the size of the first.

    Args:
      targets: [d, n].
      tables: m tables [K, d].
      beam: number of partial sums kept.
    Returns:
      int32 [m, n].

    >>> tables = jnp.array([[0.0], [4.0]]), jnp.array([[-1.0], [1.0]])
    >>> nearest(jnp.array([[3.2, 0.7]]), tables, 2).tolist()
    [[1, 0], [0, 1]]
    """
    d, n = targets.shape
    widest = max(len(t) * (beam if i else 1) for i, t in enumerate(tables))
    size = max(1, CHUNK // widest)
    if n <= size:
        return _nearest(targets, tables, beam)
    columns = jnp.pad(targets, ((0, 0), (0, -n % size))).reshape(d, -1, size)
    codes = jax.lax.map(lambda t: _nearest(t, tables, beam), jnp.moveaxis(columns, 1, 0))
    return jnp.moveaxis(codes, 0, 1).reshape(len(tables), -1)[:, :n]


def _nearest(targets: Array, tables: Sequence[Array], beam: int) -> Array:
    n = targets.shape[1]
    rest, cost = targets[None], jnp.zeros((1, n))  # one entry per partial sum
    codes = jnp.zeros((0, 1, n), jnp.int32)
    for i, table in enumerate(tables):
        score = cost[:, None] + distances(rest, table)
        score = score.reshape(-1, n)
        if i + 1 == len(tables):
            best = first_least(score)[None]
        else:
            best = jax.lax.top_k(-score.T, min(beam, len(score)))[1].T
        parent, code = best // len(table), best % len(table)
        cost = jnp.take_along_axis(score, best, 0)
        rest = jnp.take_along_axis(rest, parent[:, None], 0) - jnp.moveaxis(table[code], 2, 1)
        codes = jnp.take_along_axis(codes, parent[None], 1)
        codes = jnp.concatenate([codes, code[None].astype(jnp.int32)])
    return codes[:, 0]


def distances(x: Float[Array, "... d n"], table: Float[Array, "K d"]) -> Float[Array, "... K n"]:
    """Return squared distances [..., K, n] of columns to table rows.

    The squared norms of the columns, which do not affect the minimum, are left out.

    Args:
      x: [..., d, n].
      table: [K, d].
    """
    # Full precision on every device, since the nearest row depends on small differences.
    return jnp.sum(table**2, 1)[:, None] - 2 * jnp.matmul(table, x, precision="highest")


def first_least(x: Float[Array, "K n"]) -> Int32[Array, "n"]:
    """Return the argmin of every column.

    XLA:CPU computes a minimum many times faster than an argmin.

    Args:
      x: [K, n].
    Returns:
      int32 [n].
    """
    rows = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    least = jnp.min(x, axis=0)
    return jnp.min(jnp.where(x <= least, rows, len(x) - 1), axis=0)


def most(gain: Float[Array, "..."], share: float) -> Bool[Array, "..."]:
    """Return a mask of the greatest entries: the given share of them, but only positive ones.

    At least one entry is considered.

    Args:
      gain: [...].
      share: fraction of the entries.
    Returns:
      bool [...].

    >>> most(jnp.array([3.0, -1.0, 2.0, 2.0]), 0.5).tolist()
    [True, False, True, False]
    """
    flat = gain.reshape(-1)
    greatest = jax.lax.top_k(flat, max(1, int(share * flat.size)))[1]
    chosen = jnp.zeros(flat.size, bool).at[greatest].set(True) & (flat > 0)
    return chosen.reshape(gain.shape)
