"""Temperature: the slope -d loss / d bits, which an optimal allocation makes equal everywhere.

The best division of a budget minimizes F = loss + lambda bits, a free energy. Its multiplier
lambda = -d loss / d bits is the temperature. If rates are continuous, tensors in equilibrium have
one temperature; where two differ, moving bits to the hotter one lowers the total loss. A tensor
without bits may be colder than the others, since it has none to give.
"""

import math

import numpy as np
from jaxtyping import Array, Float

from jaxquant.core.arguments import check_arguments
from jaxquant.core.greedy_allocation import lower_hull
from jaxquant.theory.number_checks import nonnegative


def gaussian_temperature(distortion: Float[Array, "..."] | float) -> Float[np.ndarray, "..."]:
    """Return 2 ln(2) D, the temperature of a code on a Gaussian's D(R) = variance 4^-R.

    Args:
      distortion: squared error D, 0 or more; of one weight, or weighted by its importance.
    Returns:
      Squared error per bit: the slope at D. A whole bit more saves 3/4 D.
    Raises:
      ValueError: a distortion is negative or NaN.

    >>> round(float(gaussian_temperature(0.25)), 4)
    0.3466
    """
    check_arguments(gaussian_temperature, locals())
    return 2 * math.log(2) * nonnegative(distortion, "distortion")


def measured_temperature(
    bits: Float[Array, "n"],
    losses: Float[Array, "n"],
    at: Float[Array, "..."] | float,
) -> Float[np.ndarray, "..."]:
    """Return the temperature of one tensor at rates between measured points.

    The logarithm of the loss is interpolated linearly over bits, and so is its slope, which is a
    finite difference of second order at the points: temperature = -loss * d ln(loss) / d bits. The
    result is exact for losses c 4^-R.

    Args:
      bits: bits of the measured points [n], 2 or more different ones: total bits of the tensor if
        losses are totals, or bits per weight if losses are per weight.
      losses: loss at each point, positive.
      at: bits at which the temperature is wanted, within the range of `bits`.
    Returns:
      Loss per bit, of the shape of `at`. It is negative where more bits lost.
    Raises:
      ValueError: the points are not finite vectors of one length, bits occur twice, a loss is not
        positive, or `at` is out of range.

    >>> import numpy as np
    >>> bits = np.array([1.0, 2.0, 4.0])
    >>> round(float(measured_temperature(bits, 4.0**-bits, 3.0) / gaussian_temperature(4.0**-3)), 9)
    1.0
    """
    check_arguments(measured_temperature, locals())
    x, loss = _curve(bits, losses)
    if np.any(loss <= 0):
        raise ValueError(f"losses must be positive, got {loss.min()}")
    wanted = np.asarray(at, np.float64)
    if not np.all((wanted >= x[0]) & (wanted <= x[-1])):
        raise ValueError(f"expected bits from {x[0]:g} to {x[-1]:g}, which were measured, got {at}")
    logs = np.log(loss)
    slope = np.interp(wanted, x, np.gradient(logs, x, edge_order=1 if len(x) == 2 else 2))
    return -np.exp(np.interp(wanted, x, logs)) * slope


def step_temperatures(
    bits: Float[Array, "n"], losses: Float[Array, "n"], at: float
) -> tuple[float, float]:
    """Return the least and the greatest temperature at which an option of a tensor is optimal.

    With discrete options the slope is not one number: the option is the best one for every
    multiplier from the loss per bit that the next larger option would save to the loss per bit that
    the last step to this one has saved. Options above the lower convex hull are skipped.

    Args:
      bits: bits of every option, all different.
      losses: loss of every option, finite.
      at: bits of the chosen option.
    Returns:
      Loss per bit of the next step, 0 after the last one; and of the last step, infinite before the
      first one. For an option above the hull, the former is the greater: it is never optimal.
    Raises:
      ValueError: the points are not finite vectors of one length, bits occur twice, or no option
        has these bits.

    >>> import numpy as np
    >>> step_temperatures(np.array([1.0, 2.0, 3.0]), np.array([16.0, 4.0, 1.0]), 2.0)
    (3.0, 12.0)
    """
    check_arguments(step_temperatures, locals())
    x, loss = _curve(bits, losses)
    if at not in x:
        raise ValueError(f"no option has {at} bits; there are {', '.join(f'{b:g}' for b in x)}")
    here = float(loss[x == at][0])
    hull = lower_hull(x.tolist(), loss.tolist())
    more, fewer = ([i for i in hull if side(x[i], at)] for side in (np.greater, np.less))
    following = max((float((here - loss[i]) / (x[i] - at)) for i in more), default=0.0)
    last = min((float((loss[i] - here) / (at - x[i])) for i in fewer), default=math.inf)
    return max(following, 0.0), last


