"""Integer activations: rows of x as int8 codes and scales, made afresh for every product.

"float" leaves x as it is. "int8" gives every row (token) one scale, absmax / 127; "int8/256" one
for every 256 channels of a row, much as llama.cpp does, so that an outlier costs its neighbours.
"codes" says that x holds integers in [-127, 127] already, which somebody else scales: whatever a
format makes of activations, in 8 bits or 4, symmetric or not, its product is one of these.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

FORMS = ("float", "int8", "int8/256", "codes")
BLOCK = 256  # channels that share a scale in "int8/256"


def check(activations: str) -> None:
    """Raise ValueError unless it is one of `FORMS`.

    >>> check("int8")
    """
    if activations not in FORMS:
        raise ValueError(f"activations must be one of {FORMS}, got {activations!r}")


def quantize(
    x: Float[Array, "m k"], activations: str
) -> tuple[Int8[Array, "m k"], Float[Array, "m b"]]:
    """Codes q in [-127, 127] and float32 scales s of each row (b = 1) or run of 256 channels.

    q = x (1 / s) rounded, halves to even, s = absmax / 127, or 1 where all is zero. Of "codes" they
    are x and ones.

    >>> q, s = quantize(jnp.array([[1.0, -0.5, 0.25]]), "int8")
    >>> q.tolist(), round(float(s[0, 0] * 127), 6)
    ([[127, -64, 32]], 1.0)
    """
    check(activations)
    m, k = x.shape
    if activations == "codes":
        return jnp.clip(x, -127, 127).astype(jnp.int8), jnp.ones((m, 1), jnp.float32)
    size = k if activations == "int8" else BLOCK
    blocks = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -k % size))).reshape(m, -1, size)
    absmax = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
    # Times reciprocals, as the native kernels do it: a division is one or not as XLA optimizes.
    s = jnp.where(absmax > 0, absmax * (1 / 127), 1.0)
    q = jnp.clip(jnp.round(blocks * (1 / s)), -127, 127).astype(jnp.int8)
    return q.reshape(m, -1)[:, :k], s[..., 0]


def rounded(x: Float[Array, "m k"], activations: str) -> Float[Array, "m k"]:
    """What x is after `quantize`, in float32; x itself for "float" and "codes".

    >>> rounded(jnp.array([[254.0, 1.2]]), "int8").tolist()
    [[254.0, 2.0]]
    """
    if activations in ("float", "codes"):
        return x
    q, s = quantize(x, activations)
    return q * spread(s, x.shape[-1])


def spread(s: Float[Array, "m b"], k: int) -> Float[Array, "m k"]:
    """Each scale at each of its channels."""
    return s if s.shape[-1] == 1 else jnp.repeat(s, BLOCK, axis=-1)[:, :k]
