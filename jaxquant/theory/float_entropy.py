"""Entropy of floating-point numbers: of their fields as counted, and in closed form."""

import dataclasses
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Int, UInt
from scipy import integrate, special

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.entropy import entropy, symbol_entropy

DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2")
_NARROWEST = 1e-9  # part of an octave that is not halved any more
_FAINT = 1e-12  # probability of an octave that does not matter


class Distribution(Protocol):
    """A continuous distribution, such as the frozen ones of SciPy."""

    def pdf(self, x: float) -> float:
        """Return the density at x."""

    def cdf(self, x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Return the probability of values up to x."""


@dataclasses.dataclass(frozen=True)
class Fields:
    """The fields of floating-point numbers, as unsigned integers of the shape of the numbers.

    Attributes:
      sign: 0 or 1.
      exponent: the biased exponent; 0 for zeros and subnormal numbers.
      mantissa: the stored bits of the significand, without the hidden one.
      value: all bits of the number, so that -0 is not 0 and NaNs differ by their payload.
    """

    sign: UInt[np.ndarray, "..."]
    exponent: UInt[np.ndarray, "..."]
    mantissa: UInt[np.ndarray, "..."]
    value: UInt[np.ndarray, "..."]


def fields(w: Float[Any, "..."], dtype: DTypeLike | None = None) -> Fields:
    """Split floating-point numbers into sign, exponent and mantissa.

    Args:
      w: the numbers, of any shape, concrete. Infinities and NaN are patterns like others.
      dtype: bfloat16, float16, float32, float8_e4m3fn or float8_e5m2, to which the numbers are
        rounded first, to nearest, ties to even. Default: that of `w`.
    Returns:
      The fields.
    Raises:
      ValueError: the dtype is another one, or it turns a finite number into infinity or NaN.

    >>> found = fields(np.array([1.0, -3.0], np.float32), "bfloat16")
    >>> found.sign.tolist(), found.exponent.tolist(), found.mantissa.tolist()
    ([0, 1], [127, 128], [0, 64])
    """
    check_arguments(fields, locals())
    value, kind = patterns(w, dtype)
    bits, mantissa = 8 * kind.itemsize, jnp.finfo(kind).nmant
    exponent = (value >> mantissa) & ((1 << (bits - 1 - mantissa)) - 1)
    return Fields(value >> (bits - 1), exponent, value & ((1 << mantissa) - 1), value)


def patterns(
    w: Float[Any, "..."], dtype: DTypeLike | None = None
) -> tuple[UInt[np.ndarray, "..."], np.dtype]:
    """Return the bits of floating-point numbers as unsigned integers, and their dtype.

    Args:
      w, dtype: as in `fields`. Without a dtype the result is a view of `w`, or of a copy.
    Returns:
      The patterns, and the dtype of the numbers.
    Raises:
      ValueError: as in `fields`.

    >>> patterns(np.array([1.0, -0.0], np.float16))
    (array([15360, 32768], dtype=uint16), dtype('float16'))
    """
    numbers = np.asarray(w)
    kind = jnp.dtype(numbers.dtype if dtype is None else dtype)
    if kind.name not in DTYPES:
        raise ValueError(f"the dtype must be one of {', '.join(DTYPES)}, got {kind.name}")
    stored, lost = numbers, 0
    if kind != numbers.dtype:
        with np.errstate(over="ignore", invalid="ignore"):
            stored = numbers.astype(kind)
            lost = int(np.isfinite(numbers).sum() - np.isfinite(stored).sum())
    if lost:
        raise ValueError(
            f"{lost} finite numbers exceed the largest of {kind.name}, "
            f"{float(jnp.finfo(kind).max):g}; scale the weights first, as the format Float8 does"
        )
    return stored.view(f"uint{8 * kind.itemsize}"), kind


@dataclasses.dataclass(frozen=True)
class FieldEntropy:
    """Order-0 entropies of the fields of floating-point numbers, in bits per number.

    Attributes:
      sign, exponent, mantissa: of each field alone.
      value: of all bits of a number together, at most the sum of the three. N numbers have at most
        log2 N bits of it, so it says little about float32, where nearly all numbers differ.
      raw: number of bits of sign and mantissa as they are stored.
    """

    sign: float
    exponent: float
    mantissa: float
    value: float
    raw: int

    @property
    def ideal(self) -> float:
        """Bits per number of sign and mantissa as stored and an ideally coded exponent."""
        return self.raw + self.exponent


def field_entropy(
    w: Float[Any, "..."],
    dtype: DTypeLike | None = None,
    groups: Int[Any, "..."] | None = None,
) -> FieldEntropy:
    """Return the order-0 entropies of the fields of floating-point numbers.

    The entropies are those of one table per field, or per field and group; tables are not counted.
    They depend on the extent of a table: pooling tensors of different scales in one table can cost
    half a bit of the exponent, and an adaptive compressor then does better than this "limit".

    Args:
      w, dtype: as in `fields`; at least one number.
      groups: index of the group of each number, integers that broadcast to the shape of `w`.
        Default: one group.
    Returns:
      The entropies.
    Raises:
      ValueError: `w` is empty, or as in `fields` and `symbol_entropy`.

    >>> w = np.array([1.0, -1.0, 2.0, -2.0], np.float32)
    >>> field_entropy(w, "bfloat16")
    FieldEntropy(sign=1.0, exponent=1.0, mantissa=0.0, value=2.0, raw=8)
    """
    check_arguments(field_entropy, locals())
    found = fields(w, dtype)
    of = {name: symbol_entropy(a, groups) for name, a in dataclasses.asdict(found).items()}
    kind = jnp.finfo(w.dtype if dtype is None else dtype)
    return FieldEntropy(**of, raw=1 + kind.nmant)


def exponent_entropy(
    w: Float[Any, "..."],
    dtype: DTypeLike | None = None,
    groups: Int[Any, "..."] | None = None,
) -> float:
    """Return the order-0 entropy of the exponents of floating-point numbers, in bits per number.

    Args:
      w, dtype, groups: as in `field_entropy`.
    Returns:
      The entropy H(E), or H(E | group), in bits per number.
    Raises:
      ValueError: as in `field_entropy`.

    >>> exponent_entropy(np.array([1.0, 1.5, 2.0, -3.0], np.float32))
    1.0
    """
    check_arguments(exponent_entropy, locals())
    return symbol_entropy(fields(w, dtype).exponent, groups)


# --- closed forms -----------------------------------------------------------------------------


def float_entropy(distribution: Distribution, precision: int) -> float:
    """Return the entropy of samples rounded to floats, in bits per number, for fine precisions.

      H ~ p - 1/2 - E[log2(|X| f(X))]

    The spacing of floats at x is 2^(floor(log2 |x|) - p + 1), so H is the differential entropy
    -E[log2 f(X)] minus the mean logarithm of the spacing; the formula takes the fractional part of
    log2 |X| to be 1/2 on average, which makes it independent of the scale. It gives p + 2.463 for a
    Gaussian, p + 2.775 for a Laplace and p + 1.943 for a uniform distribution. The exact value
    oscillates about it with the scale; it is p + 2 for the uniform distribution on (-1, 1).
    Underflow and overflow are not considered.

    Args:
      distribution: a continuous distribution with the methods `pdf` and `cdf`, such as a frozen one
        of SciPy.
      precision: number p of significand bits, the hidden one included: 24 for float32, 11 for
        float16, 8 for bfloat16, 4 for float8_e4m3fn, 3 for float8_e5m2.
    Returns:
      The entropy in bits per number. The formula is for densities that are much wider than the
        spacing of the floats; a negative result is no entropy.
    Raises:
      ValueError: `precision` is below 1, or the distribution has no density or its mass outside of
        the range of float64.

    Source: "Entropy of floating-point numbers", arXiv:2605.11546.

    >>> from scipy import stats
    >>> round(float_entropy(stats.norm(), 8), 3), round(float_entropy(stats.laplace(), 8), 3)
    (10.463, 10.775)
    """
    check_arguments(float_entropy, locals())
    if precision < 1:
        raise ValueError(f"precision must be 1 or more, got {precision}")
    octaves, mass = exponent_probabilities(distribution)
    mean = sum(
        _surprise(distribution, sign, float(k), k + 1.0)
        for k in octaves[mass > _FAINT].tolist()
        for sign in (1, -1)
    )
    return precision - 0.5 + mean


def source_exponent_entropy(distribution: Distribution, scale: float = 1.0) -> float:
    """Return the entropy of the exponent floor(log2 |s X|) of a random number X, in bits.

      P(E = e) = P(2^e <= |s X| < 2^(e + 1)),    H(E) = -sum_e P(E = e) log2 P(E = e)

    The sum over all exponents of float64 is exact to rounding, for floats of every precision,
    except that floats with few exponents merge the smallest ones. It depends on the scale s only
    through the fractional part of log2 s: between 2.542 and 2.546 bits for a Gaussian.

    The project page of ECF8 (arXiv:2510.02676) states a / (1 + 2^-a) <= H(E) <= a / (1 - 2^-a) for
    alpha-stable X with index a, and derives a "limit" of 4.67 bits per weight from it. This is NOT
    a bound: it gives 2 bits for a Cauchy distribution (a = 1), whose exponents have 3.19. The
    statement assumes that P(E = e) falls like 2^-a|e| on both sides of the mode, whereas below the
    mode it falls like 2^e for every density that is finite and positive at 0. At a = 2 (Gaussian)
    2.67 is above the true 2.54; and 4.67 bits count one bit for the mantissa, so they are no
    lossless size of a float8_e4m3fn, which keeps three.

    Args:
      distribution: a distribution with the method `cdf`, such as a frozen one of SciPy.
      scale: factor s of the numbers, finite and above 0.
    Returns:
      The entropy in bits.
    Raises:
      ValueError: `scale` is not a positive finite number, or the distribution has its mass outside
        of the range of float64.

    >>> from scipy import stats
    >>> round(source_exponent_entropy(stats.norm()), 3)
    2.545
    >>> round(source_exponent_entropy(stats.uniform(-1, 2)), 9)
    2.0
    """
    check_arguments(source_exponent_entropy, locals())
    return float(entropy(exponent_probabilities(distribution, scale)[1]))


def _surprise(distribution: Distribution, sign: int, low: float, high: float) -> float:
    """Return -E[log2(|X| f(X))] from sign 2^low to sign 2^high, halved while mass is missed."""

    def both(u: float) -> Float[np.ndarray, "2"]:
        density = 2.0**u * float(distribution.pdf(sign * 2.0**u))  # |x| f(x)
        return np.array([density, special.entr(density) / np.log(2)]) * np.log(2)

    ends = np.sort(sign * np.exp2([low, high]))
    mass = float(np.diff(np.asarray(distribution.cdf(ends), np.float64))[0])
    if mass <= _FAINT:
        return 0.0
    found, surprise = integrate.quad_vec(both, low, high, epsabs=1e-12, epsrel=1e-10)[0]
    if abs(found - mass) <= 1e-6 * mass + _FAINT:
        return float(surprise)
    middle = (low + high) / 2
    if high - low < _NARROWEST:
        raise ValueError(
            f"the density and the distribution function disagree near {ends[0]:g}; expected a "
            "density that is finite and much wider than the spacing of float64"
        )
    return sum(_surprise(distribution, sign, *half) for half in ((low, middle), (middle, high)))


def exponent_probabilities(
    distribution: Distribution, scale: float = 1.0
) -> tuple[Int[np.ndarray, " e"], Float[np.ndarray, " e"]]:
    """Return all exponents of float64, and the probability of each: P(2^e <= |s X| < 2^(e + 1)).

    Args:
      distribution, scale: as in `source_exponent_entropy`.
    Returns:
      The exponents e, and their probabilities, which sum to 1.
    Raises:
      ValueError: as in `source_exponent_entropy`.

    >>> from scipy import stats
    >>> exponents, mass = exponent_probabilities(stats.uniform(-1, 2))
    >>> exponents[mass > 0.1].tolist(), mass[mass > 0.1].tolist()
    ([-3, -2, -1], [0.125, 0.25, 0.5])
    """
    check_arguments(exponent_probabilities, locals())
    if not 0 < scale < np.inf:
        raise ValueError(f"scale must be a finite number above 0, got {scale}")
    exponents = np.arange(-1074, 1024)
    below = lambda x: np.asarray(distribution.cdf(x), np.float64)
    with np.errstate(all="ignore"):  # at the ends of the range, which have no mass
        edges = np.ldexp(1.0, np.append(exponents, 1024)) / scale
        mass = np.maximum(np.diff(below(edges)), 0) + np.maximum(np.diff(-below(-edges)), 0)
    if not abs(mass.sum() - 1) < 1e-6:
        raise ValueError(
            "expected a continuous distribution of magnitudes within the range of float64, but "
            f"those have a probability of {mass.sum():.6g}"
        )
    return exponents, mass
