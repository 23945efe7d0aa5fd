"""Attention over an unquantized key-value cache: the part of a decode step without weights."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import checks, dispatch


def attention(
    q: Float[Array, "b t heads hd"],
    k: Float[Array, "b kv S hd"],
    v: Float[Array, "b kv S hd"],
    positions: Int32[Array, " t"],
) -> Float[Array, "b t heads hd"]:
    """Return the causal attention of a few queries over all cache slots, with a float32 softmax.

    A kernel that reads only the visible slots runs where a platform has one for this few queries;
    otherwise `reference` runs. The derivative is that of the reference.

    Args:
      q: [b, t, heads, hd], the queries at `positions`; heads is a multiple of kv, and consecutive
        query heads share a key-value head.
      k, v: [b, kv, S, hd]; slot s holds the key and value of position s. Slots after a query's
        position are masked, which also hides the unused part of a cache.
      positions: int32 [t], non-negative.
    Returns:
      [b, t, heads, hd] in the dtype of q.
    Raises:
      ValueError: shapes or dtypes do not match each other.

    >>> k, v = jnp.zeros((1, 1, 4, 16)), jnp.arange(4.0)[:, None] * jnp.ones((1, 1, 4, 16))
    >>> y = attention(jnp.zeros((1, 1, 2, 16)), k, v, jnp.array([2]))  # of slots 0, 1 and 2
    >>> y.shape, float(y[0, 0, 1, 5])
    ((1, 1, 2, 16), 1.0)
    """
    _check(q, k, v, positions)
    return dispatch.function("attention", reference, q, k, v, positions).astype(q.dtype)


def reference(q: Array, k: Array, v: Array, positions: Array) -> Float[Array, "b t heads hd"]:
    """Return the attention in jnp, the definition of the op.

    All queries that share a key head form the rows of one matrix, so that XLA multiplies keys and
    values in place without copying them.

    Args:
      q, k, v, positions: as in `attention`.
    Returns:
      float32 [b, t, heads, hd].
    """
    b, t, heads, hd = q.shape
    kv, slots = k.shape[1:3]
    rows = q.reshape(b, t, kv, heads // kv, hd).transpose(0, 2, 3, 1, 4).reshape(b, kv, -1, hd)
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    scores = dot(rows, k.astype(q.dtype), (((3,), (3,)), ((0, 1), (0, 1)))) * hd**-0.5
    visible = jnp.arange(slots) <= jnp.tile(positions, heads // kv)[:, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    mixed = dot(weights.astype(v.dtype), v, (((3,), (2,)), ((0, 1), (0, 1))))
    mixed = mixed.reshape(b, kv, heads // kv, t, hd).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(b, t, heads, hd)


def _check(q: Array, k: Array, v: Array, positions: Array) -> None:
    for name, a in {"q": q, "k": k, "v": v}.items():
        if a.ndim != 4 or a.dtype.name not in checks.FLOATS:
            raise ValueError(
                f"{name} must have 4 axes, of {', '.join(checks.FLOATS)}, got {a.dtype} "
                f"{list(a.shape)}"
            )
    b, t, heads, hd = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (b, hd) or heads % k.shape[1]:
        raise ValueError(
            f"k and v must both be [{b}, a divisor of {heads}, slots, {hd}], got {list(k.shape)} "
            f"and {list(v.shape)}"
        )
    if positions.shape != (t,) or positions.dtype != jnp.int32:
        raise ValueError(
            f"positions must be int32 [{t}], got {positions.dtype} {list(positions.shape)}"
        )
