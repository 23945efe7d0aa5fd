"""Rate-distortion functions: the Gaussian's in closed form, others by the Blahut-Arimoto algorithm.

R(D) is the least number of bits per symbol with which a source can be described at mean distortion
D, by codes of any length. No quantizer is below it; `gap_in_bits` says how far above one is.
"""

import dataclasses

import numpy as np
from jaxtyping import Array, Float
from scipy.special import xlogy

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.number_checks import (
    Numbers,
    check_shapes,
    finite,
    nonnegative,
    positive,
    probabilities,
)

DECIBELS_PER_BIT = 20 * np.log10(2)  # one more bit per symbol divides the squared error by 4
GROWTH = 1.2  # of the exponent of an update, as long as updates help
SMALLEST = np.finfo(np.float64).tiny


def gaussian_rate(distortion: Numbers, variance: Numbers = 1.0) -> Float[np.ndarray, "..."]:
    """Return R(D) of independent Gaussian symbols under squared error, in bits per symbol.

    R(D) = max(0, log2(variance / D) / 2). It is 0 for D >= variance, as the mean alone has that
    error, and infinite for D = 0 unless the variance is 0 too. Of all sources with this variance,
    the Gaussian has the largest R(D).

    Args:
      distortion: D, mean squared error per symbol, 0 or more; any shape.
      variance: variance of the source, finite, 0 or more; broadcast with `distortion`. Default: 1.
    Returns:
      The rates, of the broadcast shape.
    Raises:
      ValueError: a number is negative or NaN, a variance is infinite, or shapes do not broadcast.
    Source:
      Cover and Thomas, Elements of Information Theory, theorem 10.3.2.

    >>> gaussian_rate(np.array([0.25, 1.0, 3.0])).tolist()
    [1.0, 0.0, 0.0]
    """
    check_arguments(gaussian_rate, locals())
    d = nonnegative(distortion, "distortion")
    v = nonnegative(variance, "variance", finite=True)
    check_shapes(distortion=d, variance=v)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(d < v, (np.log2(v) - np.log2(d)) / 2, 0.0)[()]


def gaussian_distortion(rate: Numbers, variance: Numbers = 1.0) -> Float[np.ndarray, "..."]:
    """Return D(R) = variance * 2^(-2 R), the inverse of `gaussian_rate`.

    Args:
      rate: R, bits per symbol, 0 or more; any shape. Infinity gives 0.
      variance: variance of the source, finite, 0 or more; broadcast with `rate`. Default: 1.
    Returns:
      Mean squared errors per symbol, of the broadcast shape.
    Raises:
      ValueError: a number is negative or NaN, a variance is infinite, or shapes do not broadcast.
    Source:
      Cover and Thomas, Elements of Information Theory, theorem 10.3.2.

    >>> float(gaussian_distortion(2.0)), float(gaussian_distortion(1.0, 4.0))
    (0.0625, 1.0)
    """
    check_arguments(gaussian_distortion, locals())
    r, v = nonnegative(rate, "rate"), nonnegative(variance, "variance", finite=True)
    check_shapes(rate=r, variance=v)
    return v * np.exp2(-2 * r)


def gap_in_bits(
    rate: Numbers, distortion: Numbers, variance: Numbers = 1.0
) -> Float[np.ndarray, "..."]:
    """Return the rate of a quantizer minus R(D) of a Gaussian at the same distortion.

    It is positive above the bound. On independent Gaussian symbols it cannot be negative if `rate`
    counts everything that is stored. A negative gap on other data says that the data are not
    independent Gaussian symbols of this variance, for these have the largest R(D).

    Args:
      rate: bits per symbol of the quantizer, finite, 0 or more; any shape.
      distortion: its mean squared error per symbol, 0 or more; broadcast with `rate`. An error of 0
        gives -inf unless the variance is 0.
      variance: variance of the source, finite, 0 or more; broadcast likewise. Default: 1.
    Returns:
      Bits per symbol, of the broadcast shape. Below D = variance, one bit is
        `DECIBELS_PER_BIT` = 6.02 dB of squared error.
    Raises:
      ValueError: a number is negative or NaN, a rate or variance is infinite, or shapes do not
        broadcast.

    >>> round(float(gap_in_bits(2.0, 0.117482)), 4)
    0.4553
    """
    check_arguments(gap_in_bits, locals())
    r, bound = nonnegative(rate, "rate", finite=True), gaussian_rate(distortion, variance)
    check_shapes(rate=r, distortion_and_variance=bound)
    return r - bound


