"""Reverse water-filling: the rates and distortions of many Gaussian components under one budget."""

import dataclasses

import numpy as np
from jaxtyping import Array, Float

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.number_checks import nonnegative


@dataclasses.dataclass(frozen=True)
class WaterFilling:
    """The best division of a budget among components; arrays are in the order of the arguments.

    Attributes:
      level: water level theta, a weighted squared error per weight.
      rates: bits per weight R_i of every component.
      distortions: squared error per weight D_i of every component, without its weight h_i.
      bits: total number of bits, sum n_i R_i.
      loss: total weighted squared error, sum n_i h_i D_i.
    """

    level: float
    rates: Float[np.ndarray, "t"]
    distortions: Float[np.ndarray, "t"]
    bits: float
    loss: float


def reverse_water_filling(
    variances: Float[Array | np.ndarray, "t"],
    weights: Float[Array, "t"] | None = None,
    sizes: Float[Array, "t"] | None = None,
    *,
    bits: float | None = None,
    loss: float | None = None,
) -> WaterFilling:
    """Divide bits among independent Gaussian components so that their weighted error is least.

    The problem is to minimize sum n_i h_i D_i subject to sum n_i R_i = bits, or the reverse with
    the loss given. Its solution has one water level theta:

        D_i = min(theta / h_i, var_i),    R_i = max(0, log2(h_i var_i / theta) / 2)

    The level is found exactly, by sorting, and not by a search.

    Args:
      variances: variance var_i of each component, 0 or more.
      weights: weight h_i of each component's squared error, 0 or more, such as the diagonal of the
        second moment of the inputs, or its eigenvalues. Default: 1.
      sizes: number n_i of weights of each component, positive. Default: 1.
      bits: total number of bits, 0 or more.
      loss: total weighted squared error, from above 0 to sum n_i h_i var_i.
    Returns:
      The `WaterFilling`.
    Raises:
      ValueError: not exactly one of `bits` and `loss` is given or it is out of range, or an
        argument has a wrong shape or a value out of range.
    Source:
      Cover and Thomas, Elements of Information Theory, on parallel Gaussian sources. Gao et al.
      2019, arXiv:1810.06401, "Rate distortion for model compression", apply it to linear models
      with h_i = E[x_i^2]. Of that paper only the abstract was read (a lower bound, which is
      achieved for linear models); the text of its theorem was not checked against this function.
      The solution itself is checked against a numerical minimum in the tests.

    >>> import numpy as np
    >>> found = reverse_water_filling(np.array([16.0, 4.0, 1.0, 0.25]), loss=1.0)
    >>> found.level, found.rates.tolist()
    (0.25, [3.0, 2.0, 1.0, 0.0])
    """
    check_arguments(reverse_water_filling, locals())
    var, h, n = _components(variances, weights, sizes)
    energy = h * var
    if (bits is None) == (loss is None):
        raise ValueError(f"pass either bits or loss, got bits={bits} and loss={loss}")
    level = _level_of_bits(energy, n, bits) if bits is not None else _level_of_loss(energy, n, loss)
    filled = energy > level
    quotient = np.where(filled, energy, 1.0) / np.where(filled, level, 1.0)
    rates = np.where(filled, np.log2(quotient) / 2, 0.0)
    distortions = np.where(filled, level / np.where(filled, h, 1.0), var)
    total = float(np.sum(n * np.minimum(energy, level)))
    return WaterFilling(level, rates, distortions, float(np.sum(n * rates)), total)


def component_energies(
    gram: Float[Array | np.ndarray, "k k"], variances: Float[Array | np.ndarray, "k"]
) -> Float[np.ndarray, "k"]:
    """Return the variances, ascending, of the independent parts of the loss of one output.

    For independent weights w with these variances, the loss e^T H e of an error e is a plain
    squared error in the coordinates U^T V^-1/2 w, scaled by the square roots of the eigenvalues of
    V^1/2 H V^1/2, with V = diag(variances). These eigenvalues are the products h_i var_i that
    `reverse_water_filling` needs if inputs are correlated. If inputs are not, they are
    diag(H) * variances. Treating correlated inputs as uncorrelated costs bits, since by Hadamard's
    inequality the geometric mean of diag(H) * variances is at least that of the eigenvalues.

    Args:
      gram: second moment H = E[x x^T] of the inputs [k, k], symmetric and positive semidefinite.
      variances: variance of the weight of each input [k], 0 or more.
    Returns:
      Eigenvalues [k]; those that are negative by rounding are 0.
    Raises:
      ValueError: an argument has a wrong shape or is not finite, a variance is negative, or H is
        not symmetric or has a clearly negative eigenvalue.

    >>> import numpy as np
    >>> component_energies(np.array([[2.0, 1.0], [1.0, 2.0]]), np.ones(2)).round(6).tolist()
    [1.0, 3.0]
    """
    check_arguments(component_energies, locals())
    h, var = np.asarray(gram, np.float64), nonnegative(variances, "variances", finite=True)
    if var.ndim != 1 or not var.size or h.shape != (len(var), len(var)):
        raise ValueError(
            f"expected gram [k, k] and variances [k], got {list(h.shape)} and {list(var.shape)}"
        )
    largest = np.max(np.abs(h))
    if not np.isfinite(largest) or np.max(np.abs(h - h.T)) > 1e-4 * largest:
        raise ValueError("gram must be finite and symmetric; pass E[x x^T]")
    scale = np.sqrt(var)
    found = np.linalg.eigvalsh(scale[:, None] * (h + h.T) / 2 * scale)
    if found[0] < -1e-4 * max(found[-1], 0.0):
        raise ValueError(
            f"gram must be positive semidefinite, but it has the eigenvalue {found[0]:.3g} (with "
            f"variances) beside {found[-1]:.3g}"
        )
    return np.maximum(found, 0.0)


