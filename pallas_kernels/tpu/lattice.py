"""Products with E8P codes, looked up and signed in registers; and codes as 4-bit integers.

Four times a coordinate is 2 u + 1 with u from -6 to 5, which gives an integer product and a sum of
x.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels import activations as forms
from pallas_kernels.codecs import e8p, layout
from pallas_kernels.tpu import planes, unpack
from pallas_kernels.tpu.blocks import LANES, Blocks
from pallas_kernels.tpu.product import Decoder, product


def e8p_matmul(
    x: Float[Array, "m k"],
    codes: Int32[Array, "w n"],
    residual: None,
    scale: Float[Array, "1 1"],
    *,
    bits: int = 2,
    activations: str = "float",
    unit: str = planes.INT8,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Float[Array, "m n"]:
    """Return x @ (scale * points) for 2-bit codes, two octets per word.

    It takes half the memory of the result of `transcode`, but is several times slower, because
    gathers limit it.

    Args:
      x, codes, scale: as in `ops.e8p_matmul`.
      residual: None.
      bits: 2.
      activations, unit, blocks, interpret: as in `packed.packed_matmul`.
    """
    decoder = Decoder(
        lambda words, tables: [unpack.integers(_integers(words[0], *tables), 4, unit)],
        (0.5,), (2,), "e8p_matmul", order=_order, longest=128, width=128, slow=True, ahead=6,
    )  # fmt: skip
    y = product(
        x, (codes,), scale, decoder, group=1, tables=[jnp.asarray(t) for t in _tables()],
        activations=activations, unit=unit, blocks=blocks, interpret=interpret,
    )  # fmt: skip
    return y + offset(x, scale, activations)


def offset(x: Float[Array, "m k"], scale: Float[Array, "1 1"], activations: str) -> Array:
    """Return the difference [m, 1] of x @ w and x @ (scale / 2 * u).

    Args:
      x: activations [m, k].
      scale: [1, 1].
      activations: how x is rounded.
    """
    total = jnp.sum(forms.rounded(x, activations).astype(jnp.float32), axis=1, keepdims=True)
    return 0.25 * scale.astype(jnp.float32) * total


@partial(jax.jit, static_argnames="k")
def transcode(codes: Int32[Array, "w n"], k: int) -> Int32[Array, "w4 n"]:
    """Return 4-bit words of u, packed by `layout.pack`.

    They are for `packed_matmul` with scale / 2, plus `offset`. They take twice the bytes of 2-bit
    codes, and have the speed of 4-bit integers.

    Args:
      codes: int32 words [w, n] of 2-bit E8P codes.
      k: number of rows.
    """
    halves = jnp.stack([codes & 0xFFFF, codes >> 16], axis=1).reshape(-1, codes.shape[1])
    points = e8p.decode(halves[: -(-k // 8)])
    u = jnp.round(2 * points - 0.5).astype(jnp.int32).reshape(-1, codes.shape[1])
    return layout.pack(u[:k], 4)


def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Return int32 [8, 128] twice, whose nibbles j are twice coordinate ORDER[j], signed."""
    values = (2 * e8p.table()[:, e8p.ORDER]).astype(np.int64)
    # As in e8p, coordinate 7 is negative where that makes the sum even.
    odd = values.sum(1) // 2 % 2 == 1
    values[:, e8p.ORDER.index(7)] *= np.where(odd, -1, 1)
    words = np.sum((values & 15) << 4 * np.arange(8), axis=1).astype(np.uint32).view(np.int32)
    low, high = words[:LANES], words[LANES:]
    return tuple(np.ascontiguousarray(np.broadcast_to(t, (8, LANES))) for t in (low, high))


def _order(x: Array) -> Array:
    """Reorder 16 octets: the even ones, then the odd ones, each in the order of its nibbles."""
    runs = x.reshape(*x.shape[:-1], -1, 8, 2, 4, 2)
    at = x.ndim - 1
    axes = (*range(at + 1), at + 2, at + 1, at + 4, at + 3)
    return runs.transpose(axes).reshape(x.shape)


def _integers(words: Int32[Array, "w n"], low: Array, high: Array) -> Int32[Array, "2*w n"]:
    """Return the nibbles u of octets: low halves of eight words, then high halves, and so on."""
    chunks = []
    for row in range(0, len(words), 8):
        for half in (0, 16):
            code = words[row : row + 8] >> half
            parts = [
                _octets(code[:, at : at + LANES], low, high)
                for at in range(0, words.shape[1], LANES)
            ]
            chunks.append(jnp.concatenate(parts, axis=1))
    return jnp.concatenate(chunks)


def _octets(code: Int32[Array, "8 128"], low: Array, high: Array) -> Int32[Array, "8 128"]:
    at = (code >> 8) & 127
    take = lambda table: jnp.take_along_axis(table, at, axis=1)
    word = jnp.where(code & 0x8000 != 0, take(high), take(low))
    signs = code & 255
    shift = jax.lax.population_count(signs) & 1
    # Move bit j of the signs to bit 4 j. Nibbles are odd, so that -v is ~v + 1, and v - 1 does not
    # borrow.
    flips = signs ^ shift
    for step, mask in ((12, 0x000F000F), (6, 0x03030303), (3, 0x11111111)):
        flips = (flips | flips << step) & mask
    return (word ^ flips * 15) + flips - shift * 0x11111111
