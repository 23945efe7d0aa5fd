"""Floats without loss in planes of fixed length: a window of exponents, other bits as they are.

The exponents of trained weights are concentrated: of each column of a matrix [k, n], almost all lie
in a window of 7 or 15 consecutive ones. A float is stored as

    | code: exponent - base of its column, `bits` bits | rest: sign and mantissa |

Codes are packed along k (`layout`), as rests are (`float_fields`). The largest code says that the
exponent is outside of the window: it is an *escape*.

    bits = 3    The column has a word `near` for every 128 rows, with 3 bits for each of the first
                10 escapes there, low bits first: d means the exponent max(base - 1 - d, 0).
                Escapes past the tenth, and those with other exponents (7 is stored), are *listed*.
    bits = 4    Every escape is listed.

Listed floats have an entry in two arrays: `where`, their places column * k + row in ascending
order, and `exponent`. Unused entries have the place `NOWHERE`. Nothing depends on anything before
it in the matrix, except for the number of escapes in the 128 rows of a column, so that a tile is
decoded by itself.

Kernels first take *provisional* weights, and then add what listed ones lack. Provisionally, the
exponent of a listed float is the one that its 3 bits give (0 past the tenth escape). At 4 bits its
weight is 0, or in kernels that do not test codes, it has the exponent base + 15. So that a
provisional weight is neither large nor infinite, `base` is 16 to 239 in columns with escapes if
exponents have 8 bits.

Source: fixed-length codes of exponents are ZipServ's idea, arXiv:2603.17435. The layout differs:
the window is each column's own, and most escapes take 3 bits in a place that is known.
"""

import functools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, UInt, UInt8, UInt32

from pallas_kernels.codecs import float_fields, layout

BITS = (3, 4)  # widths of a code
BLOCK = 128  # rows that share a word of `near`
NEAR = 10  # escapes that a word of `near` describes, of 3 bits each
NOWHERE = (1 << 31) - 1  # place of an unused entry of the list
_LEAST_BASE, _MOST_BASE = 16, 239  # of a column with escapes
BY_COLUMN = ("codes", "rest", "base", "near")  # arrays whose last axis runs along the columns


class Planes(NamedTuple):
    """The packed arrays of one matrix.

    Attributes:
      codes: int32 words [layout.words(k, bits), n] of window codes.
      rest: int32 words of sign and mantissa, the planes of `DTYPES` one after another along axis 0.
      base: uint8 [1, n], the exponent of code 0 in each column.
      near: int32 [ceil(k / 128), n], what escapes mean; None at 4 bits.
      where: int32 [e], ascending places column * k + row of listed floats.
      exponent: uint8 [e], their exponents.
    """

    codes: Int32[Array, "w n"]
    rest: Int32[Array, "r n"]
    base: UInt8[Array, "1 n"]
    near: Int32[Array, "b n"] | None
    where: Int32[Array, " e"]
    exponent: UInt8[Array, " e"]


class Unlisted(NamedTuple):
    """The planes of a matrix whose list is still empty.

    Attributes:
      planes: the packed arrays.
      apart: [k, n], True for the floats that are to be listed.
      exponent: int32 [k, n], the exponents of all floats.
    """

    planes: Planes
    apart: Bool[Array, "k n"]
    exponent: Int32[Array, "k n"]

    @property
    def needed(self) -> Int32[Array, ""]:
        """Number of entries that the list needs."""
        return jnp.sum(self.apart, dtype=jnp.int32)


# --- encoding -------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("dtype", "bits"))
def _coded(
    u: UInt[Array, "k n"], *, dtype: str, bits: int
) -> tuple[Planes, Bool[Array, "k n"], Int32[Array, "k n"]]:
    """Return the planes without a list, which floats are to be listed, and all exponents."""
    exponent, rest = float_fields.fields(u, dtype)
    base = _bases(exponent, bits, float_fields.DTYPES[dtype][0])
    top = (1 << bits) - 1
    code = exponent - base
    escaped = (code < 0) | (code >= top)
    codes = layout.pack(jnp.where(escaped, top, code), bits)
    near, listed = None, escaped
    if bits == 3:
        d = base - 1 - exponent
        described = (d >= 0) & (d <= 7)
        d = _blocks(jnp.where(escaped, jnp.where(described, d, 7), 0))
        rank = _ranks(escaped)
        held = rank < NEAR
        listed = escaped & ~(_rows(held, len(u)) & described)
        placed = jnp.where(held, d.astype(jnp.uint32) << _shift(rank), 0)
        near = jax.lax.bitcast_convert_type(jnp.sum(placed, axis=1, dtype=jnp.uint32), jnp.int32)
    none = jnp.zeros(0, jnp.int32)
    parts = Planes(
        codes,
        float_fields.packed_rests(rest, dtype),
        base.astype(jnp.uint8)[None],
        near,
        none,
        none,
    )
    return parts, listed, exponent


