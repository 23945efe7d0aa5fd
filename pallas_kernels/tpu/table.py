"""Products with codes that select entries of a table of up to 16 values.

The eight sublanes of a register hold the table, entry i in the low half and entry i + 8 in the high
half of a word, so that a gather within the sublanes takes one operation. Values are 16-bit
integers, whose high and low bytes are two operands of the matrix unit, or 8-bit integers where
those are exact.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.tpu import planes, unpack
from pallas_kernels.tpu.blocks import LANES, Blocks
from pallas_kernels.tpu.product import Decoder, product


def codebook_matmul(
    x: Float[Array, "m k"],
    codes: Int32[Array, "w n"],
    scale: Float[Array, "g n"],
    *,
    table: tuple[float, ...],
    bits: int,
    group_size: int,
    activations: str = "float",
    unit: str = planes.INT8,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """Return x @ (scale * table[code]) for tables of 2**bits values.

    Entries are rounded to 16 bits, with an error of at most the largest entry over 65024.

    Args:
      x, codes, scale, table, bits, group_size: as in `ops.codebook_matmul`; bits is 2, 3 or 4.
      activations, unit, blocks, interpret: as in `packed.packed_matmul`.
    """
    entries, weights = integers(table)
    rows = 256 if bits == 3 else 128
    decoder = Decoder(
        lambda words, tables: _operands(_nibbles(words[0], bits), tables[0], len(weights), unit),
        weights, (bits,), f"codebook_matmul_{bits}", order=_ORDERS[bits],
        slice=rows, longest=rows, width=256, slow=True, ahead=3,
    )  # fmt: skip
    return product(
        x, (codes,), scale, decoder, group=group_size, tables=[jnp.asarray(entries)],
        activations=activations, unit=unit, blocks=blocks, interpret=interpret,
    )  # fmt: skip


def integers(table: tuple[float, ...]) -> tuple[np.ndarray, tuple[float, ...]]:
    """Return the register [8, 128] of a table, and the weights of its bytes, high byte first.

    Args:
      table: the 4, 8 or 16 values, in code order.

    >>> integers((0.0, 0.5, 1.0, -1.5) * 4)[1]
    (0.5,)
    """
    values = np.asarray(table, np.float64)
    largest = np.max(np.abs(values)) or 1.0
    whole = [s for s in 2.0 ** np.arange(-8, 9) if np.all(values % s == 0) and largest <= 127 * s]
    step = whole[-1] if whole else largest / (127 * 256)
    codes = np.round(values / step).astype(np.int64)
    # For nibbles of narrower codes, see `_nibbles`.
    nibble = np.arange(16)
    at = {2: nibble % 4, 3: nibble // 2, 4: nibble}[len(table).bit_length() - 1]
    halves = ((codes + 128 & ~255) | codes & 255)[at] & 0xFFFF if not whole else codes[at] & 0xFFFF
    words = (halves[:8] | halves[8:] << 16).astype(np.uint32).view(np.int32)
    register = np.ascontiguousarray(np.broadcast_to(words[:, None], (8, LANES)))
    step = float(step)
    return register, (step,) if whole else (256 * step, step)


def _nibbles(words: Int32[Array, "w n"], bits: int) -> Int32[Array, "v n"]:
    if bits == 3:
        return unpack.nibbles_of_3_bits(words)
    if bits == 2:
        return jnp.concatenate([words & 0x33333333, (words >> 2) & 0x33333333])
    return words


def _fours(x: Array) -> Array:
    """Reorder 64 columns, eight per word: the first fours of all words, then the second fours."""
    runs = x.reshape(*x.shape[:-1], -1, 8, 2, 4)
    return jnp.swapaxes(runs, -3, -2).reshape(x.shape)


def _order_of_2_bits(x: Array) -> Array:
    """Reorder 128 columns: the even ones, then the odd ones, each by `_fours`."""
    runs = x.reshape(*x.shape[:-1], -1, 64, 2)
    return _fours(jnp.swapaxes(runs, -2, -1).reshape(x.shape))


_ORDERS = {
    2: _order_of_2_bits,
    3: lambda x: _fours(unpack.order_of_3_bits(x)),
    4: _fours,
}


def _operands(nibbles: Int32[Array, "w n"], table: Array, count: int, unit: str) -> list[Array]:
    """Return the bytes of the entries, high first if there are two, in the order of `_fours`."""
    entries = jnp.tile(table, (1, nibbles.shape[1] // LANES))
    found: list[list[Array]] = [[] for _ in range(count)]
    for row in range(0, len(nibbles), 8):
        word = nibbles[row : row + 8]
        for first in (0, 4):
            values = [_entry(word >> 4 * i, entries) for i in range(first, first + 4)]
            for place, at in enumerate((8, 0) if count == 2 else (0,)):
                found[place].append(_bytes(values, at))
    return [pltpu.bitcast(jnp.concatenate(f), jnp.int8).astype(unit) for f in found]


def _entry(code: Array, entries: Array) -> Array:
    """Return the entry of the low nibble, in the low half of a word."""
    pair = jnp.take_along_axis(entries, code & 7, axis=0)
    return jax.lax.shift_right_logical(pair, (code << 1) & 16)


def _bytes(values: list[Array], at: int) -> Array:
    """Return bits at ... at + 7 of four words as the bytes of one."""
    word = (values[0] >> at) & 255
    for i in range(1, 4):
        shift = 8 * i - at
        moved = values[i] << shift if shift >= 0 else values[i] >> -shift
        word = word | moved & np.int32((255 << 8 * i) - (1 << 32) * (i == 3))
    return word
