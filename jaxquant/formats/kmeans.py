"""Weighted k-means: Lloyd's algorithm with a fixed number of steps and bounded memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxquant.core.magnitude import exponent, shifted
from pallas_kernels.codecs import lookup

ROUNDS = 32  # number of rounds in which the initial centroids are drawn


def residual_kmeans(
    vectors: Float[Array, "N d"],
    weights: Float[Array, "N d"],
    sizes: tuple[int, ...],
    key: Array,
    steps: int = 8,
) -> tuple[Float[Array, "K d"], ...]:
    """Learn one table of each size, each on the residuals that the previous tables leave.

    Args:
      vectors: vectors [N, d], each to be approximated by the sum of one row of each table.
      weights: weights [N, d] of the squared errors, not negative.
      sizes: number of rows K of each table.
      key: random key for the initial centroids.
      steps: number of steps of Lloyd's algorithm for each table.
    Returns:
      The tables, each [K, d].
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
    """Draw initial centroids in rounds, with probability proportional to the squared distance.

    The distance is that to the centroids drawn in earlier rounds. Since a few rows or channels hold
    most of the energy, drawing by weight alone would give them hardly any centroid.

    Args:
      vectors: vectors [N, d].
      weights: weights [N, d] of the squared errors.
      size: number of centroids.
      key: random key.

    Source: k-means++ (Arthur and Vassilvitskii 2007), with a share of the centroids at a time as in
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

    zero = jnp.sum(weights * vectors**2, 1)  # squared distances to the first centroid, the origin
    e = exponent(zero)
    table = jnp.zeros((rounds * share, vectors.shape[1]), vectors.dtype)
    return jax.lax.fori_loop(0, rounds, draw, (zero, table))[1][:size]


def lloyd(
    vectors: Float[Array, "N d"],
    weights: Float[Array, "N d"],
    table: Float[Array, "K d"],
    steps: int,
) -> Float[Array, "K d"]:
    """Return the centroids after a number of steps of Lloyd's algorithm.

    A step assigns each vector to its nearest centroid and replaces each centroid by the weighted
    mean of its vectors. It lowers sum_i sum_r weights_ir (vectors_ir - table[a_i]_r)^2. A centroid
    without vectors stays in place.

    Args:
      vectors: vectors [N, d].
      weights: weights [N, d] of the squared errors.
      table: initial centroids [K, d].
      steps: number of steps.

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
    """Return the index of the nearest table row to each vector, and the weighted squared distance.

    Args:
      vectors: vectors [N, d].
      weights: weights [N, d] of the squared errors, which define each vector's metric.
      table: table [K, d].
    """
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
