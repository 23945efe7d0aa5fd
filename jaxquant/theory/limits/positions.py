"""What rotary position embeddings can tell apart: their kernel, its range, and equal positions.

The score of a query and an equal key at distance D, averaged over pairs of components, is the
kernel K(D) = mean_i cos(theta_i D). It oscillates, so ranges are read off its mean over the octave
(D/2, D]. For theta_i = b^(-2 i / d) this mean is about

    1 - (ln D + gamma - 1 + ln 2) / ln b - 1 / d,

which falls with the logarithm of the distance and reaches 0 near D = .67 b. A trained model may use
a few frequencies only, so an effective range describes the encoding, not the model.

The kernel depends on distances alone if angles are computed exactly. Rounding them to float32
cannot change it by more than `rounding_bound`; positions rounded to bfloat16 coincide from 256 on.
"""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.limits.limit import Limit
from jaxquant.theory.number_checks import finite, positive

FARTHEST = 1 << 20  # distance up to which an effective range is searched
LARGEST = 1 << 25  # position up to which equal positions are searched
BLOCK = 1 << 14
SINGLE = 2.0**-24  # relative error of one rounding to float32


@dataclasses.dataclass(frozen=True)
class Positions:
    """Angles of rotary position embeddings against their frequencies.

    Attributes:
      context: number of positions.
      error: the largest difference of the kernel between two positions from K of their distance.
      bound: the largest that rounding to float32 allows.
      equal: number of successive positions whose cosines and sines are all equal.
    """

    context: int
    error: float
    bound: float
    equal: int

    def limits(self) -> tuple[Limit, ...]:
        """Return both theorems as rows of a suite."""
        kernel = (
            "The mean cosine of the rotary angles between two positions depends on their distance "
            "alone, up to what rounding to float32 allows."
        )
        own = (
            f"No two successive ones of the first {self.context} positions have the same rotations."
        )
        holds, apart = self.error <= self.bound, self.equal == 0
        return (
            Limit("rotary kernel", kernel, "theorem", self.error, self.bound, holds),
            Limit("rotary positions", own, "theorem", float(self.equal), 0.0, apart),
        )


def rope_kernel(
    frequencies: Float[Array | np.ndarray, "n"], distances: Float[Array | np.ndarray, "*batch"]
) -> Float[np.ndarray, "*batch"]:
    """Return K(D), the mean of cos(theta D) over frequencies.

    Args:
      frequencies: theta [n], radians per position, positive.
      distances: D, any shape.
    Returns:
      K, of the shape of the distances.
    Raises:
      ValueError: a frequency is not positive, or an array is empty or not finite.
    Source:
      arXiv:2405.14591, where the sum over frequencies bounds the base.

    >>> rope_kernel(np.array([np.pi, np.pi / 2]), np.arange(3)).round(9).tolist()
    [1.0, -0.5, 0.0]
    """
    check_arguments(rope_kernel, locals())
    return np.cos(finite(distances, "distances")[..., None] * _frequencies(frequencies)).mean(-1)


def octave_mean(
    frequencies: Float[Array | np.ndarray, "n"], distances: Float[Array | np.ndarray, "*batch"]
) -> Float[np.ndarray, "*batch"]:
    """Return the mean of K over the integers in (D/2, D], in closed form.

    Args:
      frequencies: theta [n], radians per position, positive.
      distances: D, whole numbers of 1 or more, any shape.
    Returns:
      The means, of the shape of the distances.
    Raises:
      ValueError: a frequency is not positive, or a distance not a whole number of 1 or more.

    >>> float(octave_mean(np.array([np.pi, np.pi / 2]), np.array(4)).round(9))
    0.25
    """
    check_arguments(octave_mean, locals())
    theta, d = _frequencies(frequencies), finite(distances, "distances")
    if (d < 1).any() or (d % 1).any():
        raise ValueError("distances must be whole numbers of 1 or more, got others")
    low = d // 2
    count = (d - low)[..., None]
    # The sum of cos(k theta) for k from a to b is sin(n theta / 2) / sin(theta / 2) times the
    # cosine at the middle. Where theta is a multiple of 2 pi, every term is 1.
    half = np.sin(theta / 2)
    flat = np.abs(half) < 1e-12
    ratio = np.where(flat, count, np.sin(count * theta / 2) / np.where(flat, 1.0, half))
    middle = np.where(flat, 1.0, np.cos((low + 1 + d)[..., None] * theta / 2))
    return (ratio * middle / count).mean(-1)


