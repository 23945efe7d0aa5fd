"""E8P, the lattice codebook of QuIP#: 16 bits select one of 65536 points of E8 + 1/4.

A code (a << 8) | s consists of a row a of a table of 256 non-negative half-integer vectors, seven
signs, and a shift by +-1/4. Bit j of s is the sign of coordinate ORDER[j]. The parity p of s is the
shift, and s with bit 0 flipped where p = 1 has an even number of signs, so that the parity required
by the row (an even sum) is preserved. Residual forms add a second, finer point: at 3 bits per
weight one of the 256 points E81B, at 4 bits an E8P point again. The second code is stored above the
first 16 bits.

Source: Tseng et al. 2024, "QuIP#", arXiv:2402.04396. This implementation follows a description of
the code, not the code itself. The search and the (lexicographic) numbering of E81B are ours; the
paper's 3-bit checkpoints may use another numbering.
"""

import itertools
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.codecs import lookup

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
# Bits -> scale of a unit Gaussian that minimizes its mean squared error.
OPT_SCALE = {2: 1.03, 3: 0.98, 4: 1.03}
# Reciprocals of the residual scales 2.04 and 3.45, rounded to 16 bits so that sums of two points
# are exact in float32, whatever the compiler fuses.
FINE = {bits: round(2**16 / scale) / 2**16 for bits, scale in ((3, 2.04), (4, 3.45))}
# Positions of the three entries 1/2 in the table's last 29 rows; the other entries are 3/2.
_HALVES = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 "
    "245 167 157 147 156 146 045 067 057 047 056 046 014 237"
)


def table() -> np.ndarray:
    """Return the 256 rows [256, 8] of the table.

    They are all vectors of {1/2, 3/2, 5/2}^8 of squared norm <= 10, and 29 of norm 12.

    >>> table()[[0, 226, 255], :].tolist()[1]
    [2.5, 1.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    """
    rows = np.array(list(itertools.product((0.5, 1.5, 2.5), repeat=8)), np.float32)
    last = [[0.5 if str(i) in halves else 1.5 for i in range(8)] for halves in _HALVES.split()]
    return np.concatenate([rows[np.sum(rows**2, 1) <= 10], np.float32(last)])


def e81b_table() -> np.ndarray:
    """Return the points of E81B [256, 8].

    They are the 241 points of E8 of squared norm <= 2, and +-2 e_i except -2 e_8.

    >>> np.bincount(np.sum(e81b_table() ** 2, 1).astype(int)).tolist()
    [1, 0, 240, 0, 15]
    """
    whole = np.array(list(itertools.product((-1, 0, 1), repeat=8)), np.float32)
    half = np.array(list(itertools.product((-0.5, 0.5), repeat=8)), np.float32)
    points = np.concatenate([whole, half])
    points = points[(np.sum(points**2, 1) <= 2) & (np.sum(points, 1) % 2 == 0)]
    twice = 2 * np.concatenate([np.eye(8), -np.eye(8)[:7]])
    return np.array(sorted(np.concatenate([points, twice]).tolist()), np.float32)


def _packed(points: np.ndarray) -> np.ndarray:
    """Return uint32 [256] with 2 x + 8 of coordinate ORDER[j] in bits 4 j ... 4 j + 3."""
    nibbles = (2 * points[:, ORDER] + 8).astype(np.uint32)
    return np.sum(nibbles << np.arange(0, 32, 4, dtype=np.uint32), axis=1, dtype=np.uint32)


_TABLE = table()
_ODD = np.sum(_TABLE, 1) % 2 == 1
_BIT = np.argsort(ORDER)  # the sign bit of each coordinate
# Coordinate 7 has the sign that makes the sum even.
WORDS = _packed(np.where(_ODD[:, None] & (np.arange(8) == 7), -_TABLE, _TABLE))
_E81B = e81b_table()
E81B_WORDS = _packed(_E81B)

