"""Whether quantization hurts rare tokens first: the loss of tokens by how often they occur."""

import numpy as np
from jaxtyping import Array, Float, Int

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.limits.limit import Limit

EDGES = (1, 2, 4, 16)  # of the groups: once, 2 or 3 times, 4 to 15 times, 16 times or more


def excess_by_count(
    text: Int[np.ndarray, " n"],
    tokens: Int[np.ndarray, "*b"],
    excess: Float[Array | np.ndarray, "*b"],
) -> tuple[tuple[int, ...], tuple[float | None, ...]]:
    """Return numbers of tokens and mean excess losses by how often the token occurs in a text.

    Args:
      text: the whole text, token ids [n].
      tokens: predicted tokens of the text, of any shape.
      excess: negative log-likelihood of a model minus that of a reference, at the same places.
    Returns:
      For tokens that occur once, 2 or 3 times, 4 to 15 times, and 16 times or more: their number,
      and their mean excess (None if there are none).
    Raises:
      ValueError: shapes differ.

    >>> excess_by_count(np.array([1, 2, 2]), np.array([1, 2]), np.array([0.5, 0.25]))
    ((1, 1, 0, 0), (0.5, 0.25, None, None))
    """
    check_arguments(excess_by_count, locals())
    if tokens.shape != excess.shape:
        raise ValueError(
            f"expected an excess for each token, got shapes {list(tokens.shape)} and "
            f"{list(excess.shape)}"
        )
    kinds, counts = np.unique(text, return_counts=True)
    times = counts[np.minimum(np.searchsorted(kinds, tokens), len(kinds) - 1)]
    group = np.maximum(np.digitize(times, EDGES) - 1, 0)
    of = [excess[group == i] for i in range(len(EDGES))]
    return tuple(map(len, of)), tuple(float(e.mean()) if len(e) else None for e in of)


def rarity_limit(
    text: Int[np.ndarray, " n"],
    tokens: Int[np.ndarray, "*b"],
    excess: Float[Array | np.ndarray, "*b"],
) -> Limit:
    """Return the excess loss of tokens that occur once, beside that of frequent ones, as a row.

    Args:
      text: as for `excess_by_count`.
      tokens: as for `excess_by_count`.
      excess: as for `excess_by_count`.
    """
    numbers, means = excess_by_count(text, tokens, excess)
    names = ("once", "2-3 times", "4-15 times", "16 times or more")
    each = [
        f"{name} {mean:+.3f} ({count})"
        for name, mean, count in zip(names, means, numbers, strict=True)
        if mean is not None
    ]
    return Limit(
        "rare tokens",
        "Nats by which the model's loss exceeds the reference's on tokens that occur once in the "
        "text; the bound is the same on tokens that occur 16 times or more.",
        "description",
        means[0],
        means[-1],
        None,
        note=f"By number of occurrences (tokens): {', '.join(each)}.",
    )
