"""Products with weights that a `decode` function makes from packed data, by tiles of columns.

For formats with no kernel of their own: no float copy of a large matrix stands in memory, neither
forward nor, as a residual, backward. Every function takes

  data: the packed arrays of one matrix [k, n].
  decode: (data, k) -> float [k, n]; a part of the columns of `data` decodes to these columns.
    Float entries (scales, codebooks) get the cotangents of `decode`.
  spans: name -> columns of the matrix that one entry along the last axis covers. Arrays not
    named here serve all columns (a codebook, the scale of a matrix). Names "codes".
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Data = dict[str, Array]
Decode = Callable[[Data, int], Array]
# Weights decoded at a time. Past this, columns are done tile by tile, so that no float copy of a
# large matrix (an embedding's logits, say) ever stands in memory.
TILE_WEIGHTS = 1 << 22


def matmul(
    x: Float[Array, "m k"], data: Data, decode: Decode, spans: Mapping[str, int]
) -> Float[Array, "m n"]:
    """x @ decode(data): weights in x's dtype, float32 sums, float32 result.

    >>> decode = lambda data, k: data["codes"] * data["scale"]
    >>> data = {"codes": jnp.array([[1, -2]]), "scale": jnp.array([[0.5]])}
    >>> matmul(jnp.ones((1, 1)), data, decode, {"codes": 1}).tolist()
    [[0.5, -1.0]]
    """
    (m, k), n = x.shape, outputs(data, spans)
    if 0 in (m, k, n):
        return jnp.zeros((m, n), jnp.float32)
    tiles, size = _tiles(k, n, spans)

    @jax.checkpoint  # backward decodes again
    def columns(x: Array, data: Data, tile: Array | int) -> Array:
        x, data = jax.lax.optimization_barrier((x, data))  # nothing is lifted out of the loop
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
    """g @ decode(data).T: weights in g's dtype, float32 sums, float32 result.

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
        fresh = start + jnp.arange(size) >= tile * size  # the tile before had the others
        here = jnp.where(fresh, here, 0)
        # Not w.T: for one row XLA:CPU would decode in the transposed order, much slower.
        return jnp.einsum("mn,kn->mk", here, w, preferred_element_type=jnp.float32)

    if tiles == 1:
        return part(g, data, 0)
    add = lambda total, tile: (total + part(g, data, tile), None)
    return jax.lax.scan(add, jnp.zeros((m, k), jnp.float32), jnp.arange(tiles))[0]


def columns(
    data: Data, ids: Int[Array, "i"], decode: Decode, spans: Mapping[str, int], k: int
) -> Float[Array, "k i"]:
    """Columns `ids` of decode(data), of which only the entries that hold them are decoded.

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
    """Columns n of the matrix."""
    return data["codes"].shape[-1] * spans["codes"]


def _tiles(k: int, n: int, spans: Mapping[str, int]) -> tuple[int, int]:
    """Number and columns of the fewest tiles of at most TILE_WEIGHTS weights.

    The last tile ends with the matrix, and so may begin within the tile before.
    """
    unit = math.lcm(*spans.values())
    most = max(1, TILE_WEIGHTS // (k * unit)) * unit
    size = -(-n // (-(-n // most) * unit)) * unit
    return -(-n // size), size


def _start(tile: Array | int, size: int, n: int) -> Array:
    return jnp.minimum(tile * size, n - size)


def _cut(data: Data, spans: Mapping[str, int], start: Array, size: int) -> Data:
    """The part of the data that holds columns start ... start + size."""
    cut = lambda a, span: jax.lax.dynamic_slice_in_dim(a, start // span, size // span, a.ndim - 1)
    return {name: cut(a, spans[name]) if name in spans else a for name, a in data.items()}
