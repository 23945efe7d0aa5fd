"""Scales as they are after storage, and the groups of rows that share one."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxquant.core.hosts import on_host
from jaxquant.core.magnitude import largest_bits, shifted, sizes

SCALE_DTYPES = ("float16", "bfloat16", "float32")
LEAST, MOST = 2.0**-110, 2.0**120  # of a matrix's largest weight, leaving float32 room for sums
_TINY = float(jnp.finfo(jnp.float32).tiny)
RESCALE = "rescale the weights"
WIDER = f'use scale_dtype="bfloat16" or "float32", or {RESCALE}'


def as_stored(scale: Array, dtype: str) -> Array:
    """Return positive float32 scales after a round trip through `dtype`; never zero or infinite.

    Args:
      scale: float32 scales, clamped to the range of `dtype`.
      dtype: name of the storage dtype.

    >>> as_stored(jnp.array([0.0, 0.3, 1e9]), "float8_e4m3fn").tolist()
    [0.001953125, 0.3125, 448.0]
    """
    info = jnp.finfo(dtype)
    # Subnormal float32 scales would be flushed to zero, and later divided by.
    least = max(float(info.smallest_subnormal), _TINY)
    return through(jnp.clip(scale, least, float(info.max)), dtype)


def through(x: Float[Array, "..."], dtype: str) -> Float[Array, "..."]:
    """Return float32 values after a round trip through `dtype`.

    Args:
      x: float32 array.
      dtype: name of the dtype.

    >>> through(jnp.array([0.3, 17.0]), "float8_e4m3fn").tolist()
    [0.3125, 16.0]
    """
    # Without the barrier, XLA's GPU compiler may remove the two casts as excess precision.
    return jax.lax.optimization_barrier(x.astype(dtype)).astype(jnp.float32)


def check_scales(
    groups: Float[np.ndarray, "..."],
    top: float,
    bits: int,
    dtype: str,
    remedy: str = WIDER,
    what: str = "scales",
) -> str:
    """Return a warning if groups of weights lose precision when their scales are stored, else "".

    Subnormal float16 numbers have fewer bits. A float16 scale is accepted as long as its rounding
    moves the largest weight of its group by at most half a step.

    Args:
      groups: the largest magnitude in each group; groups of zeros need no scale.
      top: level of the largest magnitude: the scale of a group is its magnitude over `top`.
      bits: number of bits per code.
      dtype: storage dtype of the scales.
      remedy: advice to append to the message.
      what: name in the error of what is stored, such as "offsets".
    Raises:
      ValueError: a scale is too large for the dtype, or all scales are too small.

    >>> check_scales(np.array([1.0, 1e-9]), 7, 4, "float16")
    '1 of 2 groups of weights, with weights up to 1e-09, need scales smaller than float16 can ...'
    """
    info: Any = jnp.finfo(dtype)
    # Subnormal numbers of the other dtypes are flushed to zero.
    half, tiny = 2.0 ** (bits - 1) * float(info.smallest_subnormal), max(float(info.tiny), _TINY)
    least = top * (half if dtype == "float16" else tiny)
    _check_range(groups, least, top * float(info.max), what, dtype, remedy)
    return lost(groups, least, dtype, remedy)


def lost(groups: Float[np.ndarray, "..."], least: float, dtype: str, remedy: str) -> str:
    """Return a warning that names the groups whose scales are too small for their dtype, else "".

    Args:
      groups: the largest magnitude in each group.
      least: smallest magnitude whose scale can be stored.
      dtype: storage dtype of the scales, for the message.
      remedy: advice to append to the message.
    """
    small = (groups > 0) & (groups < least)
    if not small.any():
        return ""
    return (
        f"{small.sum()} of {small.size} groups of weights, with weights up to "
        f"{groups[small].max():.2g}, need scales smaller than {dtype} can hold, "
        f"so they lose precision or become 0; {remedy}"
    )


def check_values(format: Any, w: Float[Array, "k n"]) -> None:
    """Run the format's `check` unless the weights are traced, so that their values are unknown.

    Args:
      format: the format.
      w: weight matrix [k, n].
    """
    if not isinstance(jnp.isfinite(w), jax.core.Tracer):
        format.check(w)


def check_wide(w: Float[Array, "..."]) -> str:
    """Check a matrix with float32 scales; return "", since nothing is lost within their range.

    Args:
      w: weights.
    Raises:
      ValueError: the weights are outside the range of the scales.
    """
    _check_range(sizes(w), LEAST, MOST, "scales", "float32", RESCALE)
    return ""


def check_half(w: Float[Array, "..."]) -> str:
    """Check a matrix whose values are stored in float16; return "" if they are within its range.

    Args:
      w: weights.
    Raises:
      ValueError: the largest weight is outside the normal range of float16.
    """
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
    """Raise ValueError unless the group size and the dtype of the scales are valid.

    Args:
      group_size: a positive integer, -1, "channel" or "tensor".
      scale_dtype: one of `SCALE_DTYPES`.
    """
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
    """Return the number of rows that share a scale in a matrix of k rows.

    Args:
      group_size: see `Integer`.
      pad: whether the last group may be short.
      k: number of rows.
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
    """Return the groups of rows of a matrix, the last one padded with zeros.

    Args:
      w: matrix [k, n].
      rows: number of rows per group.
      whole: put the whole matrix in one group.
    Returns:
      Array [groups, rows, n], or [1, k * n, 1] if `whole`.

    >>> grouped(jnp.ones((5, 2)), 4).shape, grouped(jnp.ones((5, 2)), 4, whole=True).shape
    ((2, 4, 2), (1, 10, 1))
    """
    if whole:
        return w.reshape(1, -1, 1)
    return jnp.pad(w, ((0, -len(w) % rows), (0, 0))).reshape(-1, rows, w.shape[1])


@partial(jax.jit, static_argnums=(1, 2))
def _in_groups(w: Float[Array, "k n"], rows: int, whole: bool) -> Int[Array, "g n"]:
    return largest_bits(grouped(w, rows, whole), 1)


def group_sizes(w: Float[Array, "k n"], rows: int, whole: bool = False) -> np.ndarray:
    """Return the largest |w| of each group of rows, in each column, as float64 on the host.

    Args:
      w, rows, whole: as in `grouped`.
    """
    return on_host(_in_groups(w, rows, whole)).view(np.float32).astype(np.float64)


def rescaled(data: dict[str, Array], e: Array, *names: str) -> dict[str, Array]:
    """Return packed arrays with the named scales multiplied by 2**e, each in its own dtype.

    Args:
      data: packed arrays by name.
      e: integer exponent, a scalar.
      names: names of the scales.
    """
    return data | {name: shifted(data[name], e).astype(data[name].dtype) for name in names}