def gap_in_decibels(
    rate: Numbers, distortion: Numbers, variance: Numbers = 1.0
) -> Float[np.ndarray, "..."]:
    """Return 10 log10(D / D(R)): the distortion of a quantizer over a Gaussian's at the same rate.

    It is positive above the bound. Below D = variance it is `gap_in_bits` times `DECIBELS_PER_BIT`.

    Args:
      rate: bits per symbol of the quantizer, finite, 0 or more; any shape.
      distortion: its mean squared error per symbol, 0 or more; broadcast with `rate`. An error of 0
        gives -inf.
      variance: variance of the source, finite and positive; broadcast likewise. Default: 1.
    Returns:
      Decibels, of the broadcast shape.
    Raises:
      ValueError: a number is negative or NaN, a rate or variance is infinite, a variance is 0, or
        shapes do not broadcast.

    >>> round(float(gap_in_decibels(2.0, 0.117482)), 2)
    2.74
    """
    check_arguments(gap_in_decibels, locals())
    r, d = nonnegative(rate, "rate", finite=True), nonnegative(distortion, "distortion")
    v = positive(variance, "variance")  # no distortion compares with that of variance 0
    check_shapes(rate=r, distortion=d, variance=v)
    with np.errstate(divide="ignore"):
        log_ratio = np.log2(d) - np.log2(v)
    return (r + log_ratio / 2) * DECIBELS_PER_BIT


@dataclasses.dataclass(frozen=True)
class RateDistortion:
    """A point of the rate-distortion function of a finite source.

    Attributes:
      rate: mutual information of the test channel, in bits per symbol; an upper bound on R(D).
      lower: Blahut's lower bound on R(D) at the same D, in bits per symbol.
      distortion: D, mean distortion of the test channel.
      output: probabilities of the reproduction symbols [k].
      iterations: number of updates.
    """

    rate: float
    lower: float
    distortion: float
    output: Float[np.ndarray, "k"]
    iterations: int


def blahut_arimoto(
    p: Float[Array, "n"],
    distortion_matrix: Float[Array, "n k"],
    slope: float,
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 100_000,
) -> RateDistortion:
    """Return the point of R(D) at which the tangent has a given slope, for a finite source.

    With A = exp(-slope * d), the output distribution q that maximizes sum_i p_i log(A q)_i is a
    fixed point of q <- q * c, where c_j = sum_i p_i A_ij / (A q)_i. Any q gives Blahut's bounds
    around R(D) at the D of its test channel; iteration ends when these are within `tolerance`.
    Updates use powers of c that grow as long as the sum does, which takes a third to a sixth of the
    iterations. On a fine grid the bounds close like 1 / iterations; the rate itself is by then much
    closer.

    Args:
      p: probabilities of the source symbols [n], or weights, which are divided by their sum.
      distortion_matrix: distortion [n, k] of each source symbol under each reproduction symbol;
        finite, 0 or more, of any unit.
      slope: -dR/dD in nats per unit of distortion, positive and finite. On a squared-error grid
        fine enough for a Gaussian, D = 1 / (2 slope).
      tolerance: largest distance of the bounds, in bits; positive. Default: 1e-4.
      max_iterations: number of updates after which to give up, 1 or more.
    Returns:
      The `RateDistortion`.
    Raises:
      ValueError: shapes do not match, a number is out of its range, or the bounds are not within
        `tolerance` after `max_iterations`.
    Source:
      Blahut 1972, Computation of channel capacity and rate-distortion functions;
      the adaptive powers are those of Salakhutdinov and Roweis 2003, Adaptive overrelaxed bound
      optimization methods.

    >>> coin = blahut_arimoto(np.array([0.5, 0.5]), 1 - np.eye(2), slope=2.0)
    >>> round(coin.distortion, 6), round(coin.rate, 6)
    (0.119203, 0.472935)
    """
    check_arguments(blahut_arimoto, locals())
    weights, d = _source(p, distortion_matrix)
    positive(slope, "slope"), positive(tolerance, "tolerance")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be 1 or more, got {max_iterations}")
    # Each row is shifted so that its largest entry is 1: no row vanishes, whatever the slope.
    a = np.exp(-slope * (d - d.min(1, keepdims=True)))
    q, iterations = _optimal_output(weights, a, tolerance, max_iterations)
    return _point(weights, d, a, q, iterations)


