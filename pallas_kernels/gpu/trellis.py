"""Trellis codes that are sums of four bytes: a window of the stream, a hash, a byte sum, a weight.

The sum, at most 1020, is the bit pattern of a subnormal float16, which is the weight up to an
offset. Words hold rows of tiles 16 columns wide, so that the sixteen weights of a row of a tile
come from the same words. They become sixteen columns, kept in an order in which no weight moves.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.codecs import trellis
from pallas_kernels.gpu import contraction, rows, tiles, triton
from pallas_kernels.kernel import Kernel

DEPTH = 16
TILES = 16  # number of tiles side by side in a program
OFFSET = 510  # mean of the byte sum
HASHES = {"mul1": (0x83DCD12D, 0), "1mad": (34038481, 76625530)}  # (factor, term)
RATES = (2, 4, 8)  # rates at which a row of a tile is whole words


def unit(code: str, L: int) -> float:
    """Return the weight of a byte sum that is one above the mean.

    Args:
      code: a key of `HASHES`.
      L: number of bits of a state.

    >>> round(unit("mul1", 12), 5)
    0.00678
    """
    first = sum(HASHES[code][1].to_bytes(4, "little")) - OFFSET  # sum of state 0
    return float(trellis.values(code, L, 1)[0, 0]) / first


def sums(words: list[Array], after: Array, rate: int, L: int, code: str) -> list[Array]:
    """Return the byte sums of the sixteen weights of each row of a tile.

    Args:
      words: the words of each row, in order.
      after: the word that follows.
      rate: number of bits per weight.
      L: number of bits of a state.
      code: a key of `HASHES`.
    """
    factor, summand = (jnp.int32(triton.signed(t)) for t in HASHES[code])
    found = []
    for column in range(trellis.SIDE):
        word, at = divmod(column * rate, 32)
        following = words[word + 1] if word + 1 < len(words) else after
        window = triton.funnel(words[word], following, at)
        state = jax.lax.shift_right_logical(window, jnp.int32(32 - L))
        found.append(triton.byte_sum(state * factor + summand))
    return found


def _side_by_side(found: list[Array]) -> Array:
    """Return sixteen arrays [rows, tiles] as float16 [columns, rows].

    Columns run over (high three bits of the column in its tile, top bit of the tile, low bit of the
    column, rest of the tile). The last four bits are the rows of one tensor core instruction, of
    which a thread has two that differ in the first bit; the bit before distinguishes two warps.
    """
    parts = [jax.lax.bitcast_convert_type(t.astype(jnp.int16), jnp.float16) for t in found]
    while len(parts) > 1:
        parts = [jnp.stack(two, axis=-1) for two in zip(parts[::2], parts[1::2], strict=True)]
    high, across = parts[0].shape[:2]  # then bits 0, 1, 2, 3 of the column
    w = parts[0].reshape(high, 2, across // 2, 2, 2, 2, 2)
    return jnp.transpose(w, (6, 5, 4, 1, 3, 2, 0)).reshape(across * trellis.SIDE, high)


def _columns() -> np.ndarray:
    """Return the position of column 16 tile + c of a program."""
    tile, c = np.divmod(np.arange(TILES * trellis.SIDE), trellis.SIDE)
    half, rest = np.divmod(tile, TILES // 2)
    return ((c // 2 * 2 + half) * 2 + c % 2) * (TILES // 2) + rest


def trellis_matmul(
    x: Float[Array, "m k"],
    codes: Int32[Array, "w t"],
    scale: Float[Array, "b 1"],
    *,
    rates: tuple[int, ...],
    L: int,
    code: str,
    activations: str = "float",
) -> Float[Array, "m n"]:
    """Return the product; arguments as in `ops.trellis_matmul`."""
    k, rate = x.shape[1], rates[0]
    per = rate // 2  # words per row of a tile
    wanted = contraction.shape(x, activations)
    columns = TILES * trellis.SIDE
    shape = wanted._replace(rows=min(wanted.rows, 16), columns=columns, warps=2)

    def decode(refs, step: Array, tile: Array) -> Array:
        row = step * DEPTH + jnp.arange(DEPTH)
        words = tiles.units(refs[0], codes.shape, tile, step * DEPTH, DEPTH, per)
        block = row // trellis.SIDE * trellis.SIDE
        after = tiles.rows(refs[0], codes.shape, tile, (block + (row + 1) % trellis.SIDE) * per)
        return _side_by_side(sums(words, after, rate, L, code))

    weights = contraction.Weights(
        n=codes.shape[1] * trellis.SIDE,
        arrays=[codes],
        blocks=[((len(codes), TILES), True)],
        decode=decode,
        depth=DEPTH,
        order=np.arange(DEPTH),
        factor=None,
        shape=shape,
        offset=OFFSET,
        one=rows.ONE,
        scale=scale.astype(jnp.float32) * unit(code, L),
        group_size=k // len(rates),
        columns=_columns(),
    )
    return contraction.product(x, weights, activations, "trellis_matmul")


def serves(
    x, codes, scale, *, rates: tuple[int, ...], L: int, code: str, activations: str = "float"
) -> str:
    """Return "" if the kernel supports the arguments of `trellis_matmul`, otherwise the reason."""
    if code not in HASHES:
        return f"on a GPU, trellis codes are {' and '.join(HASHES)}, not {code}"
    if len({*rates}) > 1 or rates[0] not in RATES:
        return f"on a GPU, a trellis has one rate of {', '.join(map(str, RATES))} bits, not {rates}"
    if x.shape[1] // len(rates) % DEPTH and len(rates) > 1:
        return f"on a GPU, blocks of rows of a trellis are multiples of {DEPTH}"
    return triton.missing()


KERNELS = {"trellis_matmul": Kernel(trellis_matmul, serves)}
