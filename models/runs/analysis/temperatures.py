"""Temperatures of the stacks of a model: how much of its loss a bit more in each would save."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxquant.theory.temperature import measured_temperature


def temperatures(
    curves: Mapping[str, Sequence[tuple[float, float]]], bits: Mapping[str, float]
) -> dict[str, float]:
    """Return -d KL / d (bits per weight of the stack) for each stack, in nats.

    A bit more per weight of a stack costs as many bits as the stack has weights; divided by their
    number, temperatures of stacks can be compared. Stacks whose bits are unknown or outside of the
    measured range are left out.

    Args:
      curves: for each stack (bits per weight, KL divergence) at several widths.
      bits: bits per weight of each stack now.
    """
    found = {}
    for path, pairs in curves.items():
        x, loss = np.array(pairs, np.float64).T
        at = bits.get(path, np.nan)
        if len(x) < 2 or np.any(loss <= 0) or not x.min() <= at <= x.max():
            continue
        found[path] = float(measured_temperature(x, loss, at))
    return found