def spread(least: Float[Array, "t"], greatest: Float[Array, "t"] | None = None) -> float:
    """Return the ratio of the hottest to the coldest tensor, 1 in equilibrium.

    Args:
      least: temperature of every tensor, 0 or more; with `greatest` the first values of
        `step_temperatures`. Leave out tensors without bits if rates are continuous.
      greatest: the second values of `step_temperatures`. Default: `least`.
    Returns:
      max(least) / min(greatest): how many times more the next bit would save in one tensor than
        the last bit has saved in another. It is infinite if a tensor has bits that save nothing.
        For discrete options, 1 or less means that one multiplier makes every choice optimal.
    Raises:
      ValueError: the temperatures are not vectors of one length of 1 or more, one is NaN, or one of
        `least` is negative or infinite.

    >>> import numpy as np
    >>> spread(np.array([1.0, 2.0])), spread(np.array([1.0, 2.0]), np.array([4.0, 8.0]))
    (2.0, 0.5)
    """
    check_arguments(spread, locals())
    low = np.asarray(least, np.float64)
    high = low if greatest is None else np.asarray(greatest, np.float64)
    if low.ndim != 1 or not low.size or high.shape != low.shape:
        raise ValueError(
            f"expected temperatures of one shape [t], got {list(low.shape)} and {list(high.shape)}"
        )
    if not (np.all(low >= 0) and np.all(np.isfinite(low))) or np.any(np.isnan(high)):
        raise ValueError("temperatures must be 0 or more and finite, and none may be NaN")
    hottest, coldest = float(np.max(low)), float(np.min(high))
    if coldest <= 0:
        return 1.0 if hottest == coldest else math.inf
    return hottest / coldest


def in_equilibrium(
    least: Float[Array, "t"],
    greatest: Float[Array, "t"] | None = None,
    tolerance: float = 0.01,
) -> bool:
    """Return whether all tensors have one temperature, within a tolerance.

    Args:
      least, greatest: as in `spread`.
      tolerance: largest relative difference, 0 or more.
    Returns:
      Whether `spread` is at most 1 + tolerance.
    Raises:
      ValueError: the tolerance is negative or NaN, or `spread` raises.

    >>> import numpy as np
    >>> in_equilibrium(np.array([1.0, 1.005])), in_equilibrium(np.array([1.0, 2.0]))
    (True, False)
    """
    check_arguments(in_equilibrium, locals())
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or more, got {tolerance}")
    return spread(least, greatest) <= 1 + tolerance


def _curve(bits: Array, losses: Array) -> tuple[np.ndarray, np.ndarray]:
    """Return the points by increasing bits, in float64, checked."""
    x, loss = np.asarray(bits, np.float64), np.asarray(losses, np.float64)
    if x.ndim != 1 or x.shape != loss.shape or len(x) < 2:
        raise ValueError(
            "expected bits and losses of one shape [n], n 2 or more, got "
            f"{list(x.shape)} and {list(loss.shape)}"
        )
    order = np.argsort(x)
    x, loss = x[order], loss[order]
    if not (np.all(np.isfinite(x)) and np.all(np.isfinite(loss)) and np.all(np.diff(x) > 0)):
        raise ValueError("bits and losses must be finite, and no bits may occur twice")
    return x, loss
