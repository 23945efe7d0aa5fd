"""Sources of scalar quantizers: the moments of a density, or of samples, over intervals.

Every source is standardized, so that tolerances have no unit and a large mean costs no digits.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, Float
from scipy.integrate import fixed_quad, quad
from scipy.special import ndtr, ndtri

from jaxquant.theory.number_checks import finite

TAIL = 1e-15  # probability on either side of what the range of a source holds
KNOTS, NODES = 2048, 10  # intervals of a table, points of Gauss-Legendre quadrature in each
SMALLEST = 1e-150  # standard deviation of samples, the square of which float64 can hold
RESOLVED = 1e-6  # largest error of the table's mass, mean and second moment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A real random variable X, as Z = (X - mean) / std.

    Attributes:
      mean, std: of X.
      low, high: range of Z; the probability outside is negligible.
      smooth: whether moments are differentiable in the edges.
    """

    mean: float
    std: float
    low: float
    high: float
    smooth: ClassVar[bool] = True

    def moments(self, edges: Float[np.ndarray, "n+1"]) -> Float[np.ndarray, "3 n"]:
        """Return E[1], E[Z] and E[Z^2] over each interval between ascending edges."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian(Source):
    """A Gaussian, whose moments are closed forms."""

    low: float = float(ndtri(TAIL))
    high: float = -float(ndtri(TAIL))

    def moments(self, edges: Float[np.ndarray, "n+1"]) -> Float[np.ndarray, "3 n"]:
        a, b = edges[:-1], edges[1:]
        # On the right side, differences of the upper tail keep their digits.
        mass = np.where(a > 0, ndtr(-a) - ndtr(-b), ndtr(b) - ndtr(a))
        density = np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi)
        weighted = np.where(np.isinf(edges), 0.0, edges) * density
        return np.stack([mass, -np.diff(density), mass - np.diff(weighted)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Density(Source):
    """A distribution with a density; moments come from a table of Gauss-Legendre quadratures.

    Attributes:
      density: the density of Z, a function of arrays.
      knots: ascending values of Z [n], from `low` to `high`.
      below, above: E[1], E[Z] and E[Z^2] on either side of each knot [3, n]; small numbers keep
        their digits on both sides.
    """

    density: Callable[[Array], Array]
    knots: Float[np.ndarray, "n"]
    below: Float[np.ndarray, "3 n"]
    above: Float[np.ndarray, "3 n"]

    @staticmethod
    def of(distribution: Any, mean: float, std: float) -> "Density":
        """Return the source of a continuous distribution of SciPy with its parameters."""
        density = lambda z: distribution.pdf(mean + std * z) * std
        ends = (distribution.ppf(TAIL), distribution.isf(TAIL))
        low, high = (float((end - mean) / std) for end in ends)
        knots = graded(low, high, KNOTS)
        parts = _quadrature(density, knots[:-1], knots[1:])
        support = ((np.array(distribution.support(), np.float64) - mean) / std).tolist()
        left, right = (_beyond(density, *ends) for ends in zip((low, high), support, strict=True))
        below = np.cumsum(np.column_stack([left, parts]), 1)
        above = np.cumsum(np.column_stack([parts, right])[:, ::-1], 1)[:, ::-1]
        whole = below[:, 0] + above[:, 0]
        if np.abs(whole - [1, 0, 1]).max() > RESOLVED:
            raise ValueError(
                "the density is not resolved by quadrature: its standardized mass, mean and second "
                f"moment come out as {whole.round(6).tolist()} instead of [1, 0, 1]; pass samples"
            )
        return Density(
            density=density, knots=knots, below=below, above=above,
            mean=mean, std=std, low=low, high=high,
        )  # fmt: skip

    def moments(self, edges: Float[np.ndarray, "n+1"]) -> Float[np.ndarray, "3 n"]:
        e = np.clip(edges, self.low, self.high)
        at = np.searchsorted(self.knots, e, "right") - 1
        part = _quadrature(self.density, self.knots[at], e)
        below = np.where(edges == -np.inf, 0.0, self.below[:, at] + part)
        above = np.where(edges == np.inf, 0.0, self.above[:, at] - part)
        # An interval on both sides of 0 is the whole less what is below it and above it.
        whole = self.below[:, :1] + self.above[:, :1]
        left, right = edges[1:] <= 0, edges[:-1] >= 0
        across = whole - below[:, :-1] - above[:, 1:]
        return np.where(left, np.diff(below), np.where(right, -np.diff(above), across))


def _beyond(density: Callable[[Any], Any], start: float, end: float) -> list[float]:
    """Return E[1], E[Z] and E[Z^2] over a tail; its end may be infinite."""
    # In multiples of the start, a tail has the scale 1, and no tail is too small to be resolved.
    sign, at = np.sign(start), abs(start)
    part = lambda u, i: (start * u) ** i * density(start * u) * at
    return [quad(part, 1.0, sign * end / at, (i,), epsabs=0.0, epsrel=1e-9)[0] for i in range(3)]


def _quadrature(
    density: Callable[[Array], Array], a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]
) -> Float[np.ndarray, "3 n"]:
    """Return E[1], E[Z] and E[Z^2] over short intervals [a, b]."""

    def integrand(s: Float[np.ndarray, "t"]) -> Float[np.ndarray, "3 n nodes"]:
        z = a[:, None] + (b - a)[:, None] * s
        mass = density(z) * (b - a)[:, None]
        return np.stack([mass, z * mass, z * z * mass])

    return fixed_quad(integrand, 0.0, 1.0, n=NODES)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples(Source):
    """Equally probable samples.

    Attributes:
      sums: sums of 1, z and z^2 over the smallest 0, 1, 2 ... samples, divided by their number.
      sorted: the standardized samples, ascending.
    """

    sums: Float[np.ndarray, "3 n+1"]
    sorted: Float[np.ndarray, "n"]
    smooth: ClassVar[bool] = False

    def moments(self, edges: Float[np.ndarray, "n+1"]) -> Float[np.ndarray, "3 n"]:
        at = np.searchsorted(self.sorted, edges)
        at[-1] = len(self.sorted)  # the last interval includes its upper end
        return np.diff(self.sums[:, at])


def source_of(source: Any) -> Source:
    """Return the standardized source of a distribution or an array.

    Args:
      source: a continuous distribution of SciPy with its parameters, such as `norm(0, 1)`,
        of finite variance; or an array of samples of any shape, not all equal.
    Returns:
      The `Source`.
    Raises:
      ValueError: the source is something else, such as a list; parameters of the distribution are
        arrays; its variance is zero or not finite; or an array has elements that are not finite.
    """
    if hasattr(source, "dtype") and hasattr(source, "shape"):
        return _samples(finite(source, "samples").ravel())
    if isinstance(source, list | tuple):
        raise ValueError(
            f"expected an array of samples, got a {type(source).__name__}: wrap it in np.asarray"
        )
    if not all(hasattr(source, name) for name in ("pdf", "ppf", "isf", "support", "mean", "std")):
        raise ValueError(
            "expected an array of samples, or a continuous distribution with its parameters, like "
            f"scipy.stats.norm(0, 1), got {type(source).__name__}"
        )
    if np.ndim(source.mean()) or np.ndim(source.std()):
        raise ValueError(
            "the parameters of the distribution must be numbers, got arrays of the shape "
            f"{list(np.shape(source.std()))}: pass one distribution at a time"
        )
    mean, std = float(source.mean()), float(source.std())
    if not np.isfinite(mean) or not 0 < std < np.inf:
        raise ValueError(
            f"the distribution must have a finite mean and variance, got mean {mean} and standard "
            f"deviation {std}"
        )
    if getattr(getattr(source, "dist", None), "name", None) == "norm":
        return Gaussian(mean=mean, std=std)
    return Density.of(source, mean, std)


def _samples(x: Float[np.ndarray, "n"]) -> Samples:
    if x.min() == x.max():
        raise ValueError(f"the samples must not all be equal: one level, {x[0]:g}, is exact")
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = float(x.mean()), float(x.std())
    if not SMALLEST < std < 1 / SMALLEST:
        raise ValueError(
            f"the standard deviation of the samples must lie between {SMALLEST:g} and "
            f"{1 / SMALLEST:g}, got {std:g}: rescale the samples"
        )
    z = np.sort((x - mean) / std)
    sums = np.cumsum(np.stack([np.ones_like(z), z, z * z]), 1) / len(z)
    sums = np.pad(sums, ((0, 0), (1, 0)))
    low, high = float(z[0]), float(z[-1])
    return Samples(sums=sums, sorted=z, mean=mean, std=std, low=low, high=high)


def graded(low: float, high: float, intervals: int) -> Float[np.ndarray, "n+1"]:
    """Return a grid whose steps grow with the distance from 0, which is one of its points.

    Args:
      low, high: its ends; `low` is negative and `high` positive.
      intervals: number of intervals; an even number.
    """
    half = intervals // 2
    below = np.sinh(np.linspace(np.arcsinh(low), 0, half + 1))
    return np.append(below, np.sinh(np.linspace(0, np.arcsinh(high), half + 1))[1:])


def high_rate_levels(source: Source, count: int) -> Float[np.ndarray, "n"]:
    """Return levels whose density is that of the best quantizer with many levels.

    The density of the levels is proportional to the cube root of that of the source.

    Args:
      source: the source.
      count: number of levels.
    Source:
      Panter and Dite 1951, Quantization distortion in pulse-count modulation.
    """
    grid = graded(source.low, source.high, 256)
    mass = np.maximum(source.moments(grid)[0], 0)
    cumulative = np.cumsum(np.cbrt(mass * np.diff(grid) ** 2))
    at = (np.arange(count) + 0.5) / count * cumulative[-1]
    return np.interp(at, np.append(0, cumulative), grid)
