"""Scales as storage gives them back, and the groups of rows that share one."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SCALE_DTYPES = ("float16", "bfloat16", "float32")


def as_stored(scale: Array, dtype: str) -> Array:
    """Positive float32 scales after a round trip through `dtype`; never zero, never infinite.

    >>> as_stored(jnp.array([0.0, 0.3, 1e9]), "float8_e4m3fn").tolist()
    [0.001953125, 0.3125, 448.0]
    """
    info = jnp.finfo(dtype)
    # A subnormal float32 would be flushed to zero, and divided by.
    least = max(float(info.smallest_subnormal), float(jnp.finfo(jnp.float32).tiny))
    return through(jnp.clip(scale, least, float(info.max)), dtype)


def through(x: Float[Array, "..."], dtype: str) -> Float[Array, "..."]:
    """float32 values after a round trip through `dtype`.

    >>> through(jnp.array([0.3, 17.0]), "float8_e4m3fn").tolist()
    [0.3125, 16.0]
    """
    # Without the barrier XLA may skip the trip: to its GPU compiler that is only more precision.
    return jax.lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)


def check_half(largest: float) -> None:
    """Raise ValueError if values up to `largest` leave the range of float16."""
    info: Any = jnp.finfo("float16")
    if largest > 0 and not float(info.tiny) <= largest <= float(info.max):
        raise ValueError(
            f"weights of size {largest:.2g} are outside the range of float16, which stores them; "
            f"rescale the weights"
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
