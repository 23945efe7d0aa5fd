"""BitNet's schedules: a two-stage learning rate and a weight decay that ends halfway."""

import jax.numpy as jnp
import optax
from jaxtyping import Array


def two_stage(first: float, second: float, steps: int, warmup: int = 0) -> optax.Schedule:
    """Return the schedule peak (1 - t / steps), the peak being `first`, then `second` from halfway.

    It is multiplied by a linear rise from 0 over `warmup` steps. The magnitude of a latent weight
    is the confidence in its code: once weight decay has ended and the rate has dropped, codes
    settle.

    Args:
      first, second: peak learning rates of the two halves.
      steps: number of steps, 2 or more.
      warmup: steps of warm-up, at most half of `steps`. Default: none.
    Returns:
      The schedule.
    Raises:
      ValueError: `steps` or `warmup` is out of range.
    Source:
      The training notes of BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764).

    >>> rate = two_stage(1.0, 0.5, 100, warmup=10)
    >>> [round(float(rate(t)), 3) for t in (0, 5, 10, 49, 50, 100)]
    [0.0, 0.475, 0.9, 0.51, 0.25, 0.0]
    """
    if steps < 2 or not 0 <= warmup <= steps // 2:
        raise ValueError(
            f"steps must be at least 2, and warmup 0 to half of steps, got {steps} and {warmup}"
        )
    half = steps // 2
    line = lambda peak: optax.linear_schedule(peak, 0.0, steps)
    rise = optax.linear_schedule(0.0, 1.0, warmup) if warmup else optax.constant_schedule(1.0)

    def rate(t: Array) -> Array:
        return jnp.where(t < half, line(first)(t), line(second)(t)) * rise(t)

    return rate


def decay_until_half(weight_decay: float, steps: int) -> optax.Schedule:
    """Return a schedule that is `weight_decay` in the first half of the steps, then 0.

    Args:
      weight_decay: weight decay of the first half.
      steps: number of steps.
    Returns:
      The schedule.

    >>> [float(decay_until_half(0.1, 100)(t)) for t in (0, 49, 50)]
    [0.1..., 0.1..., 0.0]
    """
    return optax.piecewise_constant_schedule(weight_decay, {steps // 2: 0.0})
