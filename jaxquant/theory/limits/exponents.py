"""The local exponent of a sum of power laws, such as the loss of a mixture of modalities.

For L(x) = sum_i c_i x^-a_i with c_i > 0,

    -d ln L / d ln x = sum_i w_i a_i,   w_i = c_i x^-a_i / L(x),

is a mean of the exponents, so it lies between the smallest and the largest, and so does the slope
between any two points. L must be free of an irreducible constant, which is a term of exponent 0:
subtract it first.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.limits.limit import Limit
from jaxquant.theory.number_checks import positive

ROUNDING = 1e-12  # relative error of a loss that is computed in float64


@dataclasses.dataclass(frozen=True)
class Exponents:
    """Slopes of measured losses between successive sizes.

    Attributes:
      secants: -ln(L_2 / L_1) / ln(x_2 / x_1) of neighbors, by rising size.
      tolerance: how far the stated error of the losses can move each.
      smallest, largest: the exponents between which they must lie.
    """

    secants: tuple[float, ...]
    tolerance: tuple[float, ...]
    smallest: float
    largest: float

    def limits(self) -> tuple[Limit, ...]:
        """Return the theorem as a row of a suite: the secant that is farthest out."""
        out = [
            max(s - self.largest, self.smallest - s) - t
            for s, t in zip(self.secants, self.tolerance, strict=True)
        ]
        worst = self.secants[int(np.argmax(out))]
        bound = self.largest if worst > (self.smallest + self.largest) / 2 else self.smallest
        statement = (
            f"A loss that is a sum of power laws of exponents from {self.smallest:g} to "
            f"{self.largest:g} falls with a slope between them at every size; measured is the "
            "slope that is nearest to leaving this range."
        )
        return (Limit("exponents", statement, "theorem", worst, bound, max(out) <= 0),)


def power_laws(
    sizes: Float[Array | np.ndarray, "n"], coefficients: Sequence[Any], exponents: Sequence[Any]
) -> Float[np.ndarray, "n"]:
    """Return L(x) = sum_i c_i x^-a_i.

    Args:
      sizes: x [n], positive.
      coefficients: c_i, finite numbers of any sign, so that wrong laws can be written.
      exponents: a_i, one for each coefficient.
    Returns:
      The losses [n].
    Raises:
      ValueError: a size is not positive, or the numbers of coefficients and exponents differ.

    >>> power_laws(np.array([1.0]), [1, 3], [0.3, 0.08]).tolist()
    [4.0]
    """
    check_arguments(power_laws, locals())
    return _terms(sizes, coefficients, exponents).sum(-1)


def local_exponent(
    sizes: Float[Array | np.ndarray, "n"], coefficients: Sequence[Any], exponents: Sequence[Any]
) -> Float[np.ndarray, "n"]:
    """Return -d ln L / d ln x of a sum of power laws.

    Args:
      sizes: x [n], positive.
      coefficients: c_i, positive.
      exponents: a_i, one for each coefficient.
    Returns:
      The exponents [n].
    Raises:
      ValueError: a size or a coefficient is not positive, or their numbers differ.

    >>> local_exponent(np.array([1.0]), [1, 3], [0.3, 0.08]).round(3).tolist()
    [0.135]
    """
    check_arguments(local_exponent, locals())
    positive(coefficients, "coefficients")
    terms = _terms(sizes, coefficients, exponents)
    return terms @ np.asarray(exponents, np.float64) / terms.sum(-1)


def secants(
    sizes: Float[Array | np.ndarray, "n"],
    losses: Float[Array | np.ndarray, "n"],
    exponents: Sequence[Any],
    error: float = 0.0,
) -> Exponents:
    """Measure the slopes of losses between successive sizes.

    Args:
      sizes: x [n], positive and distinct, in any order; two or more.
      losses: L [n], positive, without the irreducible constant.
      exponents: of the power laws that the losses are said to be a sum of.
      error: relative error of each loss, 0 or more; it moves a slope by at most
        2 ln(1 + error) / ln(x_2 / x_1).
    Returns:
      The slopes and their bounds.
    Raises:
      ValueError: numbers are out of range, shapes do not match, or sizes occur twice.

    >>> secants(np.array([1.0, 4.0]), np.array([1.0, 0.5]), [0.5]).secants
    (0.5,)
    """
    check_arguments(secants, locals())
    x, y = positive(sizes, "sizes"), positive(losses, "losses")
    if x.ndim != 1 or x.shape != y.shape or x.size < 2 or np.unique(x).size < x.size:
        raise ValueError(
            "expected two or more distinct sizes and a loss for each, got shapes "
            f"{list(x.shape)} and {list(y.shape)} with {np.unique(x).size} distinct sizes"
        )
    powers = np.asarray(exponents, np.float64)
    if powers.size == 0 or not np.isfinite(powers).all() or not 0 <= error < math.inf:
        raise ValueError(
            f"exponents and error must be finite, and error 0 or more, got {exponents} and {error}"
        )
    order = np.argsort(x)
    steps = np.diff(np.log(x[order]))
    slopes = -np.diff(np.log(y[order])) / steps
    tolerance = 2 * math.log1p(error + ROUNDING) / steps
    each = lambda values: tuple(map(float, values))
    return Exponents(each(slopes), each(tolerance), float(powers.min()), float(powers.max()))


def _terms(
    sizes: Float[Array | np.ndarray, "n"], coefficients: Sequence[Any], exponents: Sequence[Any]
) -> Float[np.ndarray, "n k"]:
    x = positive(sizes, "sizes")
    c, a = np.asarray(coefficients, np.float64), np.asarray(exponents, np.float64)
    if c.shape != a.shape or c.ndim != 1 or c.size == 0 or not np.isfinite([c, a]).all():
        raise ValueError(
            f"expected one finite exponent for each finite coefficient, got {coefficients} and "
            f"{exponents}"
        )
    return c * x[..., None] ** -a
