"""What the arguments of an op must be; a ValueError names the one that is not."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import activations as forms
from pallas_kernels.codecs import layout, lookup

FLOATS = ("float32", "bfloat16", "float16")


def rows(x: Float[Array, "m k"], activations: str) -> tuple[int, int]:
    """(m, k) of activations that an op takes.

    >>> rows(jnp.ones((2, 8)), "float")
    (2, 8)
    """
    forms.check(activations)
    if x.ndim != 2 or x.dtype.name not in FLOATS:
        raise ValueError(
            f"x must be [m, k] of {', '.join(FLOATS)}, got {x.dtype} {list(x.shape)}; "
            "reshape it, or cast it with x.astype"
        )
    return x.shape


def words(codes: Int32[Array, "w n"], expected: int, name: str = "codes") -> int:
    """n of packed words [expected, n]."""
    if codes.ndim != 2 or codes.dtype != jnp.int32:
        raise ValueError(f"{name} must be int32 words [w, n], got {codes.dtype} {codes.shape}")
    if codes.shape[0] != expected:
        raise ValueError(f"{name} must have {expected} words a column, got {codes.shape[0]}")
    return codes.shape[1]


def bits(value: int) -> None:
    """Raise ValueError unless codes can have so many bits."""
    if value not in layout.BITS:
        raise ValueError(f"bits must be one of {layout.BITS}, got {value}")


def groups(k: int, group_size: int, pad: bool) -> int:
    """Number of groups of rows."""
    if group_size < 1:
        raise ValueError(f"group_size must be positive, got {group_size}")
    if k % group_size and not pad:
        raise ValueError(
            f"group_size {group_size} does not divide k = {k}; use one that does, or pad=True "
            "for a short last group"
        )
    return -(-k // group_size)


def scales(scale: Float[Array, "g n"], g: int, n: int) -> None:
    """Raise ValueError unless scales are [g, n], or [g, 1] where one serves all columns."""
    if scale.dtype.name not in FLOATS or scale.shape not in ((g, n), (g, 1)):
        raise ValueError(
            f"scale must be [{g}, {n}] or [{g}, 1] of {', '.join(FLOATS)}, "
            f"got {scale.dtype} {list(scale.shape)}"
        )


def zeros(zero: Int32[Array, "g wn"] | None, scale: Array, width: int) -> None:
    """Raise ValueError unless zero points are packed along n, like the scales."""
    if zero is None:
        return
    g, n = scale.shape
    expected = (g, layout.words(n, width))
    if zero.dtype != jnp.int32 or zero.shape != expected:
        raise ValueError(
            f"zero must be int32 {list(expected)}, packed along n, got {zero.dtype} "
            f"{list(zero.shape)}"
        )


def multiple(k: int, of: int, what: str) -> None:
    """Raise ValueError unless rows come in whole codes."""
    if k % of:
        raise ValueError(f"x has k = {k} channels, but {what} cover {of} rows each; pad x and w")


def lookup_words(groups: int, m: int, width: int) -> int:
    """Words down a column of `groups` groups of m codes of `width` bits."""
    digit = lookup.digit(width)
    return layout.words(groups * m * width // digit, digit)
