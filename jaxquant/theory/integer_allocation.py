"""Integer or listed bits for each tensor, with the least total loss within a budget."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float

from jaxquant.core.arguments import check_arguments
from jaxquant.core.greedy_allocation import cheapest


def integer_allocation(
    losses: Float[Array, "t o"],
    bits: Sequence,
    budget: float,
    sizes: Float[Array, "t"] | None = None,
) -> Float[np.ndarray, "t"]:
    """Return the bits per weight of every tensor, chosen from a list.

    This is greedy marginal analysis on the lower convex hulls, by the same solver as
    `jaxquant.ptq.allocate`, whose options are methods with bytes. The result is optimal for the
    bits that it spends if losses are convex in bits and all steps cost the same (tensors of one
    size, bits that are equally spaced). Otherwise it is optimal for the bits spent before a step
    first did not fit; smaller steps then fill the rest.

    Args:
      losses: total loss of each tensor at each of the bits, finite; for a Gaussian,
        size * weight * `gaussian_distortion(bits, variance)`.
      bits: bits per weight to choose from, all different, 0 or more.
      budget: largest total number of bits, at least min(bits) * sum(sizes).
      sizes: number of weights of each tensor, positive. Default: 1.
    Returns:
      Bits per weight of each tensor [t].
    Raises:
      ValueError: shapes do not agree, a value is out of range, or the budget is below the least.
    Source:
      Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers" (cited
      from memory).

    >>> import numpy as np
    >>> variances, bits = np.array([16.0, 4.0, 1.0, 0.25]), range(5)
    >>> losses = variances[:, None] * 4.0 ** -np.arange(5)
    >>> integer_allocation(losses, bits, budget=6).tolist()
    [3.0, 2.0, 1.0, 0.0]
    """
    check_arguments(integer_allocation, locals())
    table, options = np.asarray(losses, np.float64), np.asarray(list(bits), np.float64)
    if table.ndim != 2 or not table.size or options.shape != table.shape[1:]:
        raise ValueError(
            f"expected losses [t, o] and o bits, got {list(table.shape)} and {list(options.shape)}"
        )
    n = np.ones(len(table)) if sizes is None else np.asarray(sizes, np.float64)
    if n.shape != (len(table),) or not (np.all(np.isfinite(n)) and np.all(n > 0)):
        raise ValueError(f"expected {len(table)} positive sizes, got {n.tolist()}")
    if not (np.all(np.isfinite(options)) and np.all(options >= 0)):
        raise ValueError("bits must be finite and 0 or more")
    if len(np.unique(options)) < len(options) or not np.all(np.isfinite(table)):
        raise ValueError("bits must be all different, and losses finite")
    least = float(options.min() * n.sum())
    if not budget >= least:
        raise ValueError(f"the budget must be at least {least:g} bits in total, got {budget}")
    chosen = cheapest((n[:, None] * options).tolist(), table.tolist(), budget)
    return options[chosen]
