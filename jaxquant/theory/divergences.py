"""Distances of distributions: W2 in one dimension, and KL divergence of softmax distributions.

W2 compares the values of two tensors, weights or logits, whatever their places, as a perception
constraint does. KL compares predictions token by token. Both say what a mean squared error cannot:
that values have shrunk, and that a prediction has changed.
"""

import numpy as np
from jaxtyping import Array, Float
from scipy.special import log_softmax

from jaxquant.core.arguments import check_arguments
from jaxquant.theory.number_checks import (
    Numbers,
    check_shapes,
    finite,
    nonnegative,
    probabilities,
)


def wasserstein2(
    x: Float[Array, "*batch n"],
    y: Float[Array, "*batch k"],
    x_weights: Float[Array, "*batch n"] | None = None,
    y_weights: Float[Array, "*batch k"] | None = None,
) -> Float[np.ndarray, "*batch"]:
    """Return the Wasserstein distance W2 of distributions on the line, row by row.

    W2^2 = min E (X - Y)^2 over all couplings of the two = the integral of (Qx(u) - Qy(u))^2 over u
    in [0, 1], where Q are the quantile functions. The result is exact, for unequal numbers of
    points too. Its square compares with D, and with the P of `theory.perception`.

    Args:
      x: points [..., n], one distribution per row. Ravel tensors that are one distribution.
      y: points [..., k]; leading axes are broadcast with those of x.
      x_weights: probabilities of x, or weights, which are divided by their sum over the last axis;
        broadcast with x. Default: equal.
      y_weights: those of y, likewise.
    Returns:
      W2 [...], in the unit of x and y.
    Raises:
      ValueError: an array is empty, has no axis, or is not finite; weights are negative or all 0;
        or shapes do not match.
    Source:
      Villani 2003, Topics in Optimal Transportation, theorem 2.18.

    >>> float(wasserstein2(np.array([0.0, 2.0]), np.array([1.0])))
    1.0
    """
    check_arguments(wasserstein2, locals())
    (a, below_a), (b, below_b) = _steps(x, x_weights, "x"), _steps(y, y_weights, "y")
    try:
        rows = np.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    except ValueError:
        raise ValueError(
            f"the leading axes of x and y must broadcast, got shapes {list(a.shape)} and "
            f"{list(b.shape)}"
        ) from None
    if x_weights is None and y_weights is None and a.shape[-1] == b.shape[-1]:
        return np.sqrt(np.mean((a - b) ** 2, -1))
    full = lambda c: np.broadcast_to(c, (*rows, c.shape[-1]))
    ends = np.concatenate([full(below_a), full(below_b)], -1)
    order = np.argsort(ends, -1, kind="stable")
    # Between two successive ends both quantile functions are constant. How many ends of either lie
    # before tells on which step.
    of_a = order < a.shape[-1]
    at_a = np.minimum(np.cumsum(of_a, -1) - of_a, a.shape[-1] - 1)
    at_b = np.minimum(np.cumsum(~of_a, -1) - ~of_a, b.shape[-1] - 1)
    width = np.diff(np.take_along_axis(ends, order, -1), prepend=0.0)
    difference = np.take_along_axis(full(a), at_a, -1) - np.take_along_axis(full(b), at_b, -1)
    return np.sqrt(np.sum(width * difference**2, -1))


