"""Weights as row scale times column scale times Gaussian or Student-t variables, and their entropy.

Outputs and inputs of a layer differ in scale, and what is left still has heavier tails than a
Gaussian. The model describes both with k + n + 1 numbers for k n weights.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Array, Float
from scipy import optimize, special, stats

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.number_checks import finite

ROUNDS, CLOSE = 500, 1e-9  # most rounds of the fit, and the change of a log scale that ends it
SETTLED = 1e-5  # the change that is accepted after these rounds
DEGREES = 0.5, 200.0  # of freedom that the fit searches


@dataclasses.dataclass(frozen=True)
class ScaleMixture:
    """Independent weights w_ij = sqrt(rows_i columns_j) t_ij with t_ij Student-t or Gaussian.

    Attributes:
      rows: squared scale of each row [k].
      columns: squared scale of each column [n], with geometric mean 1.
      degrees: degrees of freedom of the Student-t distribution, infinite for a Gaussian.
    """

    rows: Float[np.ndarray, "k"]
    columns: Float[np.ndarray, "n"]
    degrees: float = math.inf

    @property
    def entropy(self) -> float:
        """Differential entropy in bits per weight, given the scales."""
        scales = np.mean(np.log2(self.rows)) + np.mean(np.log2(self.columns))
        return float(scales) / 2 + student_t_entropy(self.degrees)

    @property
    def standard_entropy_power(self) -> float:
        """Variance of a Gaussian with the entropy of t, 4^h / (2 pi e); 1 if t is Gaussian."""
        return 4.0 ** student_t_entropy(self.degrees) / (2 * math.pi * math.e)

    def log_likelihood(self, w: Float[Array, "k n"]) -> float:
        """Return the mean log2 density of the weights of a matrix, in bits per weight."""
        scales = np.sqrt(np.outer(self.rows, self.columns))
        density = _standard(self.degrees).logpdf(np.asarray(w, np.float64) / scales)
        return float(np.mean(density - np.log(scales))) / math.log(2)


def student_t_entropy(degrees: float) -> float:
    """Return the differential entropy of the standard Student-t distribution, in bits.

    Args:
      degrees: degrees of freedom, above 0; infinite for the standard Gaussian.
    Returns:
      h in bits. The standard Student-t has the variance degrees / (degrees - 2), not 1.
    Raises:
      ValueError: `degrees` is not above 0.

    >>> round(student_t_entropy(5.0), 3), round(student_t_entropy(math.inf), 3)
    (2.348, 2.047)
    """
    check_arguments(student_t_entropy, locals())
    if not degrees > 0:
        raise ValueError(f"degrees must be above 0, got {degrees}")
    return float(_standard(degrees).entropy()) / math.log(2)


def fit_scale_mixture(w: Float[Array, "k n"], degrees: float | None = None) -> ScaleMixture:
    """Return the row scales, column scales and degrees of freedom of greatest likelihood.

    The scales of rows and of columns are set in turn, each to its best value given the others:

        rows_i = mean_j u_ij w_ij^2 / columns_j,   columns_j = mean_i u_ij w_ij^2 / rows_i

    with u_ij = 1 for a Gaussian, and u_ij = (v + 1) / (v + w_ij^2 / (rows_i columns_j)) for
    Student-t with v degrees of freedom (expectation maximization).

    Args:
      w: matrix of weights [k, n] without rows or columns of zeros.
      degrees: degrees of freedom; infinite for a Gaussian. Default: found by maximizing the
        likelihood from 0.5 to 200.
    Returns:
      The `ScaleMixture`.
    Raises:
      ValueError: the matrix is not finite or has another rank, a row or a column is zero, so many
        weights are exactly 0 that the likelihood has no maximum, or `degrees` is not above 0.
    Source:
      Liu and Rubin 1995, "ML estimation of the t distribution using EM and its extensions", for
      Student-t (cited from memory); rows and columns in turn are ours.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> found = fit_scale_mixture(4 * rng.standard_t(5, (400, 100)))
    >>> 4 < found.degrees < 6, bool(abs(np.sqrt(found.rows).mean() / 4 - 1) < 0.02)
    (True, True)
    """
    check_arguments(fit_scale_mixture, locals())
    unit, squares = _squares(w)
    if degrees is not None and not degrees > 0:
        raise ValueError(f"degrees must be above 0, got {degrees}")
    rows, columns = _fitted(squares, math.inf, squares.mean(axis=1), np.ones(squares.shape[1]))
    if degrees is None:
        degrees, rows, columns = _fitted_together(squares, rows, columns)
    elif not math.isinf(degrees):
        rows, columns = _fitted(squares, degrees, rows, columns)
    mean = math.exp(np.mean(np.log(columns)))
    return ScaleMixture(rows * mean * unit**2, columns / mean, degrees)


def _squares(w: Array) -> tuple[float, np.ndarray]:
    """Return the largest magnitude of a matrix, and the squares of its multiples of that."""
    weights = finite(w, "w")
    if weights.ndim != 2:
        raise ValueError(f"w must be a matrix [k, n], got shape {list(weights.shape)}")
    unit = float(np.max(np.abs(weights)))
    if unit and not 1e-150 < unit < 1e150:
        raise ValueError(
            f"the largest weight is {unit:.3g}, and float64 cannot hold its square: rescale w"
        )
    squares = (weights / (unit or 1.0)) ** 2
    for name, axis in (("row", 1), ("column", 0)):
        empty = np.flatnonzero(~np.any(squares, axis=axis))
        if len(empty):
            raise ValueError(f"{name} {empty[0]} is zero, so it has no scale: leave it out")
    return unit, squares


def _fitted(
    squares: np.ndarray,
    degrees: float,
    rows: np.ndarray,
    columns: np.ndarray,
    rounds: int = ROUNDS,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the squared scales of greatest likelihood for these degrees of freedom."""
    for _ in range(rounds):
        before = rows, columns
        rows = np.mean(_weighted(squares, degrees, rows, columns) / columns, axis=1)
        columns = np.mean(_weighted(squares, degrees, rows, columns) / rows[:, None], axis=0)
        changes = [np.log(a / b) for a, b in zip((rows, columns), before, strict=True)]
        if max(np.max(np.abs(change)) for change in changes) < CLOSE:
            break
    else:
        change = max(float(np.max(np.abs(change))) for change in changes)
        if rounds == ROUNDS and change > SETTLED:
            raise ValueError(
                f"the scales still change by {change:.2g} (relative) after {rounds} rounds: "
                "weights that are exactly 0 may leave no scales of greatest likelihood"
            )
    return rows, columns


