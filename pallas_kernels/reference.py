"""The jnp meaning of every kernel: it defines correctness, and serves where nothing faster does."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import layout

# Weights dequantized at a time. Past this, output columns are done tile by tile, so that no
# float copy of a large matrix (an embedding's logits, say) ever stands in memory.
TILE_WEIGHTS = 1 << 22


def dequantize(
    codes: Int32[Array, "... w n"],
    scale: Float[Array, "... g n"],
    zero: Int32[Array, "... g wn"] | None,
    *,
    bits: int,
    group_size: int,
    k: int,
    dtype: jnp.dtype,
) -> Float[Array, "... k n"]:
    """Float weights of packed codes: scale * (code - zero), in float32, then cast.

    Args:
      codes: int32 [..., words(k, bits), n], packed along k (`layout.pack`).
      scale: [..., groups, n], or [..., 1, 1] where one scale serves the matrix.
      zero: int32 [..., groups, words(n, bits)], packed along n; None if symmetric.
      bits: bits of a code, 2, 3, 4 or 8.
      group_size: rows of k that share a scale; groups = ceil(k / group_size).
      k: rows, static (the packed axis may be padded).
      dtype: of the result.

    >>> codes = layout.pack(jnp.array([[1], [-2]]), 4)
    >>> dequantize(codes, jnp.array([[0.5]]), None, bits=4, group_size=2, k=2,
    ...            dtype=jnp.float32).ravel().tolist()
    [0.5, -1.0]
    """
    q = layout.unpack(codes, bits, k)
    *batch, groups, width = scale.shape
    full = groups * group_size
    q = jnp.pad(q, [*[(0, 0)] * len(batch), (0, full - k), (0, 0)])  # a short last group
    q = q.reshape(*batch, groups, group_size, -1)
    if zero is not None:
        z = layout.unpack(jnp.swapaxes(zero, -1, -2), bits, width)
        q = q - jnp.swapaxes(z, -1, -2)[..., None, :]
    w = q.astype(jnp.float32) * scale.astype(jnp.float32)[..., None, :]
    return w.reshape(*batch, full, -1)[..., :k, :].astype(dtype)


def packed_matmul(
    x: Float[Array, "m k"],
    codes: Int32[Array, "w n"],
    scale: Float[Array, "g n"],
    zero: Int32[Array, "g wn"] | None,
    *,
    bits: int,
    group_size: int,
) -> Float[Array, "m n"]:
    """x @ dequantize(codes): weights in x's dtype, float32 sums, float32 result.

    The barrier ties what is stored to x: without it XLA lifts the dequantization, which depends
    on nothing that changes, out of a decoding loop, and a float copy of the model appears.
    """
    x, codes, scale, zero = jax.lax.optimization_barrier((x, codes, scale, zero))
    m, k = x.shape
    n = codes.shape[-1]

    def columns(codes: Array, scale: Array, zero: Array | None) -> Array:
        w = dequantize(codes, scale, zero, bits=bits, group_size=group_size, k=k, dtype=x.dtype)
        return jnp.dot(x, w, preferred_element_type=jnp.float32)

    tiles = _tiles(k, n)
    if tiles == 1:
        return columns(codes, scale, zero)
    parts = _split_grid(codes, scale, zero, tiles)
    y = jax.lax.map(lambda t: columns(*t), parts)
    return jnp.moveaxis(y, 0, 1).reshape(m, n)


def packed_matmul_transposed(
    g: Float[Array, "m n"],
    codes: Int32[Array, "w n"],
    scale: Float[Array, "g n"],
    zero: Int32[Array, "g wn"] | None,
    *,
    bits: int,
    group_size: int,
    k: int,
) -> Float[Array, "m k"]:
    """g @ dequantize(codes).T: the cotangent of x, and a weight used the other way round."""
    g, codes, scale, zero = jax.lax.optimization_barrier((g, codes, scale, zero))
    m, n = g.shape

    def add(total: Array, part: tuple) -> tuple[Array, None]:
        g, codes, scale, zero = part
        w = dequantize(codes, scale, zero, bits=bits, group_size=group_size, k=k, dtype=g.dtype)
        return total + jnp.dot(g, w.T, preferred_element_type=jnp.float32), None

    tiles = _tiles(k, n)
    start = jnp.zeros((m, k), jnp.float32)
    if tiles == 1:
        return add(start, (g, codes, scale, zero))[0]
    parts = (_split(g, tiles), *_split_grid(codes, scale, zero, tiles))
    return jax.lax.scan(add, start, parts)[0]


def _tiles(k: int, n: int) -> int:
    """Fewest equal tiles of columns, each a multiple of 32, of at most TILE_WEIGHTS weights."""
    if k * n <= TILE_WEIGHTS or n % 32:
        return 1
    units = n // 32
    fitting = (t for t in range(2, units) if units % t == 0 and k * n // t <= TILE_WEIGHTS)
    return next(fitting, units)


def _split_grid(codes: Array, scale: Array, zero: Array | None, tiles: int) -> tuple:
    """Codes, scales and zero points of each tile; a scale of the whole matrix goes to all."""
    if scale.shape[-1] == 1:
        shared = jax.tree.map(lambda a: jnp.broadcast_to(a, (tiles, *a.shape)), (scale, zero))
        return (_split(codes, tiles), *shared)
    return jax.tree.map(lambda a: _split(a, tiles), (codes, scale, zero))


def _split(a: Array, tiles: int) -> Array:
    """[r, c] -> [tiles, r, c / tiles]."""
    r, c = a.shape
    return jnp.moveaxis(a.reshape(r, tiles, c // tiles), 1, 0)