def gaussian_wasserstein2(
    x_mean: Numbers, x_std: Numbers, y_mean: Numbers, y_std: Numbers
) -> Float[np.ndarray, "..."]:
    """Return W2 of two Gaussians on the line: the length of (mean, std) minus (mean, std).

    For other distributions with these means and standard deviations it is a lower bound.

    Args:
      x_mean: mean of the first, finite; any shape.
      x_std: its standard deviation, finite, 0 or more; all are broadcast.
      y_mean: mean of the second.
      y_std: its standard deviation.
    Returns:
      W2, of the broadcast shape.
    Raises:
      ValueError: a number is not finite, a standard deviation is negative, or shapes do not
        broadcast.
    Source:
      Gelbrich 1990, On a formula for the L2 Wasserstein metric, theorem 2.1.

    >>> float(gaussian_wasserstein2(0.0, 1.0, 3.0, 5.0))
    5.0
    """
    check_arguments(gaussian_wasserstein2, locals())
    means = finite(x_mean, "x_mean"), finite(y_mean, "y_mean")
    stds = nonnegative(x_std, "x_std", finite=True), nonnegative(y_std, "y_std", finite=True)
    check_shapes(x_mean=means[0], x_std=stds[0], y_mean=means[1], y_std=stds[1])
    return np.hypot(means[0] - means[1], stds[0] - stds[1])


def kl_divergence(
    teacher_logits: Float[Array, "*batch n"], student_logits: Float[Array, "*batch n"]
) -> Float[np.ndarray, "*batch"]:
    """Return KL(softmax(teacher) || softmax(student)) of each row of logits, in nats.

    For close logits z and z + e it is half the variance of e under softmax(z), to second order.
    `jaxquant.evaluation.evaluate` computes the mean over tokens for whole models, in float32.

    Args:
      teacher_logits: logits [..., n]; -inf where a token is masked.
      student_logits: logits of the same shape.
    Returns:
      Nats [...]; infinite where the student masks a token that the teacher does not.
    Raises:
      ValueError: shapes differ, there are no tokens, or a row holds NaN, +inf or only -inf.

    >>> z = np.log([[0.5, 0.5], [0.25, 0.75]])
    >>> kl_divergence(z, z[::-1]).round(4).tolist()
    [0.1438, 0.1308]
    """
    check_arguments(kl_divergence, locals())
    log_t, log_s = _log_probabilities(teacher_logits), _log_probabilities(student_logits)
    if log_t.shape != log_s.shape:
        raise ValueError(
            "teacher and student logits must have one shape, got "
            f"{list(log_t.shape)} and {list(log_s.shape)}"
        )
    p = np.exp(log_t)
    ratio = np.subtract(log_t, log_s, out=np.zeros_like(p), where=p > 0)
    return np.maximum(np.sum(p * ratio, -1), 0.0)


def _log_probabilities(logits: Float[Array, "*batch n"]) -> Float[np.ndarray, "*batch n"]:
    z = np.asarray(logits, np.float64)
    if z.ndim == 0 or z.size == 0:
        raise ValueError(
            f"expected logits [..., n] of one token or more, got shape {list(z.shape)}"
        )
    largest = z.max(-1)
    if not np.isfinite(largest).all():
        raise ValueError(
            "the largest logit of every row must be finite, but "
            f"{(~np.isfinite(largest)).sum()} rows hold NaN, inf or only -inf"
        )
    return log_softmax(z, -1)


def _steps(
    values: Float[Array, "*batch n"], weights: Float[Array, "*batch n"] | None, name: str
) -> tuple[Float[np.ndarray, "*batch n"], Float[np.ndarray, "*batch n"]]:
    """Return the ascending values of a quantile function, and the upper ends of its steps."""
    points = finite(values, name)
    if points.ndim == 0:
        raise ValueError(f"{name} must have an axis of points, got a number")
    n = points.shape[-1]
    if weights is None:
        return np.sort(points, -1), np.arange(1, n + 1) / n
    shares = probabilities(weights, f"{name}_weights")
    if shares.shape[-1] != n:
        raise ValueError(f"expected weights for {n} points of {name}, got {shares.shape[-1]}")
    check_shapes(**{name: points, f"{name}_weights": shares})
    points, shares = np.broadcast_arrays(points, shares)
    order = np.argsort(points, -1)
    return (
        np.take_along_axis(points, order, -1),
        np.cumsum(np.take_along_axis(shares, order, -1), -1),
    )
