"""Float64 copies of numbers and arrays that a formula takes, checked before it is applied."""

from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

Numbers = float | Float[Array, "..."]


def nonnegative(value: Any, name: str, *, finite: bool = False) -> Float[np.ndarray, "..."]:
    """Return a float64 array of the value; refuse negative numbers and NaN.

    Args:
      value: a number, or an array of any shape.
      name: what an error message calls it.
      finite: whether infinity is refused too.
    Returns:
      The numbers, of the shape of `value`.
    Raises:
      ValueError: an element is refused.

    >>> nonnegative(2, "rate")
    array(2.)
    """
    x = np.asarray(value, np.float64)
    bad = ~(x >= 0) | (np.isinf(x) if finite else False)
    if bad.any():
        kind = "finite and nonnegative" if finite else "nonnegative"
        raise ValueError(f"{name} must be {kind}, got {x[bad][0]:g}")
    return x


def positive(value: Any, name: str) -> Float[np.ndarray, "..."]:
    """Return a float64 array of the value; refuse 0, negative numbers, NaN and infinity.

    Args:
      value: a number, or an array of any shape.
      name: what an error message calls it.
    Returns:
      The numbers, of the shape of `value`.
    Raises:
      ValueError: an element is refused.

    >>> positive(2, "step")
    array(2.)
    """
    x = np.asarray(value, np.float64)
    bad = ~((x > 0) & np.isfinite(x))
    if bad.any():
        raise ValueError(f"{name} must be positive and finite, got {x[bad][0]:g}")
    return x


def finite(value: Any, name: str) -> Float[np.ndarray, "..."]:
    """Return a float64 array of the value; refuse empty arrays, NaN and infinities.

    Args:
      value: an array of any shape.
      name: what an error message calls it.
    Returns:
      The numbers, of the shape of `value`.
    Raises:
      ValueError: the array is empty, or an element is refused.

    >>> finite(np.arange(2), "samples")
    array([0., 1.])
    """
    x = np.asarray(value, np.float64)
    if x.size == 0:
        raise ValueError(f"{name} must not be empty, got shape {list(x.shape)}")
    bad = ~np.isfinite(x)
    if bad.any():
        raise ValueError(f"{name} must be finite, but {bad.sum()} of {x.size} elements are not")
    return x


def check_shapes(**arrays: Float[np.ndarray, "..."]) -> None:
    """Check that arrays broadcast.

    Args:
      arrays: the arrays, by the names that an error message calls them.
    Raises:
      ValueError: their shapes do not broadcast.

    >>> check_shapes(rate=np.ones((2, 1)), variance=np.ones(3))
    """
    try:
        np.broadcast_shapes(*(x.shape for x in arrays.values()))
    except ValueError:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in arrays.items())
        raise ValueError(f"the arrays must broadcast, got the shapes {shapes}") from None


def probabilities(value: Any, name: str) -> Float[np.ndarray, "..."]:
    """Return float64 weights divided by their sum over the last axis.

    Args:
      value: nonnegative weights; those of every row have a positive sum.
      name: what an error message calls them.
    Returns:
      The probabilities, of the shape of `value`.
    Raises:
      ValueError: the array is empty or a number, an element is negative, infinite or NaN, or the
        sum of a row is 0.

    >>> probabilities(np.array([1, 3]), "p")
    array([0.25, 0.75])
    """
    x = nonnegative(value, name, finite=True)
    if x.ndim == 0 or x.size == 0:
        raise ValueError(f"{name} must be a nonempty array, got shape {list(x.shape)}")
    largest = x.max(-1, keepdims=True)
    if not largest.all():
        raise ValueError(f"{name} must have a positive sum, got only zeros")
    x = np.ldexp(x, -np.frexp(largest)[1])  # so that no sum overflows; powers of 2 round nothing
    return x / x.sum(-1, keepdims=True)


def places(value: Any, what: str, queries: int, count: int) -> Int[np.ndarray, " {queries}"]:
    """Return an array of one index for each query; refuse floats and indices out of range.

    Args:
      value: integers [queries].
      what: what an error message calls one of them, with its article.
      queries: number of queries.
      count: number of things that are indexed.
    Returns:
      The indices, in their own dtype.
    Raises:
      ValueError: the array is not one of integers of that shape, or an index is out of range.

    >>> places([1, 0], "a rank", 2, 3)
    array([1, 0])
    """
    x = np.asarray(value)
    whole = np.issubdtype(x.dtype, np.integer) and x.shape == (queries,)
    if not whole or x.min() < 0 or x.max() >= count:
        raise ValueError(
            f"expected {what} from 0 to {count - 1} for each of {queries} queries, got an array "
            f"{x.dtype}{list(x.shape)}"
        )
    return x
