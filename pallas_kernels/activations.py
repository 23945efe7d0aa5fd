"""Integer activations: rows of x as int8 codes and scales, made afresh for every product.

"float" leaves x as it is. "int8" gives every row (token) one scale, absmax / 127; "int8/256" one
for every 256 channels of a row, much as llama.cpp does, so that an outlier costs its neighbours.
"codes" says that x holds integers in [-127, 127] already, which somebody else scales: whatever a
format makes of activations, in 8 bits or 4, symmetric or not, its product is one of these.

One rule holds for every form and on every path: a row with an entry that is not finite, NaN or an
infinity, gives a row of NaN, and no other row differs for it. Integers cannot hold such an entry,
and a kernel that takes x apart cannot tell an infinity from NaN, so both are caught before x is
rounded (`finite_rows`), and the row's scale carries the NaN to its results.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

FORMS = ("float", "int8", "int8/256", "codes")
BLOCK = 256  # channels that share a scale in "int8/256"
LEAST = float(jnp.finfo(jnp.float32).tiny)  # of a scale; that of smaller entries is 1, as of zeros


def check(activations: str) -> None:
    """Raise ValueError unless it is one of `FORMS`.

    >>> check("int8")
    """
    if activations not in FORMS:
        raise ValueError(f"activations must be one of {FORMS}, got {activations!r}")


def finite_rows(x: Float[Array, "*b k"]) -> tuple[Float[Array, "*b k"], Float[Array, "*b 1"]]:
    """x with zeros for rows that are not finite, and a float32 factor of each row's results.

    The factor is 1, or NaN for a row that has an entry that is NaN or infinite. Maxima would not
    tell: compiled for a CPU, one of many rows may pass over NaN.

    >>> x, factor = finite_rows(jnp.array([[1.0, 2.0], [3.0, jnp.inf]]))
    >>> x.tolist(), factor.tolist()
    ([[1.0, 2.0], [0.0, 0.0]], [[1.0], [nan]])
    """
    finite = jnp.all(jnp.isfinite(x), axis=-1, keepdims=True)
    return jnp.where(finite, x, 0), jnp.where(finite, 1.0, jnp.nan).astype(jnp.float32)


def quantize(
    x: Float[Array, "m k"], activations: str
) -> tuple[Int8[Array, "m k"], Float[Array, "m b"]]:
    """Codes q in [-127, 127] and float32 scales s of each row (b = 1) or run of 256 channels.

    q = x (1 / s) rounded, halves to even, s = absmax / 127, or 1 where that is no normal number: x
    is zero, or nearly. Of "codes" they are x and ones. Where x is not finite q is 0 and s is NaN.

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
    blocks = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -k % size))).reshape(m, -1, size)
    blocks, factor = finite_rows(blocks)
    # Times reciprocals, as the native kernels do it: a division is one or not as XLA optimizes.
    s = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) * (1 / 127)
    s = jnp.where(s >= LEAST, s, 1.0)
    q = jnp.clip(jnp.round(blocks * (1 / s)), -127, 127).astype(jnp.int8)
    return q.reshape(m, -1)[:, :k], (s * factor)[..., 0]


def rounded(x: Float[Array, "m k"], activations: str) -> Float[Array, "m k"]:
    """What x is after `quantize`, in float32; x itself for "float" and "codes".

    What is not finite is NaN, and so are all results of its row.

    >>> rounded(jnp.array([[254.0, 1.2], [jnp.inf, 1.0]]), "int8").tolist()
    [[254.0, 2.0], [nan, nan]]
    """
    if activations in ("float", "codes"):
        return jnp.where(jnp.isfinite(x), x, jnp.nan)
    q, s = quantize(x, activations)
    return q * spread(s, x.shape[-1])


def spread(s: Float[Array, "m b"], k: int) -> Float[Array, "m k"]:
    """Each scale at each of its channels."""
    return s if s.shape[-1] == 1 else jnp.repeat(s, BLOCK, axis=-1)[:, :k]
