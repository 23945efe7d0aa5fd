"""Streams of trellis codes with four weights per step, interleaved over words for wide registers.

Step t of a tile is field t // words of word t % words, with fields counted from the low bits. At
two bits per weight, byte j of word w is step 16 j + w. A successor is therefore in the same byte of
the next word, so that two words give the states of four steps without a shift (for the last word,
with one rotation of the first). It also holds the same four rows of the next column, so that the
bytes of a word are four rows each, in order.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32

_SIDE = 16  # rows and columns of a tile


def fits(K: int, V: int) -> bool:
    """Return whether streams of K bits per weight have this layout: V = 4, and K V divides 32.

    Args:
      K: number of bits per weight.
      V: number of weights per step.

    >>> fits(2, 4), fits(3, 4), fits(2, 1)
    (True, False, False)
    """
    return V == 4 and 32 % (K * V) == 0


def pack(symbols: Int[Array, "s steps"], bits: int) -> Int32[Array, "s words"]:
    """Return the words of streams, given the bits that each step adds.

    Args:
      symbols: [s, steps].
      bits: number of bits per step.
    """
    s, steps = symbols.shape
    fields = symbols.astype(jnp.uint32).reshape(s, 32 // bits, steps * bits // 32)
    words = jnp.sum(fields << _low(bits), axis=1, dtype=jnp.uint32)  # bits are disjoint
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def states(words: Int32[Array, "... words"], L: int, bits: int) -> Int32[Array, "... steps"]:
    """Return the state of every step: its own bits at the top, then those of the following steps.

    Args:
      words: int32 [..., words].
      L: number of bits of a state.
      bits: number of bits per step.
    Returns:
      int32 [..., steps].

    >>> import jax.numpy as jnp
    >>> states(jnp.array([[0x04030201, 0x14131211]]), 16, 8)[0, :3].tolist() == [
    ...     0x0111, 0x1102, 0x0212]
    True
    """
    here = jax.lax.bitcast_convert_type(words, jnp.uint32)
    fields = (here[..., None, :] >> _low(bits)) & np.uint32((1 << bits) - 1)
    symbols = fields.reshape(*words.shape[:-1], -1)
    count = -(-L // bits)
    state = jnp.zeros_like(symbols)
    for i in range(count):
        state = (state << bits) | jnp.roll(symbols, -i, axis=-1)
    return (state >> (count * bits - L)).astype(jnp.int32)


def tiles(w: jax.Array) -> jax.Array:
    """Return a block of 16 rows [16, n] as tiles [n / 16, 256] in the order of their steps.

    Args:
      w: [16, n].
    """
    quads = w.reshape(4, 4, -1, _SIDE)  # four rows each: (quad, row, tile, column)
    return jnp.transpose(quads, (2, 0, 3, 1)).reshape(-1, _SIDE * _SIDE)


def untiled(weights: jax.Array) -> jax.Array:
    """Return tiles [..., t, 256] as rows [..., 16, 16 t]; the inverse of `tiles`.

    Args:
      weights: [..., t, 256].
    """
    *batch, t, _ = weights.shape
    quads = weights.reshape(*batch, t, 4, _SIDE, 4)  # (tile, quad, column, row)
    quads = jnp.moveaxis(quads, (-3, -1, -4, -2), (-4, -3, -2, -1))
    return quads.reshape(*batch, _SIDE, t * _SIDE)


def _low(bits: int) -> np.ndarray:
    """Return the lowest bit of every field, [fields, 1]."""
    return np.arange(0, 32, bits, dtype=np.uint32)[:, None]
