"""Scales as storage gives them back, and the groups of rows that share one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxquant.core.magnitude import shifted, sizes

SCALE_DTYPES = ("float16", "bfloat16", "float32")
LEAST, MOST = 2.0**-110, 2.0**120  # of matrices, with room in float32 for steps and sums
_TINY = float(jnp.finfo(jnp.float32).tiny)
RESCALE = "rescale the weights"
WIDER = f'use scale_dtype="bfloat16" or "float32", or {RESCALE}'


def as_stored(scale: Array, dtype: str) -> Array:
    """Positive float32 scales after a round trip through `dtype`; never zero, never infinite.

    >>> as_stored(jnp.array([0.0, 0.3, 1e9]), "float8_e4m3fn").tolist()
    [0.001953125, 0.3125, 448.0]
    """
    info = jnp.finfo(dtype)
    # A subnormal float32 would be flushed to zero, and divided by.
    least = max(float(info.smallest_subnormal), _TINY)
    return through(jnp.clip(scale, least, float(info.max)), dtype)


def through(x: Float[Array, "..."], dtype: str) -> Float[Array, "..."]:
    """float32 values after a round trip through `dtype`.

    >>> through(jnp.array([0.3, 17.0]), "float8_e4m3fn").tolist()
    [0.3125, 16.0]
    """
    # Without the barrier XLA may skip the trip: to its GPU compiler that is only more precision.
    return jax.lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)


def check_scales(
    groups: Float[np.ndarray, "..."], top: float, bits: int, dtype: str, remedy: str = WIDER
) -> str:
    """What groups of weights lose where their scales are stored, in words; "" if nothing.

    Below its normal numbers float16 has fewer bits: a scale is held if its rounding moves the
    largest weight by half a step at most.

    Args:
      groups: the largest magnitude in each; zeros need no scale.
      top: the level that it comes to: its scale is the magnitude over this.
      bits: of a code.
      dtype: of the scales.
      remedy: what to do about it.
    Raises:
      ValueError: a scale is too large for the dtype, or all are too small.

    >>> check_scales(np.array([1.0, 1e-9]), 7, 4, "float16")
    '1 of 2 groups of weights, those up to 1e-09, need scales finer than float16 holds and ...'
    """
    info: Any = jnp.finfo(dtype)
    # Subnormal numbers of the other dtypes are flushed to zero.
    half, tiny = 2.0 ** (bits - 1) * float(info.smallest_subnormal), max(float(info.tiny), _TINY)
    least = top * (half if dtype == "float16" else tiny)
    _check_range(groups, least, top * float(info.max), "scales", dtype, remedy)
    return lost(groups, least, dtype, remedy)


def lost(groups: Float[np.ndarray, "..."], least: float, dtype: str, remedy: str) -> str:
    """In words, which groups need scales that are too small for their dtype; "" if none."""
    small = (groups > 0) & (groups < least)
    if not small.any():
        return ""
    return (
        f"{small.sum()} of {small.size} groups of weights, those up to {groups[small].max():.2g}, "
        f"need scales finer than {dtype} holds and lose precision or become 0; {remedy}"
    )


def check_values(format: Any, w: Float[Array, "k n"]) -> None:
    """The format's `check` of weights whose values are known, and not traced."""
    if not isinstance(jnp.isfinite(w), jax.core.Tracer):
        format.check(w)


def check_wide(w: Float[Array, "..."]) -> str:
    """As `check_scales`, of a matrix with a scale in float32."""
    _check_range(sizes(w), LEAST, MOST, "scales", "float32", RESCALE)
    return ""


def check_half(w: Float[Array, "..."]) -> str:
    """As `check_scales`, of a matrix whose very values are kept in float16."""
    info: Any = jnp.finfo("float16")
    _check_range(sizes(w), float(info.tiny), float(info.max), "tables", "float16", RESCALE)
    return ""


def _check_range(
    groups: Float[np.ndarray, "..."], least: float, most: float, what: str, dtype: str, remedy: str
) -> None:
    largest = float(np.max(groups, initial=0))
    if largest > 0 and not least <= largest <= most:
        raise ValueError(
            f"weights up to {largest:.2g} need {what} outside the range of {dtype}, which holds "
            f"matrices whose largest weight is from {least:.2g} to {most:.2g}; {remedy}"
        )


def check_grouping(group_size: int | str, scale_dtype: str) -> None:
    """Raise ValueError unless the group size and the dtype of the scales are possible ones."""
    good = group_size in (-1, "channel", "tensor") or (
        isinstance(group_size, int) and not isinstance(group_size, bool) and group_size > 0
    )
    if not good:
        raise ValueError(
            f'group_size must be positive, -1 (per output), "channel" or "tensor", '
            f"got {group_size!r}"
        )
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype must be one of {SCALE_DTYPES}, got {scale_dtype!r}")


def rows_per_group(group_size: int | str, pad: bool, k: int) -> int:
    """Rows that share a scale in a matrix of k rows.

    Raises:
      ValueError: the group size does not divide k and `pad` is off.
    """
    if isinstance(group_size, str) or group_size == -1:
        return k
    if k % group_size and not pad:
        fits = [g for g in (16, 32, 64, 128, 256) if k % g == 0]
        raise ValueError(
            f"group_size {group_size} does not divide k = {k}; "
            f"use one that does (such as {fits or [-1]}), -1, or pad=True"
        )
    return group_size


def grouped(w: Float[Array, "k n"], rows: int, whole: bool = False) -> Float[Array, "g rows n"]:
    """Groups of rows, the last one filled up with zeros; with `whole` one group holds everything.

    >>> grouped(jnp.ones((5, 2)), 4).shape, grouped(jnp.ones((5, 2)), 4, whole=True).shape
    ((2, 4, 2), (1, 10, 1))
    """
    if whole:
        return w.reshape(1, -1, 1)
    return jnp.pad(w, ((0, -len(w) % rows), (0, 0))).reshape(-1, rows, w.shape[1])


def rescaled(data: dict[str, Array], e: Array, *names: str) -> dict[str, Array]:
    """Packed data with these scales times 2**e, each in its own dtype."""
    return data | {name: shifted(data[name], e).astype(data[name].dtype) for name in names}