# --- decode ---------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="bits")
def decode(code: Int[Array, "... n"], bits: int = 2) -> Float[Array, "... 8 n"]:
    """Return the float32 points [..., 8, n] of the codes.

    Args:
      code: integers of 8 * bits bits: the first point in the low 16 bits, the residual above.
      bits: number of bits per weight, 2, 3 or 4.

    >>> decode(jnp.array([0]))[:, 0].tolist()
    [0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75]
    """
    first = _e8p(code)
    if bits == 2:
        return first
    second = _e8p(code >> 16) if bits == 4 else _e81b(code >> 16)
    return first + FINE[bits] * second


def dequantize(
    codes: Int32[Array, "... w n"],
    residual: Int32[Array, "... r n"] | None,
    scale: Float[Array, "... 1 1"],
    *,
    bits: int,
    k: int,
) -> Float[Array, "... k n"]:
    """Return the float32 weights of packed codes: scale times the points.

    Args:
      codes: int32 words [..., w, n] of the low 16 bits of each code, packed by `lookup.pack`.
      residual: int32 words [..., r, n] of the remaining 8 * (bits - 2) bits, packed the same way;
        None at 2 bits.
      scale: [..., 1, 1], the scale of the matrix.
      bits: number of bits per weight, 2, 3 or 4.
      k: number of rows, a multiple of 8.
    Returns:
      [..., k, n].

    >>> words = lookup.pack(jnp.zeros((1, 1, 1), int), 16)
    >>> dequantize(words, None, jnp.array([[2.0]]), bits=2, k=8).ravel().tolist()[:2]
    [1.5, 1.5]
    """
    code = lookup.unpack(codes, 16, k // 8, 1)
    if residual is not None:
        code = code | lookup.unpack(residual, 8 * (bits - 2), k // 8, 1) << 16
    points = decode(code[..., 0, :], bits)
    return scale * points.reshape(*points.shape[:-3], k, points.shape[-1])


def _e8p(code: Array) -> Array:
    s, row = code & 255, (code >> 8) & 255
    shift = jax.lax.population_count(s) & 1
    # Move bit j of the signs to bit 4 j; then negate, (nibble ^ 15) + 1, in all eight nibbles.
    flips = (s ^ shift).astype(jnp.uint32)
    for step, mask in ((12, 0x000F000F), (6, 0x03030303), (3, 0x11111111)):
        flips = (flips | flips << step) & mask
    word = (jnp.asarray(WORDS)[row] ^ flips * 15) + flips
    return _nibbles(word) + jnp.where(shift == 1, jnp.float32(-0.25), 0.25)[..., None, :]


def _e81b(code: Array) -> Array:
    return _nibbles(jnp.asarray(E81B_WORDS)[code & 255])


def _nibbles(word: Array) -> Array:
    """Return the coordinates [..., 8, n], in order, of words [..., n]."""
    nibbles = (word[..., None, :] >> (4 * _BIT[:, None]).astype(np.uint32)) & 15
    return 0.5 * nibbles.astype(jnp.int32).astype(jnp.float32) - 4


# --- nearest --------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="bits")
def nearest(x: Float[Array, "8 n"], bits: int = 2) -> tuple[Int32[Array, "n"], Float[Array, "8 n"]]:
    """Return the code of the nearest point, and the point.

    At 3 or 4 bits, the residual's code is that of the point nearest to the remainder.

    Args:
      x: [8, n], vectors in columns.
      bits: number of bits per weight, 2, 3 or 4.
    Returns:
      int32 codes [n], and points [8, n].

    >>> code, value = nearest(jnp.full((8, 1), 0.7))
    >>> code.tolist(), value[:, 0].tolist()
    ([0], [0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75])
    """
    code, value = _nearest_e8p(x)
    if bits == 2:
        return code, value
    residual = (x - value) / FINE[bits]
    second, fine = _nearest_e8p(residual) if bits == 4 else _nearest_e81b(residual)
    return code | second << 16, value + FINE[bits] * fine


# Sorted in descending order, every row of norm <= 10 has one of seven shapes (given by the entries
# that differ from 1/2), and the best row of a shape is ordered like |x|. So 7 + 29 candidates are
# equivalent to the 256 rows.
_SHAPES = [(), (1.5,), (1.5,) * 2, (1.5,) * 3, (1.5,) * 4, (2.5,), (2.5, 1.5)]
_CANDIDATES = np.concatenate(
    [np.float32([[*shape, *[0.5] * (8 - len(shape))] for shape in _SHAPES]), _TABLE[227:]]
)
# The row of each vector in {1/2, 3/2, 5/2}^8, indexed by the vector as a number in base 3.
_POWERS = 3 ** np.arange(8)
_ROWS = np.zeros(3**8, np.int32)
_ROWS[((_TABLE - 0.5) @ _POWERS).astype(int)] = np.arange(256)
_COORDINATES = np.arange(8)[:, None]
_SHIFTS = np.float32([0.25, -0.25])


def _nearest_e8p(x: Array) -> tuple[Array, Array]:
    """Return codes and points nearest to x.

    Points are half-integer vectors v with an even sum, minus 1/4 or plus 1/4.
    """
    shifted = x + _SHIFTS[:, None, None]
    y, odd = jnp.abs(shifted), _odd_signs(shifted)
    # 2 <v, x + shift> - |v|^2 equals |x|^2 - |x - point|^2 plus 2 shift sum(x) and a constant.
    score = jnp.concatenate([_scores(0, 7, _sorted(y), odd), _scores(7, 36, y, odd)])
    score = score - 2 * _SHIFTS[:, None] * jnp.sum(x, axis=0)
    which = _first_max(score.reshape(72, -1))
    candidate, down = which // 2, 1 - which % 2
    shift = jnp.asarray(_SHIFTS)[which % 2]

    y = jnp.abs(x + shift)
    entry = jnp.where(candidate < 7, _ranks(y), _COORDINATES)
    v = jnp.asarray(_CANDIDATES)[candidate, entry]
    odd_row = jnp.sum(v, axis=0) % 2 == 1
    # Signs are those of x; if the sum would be odd, the cheapest one is flipped.
    other = (odd_row != _odd_signs(x + shift)) & (jnp.argmin(v * y, axis=0) == _COORDINATES)
    negative = (x + shift < 0) != other
    signs = negative != (odd_row & (_COORDINATES == 7))
    s = jnp.sum(signs << _BIT[:, None], axis=0) ^ down
    row = jnp.asarray(_ROWS)[jnp.sum((v - 0.5).astype(jnp.int32) * _POWERS[:, None], axis=0)]
    return (row << 8 | s).astype(jnp.int32), jnp.where(negative, -v, v) - shift


def _scores(start: int, stop: int, y: Array, odd: Array) -> Array:
    """Return [candidates, 2, n]: the best 2 <v, x> - |v|^2 over v's signs, for |x| = y of 2 shifts.

    It is written out by coordinates because XLA vectorizes this form, but not a reduction.
    """
    rows = _CANDIDATES[start:stop]
    products = [rows[:, i, None, None] * y[:, i] for i in range(8)]
    match = (np.sum(rows, 1) % 2 == 1)[:, None, None] == odd
    cost = jnp.where(match, 0, 4 * reduce(jnp.minimum, products))
    return 2 * sum(products) - np.sum(rows**2, 1)[:, None, None] - cost


def _odd_signs(x: Array) -> Array:
    return jnp.sum(x < 0, axis=-2) % 2 == 1


def _ranks(y: Array) -> Array:
    """Return how many coordinates are larger, or as large and earlier."""
    before = _COORDINATES.T < _COORDINATES
    one, other = y[..., :, None, :], y[..., None, :, :]
    larger = (other > one) | ((other == one) & before[:, :, None])
    return jnp.sum(larger, axis=-2)


def _sorted(y: Array) -> Array:
    """Return y in descending order along axis -2; for eight entries faster than `jnp.sort`."""
    here = _ranks(y)[..., None, :, :] == _COORDINATES[:, :, None]
    return jnp.sum(jnp.where(here, y[..., None, :, :], 0), axis=-2)


def _nearest_e81b(x: Array) -> tuple[Array, Array]:
    inner = jnp.matmul(_E81B, x, precision="highest")
    code = _first_max(2 * inner - np.sum(_E81B**2, 1)[:, None])
    return code, _e81b(code)


def _first_max(score: Array) -> Array:
    """Return the argmax over axis 0 by two reductions, which is faster on the CPU."""
    index = np.arange(len(score), dtype=np.int32)[:, None]
    return jnp.min(jnp.where(score == jnp.max(score, axis=0), index, len(score) - 1), axis=0)


# --- the layout of published checkpoints ----------------------------------------------------


def from_quip_words(words: np.ndarray) -> np.ndarray:
    """Return the codes of QuIP#'s `Qidxs`.

    A 64-bit word holds the codes of two outputs and two octets of inputs, in the order (0, 0), (1,
    0), (0, 1), (1, 1): the rows a are bytes 0 to 3, and bit j of the signs of code i is bit 32 + 4
    j + i. Words are arranged in tiles of 16 outputs by 64 inputs.

    Args:
      words: int64 [out, in / 32], or uint32 [out, in / 32, 2], low half first.
    Returns:
      int32 [out, in / 8].
    Raises:
      ValueError: out is not a multiple of 16, in is not a multiple of 64, or the dtype is another.

    >>> from_quip_words(to_quip_words(np.arange(128).reshape(16, 8)))[1].tolist()
    [8, 9, 10, 11, 12, 13, 14, 15]
    """
    if words.dtype.itemsize == 8:
        words = np.ascontiguousarray(words, "<i8").view("<u4").reshape(*words.shape, 2)
    if words.dtype != np.uint32 or words.ndim != 3 or words.shape[0] % 16 or words.shape[1] % 2:
        raise ValueError(
            "expected int64 [out, in / 32] or uint32 [out, in / 32, 2], out a multiple of 16 and "
            f"in of 64; got {words.dtype} {list(words.shape)}"
        )
    outputs, quarters, _ = words.shape
    low, high = np.moveaxis(words.astype(np.int64), -1, 0)
    codes = np.zeros((4, outputs, quarters), np.int32)
    for i in range(4):
        codes[i] = (low >> 8 * i & 255) << 8
        for j in range(8):
            codes[i] |= (high >> 4 * j + i & 1) << j
    # [octet, output of a pair; tiles down, tiles across; pairs down, pairs across]
    tiles = codes.reshape(2, 2, outputs // 16, quarters // 2, 8, 4)
    return tiles.transpose(2, 4, 1, 3, 5, 0).reshape(outputs, quarters * 4)


def to_quip_words(codes: Int[np.ndarray, "out octets"]) -> np.ndarray:
    """Return the words, int64 [out, in / 32], of codes [out, in / 8].

    It is the inverse of `from_quip_words`.

    Args:
      codes: int32 [out, in / 8].
    Raises:
      ValueError: out is not a multiple of 16, or in is not a multiple of 64.
    """
    outputs, octets = codes.shape
    if outputs % 16 or octets % 8:
        raise ValueError(
            "the layout of QuIP# needs a multiple of 16 outputs and of 64 inputs, "
            f"got codes of {outputs} outputs and {8 * octets} inputs"
        )
    tiles = codes.astype(np.uint64).reshape(outputs // 16, 8, 2, octets // 8, 4, 2)
    parts = tiles.transpose(5, 2, 0, 3, 1, 4).reshape(4, outputs, octets // 4)
    words = np.zeros((outputs, octets // 4), np.uint64)
    for i in range(4):
        words |= (parts[i] >> np.uint64(8)) << np.uint64(8 * i)
        for j in range(8):
            words |= (parts[i] >> np.uint64(j) & np.uint64(1)) << np.uint64(32 + 4 * j + i)
    return words.view(np.int64)