def _optimal_output(
    p: Float[np.ndarray, "n"], a: Float[np.ndarray, "n k"], tolerance: float, most: int
) -> tuple[Float[np.ndarray, "k"], int]:
    """Return the output distribution and the number of updates that it took."""
    q = plain = np.full(a.shape[1], 1 / a.shape[1])
    best, power, bound = -np.inf, 1.0, np.inf
    for iteration in range(1, most + 1):
        z = a @ q
        if p @ np.log(z) < best:  # the last update went too far: take the plain one instead
            q, power, z = plain, 1.0, a @ plain
        best = p @ np.log(z)
        c = (p / z) @ a
        bound = (np.log(c.max()) - np.sum(xlogy(q * c, c))) / np.log(2)
        if bound <= tolerance:
            return q, iteration
        plain = np.maximum(q * c, SMALLEST)
        power *= GROWTH
        q = np.maximum(q * c**power, SMALLEST)
        q /= q.sum()
    raise ValueError(
        f"the bounds are still {bound:.3g} bits apart after {most} iterations, expected at most "
        f"{tolerance:.3g}: raise max_iterations or tolerance, or use a coarser alphabet"
    )


def _source(
    p: Float[Array, "n"], distortion_matrix: Float[Array, "n k"]
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n k"]]:
    """Return the checked source without the symbols of probability 0."""
    weights = probabilities(p, "p")
    d = nonnegative(finite(distortion_matrix, "distortion_matrix"), "distortion_matrix")
    if weights.ndim != 1 or d.ndim != 2 or len(d) != len(weights):
        raise ValueError(
            "expected probabilities [n] and a distortion matrix [n, k], got shapes "
            f"{list(weights.shape)} and {list(d.shape)}"
        )
    return weights[weights > 0], d[weights > 0]


def _point(
    p: Float[np.ndarray, "n"],
    d: Float[np.ndarray, "n k"],
    a: Float[np.ndarray, "n k"],
    q: Float[np.ndarray, "k"],
    iterations: int,
) -> RateDistortion:
    """Return the test channel q_j A_ij / (A q)_i and Blahut's bounds at its distortion."""
    z = a @ q
    c = (p / z) @ a
    joint = (p / z)[:, None] * a * q
    # Both bounds are sums of joint * log(a / z) less a term in c; a is 0 only where the joint is.
    common = np.sum(xlogy(joint, a)) - p @ np.log(z)
    rate = (common - np.sum(xlogy(q * c, c))) / np.log(2)
    lower = (common - np.log(c.max())) / np.log(2)
    return RateDistortion(
        rate=max(float(rate), 0.0),
        lower=max(float(lower), 0.0),
        distortion=float(np.sum(joint * d)),
        output=q * c,
        iterations=iterations,
    )