def effective_range(
    frequencies: Float[Array | np.ndarray, "n"], threshold: float, farthest: int = FARTHEST
) -> int | None:
    """Return the smallest distance whose octave mean of the kernel is below a threshold.

    Args:
      frequencies: theta [n], radians per position, positive.
      threshold: below 1.
      farthest: largest distance that is tried.
    Returns:
      The distance; None if there is none up to `farthest`.
    Raises:
      ValueError: a frequency is not positive, the threshold is 1 or more, or `farthest` is below 1.

    >>> effective_range(1e4 ** (-np.arange(32) / 32), 0.3)
    398
    """
    check_arguments(effective_range, locals())
    if not threshold < 1 or farthest < 1:
        raise ValueError(
            f"expected a threshold below 1 and a distance of 1 or more, got {threshold} and "
            f"{farthest}"
        )
    for start in range(1, int(farthest) + 1, BLOCK):
        distances = np.arange(start, min(start + BLOCK, int(farthest) + 1))
        below = octave_mean(frequencies, distances) < threshold
        if below.any():
            return int(distances[below.argmax()])
    return None


def range_limit(
    frequencies: Float[Array | np.ndarray, "n"],
    context: int,
    threshold: float = 0.3,
    *,
    name: str = "rotary range",
) -> Limit:
    """Return the effective range beside the context as a row of a suite.

    Args:
      frequencies: theta [n], radians per position, positive.
      context: largest number of positions of the model.
      threshold: as for `effective_range`.
      name: name of the row.
    Returns:
      The row, a description.
    Raises:
      ValueError: as for `effective_range`.

    >>> range_limit(1e4 ** (-np.arange(32) / 32), 2048).measured
    398.0
    """
    check_arguments(range_limit, locals())
    found = effective_range(frequencies, threshold)
    statement = (
        "Smallest distance D at which the mean cosine of the rotary angles, averaged over "
        f"distances from D / 2 to D, falls below {threshold:g}; the bound is the model's context."
    )
    note = "" if found else f"There is none up to {FARTHEST}."
    return Limit(name, statement, "description", found, context, None, note=note)


def first_collision(dtype: Any) -> int | None:
    """Return the first position that a floating-point type cannot tell from the next one.

    It is found by casting successive integers, not from the number of bits.

    Args:
      dtype: a floating-point type of NumPy, JAX or ml_dtypes, such as `jnp.bfloat16`.
    Returns:
      The position: 2^p for a significand of p bits, the hidden one included. None if there is none
      up to 2^25.
    Raises:
      ValueError: the type is not a floating-point type.

    >>> first_collision("bfloat16"), first_collision(np.float16)
    (256, 2048)
    """
    check_arguments(first_collision, locals())
    try:
        kind = np.dtype(getattr(ml_dtypes, dtype) if hasattr(ml_dtypes, str(dtype)) else dtype)
        ml_dtypes.finfo(kind)
    except (TypeError, ValueError):
        raise ValueError(f"expected a floating-point type, got {dtype!r}") from None
    size, start = BLOCK, 0
    while start < LARGEST:
        with np.errstate(over="ignore"):
            cast = np.arange(start, start + size + 1).astype(kind).astype(np.float64)
        equal = cast[1:] == cast[:-1]
        if equal.any():
            return start + int(equal.argmax())
        start, size = start + size, min(2 * size, 1 << 20)
    return None


