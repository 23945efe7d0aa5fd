"""t-SignSGD: numbers that are -1, 0 or 1 move by whole steps where the gradient is largest."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

LEAST = 1e-9  # gradients up to this magnitude move nothing
LAST_SHARE = 1e-3  # of the paper's schedule, after four fifths of the updates


def sign_descent(share: float | Callable[[Array], Array]) -> optax.GradientTransformation:
    """Return the optimizer of ternary numbers: the share with the largest gradients takes a step.

    In every matrix, the entries whose gradient exceeds the quantile 1 - share of the magnitudes
    move by one against its sign, and stay within -1 ... 1. There is no learning rate.

    Args:
      share: fraction of the entries of a matrix that move, in (0, 1), or a function of the number
        of updates done (int32 scalar), such as `falling`. Gradients of magnitude 1e-9 or less move
        nothing.
    Returns:
      The optimizer; its update needs the parameters. Leading axes beyond the last two are those of
      a stack of matrices.
    Raises:
      ValueError: the share is a number that is not between 0 and 1; or, at `update`, the parameters
        are missing.
    Source: t-SignSGD of LoTA-QAF (Chen et al. 2025, arXiv:2505.18724).

    >>> optimizer = sign_descent(0.5)
    >>> w, g = jnp.array([[0.0, 1.0, 0.0, -1.0]]), jnp.array([[0.1, -3.0, 2.0, -0.1]])
    >>> updates, _ = optimizer.update(g, optimizer.init(w), w)
    >>> (w + updates).tolist()
    [[0.0, 1.0, -1.0, -1.0]]
    """

    if not callable(share) and not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, or a function, got {share}")

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError("sign_descent needs the parameters: update(updates, state, params)")
        now = share(state.count) if callable(share) else share
        new = jax.tree.map(lambda g, w: _moved(g, w, now) - w, updates, params)
        return new, optax.ScaleByScheduleState(state.count + 1)

    return optax.GradientTransformation(
        lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), update
    )


def _moved(
    g: Float[Array, "... k r"], w: Float[Array, "... k r"], share: float | Array
) -> Float[Array, "... k r"]:
    size = jnp.abs(g.astype(jnp.float32))
    flat = size.reshape(*size.shape[:-2], -1)
    bound = jnp.quantile(flat, 1 - share, axis=-1)[..., None, None]
    moves = size > jnp.maximum(bound, LEAST)
    return jnp.clip(w - jnp.where(moves, jnp.sign(g), 0).astype(w.dtype), -1, 1)


def falling(steps: int, first: float = 0.05, last: float = LAST_SHARE) -> Callable[[Array], Array]:
    """Return the schedule of shares of LoTA-QAF (arXiv:2505.18724), for `sign_descent`.

    Over the first four fifths of the updates the share goes in a straight line from `first` to
    `last`; afterwards it is last / 10.

    Args:
      steps: number of updates, at least 1.
      first: share of the first update, in (0, 1). Default: 0.05.
      last: share at the end of the line, in (0, 1). Default: 1e-3.
    Returns:
      A function from the number of updates done, int32, to the share, float32.

    >>> [round(float(falling(10)(jnp.int32(i))), 4) for i in (0, 4, 9)]
    [0.05, 0.0255, 0.0001]
    """
    turn = max(1, math.ceil(0.8 * steps))

    def share(count: Int[Array, ""]) -> Array:
        line = first + (last - first) * count / turn
        return jnp.where(count < turn, line, last / 10)

    return share
