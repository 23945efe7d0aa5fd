"""The rate-distortion-perception function of a Gaussian: squared error, and W2^2 as perception.

A quantizer that minimizes squared error alone shrinks what it quantizes: its output has the
variance of the source less D. R(D, P) is the rate that it takes if the distribution of the output
must also be within W2^2 <= P of that of the source.

A common statement is corrected here: GPTQ and QuIP# do not "navigate the rate-distortion-perception
trade-off". They minimize a squared error that is weighted by a Hessian, tr(E^T H E), which is a
distortion; nothing in it constrains the distribution of the rounded weights. A weighted error and a
perception constraint are different things and are offered separately.
"""

import numpy as np
from jaxtyping import Float

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.number_checks import Numbers, check_shapes, nonnegative
from jaxquant.theory.rate_distortion import gaussian_rate


def perception_rate(
    distortion: Numbers, perception: Numbers, variance: Numbers = 1.0
) -> Float[np.ndarray, "..."]:
    """Return R(D, P) of independent Gaussian symbols, in bits per symbol.

    The output is Gaussian too, with the standard deviation t, so that W2 = |s - t|, and the
    correlation c of source and output:

        D = s^2 + t^2 - 2 c s t,    R = -log2(1 - c^2) / 2

    Where classical output, of t^2 = s^2 - D, is too narrow, t is s - sqrt(P). For P >= D the
    constraint says nothing, as the code itself is a coupling with W2^2 <= D. The rate can be
    reached if encoder and decoder share unlimited randomness.

    Args:
      distortion: D, mean squared error per symbol, 0 or more; any shape.
      perception: P, the largest W2^2 between source and output, 0 or more, in the unit of D;
        broadcast with `distortion`. Infinity gives `gaussian_rate`.
      variance: s^2, finite, 0 or more; broadcast likewise. Default: 1.
    Returns:
      The rates, of the broadcast shape. They are infinite for D = 0 unless the variance is 0 too,
        and for D >= s^2 positive until D = s^2 + (s - sqrt(P))^2, beyond which independent output
        is good enough.
    Raises:
      ValueError: a number is negative or NaN, a variance is infinite, or shapes do not broadcast.
    Source:
      Zhang, Qian, Chen and Khisti 2021, Universal rate-distortion-perception representations for
      lossy compression, arXiv:2106.10311; Blau and Michaeli 2019, arXiv:1901.07821.

    >>> round(float(perception_rate(0.25, 0.0)), 4), round(float(perception_rate(1.0, 0.05)), 4)
    (1.0466, 0.1178)
    """
    check_arguments(perception_rate, locals())
    d, p = nonnegative(distortion, "distortion"), nonnegative(perception, "perception")
    v = nonnegative(variance, "variance", finite=True)
    check_shapes(distortion=d, perception=p, variance=v)
    s = np.sqrt(v)
    narrower = np.minimum(np.sqrt(p), s)
    t = s - narrower
    limited = t > np.sqrt(np.abs(v - d))
    with np.errstate(divide="ignore", invalid="ignore"):
        # 1 - c and 1 + c, each without cancellation; 1 - c^2 is their product.
        less, more = (d - narrower**2) / (2 * s * t), ((s + t) ** 2 - d) / (2 * s * t)
        rate = -np.log2(less * more) / 2
    return np.where(limited, rate, gaussian_rate(distortion, variance))[()]


def perception_distortion(
    rate: Numbers, perception: Numbers, variance: Numbers = 1.0
) -> Float[np.ndarray, "..."]:
    """Return D(R, P), the inverse of `perception_rate` in D.

    With c = sqrt(1 - 2^(-2 R)), it is s^2 + t^2 - 2 c s t at t = max(c s, s - sqrt(P)). Perfect
    perception, P = 0, costs D = 2 s^2 (1 - c): at low rates twice the classical distortion (3 dB),
    at high rates nothing more.

    Args:
      rate: R, bits per symbol, 0 or more; any shape.
      perception: P, the largest W2^2 between source and output, 0 or more, in the unit of D;
        broadcast with `rate`. Infinity gives `gaussian_distortion`.
      variance: s^2, finite, 0 or more; broadcast likewise. Default: 1.
    Returns:
      Mean squared errors per symbol, of the broadcast shape.
    Raises:
      ValueError: a number is negative or NaN, a variance is infinite, or shapes do not broadcast.
    Source:
      As `perception_rate`.

    >>> perception_distortion(np.array([1.0, 2.0]), 0.0).round(5).tolist()
    [0.26795, 0.06351]
    """
    check_arguments(perception_distortion, locals())
    r, p = nonnegative(rate, "rate"), nonnegative(perception, "perception")
    v = nonnegative(variance, "variance", finite=True)
    check_shapes(rate=r, perception=p, variance=v)
    s = np.sqrt(v)
    least = v * np.exp2(-2 * r)
    t = np.sqrt(v - least)  # the classical output
    # Its distortion, plus that of output which is wider by the excess.
    excess = np.maximum(s - np.sqrt(p) - t, 0.0)
    return (least + excess**2)[()]


def centroid_perception(distortion: Numbers, variance: Numbers = 1.0) -> Float[np.ndarray, "..."]:
    """Return the least W2^2 between a source and its output under a quantizer of centroids.

    Centroids have variance s^2 - D, and W2^2 >= (s - sqrt(s^2 - D))^2. Equality holds for output of
    the shape of the source; that of a scalar quantizer is discrete. As its map is ascending, it is
    itself the best coupling, so there W2^2 = D exactly: Lloyd-Max at 2 bits has 0.1175, where this
    bound is 0.0037.

    Args:
      distortion: D, mean squared error, from 0 to the variance; any shape.
      variance: s^2, finite, 0 or more; broadcast with `distortion`. Default: 1.
    Returns:
      Lower bounds on W2^2, of the broadcast shape, in the unit of D.
    Raises:
      ValueError: a number is negative or NaN, D is above the variance, as for no centroids, or
        shapes do not broadcast.

    >>> round(float(centroid_perception(0.117482)), 4)
    0.0037
    """
    check_arguments(centroid_perception, locals())
    d = nonnegative(distortion, "distortion")
    v = nonnegative(variance, "variance", finite=True)
    check_shapes(distortion=d, variance=v)
    if np.any(d > v):
        raise ValueError(
            "the distortion of centroids is at most the variance, got a distortion of up to "
            f"{d.max():g} and a variance of {v.min():g} or more"
        )
    return ((np.sqrt(v) - np.sqrt(v - d)) ** 2)[()]