def _fitted_together(
    squares: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return degrees of freedom and squared scales of greatest likelihood, from a start."""
    degrees = 0.0
    for _ in range(ROUNDS):
        before, degrees = degrees, _likeliest_degrees(squares, rows, columns)
        rows, columns = _fitted(squares, degrees, rows, columns, rounds=5)
        if abs(degrees - before) < 1e-5 * degrees:
            break
    if degrees < 1.01 * DEGREES[0]:
        zeros = float(np.mean(squares == 0))
        raise ValueError(
            f"no Student-t distribution fits: its degrees of freedom fall to {degrees:.2g}, and "
            f"{zeros:.0%} of the weights are exactly 0, which no density allows for; pass "
            "degrees=math.inf for a Gaussian"
        )
    return (degrees, *_fitted(squares, degrees, rows, columns))


def _weighted(
    squares: np.ndarray, degrees: float, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Return u_ij w_ij^2."""
    if math.isinf(degrees):
        return squares
    return squares * (degrees + 1) / (degrees + squares / np.outer(rows, columns))


def _likeliest_degrees(squares: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> float:
    """Return the degrees of freedom of greatest likelihood for these scales."""
    ratios = squares / np.outer(rows, columns)

    def surprise(log: float) -> float:  # nats per weight, without what does not depend on v
        v = math.exp(log)
        norm = special.gammaln((v + 1) / 2) - special.gammaln(v / 2) - log / 2
        return float((v + 1) / 2 * np.mean(np.log1p(ratios / v)) - norm)

    bounds = tuple(map(math.log, DEGREES))
    return math.exp(optimize.minimize_scalar(surprise, bounds=bounds, method="bounded").x)


def _standard(degrees: float) -> stats.rv_continuous:
    """Return the standard Student-t distribution, or the standard Gaussian."""
    return stats.norm() if math.isinf(degrees) else stats.t(degrees)
