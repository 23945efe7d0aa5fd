"""t-SignSGD: numbers that are -1, 0 or 1 move by whole steps where the gradient is largest."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

LEAST = 1e-9  # gradients up to this magnitude move nothing


def sign_descent(share: float | Callable[[Array], Array]) -> optax.GradientTransformation:
    """Return the optimizer of ternary numbers: the share with the largest gradients takes a step.

    In every matrix, the entries whose gradient exceeds the quantile 1 - share of the magnitudes
    move by one against its sign, and stay within -1 ... 1. There is no learning rate.

    Args:
      share: fraction of the entries of a matrix that move, in (0, 1), or a function of the number
        of updates done, such as `falling`.
    Returns:
      The optimizer; its update needs the parameters. Leading axes beyond the last two are those of
      a stack of matrices.
    Raises:
      ValueError: the share is not between 0 and 1.
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


def falling(steps: int, first: float = 0.05, last: float = 1e-3) -> Callable[[Array], Array]:
    """Return the paper's schedule of shares.

    Args:
      steps: number of updates.
      first: share at the beginning.
      last: share after four fifths of the updates, which the share reaches in a straight line; it
        is a tenth of that afterwards.

    >>> [round(float(falling(10)(jnp.int32(i))), 4) for i in (0, 4, 9)]
    [0.05, 0.0255, 0.0001]
    """
    turn = max(1, math.ceil(0.8 * steps))

    def share(count: Int[Array, ""]) -> Array:
        line = first + (last - first) * count / turn
        return jnp.where(count < turn, line, last / 10)

    return share
