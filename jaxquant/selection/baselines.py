"""Random draws, with which a selection is compared."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxquant.core.arguments import check_arguments


def random_draw(
    sizes: Sequence[Any] | Int[np.ndarray, "n"], budget: int, seed: int
) -> Int[np.ndarray, "n"]:
    """Return a random part of a pool that takes as much of a budget as fits.

    Items are taken in random order; those that would exceed the budget are passed over, as
    `selection.zip_selection.zip_select` does.

    Args:
      sizes: how much of the budget each item takes, integers of 0 or more.
      budget: the budget, 1 or more, in the unit of the sizes.
      seed: seed of the order.

    Returns:
      The indices of the items, in random order.

    Raises:
      ValueError: there are no items, or an argument is out of range.

    >>> random_draw([3, 3, 3, 1], 7, seed=0).tolist()
    [2, 0, 3]
    """
    check_arguments(random_draw, locals())
    takes = np.asarray(sizes)
    if (
        takes.dtype.kind not in "iu"
        or takes.ndim != 1
        or not takes.size
        or (takes < 0).any()
        or budget < 1
    ):
        raise ValueError(
            "random_draw needs one integer of 0 or more per item and a budget of at least 1, got "
            f"{takes.dtype} of shape {list(takes.shape)} and budget {budget}"
        )
    left, drawn = budget, []
    for i in np.random.default_rng(seed).permutation(takes.size):
        if takes[i] <= left:
            drawn.append(i)
            left -= int(takes[i])
    return np.array(drawn, np.int64)