def collision_limit(dtype: Any) -> Limit:
    """Return the first collision of a type beside 2^p as a row of a suite.

    Args:
      dtype: as for `first_collision`.
    Returns:
      The row.
    Raises:
      ValueError: as for `first_collision`, or the type has no collision up to 2^25.

    >>> collision_limit("bfloat16").verdict
    'holds'
    """
    check_arguments(collision_limit, locals())
    found = first_collision(dtype)
    if found is None:
        raise ValueError(f"{dtype} tells all positions apart up to {LARGEST}")
    kind = np.dtype(getattr(ml_dtypes, dtype) if hasattr(ml_dtypes, str(dtype)) else dtype)
    bound = 2.0 ** (ml_dtypes.finfo(kind).nmant + 1)
    statement = (
        f"Successive positions that are stored as {kind.name} first coincide at 2^p, where p is "
        "the number of bits of its significand."
    )
    return Limit(f"positions {kind.name}", statement, "theorem", found, bound, found == bound)


def rounding_bound(frequencies: Float[Array | np.ndarray, "n"], context: int) -> float:
    """Return how far rounding to float32 can move the kernel of any two positions.

    An angle t theta is a rounded product of a position and a rounded frequency; a difference of two
    such angles is off by at most 2 (t + t) theta 2^-24, and a cosine by no more.

    Args:
      frequencies: theta [n], radians per position, positive.
      context: number of positions.
    Returns:
      The bound.
    Raises:
      ValueError: a frequency is not positive, or the context is below 1.

    >>> rounding_bound(np.ones(1), 1024) < 3e-4
    True
    """
    check_arguments(rounding_bound, locals())
    if context < 1:
        raise ValueError(f"context must be 1 or more, got {context}")
    return float(4 * SINGLE * context * _frequencies(frequencies).mean() + 8 * SINGLE)


def rope_positions(
    angles: Float[Array | np.ndarray, "t n"], frequencies: Float[Array | np.ndarray, "n"]
) -> Positions:
    """Compare angles that a model computes for successive positions with its frequencies.

    The kernel of positions t and t - D is the mean of cos(angle_t - angle_{t - D}); it is compared
    with K(D) at all D from the last position, and at distances 1, 2, 4, ... from all positions.

    Args:
      angles: radians [t, n] of positions 0, 1, ..., t - 1.
      frequencies: theta [n], radians per position, positive.
    Returns:
      The largest difference, its bound, and the number of successive equal rotations.
    Raises:
      ValueError: there are fewer than two positions, shapes do not match, or a number is not
        finite.

    >>> theta = 1e4 ** (-np.arange(32) / 32)
    >>> rope_positions(np.arange(100)[:, None] * theta, theta).equal
    0
    """
    check_arguments(rope_positions, locals())
    a, theta = finite(angles, "angles"), _frequencies(frequencies)
    if a.ndim != 2 or a.shape[0] < 2 or a.shape[1:] != theta.shape:
        raise ValueError(
            f"expected angles [t, {theta.size}] of two positions or more, got shape {list(a.shape)}"
        )
    t = len(a)
    last = np.cos(a[-1] - a).mean(-1) - rope_kernel(theta, np.arange(t - 1, -1, -1.0))
    error = np.abs(last).max()
    for power in range((t - 1).bit_length()):
        d = 1 << power
        near = np.cos(a[d:] - a[:-d]).mean(-1) - rope_kernel(theta, np.array(float(d)))
        error = max(error, np.abs(near).max())
    single = a.astype(np.float32)
    turns = np.concatenate([np.cos(single), np.sin(single)], -1)
    equal = int((turns[1:] == turns[:-1]).all(-1).sum())
    return Positions(t, float(error), rounding_bound(theta, t), equal)


def _frequencies(value: Any) -> Float[np.ndarray, "n"]:
    theta = positive(value, "frequencies")
    if theta.ndim != 1 or theta.size == 0:
        raise ValueError(f"expected frequencies [n], got shape {list(theta.shape)}")
    return theta
