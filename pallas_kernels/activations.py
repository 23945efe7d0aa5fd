"""Integer activations: the rows of x quantized to int8 anew for every product.

"float" leaves x unchanged. "int8" gives every row (token) one scale, absmax / 127. "int8/256" gives
every 256 channels of a row a scale, similar to llama.cpp, so that an outlier coarsens only the
codes of its own block. "codes" states that x already holds integers in [-127, 127], scaled
elsewhere: every activation format, of 8 bits or 4, symmetric or not, reduces to one of these forms.

One rule holds for every form and every implementation: a row that contains NaN or an infinity gives
a row of NaN, and no other row is affected. Integers cannot represent such an entry, and a kernel
that splits x into parts cannot tell an infinity from NaN, so both are detected before x is rounded
(`finite_rows`), and the scale of the row carries the NaN to its results.
"""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from pallas_kernels.context import compiled

FORMS = ("float", "int8", "int8/256", "codes")
BLOCK = 256  # channels that share a scale in "int8/256"
LEAST = float(jnp.finfo(jnp.float32).tiny)  # smallest scale; below it the scale is 1, as for zeros


def check(activations: str) -> None:
    """Raise ValueError unless `activations` is one of `FORMS`.

    Args:
      activations: the value to check.
    Raises:
      ValueError: it is not one of `FORMS`.

    >>> check("int8")
    """
    if activations not in FORMS:
        raise ValueError(f"activations must be one of {FORMS}, got {activations!r}")


def finite_rows(x: Float[Array, "*b k"]) -> tuple[Float[Array, "*b k"], Float[Array, "*b 1"]]:
    """Return x with non-finite rows set to zero, and a float32 factor for each row's results.

    Args:
      x: [..., k], any floating-point dtype.
    Returns:
      x with each row that contains NaN or an infinity replaced by zeros; and a float32 factor
      [..., 1], NaN for those rows and 1 for the others. Row maxima would not detect them: compiled
      for a CPU, a maximum over one of many rows may skip NaN.

    >>> x, factor = finite_rows(jnp.array([[1.0, 2.0], [3.0, jnp.inf]]))
    >>> x.tolist(), factor.tolist()
    ([[1.0, 2.0], [0.0, 0.0]], [[1.0], [nan]])
    """
    finite = jnp.all(jnp.isfinite(x), axis=-1, keepdims=True)
    return jnp.where(finite, x, 0), jnp.where(finite, 1.0, jnp.nan).astype(jnp.float32)


def quantize(
    x: Float[Array, "m k"], activations: str
) -> tuple[Int8[Array, "m k"], Float[Array, "m b"]]:
    """Return int8 codes q and float32 scales s of each row or of each block of 256 channels.

    q = round(x * (1 / s)) with halves rounded to even, and s = absmax / 127, or 1 where that is not
    a normal number because x is zero or nearly so. For "codes", q is x clamped to [-127, 127] and s
    is 1. Where x is not finite, q is 0 and s is NaN.

    Args:
      x: [m, k], any floating-point dtype.
      activations: "int8", "int8/256" or "codes".
    Returns:
      q [m, k] in [-127, 127], and s [m, b]: b is the number of blocks for "int8/256", otherwise 1.
    Raises:
      ValueError: activations is not one of `FORMS`.

    >>> q, s = quantize(jnp.array([[1.0, -0.5, 0.25]]), "int8")
    >>> q.tolist(), round(float(s[0, 0] * 127), 6)
    ([[127, -64, 32]], 1.0)
    """
    check(activations)
    m, k = x.shape
    if activations == "codes":
        x, factor = finite_rows(x)
        return jnp.clip(x, -127, 127).astype(jnp.int8), factor
    size = k if activations == "int8" else BLOCK
    runs = -(-k // size)
    blocks = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -k % size))).reshape(m, runs, size)
    blocks, factor = finite_rows(blocks)
    # Reciprocals, as in the native kernels: XLA may or may not turn a division into one.
    s = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) * (1 / 127)
    s = jnp.where(s >= LEAST, s, 1.0)
    q = jnp.clip(jnp.round(blocks * (1 / s)), -127, 127).astype(jnp.int8)
    return q.reshape(m, runs * size)[:, :k], (s * factor)[..., 0]


@partial(compiled, static_argnums=1)
def rounded(x: Float[Array, "m k"], activations: str) -> Float[Array, "m k"]:
    """Return the dequantized result of `quantize` in float32, or x itself for "float" and "codes".

    Non-finite entries become NaN, and so do all products of their row.

    Args:
      x: [m, k], any floating-point dtype.
      activations: one of `FORMS`.

    >>> rounded(jnp.array([[254.0, 1.2], [jnp.inf, 1.0]]), "int8").tolist()
    [[254.0, 2.0], [nan, nan]]
    """
    if activations in ("float", "codes"):
        return jnp.where(jnp.isfinite(x), x, jnp.nan)
    q, s = quantize(x, activations)
    return q * spread(s, x.shape[-1])


def spread(s: Float[Array, "m b"], k: int) -> Float[Array, "m k"]:
    """Return the scales repeated so that each of the k channels has its own.

    Scales [m, 1], one per row, are returned unchanged.

    Args:
      s: [m, b], one scale per row (b = 1) or per block of 256 channels.
      k: number of channels.
    Returns:
      [m, k] or [m, 1].
    """
    return s if s.shape[-1] == 1 else jnp.repeat(s, BLOCK, axis=-1)[:, :k]
