"""Lower bounds on the loss of rounded weights at a rate: Shannon's, for a source model of weights.

A rate-distortion bound holds for the mean over random matrices of a source, and for codes that know
that source. It is no bound for the one matrix at hand: a code that is made for one matrix needs
no bits. It says how far a code for weights like these can be improved: a method below the bound
uses structure that the source model does not have, or its bits are counted wrongly.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Array, Float

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.number_checks import nonnegative
from jaxquant.theory.scale_mixture import fit_scale_mixture
from jaxquant.theory.water_filling import component_energies, reverse_water_filling

_POWER = 2 * math.pi * math.e
RANK = 1e-12  # eigenvalues below this times the largest are 0


def shannon_lower_bound(
    entropy: float, distortion: Float[Array, "..."] | float
) -> Float[np.ndarray, "..."]:
    """Return h(X) - log2(2 pi e D) / 2, which the rate of no code is below.

    The bound holds for squared error and every real source with a density; at few bits it is loose,
    and it may be negative. It is R(D) itself for a Gaussian with D <= variance. The Gaussian R(D)
    of the same variance is an upper bound on R(D) of any source, so the truth lies between.

    Args:
      entropy: differential entropy h(X) in bits, as `differential_entropy.spacing_entropy` or
        `distribution_entropy` returns it.
      distortion: mean squared error D, above 0.
    Returns:
      Bits per sample.
    Raises:
      ValueError: the distortion is not above 0, or the entropy is NaN or infinite.
    Source:
      Shannon 1959; Cover and Thomas, Elements of Information Theory, on rate distortion.

    >>> from scipy import stats
    >>> from jaxquant.theory.differential_entropy import distribution_entropy
    >>> round(float(shannon_lower_bound(distribution_entropy(stats.norm(0, 2)), 0.25)), 12)
    2.0
    """
    check_arguments(shannon_lower_bound, locals())
    _check_finite(entropy)
    d = np.asarray(distortion, np.float64)
    if not np.all(d > 0):
        raise ValueError(f"the distortion must be above 0, got {d.min() if d.size else 'none'}")
    return entropy - np.log2(_POWER * d) / 2


def shannon_distortion(
    entropy: float, rate: Float[Array, "..."] | float
) -> Float[np.ndarray, "..."]:
    """Return 4^(h(X) - R) / (2 pi e), which the mean squared error of no code of R bits is below.

    This is the inverse of `shannon_lower_bound`.

    Args:
      entropy: differential entropy h(X) in bits.
      rate: bits per sample, 0 or more.
    Returns:
      Mean squared error.
    Raises:
      ValueError: a rate is negative or NaN, or the entropy is NaN or infinite.

    >>> round(float(shannon_distortion(0.0, 0.0)), 6)  # uniform in [0, 1], whose variance is 1 / 12
    0.05855
    """
    check_arguments(shannon_distortion, locals())
    _check_finite(entropy)
    return np.exp2(2 * (entropy - nonnegative(rate, "rate"))) / _POWER


@dataclasses.dataclass(frozen=True)
class LayerBound:
    """Lower bound on the share of a layer's output energy that rounding its weights loses.

    Attributes:
      energies: variances of the independent parts of the loss [N = k n], descending, of a Gaussian
        source, or of the Gaussian with the entropy of the source.
      total: tr(W^T H W) of the matrix, which losses are relative to.
      gaussian: whether the source is Gaussian, so that reverse water-filling applies; otherwise
        Shannon's lower bound does.
    """

    energies: Float[np.ndarray, "N"]
    total: float
    gaussian: bool

    def loss(self, rate: float) -> float:
        """Return the least mean loss tr(E^T H E) / tr(W^T H W) at a rate.

        Args:
          rate: bits per weight, 0 or more.
        Returns:
          The loss, at most 1, which weights of zeros have. Close to 1 it carries the sampling error
            of tr(W^T H W), the energy of the one matrix that losses are relative to.
        Raises:
          ValueError: the rate is negative or not finite.
        """
        nonnegative(rate, "rate", finite=True)
        if self.gaussian:
            bits = rate * self.energies.size
            return min(reverse_water_filling(self.energies, bits=bits).loss / self.total, 1.0)
        return min(self._intercept * 4.0**-rate, 1.0)

    def rate(self, loss: float) -> float:
        """Return the least bits per weight at which the mean loss can be this small.

        Args:
          loss: relative loss, above 0.
        Returns:
          Bits per weight; 0 from a loss of 1 on.
        Raises:
          ValueError: the loss is not above 0.
        """
        if not loss > 0:
            raise ValueError(f"the loss must be above 0, got {loss}")
        if loss >= 1:
            return 0.0
        if not self.gaussian:
            return max(math.log2(self._intercept / loss) / 2, 0.0) if self._intercept else 0.0
        total = float(np.sum(self.energies))
        if loss * self.total >= total:
            return 0.0
        found = reverse_water_filling(self.energies, loss=loss * self.total)
        return found.bits / self.energies.size

    @property
    def _intercept(self) -> float:
        """Relative loss at 0 bits of the line log4(loss) = -rate + const."""
        with np.errstate(divide="ignore"):
            mean = float(np.exp(np.mean(np.log(self.energies))))
        return mean * self.energies.size / self.total


def layer_bound(
    w: Float[Array, "k n"], gram: Float[Array, "k k"], degrees: float | None = math.inf
) -> LayerBound:
    """Return the lower bound on the loss of codes for weights like those of a matrix.

    The source is `scale_mixture.ScaleMixture`, w_ij = sqrt(rows_i columns_j) t_ij, with the scales
    of greatest likelihood for W and known to encoder and decoder at no cost. The loss is
    tr(E^T H E) / tr(W^T H W), with the energy of this very matrix below. If t is Gaussian, the loss
    of column j is a squared error of k independent parts of variances columns_j lambda_i, lambda
    the eigenvalues of diag(rows)^1/2 H diag(rows)^1/2, and the bound is exact reverse water-filling
    over all k n parts: R(D) of this source. At many bits it is

        det(H)^(1/k) (geometric mean of rows_i columns_j) k n 4^-R / tr(W^T H W).

    If t is Student-t, the variances are replaced by entropy powers 4^h / (2 pi e) and the bound is
    Shannon's, which is this formula at all rates; it is loose below about 1 bit. Student-t weights
    have less entropy than Gaussian ones of the scales of greatest likelihood, so a code may pass
    below the bound of the Gaussian if weights have heavy tails; on average over such matrices, no
    code passes below that of Student-t. If H is singular (fewer tokens than inputs), the latter is
    0: Shannon's bound says nothing there, while water-filling does.

    Args:
      w: matrix of weights [k, n] without rows or columns of zeros.
      gram: second moment H = E[x x^T] of the inputs [k, k].
      degrees: degrees of freedom of t; infinite for a Gaussian, None for those of greatest
        likelihood.
    Returns:
      The `LayerBound`.
    Raises:
      ValueError: the shapes do not agree, a value is not finite, H is not positive semidefinite, or
        `fit_scale_mixture` raises.

    >>> import numpy as np
    >>> w = np.random.default_rng(0).normal(size=(64, 256))
    >>> bound = layer_bound(w, np.diag(np.linspace(1.0, 2.0, 64)))
    >>> round(bound.loss(3.0) / 4.0**-3, 2), round(bound.rate(bound.loss(3.0)), 9)
    (0.96, 3.0)
    """
    check_arguments(layer_bound, locals())
    weights, h = np.asarray(w, np.float64), np.asarray(gram, np.float64)
    if weights.ndim != 2 or h.shape != (len(weights), len(weights)):
        raise ValueError(
            f"expected w [k, n] and gram [k, k], got {list(weights.shape)} and {list(h.shape)}"
        )
    source = fit_scale_mixture(w, degrees)
    gaussian = math.isinf(source.degrees)
    own = component_energies(h, source.rows)
    own = np.where(own > RANK * own.max(), own, 0.0)
    if not own.any():
        raise ValueError("gram must not be zero: without inputs there is no loss to bound")
    power = 1.0 if gaussian else source.standard_entropy_power
    energies = np.sort(np.outer(own, source.columns).reshape(-1) * power)[::-1]
    return LayerBound(energies, float(np.sum(weights * (h @ weights))), gaussian)


def _check_finite(entropy: float) -> None:
    if not math.isfinite(entropy):
        raise ValueError(
            f"the entropy must be finite, got {entropy}; it is minus infinity for samples that "
            "take few values, which have no density"
        )
