"""Products with weights decoded from packed data by a `decode` function, tile by tile of columns.

They serve formats without a kernel of their own. No floating-point copy of a large matrix is held
in memory, neither in the forward pass nor as a residual for the backward pass. Every function takes

  data: the packed arrays of one matrix [k, n].
  decode: (data, k) -> float [k, n]. Applied to a slice of the columns of `data`, it returns those
    columns. Floating-point entries (scales, codebooks) receive the cotangents of `decode`.
  spans: name -> number of columns that one entry along the last axis covers. Arrays not named here
    serve all columns (a codebook, the scale of a matrix). "codes" must be named.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Data = dict[str, Array]
Decode = Callable[[Data, int], Array]
# Number of weights decoded at a time. Larger matrices are decoded tile by tile, so that no
# floating-point copy of one (an embedding used for logits, for example) is ever held in memory.
TILE_WEIGHTS = 1 << 22


def matmul(
    x: Float[Array, "m k"], data: Data, decode: Decode, spans: Mapping[str, int]
) -> Float[Array, "m n"]:
    """Return x @ decode(data), with weights in x's dtype and float32 sums.

    Args:
      x: [m, k].
      data, decode, spans: see the module docstring.
    Returns:
      float32 [m, n].

    >>> decode = lambda data, k: data["codes"] * data["scale"]
    >>> data = {"codes": jnp.array([[1, -2]]), "scale": jnp.array([[0.5]])}
    >>> matmul(jnp.ones((1, 1)), data, decode, {"codes": 1}).tolist()
    [[0.5, -1.0]]
    """
    (m, k), n = x.shape, outputs(data, spans)
    if 0 in (m, k, n):
        return jnp.zeros((m, n), jnp.float32)
    tiles, size = _tiles(k, n, spans)

    @jax.checkpoint  # the backward pass decodes again
    def columns(x: Array, data: Data, tile: Array | int) -> Array:
        x, data = jax.lax.optimization_barrier((x, data))  # keeps decoding inside the loop
        w = decode(_cut(data, spans, _start(tile, size, n), size), k).astype(x.dtype)
        return jnp.dot(x, w, preferred_element_type=jnp.float32)

    if tiles == 1:
        return columns(x, data, 0)
    y = jax.lax.map(lambda tile: columns(x, data, tile), jnp.arange(tiles))
    head = jnp.moveaxis(y[:-1], 0, 1).reshape(m, -1)
    return jnp.concatenate([head, y[-1, :, head.shape[1] - n :]], axis=1)


def matmul_transposed(
    g: Float[Array, "m n"], data: Data, decode: Decode, spans: Mapping[str, int], k: int
) -> Float[Array, "m k"]:
    """Return g @ decode(data).T, with weights in g's dtype and float32 sums.

    Args:
      g: [m, n].
      data, decode, spans: see the module docstring.
      k: number of rows of the matrix.
    Returns:
      float32 [m, k].

    >>> decode = lambda data, k: data["codes"] * data["scale"]
    >>> data = {"codes": jnp.array([[1, -2]]), "scale": jnp.array([[0.5]])}
    >>> matmul_transposed(jnp.ones((1, 2)), data, decode, {"codes": 1}, 1).tolist()
    [[-0.5]]
    """
    m, n = g.shape
    if 0 in (m, k, n):
        return jnp.zeros((m, k), jnp.float32)
    tiles, size = _tiles(k, n, spans)

    @jax.checkpoint
    def part(g: Array, data: Data, tile: Array | int) -> Array:
        g, data = jax.lax.optimization_barrier((g, data))
        start = _start(tile, size, n)
        w = decode(_cut(data, spans, start, size), k).astype(g.dtype)
        here = jax.lax.dynamic_slice_in_dim(g, start, size, 1)
        fresh = start + jnp.arange(size) >= tile * size  # not in the previous tile
        here = jnp.where(fresh, here, 0)
        # Not g @ w.T: for a single row XLA:CPU would decode in transposed order, which is much
        # slower.
        return jnp.einsum("mn,kn->mk", here, w, preferred_element_type=jnp.float32)

    if tiles == 1:
        return part(g, data, 0)
    add = lambda total, tile: (total + part(g, data, tile), None)
    return jax.lax.scan(add, jnp.zeros((m, k), jnp.float32), jnp.arange(tiles))[0]


def columns(
    data: Data, ids: Int[Array, "i"], decode: Decode, spans: Mapping[str, int], k: int
) -> Float[Array, "k i"]:
    """Return columns `ids` of decode(data), decoding only the entries that hold them.

    Args:
      data, decode, spans: see the module docstring.
      ids: column indices [i].
      k: number of rows of the matrix.
    Returns:
      [k, i], in the dtype of `decode`.

    >>> data = {"codes": jnp.array([[1, -2, 3]])}
    >>> columns(data, jnp.array([2, 0]), lambda data, k: data["codes"], {"codes": 1}, 1).tolist()
    [[3, 1]]
    """
    if 0 in (k, len(ids)):
        return jnp.zeros((k, len(ids)), jnp.float32)
    unit = math.lcm(*spans.values())

    def take(a: Array, span: int) -> Array:
        entries = ids[:, None] // unit * (unit // span) + np.arange(unit // span)
        return a[..., entries.reshape(-1)]

    part = {name: take(a, spans[name]) if name in spans else a for name, a in data.items()}
    w = decode(part, k).reshape(k, len(ids), unit)
    return jnp.take_along_axis(w, (ids % unit)[None, :, None], axis=-1)[..., 0]


def outputs(data: Data, spans: Mapping[str, int]) -> int:
    """Return the number of columns n of the matrix.

    Args:
      data, spans: see the module docstring.
    """
    return data["codes"].shape[-1] * spans["codes"]


def _tiles(k: int, n: int, spans: Mapping[str, int]) -> tuple[int, int]:
    """Return the number and width of the fewest tiles of at most TILE_WEIGHTS weights.

    The last tile ends at the last column, so it may overlap the previous one.
    """
    unit = math.lcm(*spans.values())
    most = max(1, TILE_WEIGHTS // (k * unit)) * unit
    size = -(-n // (-(-n // most) * unit)) * unit
    return -(-n // size), size


def _start(tile: Array | int, size: int, n: int) -> Array:
    return jnp.minimum(tile * size, n - size)


def _cut(data: Data, spans: Mapping[str, int], start: Array, size: int) -> Data:
    """Return the slice of the data that holds columns start ... start + size - 1."""
    cut = lambda a, span: jax.lax.dynamic_slice_in_dim(a, start // span, size // span, a.ndim - 1)
    return {name: cut(a, spans[name]) if name in spans else a for name, a in data.items()}