def encode(u: UInt[Array, "k n"], dtype: str, bits: int, listed: int | None = None) -> Planes:
    """Return the planes of a matrix of floats.

    Args:
      u: the bits of the floats [k, n], of `float_fields.unsigned(dtype)`; k n < 2^31.
      dtype: a key of `float_fields.DTYPES`.
      bits: width of a code, 3 or 4.
      listed: number of entries of the list, at least 1; None for as many as are needed, which needs
        concrete values.
    Returns:
      The planes. If more floats are to be listed than the list has entries, they decode to NaN
      throughout.

    >>> w = jnp.array([[1.0], [-0.75], [3e38]], jnp.bfloat16)
    >>> u = jax.lax.bitcast_convert_type(w, jnp.uint16)
    >>> planes = encode(u, "bfloat16", 3)
    >>> planes.where.tolist(), planes.exponent.tolist()
    ([2], [254])
    >>> bool((decode(planes, dtype="bfloat16", bits=3, k=3) == u).all())
    True
    """
    float_fields.check_size(*u.shape)
    coded = unlisted(u, dtype, bits)
    return with_list(coded, max(1, int(coded.needed)) if listed is None else listed, dtype)


def unlisted(u: UInt[Array, "k n"], dtype: str, bits: int) -> Unlisted:
    """Return the planes of a matrix before its list has a size.

    Args:
      u, dtype, bits: see `encode`.
    """
    return Unlisted(*_coded(u, dtype=dtype, bits=bits))


def with_list(coded: Unlisted, listed: int, dtype: str) -> Planes:
    """Return planes with a list of some size; they decode to NaN if it is too short.

    Args:
      coded: what `unlisted` returns.
      listed: number of entries of the list.
      dtype: a key of `float_fields.DTYPES`.
    """
    where, values = _listed(coded.apart, coded.exponent, listed)
    planes = coded.planes._replace(where=where, exponent=values)
    return _or_nan(planes, coded.needed <= listed, dtype)


@partial(jax.jit, static_argnums=2)
def _listed(apart: Array, exponent: Array, size: int) -> tuple[Array, Array]:
    """Return places and exponents of the floats that are listed, in column order."""
    flat = apart.T.reshape(-1)
    (where,) = jnp.nonzero(flat, size=size, fill_value=NOWHERE)
    values = exponent.T.reshape(-1).at[where].get(mode="fill", fill_value=0)
    return where.astype(jnp.int32), values.astype(jnp.uint8)


def _or_nan(planes: Planes, whole: Bool[Array, ""], dtype: str) -> Planes:
    """Return the planes, or planes that decode to NaN unless they are whole."""
    last = (1 << float_fields.DTYPES[dtype][0]) - 1
    return Planes(
        jnp.where(whole, planes.codes, 0),
        jnp.where(whole, planes.rest, -1),
        jnp.where(whole, planes.base, last).astype(jnp.uint8),
        planes.near,
        jnp.where(whole, planes.where, NOWHERE),
        planes.exponent,
    )


def missing(u: UInt[Array, "k n"], dtype: str, bits: int) -> Int32[Array, ""]:
    """Return how many floats of a matrix are to be listed.

    Args:
      u, dtype, bits: see `encode`.

    >>> u = jnp.full((256, 1), 0x3F80, jnp.uint16).at[7].set(0xFFFF)
    >>> int(missing(u, "bfloat16", 3))
    1
    """
    return unlisted(u, dtype, bits).needed


