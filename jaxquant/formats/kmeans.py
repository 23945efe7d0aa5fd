"""Weighted k-means: Lloyd's algorithm with a fixed number of steps and bounded memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxquant.core.magnitude import exponent, shifted
from pallas_kernels.codecs import lookup

ROUNDS = 32  # in which the first centroids are drawn


def residual_kmeans(
    vectors: Float[Array, "N d"],
    weights: Float[Array, "N d"],
    sizes: tuple[int, ...],
    key: Array,
    steps: int = 8,
) -> tuple[Float[Array, "K d"], ...]:
    """One table of each size, each learned on what those before it leave.

    Args:
      vectors: to be the sum of one row of each table.
      weights: of their squared errors, not negative.
      sizes: rows K of each table.
      key: draws the first centroids.
      steps: of Lloyd.
    """
    tables = []
    for size, k in zip(sizes, jax.random.split(key, len(sizes)), strict=True):
        table = lloyd(vectors, weights, start(vectors, weights, size, k), steps)
        vectors = vectors - table[assign(vectors, weights, table)[0]]
        tables.append(table)
    return tuple(tables)


def start(
    vectors: Float[Array, "N d"], weights: Float[Array, "N d"], size: int, key: Array
) -> Float[Array, "K d"]:
    """First centroids: vectors drawn in rounds, each by its squared distance to those drawn.

    A few rows or channels hold most of the energy; drawn by weight alone, hardly a centroid
    would be theirs.

    Source: k-means++ (Arthur and Vassilvitskii 2007), a share of the centroids at a time as in
    k-means|| (Bahmani et al. 2012, arXiv:1203.6402).
    """
    share = min(max(1, size // ROUNDS), len(vectors))
    rounds = -(-size // share)

    def draw(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        far, table = state
        luck = jax.random.gumbel(jax.random.fold_in(key, i), far.shape)
        chance = jnp.log(jnp.maximum(shifted(far, -e), 1e-30)) + luck
        new = vectors[jax.lax.top_k(chance, share)[1]]
        table = jax.lax.dynamic_update_slice_in_dim(table, new, i * share, 0)
        return jnp.minimum(far, assign(vectors, weights, new)[1]), table

    zero = jnp.sum(weights * vectors**2, 1)  # distances to the first centroid, the origin
    e = exponent(zero)
    table = jnp.zeros((rounds * share, vectors.shape[1]), vectors.dtype)
    return jax.lax.fori_loop(0, rounds, draw, (zero, table))[1][:size]


def lloyd(
    vectors: Float[Array, "N d"],
    weights: Float[Array, "N d"],
    table: Float[Array, "K d"],
    steps: int,
) -> Float[Array, "K d"]:
    """Centroids after `steps` of: assign to the nearest, take the weighted mean.

    Each step lowers sum_i sum_r weights_ir (vectors_ir - table[a_i]_r)^2. A centroid that serves
    no vector stays.

    >>> x = jnp.array([[0.0], [1.0], [9.0], [10.0]])
    >>> lloyd(x, jnp.array([[1.0], [3.0], [1.0], [1.0]]), x[:2], 4).tolist()
    [[0.75], [9.5]]
    """

    def step(_: Array, table: Array) -> Array:
        near, _ = assign(vectors, weights, table)
        total = lambda a: jax.ops.segment_sum(a, near, len(table))
        mass = total(weights)
        return jnp.where(mass > 0, total(weights * vectors) / jnp.where(mass > 0, mass, 1), table)

    return jax.lax.fori_loop(0, steps, step, table)


def assign(
    vectors: Float[Array, "N d"], weights: Float[Array, "N d"], table: Float[Array, "K d"]
) -> tuple[Int32[Array, "N"], Float[Array, "N"]]:
    """The nearest row of the table to each vector in the vector's own weights, and how far."""
    # sum_r w_r (c_r^2 - 2 v_r c_r + v_r^2), the first two terms as one product.
    rows = jnp.concatenate([table**2, -2 * table], 1)
    size = max(1, min(len(vectors), lookup.CHUNK // len(table)))

    def part(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        v, w = chunk
        far = jnp.matmul(rows, jnp.concatenate([w, w * v], 1).T, precision="highest")
        return lookup.first_least(far), jnp.min(far, 0) + jnp.sum(w * v**2, 1)

    split = lambda a: jnp.pad(a, ((0, -len(a) % size), (0, 0))).reshape(-1, size, a.shape[1])
    near, far = jax.lax.map(part, (split(vectors), split(weights)))
    near, far = (a.reshape(-1)[: len(vectors)] for a in (near, far))
    return near, jnp.maximum(far, 0)