def high_rate_gain(
    variances: Float[Array | np.ndarray, "t"],
    weights: Float[Array, "t"] | None = None,
    sizes: Float[Array, "t"] | None = None,
) -> float:
    """Return the factor by which water-filling lowers the loss of equal rates at many bits.

    The factor is the arithmetic over the geometric mean of h_i var_i. It holds where every
    component has a positive rate; below, the gain is smaller.

    Args:
      variances, weights, sizes: as in `reverse_water_filling`.
    Returns:
      The factor, 1 or more; infinite if a component has no energy. Half its log2 is the gain in
        bits.
    Raises:
      ValueError: an argument has a wrong shape or a value out of range, or no component has energy.

    >>> import numpy as np
    >>> round(high_rate_gain(np.array([4.0, 1.0])), 12)
    1.25
    """
    check_arguments(high_rate_gain, locals())
    var, h, n = _components(variances, weights, sizes)
    energy = h * var
    mean = np.average(energy, weights=n)
    if not mean > 0:
        raise ValueError("expected a component with positive weight and variance, got none")
    with np.errstate(divide="ignore"):
        return float(np.exp(np.log(mean) - np.average(np.log(energy), weights=n)))


def _components(
    variances: Array | np.ndarray, weights: Array | None, sizes: Array | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return variances, weights and sizes in float64, checked."""
    var = nonnegative(variances, "variances", finite=True)
    h = np.ones_like(var) if weights is None else nonnegative(weights, "weights", finite=True)
    n = np.ones_like(var) if sizes is None else nonnegative(sizes, "sizes", finite=True)
    if var.ndim != 1 or not var.size or h.shape != var.shape or n.shape != var.shape:
        raise ValueError(
            "expected variances, weights and sizes of one shape [t] with t >= 1, got "
            f"{list(var.shape)}, {list(h.shape)} and {list(n.shape)}"
        )
    if not np.all(n > 0):
        raise ValueError("sizes must be positive")
    with np.errstate(over="ignore", under="ignore"):
        energy = h * var
    if not np.isfinite(energy).all() or np.any((energy == 0) & (h > 0) & (var > 0)):
        raise ValueError(
            "a product of a variance and its weight is too large or too small for float64: rescale "
            "the variances or the weights"
        )
    return var, h, n


def _level_of_bits(energy: np.ndarray, n: np.ndarray, bits: float) -> float:
    """Return the level at which the components take so many bits together."""
    nonnegative(bits, "bits", finite=True)
    if not np.any(energy > 0):
        return 0.0
    order = np.argsort(-energy, kind="stable")
    order = order[energy[order] > 0]
    logs, n = np.log2(energy[order]), n[order]
    # The level if the first m components, and no others, have a positive rate.
    levels = (np.cumsum(n * logs) - 2 * bits) / np.cumsum(n)
    filled = max(int(np.sum(logs >= levels)), 1)
    if levels[filled - 1] < -1000:  # so that no distortion underflows
        raise ValueError(
            f"{bits:g} bits make distortions too small for float64; expected fewer for "
            f"{len(energy)} components"
        )
    return float(np.exp2(levels[filled - 1]))


def _level_of_loss(energy: np.ndarray, n: np.ndarray, loss: float | None) -> float:
    """Return the level at which the components have this loss together."""
    total = float(np.sum(n * energy))
    if loss is None or not 0 < loss <= total * (1 + 1e-12):
        raise ValueError(f"loss must be above 0 and at most the loss without bits, {total:.6g}, "
                         f"got {loss}")  # fmt: skip
    order = np.argsort(-energy, kind="stable")
    sorted_energy, n = energy[order], n[order]
    own = n * sorted_energy
    unfilled = np.append(np.cumsum(own[:0:-1])[::-1], 0.0)  # the loss of components without a rate
    levels = (loss - unfilled) / np.cumsum(n)
    filled = max(int(np.sum(sorted_energy >= levels)), 1)
    return float(levels[filled - 1])