def nbytes(k: int, n: int, dtype: str, bits: int, listed: int) -> int:
    """Return the number of bytes of all planes of a matrix.

    Args:
      k, n: number of rows and columns.
      dtype: a key of `float_fields.DTYPES`.
      bits: width of a code, 3 or 4.
      listed: number of entries of the list.

    >>> 8 * nbytes(4096, 11008, "bfloat16", 3, 0) / (4096 * 11008)
    11.251953125
    """
    words = layout.words(k, bits) + float_fields.rest_words(k, dtype)
    return (4 * (words + (-(-k // BLOCK) if bits == 3 else 0)) + 1) * n + 5 * listed


def _bases(exponent: Int32[Array, "k n"], bits: int, width: int) -> Int32[Array, " n"]:
    """Return the base of each column for which the fewest floats are expected to be listed."""
    k, n = exponent.shape
    size, window = 1 << width, (1 << bits) - 1
    count = jnp.zeros((n, size), jnp.int32).at[jnp.arange(n), exponent].add(1)
    below = jnp.pad(jnp.cumsum(count, axis=1), ((0, 0), (1, 0)))  # number of smaller exponents
    base = jnp.arange(size)
    under = below[:, base]
    far = under - below[:, jnp.maximum(base - 8, 0)] if bits == 3 else 0  # what `near` describes
    inside = below[:, jnp.minimum(base + window, size)] - under
    price = (k - inside - far).astype(jnp.float32)
    if bits == 3:
        price += jnp.asarray(_past_tenth(k))[k - inside]
    if width == 8:
        outside = (base < _LEAST_BASE) | (base > _MOST_BASE)
        price = jnp.where(outside & (inside < k), jnp.inf, price)
    return jnp.argmin(price, axis=1).astype(jnp.int32)


@functools.lru_cache(maxsize=64)
def _past_tenth(k: int) -> Float32[np.ndarray, " e"]:
    """Return how many of 0, 1, ..., k escapes of a column are expected to come after the tenth of
    their block, if those of a block are Poisson distributed.
    """
    mean = np.arange(k + 1) * (min(BLOCK, k) / max(k, 1))
    at_least = scipy.special.gammainc
    past = mean * at_least(NEAR, mean) - NEAR * at_least(NEAR + 1, mean)
    return (-(-k // BLOCK) * past).astype(np.float32)


def _blocks(a: Int[Array, "k n"]) -> Int[Array, "b 128 n"]:
    """Return blocks of 128 rows, zero-padded."""
    k, n = a.shape
    return jnp.pad(a, ((0, -k % BLOCK), (0, 0))).reshape(-(-k // BLOCK), BLOCK, n)


def _rows(a: Int[Array, "b 128 n"], k: int) -> Int[Array, "k n"]:
    """Return the first k rows of blocks; the inverse of `_blocks`."""
    return a.reshape(a.shape[0] * BLOCK, a.shape[-1])[:k]


def _ranks(escaped: Bool[Array, "k n"]) -> Int32[Array, "b 128 n"]:
    """Return the number of escapes before each row, within its block and column."""
    one = _blocks(escaped.astype(jnp.int32))
    return jnp.cumsum(one, axis=1) - one


def _shift(rank: Int32[Array, "*s"]) -> UInt32[Array, "*s"]:
    """Return the place of an escape's bits in its word of `near`."""
    return 3 * jnp.minimum(rank, NEAR - 1).astype(jnp.uint32)


# --- decoding -------------------------------------------------------------------------------


def provisional(
    planes: Planes, *, bits: int, k: int
) -> tuple[Int32[Array, "k n"], Bool[Array, "k n"]]:
    """Return the exponents before the list is read, and where they are the true ones.

    Args:
      planes: the packed arrays.
      bits: width of a code, 3 or 4.
      k: number of rows.
    Returns:
      int32 [k, n], and at 3 bits all True; at 4 bits False for escapes, whose weight is 0.
    """
    top = (1 << bits) - 1
    code, base = layout.unpack(planes.codes, bits, k) & top, planes.base.astype(jnp.int32)
    inside = code < top
    if bits == 4:
        return jnp.where(inside, base + code, 0), inside
    rank = _ranks(~inside)
    words = jax.lax.bitcast_convert_type(planes.near, jnp.uint32)[:, None, :]
    d = jnp.where(rank < NEAR, words >> _shift(rank) & 7, 0).astype(jnp.int32)
    near = jnp.maximum(base - 1 - _rows(d, k), 0)
    return jnp.where(inside, base + code, near), jnp.ones_like(inside)


def decode(
    planes: Planes, *, dtype: str, bits: int, k: int, first: Int[Array, ""] | int = 0
) -> UInt[Array, "k n"]:
    """Return the bits of the floats of a matrix, or of some consecutive columns of it.

    Args:
      planes: the packed arrays; all but the list may be those of some consecutive columns.
      dtype: a key of `float_fields.DTYPES`.
      bits: width of a code, 3 or 4.
      k: number of rows.
      first: index of the first column.
    """
    exponent, _ = provisional(planes, bits=bits, k=k)
    n = exponent.shape[1]
    row, column = planes.where % k, planes.where // k - first
    # A negative index would count from the end.
    column = jnp.where((planes.where < NOWHERE) & (column >= 0), column, n)
    exponent = exponent.at[row, column].set(planes.exponent.astype(jnp.int32), mode="drop")
    return float_fields.joined(exponent, float_fields.rests(planes.rest, dtype, k), dtype)


def columns(
    planes: Planes, ids: Int[Array, " i"], *, dtype: str, bits: int, k: int
) -> UInt[Array, "k i"]:
    """Return the bits of columns `ids`, decoding only these.

    Args:
      planes: the packed arrays of the whole matrix.
      ids: column indices [i].
      dtype, bits, k: see `decode`.
    """
    of = lambda a: None if a is None else a[:, ids]
    some = planes._replace(**{name: of(getattr(planes, name)) for name in BY_COLUMN})
    exponent, _ = provisional(some, bits=bits, k=k)
    place = ids.astype(jnp.int32) * k + jnp.arange(k, dtype=jnp.int32)[:, None]
    at = jnp.minimum(jnp.searchsorted(planes.where, place), len(planes.where) - 1)
    told = planes.where[at] == place
    exponent = jnp.where(told, planes.exponent[at].astype(jnp.int32), exponent)
    return float_fields.joined(exponent, float_fields.rests(some.rest, dtype, k), dtype)


def lacking(
    planes: Planes, *, dtype: str, bits: int, k: int, tested: bool = True
) -> tuple[Int32[Array, " e"], Int32[Array, " e"], Float[Array, " e"]]:
    """Return rows, columns and what to add to the provisional weights of listed floats.

    Args:
      planes: the packed arrays of a matrix.
      dtype, bits, k: see `decode`.
      tested: whether 4-bit codes were tested. If not, provisional escapes have the exponent base +
        15. Default: True.
    Returns:
      Row and column of each entry (column n for unused entries), and the float32 difference between
      the weight and its provisional value.
    """
    n = planes.codes.shape[1]
    row, column = planes.where % k, jnp.minimum(planes.where // k, n - 1)
    exponent, known = _entries(planes, row, column, bits, tested)
    rest = float_fields.rests_at(planes.rest, row, column, dtype, k)
    value = lambda e: float_fields.floats(float_fields.joined(e, rest, dtype), dtype).astype(
        jnp.float32
    )
    true, seen = value(planes.exponent.astype(jnp.int32)), jnp.where(known, value(exponent), 0)
    used = planes.where < NOWHERE
    return row, jnp.where(used, column, n), jnp.where(used, true - seen, 0)


def _entries(
    planes: Planes, row: Array, column: Array, bits: int, tested: bool
) -> tuple[Array, Array]:
    """Return the provisional exponents of single floats, and whether these are not the weight 0."""
    base = planes.base[0, column].astype(jnp.int32)
    if bits == 4:
        return base + 15, jnp.full(len(row), not tested)
    run, per = layout.unit(bits)
    rows = jnp.arange(BLOCK)
    words = planes.codes.reshape(-1, per, planes.codes.shape[1])
    blocks = row // BLOCK * (BLOCK // run) + jnp.arange(BLOCK // run)[:, None]
    words = words.at[blocks, :, column].get(mode="fill", fill_value=0)  # [runs, e, words]
    block = jnp.moveaxis(words, 2, 1).reshape(-1, len(row))
    escaped = (layout.unpack(block, bits, BLOCK) & 7) == 7
    rank = jnp.sum(escaped & (rows[:, None] < row % BLOCK), axis=0)
    word = jax.lax.bitcast_convert_type(planes.near[row // BLOCK, column], jnp.uint32)
    d = jnp.where(rank < NEAR, word >> _shift(rank) & 7, 0)
    return jnp.maximum(base - 1 - d.astype(jnp.int32), 0), jnp.ones(len(row), bool)
