"""Symmetric alpha-stable distributions: their distribution function, density and exponents."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float
from scipy import special

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.float_entropy import source_exponent_entropy

NODES = 12  # Gauss-Legendre nodes of a panel
PANELS = np.append(0, 4.0 ** np.arange(-14, 0))  # their ends, as parts of the distance to the bend
LEFT, RIGHT = np.append(PANELS, [0.5, 1.0]), np.append(PANELS, [0.5, 0.75, 0.875, 0.9375, 1.0])
REACH = 40.0  # logarithm of the smallest part of the integral that matters
CAUCHY = 1e-5  # distance of alpha from 1 at which the integrand is a step
TINY = 1e-9  # magnitude up to which the density is constant
FAR = 1e12  # x^alpha from which the first term of the tail is enough
BLOCK = 2048  # number of values that are computed at a time
LEAST = 0.5  # alpha


@dataclasses.dataclass(frozen=True)
class StableLaw:
    """The symmetric alpha-stable distribution about 0, with E[exp(itX)] = exp(-|scale t|^alpha).

    Sums of independent variables of one alpha have a distribution of that alpha. At alpha = 2 it is
    a Gaussian of variance 2 scale^2, at alpha = 1 a Cauchy distribution; in between the tails fall
    like |x|^-alpha and the variance is infinite.

    It has the methods that `jaxquant.theory.float_entropy.Distribution` asks for.

    Attributes:
      alpha: index of stability, from 0.5 to 2.
      scale: scale parameter, above 0 and finite.
    Raises:
      ValueError: a parameter is out of its range.

    Source: the integral of Zolotarev 1986 and Nolan 1997, written in the angle from its far end so
    that tails keep their relative precision.

    >>> law = StableLaw(1.0, 2.0)
    >>> law.cdf(np.array([0.0, 2.0])).round(6).tolist(), round(law.pdf(0.0), 6)
    ([0.5, 0.75], 0.159155)
    """

    alpha: float
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not LEAST <= self.alpha <= 2:
            raise ValueError(f"alpha must be from {LEAST} to 2, got {self.alpha}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be a finite number above 0, got {self.scale}")

    def cdf(self, x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Return the probability of values up to x, which is precise relatively if x < 0."""
        x = np.asarray(x, np.float64)
        above = self.sf(np.abs(x))
        return np.where(x < 0, above, 1 - above)

    def sf(self, x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Return the probability of values above x, for x >= 0."""
        scaled = np.asarray(x, np.float64) / self.scale
        flat = scaled.reshape(-1)
        starts = range(0, flat.size, BLOCK)
        parts = [_survival(flat[at : at + BLOCK], self.alpha) for at in starts] or [flat]
        return np.concatenate(parts).reshape(scaled.shape)

    def pdf(self, x: float) -> float:
        """Return the density at x."""
        magnitude = np.array([abs(x) / self.scale])
        return float(_density(magnitude, self.alpha)[0]) / self.scale

    @property
    def exponent_entropy(self) -> float:
        """Entropy of the exponent floor(log2 |X|) in bits: exact, by the distribution function."""
        return source_exponent_entropy(self)


def ecf8_paper_bounds(alpha: float) -> tuple[float, float]:
    """Return what the paper of ECF8 states as bounds of H(E) of alpha-stable numbers. They are not.

      a / (1 + 2^-a) <= H(E) <= a / (1 - 2^-a)

    The entropy of exponents of alpha-stable numbers is above the "upper bound" for every alpha up
    to about 1.90: it is 3.194 bits at alpha = 1, where the formula allows 2. `StableLaw` has the
    true value as `exponent_entropy`; see `jaxquant.theory.float_entropy.source_exponent_entropy`
    for the step at which the proof fails.

    Args:
      alpha: index of stability, above 0 and at most 2.
    Returns:
      The lower and the upper "bound", in bits.
    Raises:
      ValueError: alpha is out of its range.

    Source: ECF8, arXiv:2510.02676, reported for comparison only.

    >>> law = StableLaw(1.5)
    >>> [round(bits, 3) for bits in ecf8_paper_bounds(1.5)], round(law.exponent_entropy, 3)
    ([1.108, 2.32], 2.819)
    """
    check_arguments(ecf8_paper_bounds, locals())
    if not 0 < alpha <= 2:
        raise ValueError(f"alpha must be above 0 and at most 2, got {alpha}")
    return alpha / (1 + 2**-alpha), alpha / (1 - 2**-alpha)


# --- the standard law at magnitudes x >= 0 ------------------------------------------------------


def _survival(x: Float[np.ndarray, " n"], alpha: float) -> Float[np.ndarray, " n"]:
    """Return P(X > x) = 1/pi int_0^(pi/2) exp(-e^h) dd, or of 1 - exp(-e^h) if alpha < 1."""
    if abs(alpha - 1) < CAUCHY:
        return np.arctan2(1, x) / math.pi
    if alpha == 2:
        return special.erfc(x / 2) / 2
    small, large = x < TINY, x > FAR ** (1 / alpha)
    found = np.where(small, 0.5 - np.minimum(x, TINY) * _peak(alpha), _tail(x, alpha))
    between = ~(small | large)
    h, weights = _nodes(x[between], alpha)
    values = np.exp(-np.exp(h)) if alpha > 1 else -np.expm1(-np.exp(h))
    found[between] = (values * weights).sum(-1) / math.pi
    return found


def _density(x: Float[np.ndarray, " n"], alpha: float) -> Float[np.ndarray, " n"]:
    if abs(alpha - 1) < CAUCHY:
        return 1 / (math.pi * (1 + x**2))
    if alpha == 2:
        return np.exp(-(x**2) / 4) / math.sqrt(4 * math.pi)
    small, large = x < TINY, x > FAR ** (1 / alpha)
    found = np.where(small, _peak(alpha), _tail(x, alpha) * alpha / np.maximum(x, TINY))
    between = ~(small | large)
    h, weights = _nodes(x[between], alpha)
    factor = abs(alpha / (alpha - 1)) / (math.pi * x[between])
    found[between] = (np.exp(h - np.exp(h)) * weights).sum(-1) * factor
    return found


def _peak(alpha: float) -> float:
    """Return the density at 0."""
    return math.gamma(1 + 1 / alpha) / math.pi


def _tail(x: Float[np.ndarray, " n"], alpha: float) -> Float[np.ndarray, " n"]:
    """Return the first term of P(X > x) for large x."""
    factor = math.gamma(alpha) * math.sin((2 - alpha) * math.pi / 2) / math.pi
    return factor * np.maximum(x, TINY) ** -alpha


def _nodes(
    x: Float[np.ndarray, " n"], alpha: float
) -> tuple[Float[np.ndarray, "n q"], Float[np.ndarray, "n q"]]:
    """Return h and the weights of a quadrature over the angle d = pi/2 - theta.

    In log d the integrand bends where h = 0, and the more steeply the nearer alpha is to 1; panels
    shrink towards that point from both sides. At the far right the integrand bends again if alpha
    is near 2, so panels shrink there too.
    """
    log_x = np.log(np.maximum(x, TINY))
    bend = _bend(log_x, alpha)[:, None]
    right = math.log(math.pi / 2) - bend
    (left_at, left_share), (right_at, right_share) = _rule(LEFT), _rule(RIGHT)
    log_d = np.concatenate([bend - REACH * left_at, bend + right * right_at], 1)
    shares = np.broadcast_to(REACH * left_share, (len(x), left_share.size))
    weights = np.concatenate([shares, right * right_share], 1)
    return _exponent(log_d, log_x[:, None], alpha), weights * np.exp(log_d)


def _rule(ends: Float[np.ndarray, " p"]) -> tuple[Float[np.ndarray, " q"], Float[np.ndarray, " q"]]:
    """Return the points and weights of the quadrature over panels with these ends."""
    point, weight = np.polynomial.legendre.leggauss(NODES)
    middles, halves = (ends[1:] + ends[:-1])[:, None] / 2, np.diff(ends)[:, None] / 2
    return (middles + halves * point).ravel(), (halves * weight).ravel()


def _exponent(
    log_d: Float[np.ndarray, "..."], log_x: Float[np.ndarray, "..."], alpha: float
) -> Float[np.ndarray, "..."]:
    """Return h = log(x^(a / (a - 1)) V_a(pi/2 - d)), clipped where e^h is 0 or infinite."""
    d, rest = np.exp(log_d), (2 - alpha) * math.pi / 2
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        log_sin = np.where(d > 1e-8, np.log(np.sin(d)), log_d)
        ratio = log_x + log_sin - np.log(np.abs(np.sin(rest + alpha * d)))
        h = alpha / (alpha - 1) * ratio + np.log(np.abs(np.sin(rest + (alpha - 1) * d))) - log_sin
    return np.clip(h, -700, 700)


def _bend(log_x: Float[np.ndarray, " n"], alpha: float) -> Float[np.ndarray, " n"]:
    """Return log d where h is 0, by bisection: h rises with d if alpha > 1, and else falls."""
    low = np.full_like(log_x, -740.0)
    high = np.full_like(log_x, math.log(math.pi / 2))
    for _ in range(50):
        middle = (low + high) / 2
        beyond = (_exponent(middle, log_x, alpha) > 0) == (alpha > 1)
        low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
    return (low + high) / 2
