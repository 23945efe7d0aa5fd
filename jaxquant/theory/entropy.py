"""Order-0 entropy of symbols, alone and given a group, in bits per symbol."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy import sparse, special

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.number_checks import probabilities


def entropy(counts: Shaped[Any, "... a"]) -> Float[np.ndarray, "..."]:
    """Return the order-0 entropy of a source that produced these counts.

      H = -sum_i p_i log2 p_i,    p_i = counts_i / sum_j counts_j

    This is the exact entropy of the counted frequencies (the plug-in estimate); no order-0 code
    with a fixed table is shorter. As an estimate of the entropy of the source behind the counts it
    is too low, by about (a - 1) / (2 N ln 2) bits for N symbols. No correction such as that of
    Miller and Madow is applied, since a coder pays for the difference when it sends its table;
    `jaxquant.theory.description_length.adaptive_bits` returns the whole price.

    Args:
      counts: how often each symbol occurs, or its probability: 0 or more, not all 0.
    Returns:
      The entropy in bits per symbol, float64, one for each vector of counts.
    Raises:
      ValueError: a count is negative or not finite, or a vector of counts is empty or sums to 0.

    >>> print(entropy(np.array([2, 1, 1])), entropy(np.array([5, 0])))
    1.5 0.0
    """
    check_arguments(entropy, locals())
    return special.entr(probabilities(counts, "counts")).sum(-1) / np.log(2)


def symbol_entropy(symbols: Int[Any, "..."], groups: Int[Any, "..."] | None = None) -> float:
    """Return the order-0 entropy of integer symbols, or their conditional entropy given a group.

      H(S) = -sum_s p(s) log2 p(s),    H(S | G) = sum_g p(g) H(S | G = g)

    H(S) is the rate of an ideal order-0 entropy coder with one table for all symbols, and H(S | G)
    that of one with a table for every group: a tensor, a row, a scale group. The tables themselves
    are not counted in either. Many small groups have a low H(S | G) only because each table is
    fitted to few symbols: a group of one symbol has 0 bits. Compare
    `jaxquant.theory.description_length.adaptive_bits`, which counts the tables.

    Args:
      symbols: the symbols, integers, of any shape.
      groups: index of the group of every symbol, integers that broadcast to the shape of `symbols`.
        Default: all symbols form one group.
    Returns:
      The entropy in bits per symbol.
    Raises:
      ValueError: there are no symbols, they are no integers, or the shape of `groups` does not fit.

    >>> rows = np.array([[0, 1, 0, 1], [2, 2, 2, 2]])
    >>> symbol_entropy(rows), symbol_entropy(rows, np.array([[0], [1]]))
    (1.5, 0.5)
    """
    check_arguments(symbol_entropy, locals())
    table = contingency(symbols, groups)
    of_group = np.repeat(table.sum(1), np.diff(table.indptr))  # of the group of every entry
    return float(np.sum(table.data * np.log2(of_group / table.data)) / table.sum())


def contingency(
    symbols: Int[Any, "..."], groups: Int[Any, "..."] | None = None
) -> sparse.csr_array:
    """Return how often every symbol occurs in every group.

    Args:
      symbols: the symbols, integers, of any shape.
      groups: index of the group of every symbol, integers that broadcast to the shape of `symbols`;
        None for one group.
    Returns:
      Counts, a float64 sparse matrix [groups, symbols] in which no stored entry is 0. Its rows and
        columns are the values that occur, in their order.
    Raises:
      ValueError: there are no symbols, they are no integers, or the shape of `groups` does not fit.

    >>> contingency(np.array([3, 3, 4]), np.array([0, 0, 1])).toarray().tolist()
    [[2.0, 0.0], [0.0, 1.0]]
    """
    flat = _integers("symbols", symbols)
    if not flat.size:
        raise ValueError(
            "expected symbols, got an empty array; the entropy of nothing is undefined"
        )
    of = np.zeros(1, np.int64) if groups is None else _integers("groups", groups)
    try:
        of = np.broadcast_to(of, flat.shape)
    except ValueError:
        raise ValueError(
            f"groups must broadcast to the shape of the symbols, {list(flat.shape)}, got "
            f"{list(of.shape)}; pass one index for each symbol, or for each row as [rows, 1]"
        ) from None
    pairs = _places(of.ravel()), _places(flat.ravel())
    table = sparse.coo_array((np.ones(flat.size), pairs)).tocsr()  # adds what is equal
    return table[np.flatnonzero(table.sum(1))][:, np.flatnonzero(table.sum(0))]


def _places(values: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Return small nonnegative numbers that differ where the values do, in their order."""
    low, high = int(values.min()), int(values.max())
    if high - low < 4 * values.size:  # then a subtraction will do, which is faster than a sort
        return (values - values.min()).astype(np.int64)
    return np.unique(values, return_inverse=True)[1]


def _integers(name: str, values: Int[Any, "..."]) -> Int[np.ndarray, "..."]:
    found = np.asarray(values)
    if found.dtype.kind not in "iub":
        raise ValueError(
            f"{name} must be integers, got {found.dtype}; for floats, see "
            "jaxquant.theory.float_entropy"
        )
    return found if found.dtype == np.uint64 else found.astype(np.int64)
