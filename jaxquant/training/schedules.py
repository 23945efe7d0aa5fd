"""BitNet's schedules: a learning rate that falls to zero in two lines, a weight decay that ends."""

import jax.numpy as jnp
import optax
from jaxtyping import Array


def two_stage(first: float, second: float, steps: int, warmup: int = 0) -> optax.Schedule:
    """peak (1 - t / steps), the peak being `first` in the first half and `second` after it.

    Rises from 0 over `warmup` steps. The size of a latent weight is how sure its code is: once
    decay has ended and the rate has stepped down, codes settle.

    Source: the training notes of BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764).

    Raises:
      ValueError: fewer than two steps; a warm-up longer than half of them.

    >>> rate = two_stage(1.0, 0.5, 100, warmup=10)
    >>> [round(float(rate(t)), 3) for t in (0, 5, 10, 49, 50, 100)]
    [0.0, 0.475, 0.9, 0.51, 0.25, 0.0]
    """
    if steps < 2 or not 0 <= warmup <= steps // 2:
        raise ValueError(
            f"expected two steps or more and a warm-up of at most half of them, got {steps} and "
            f"{warmup}"
        )
    half = steps // 2
    line = lambda peak: optax.linear_schedule(peak, 0.0, steps)
    rise = optax.linear_schedule(0.0, 1.0, warmup) if warmup else optax.constant_schedule(1.0)

    def rate(t: Array) -> Array:
        return jnp.where(t < half, line(first)(t), line(second)(t)) * rise(t)

    return rate


def decay_until_half(weight_decay: float, steps: int) -> optax.Schedule:
    """The weight decay in the first half of the steps, then none.

    >>> [float(decay_until_half(0.1, 100)(t)) for t in (0, 49, 50)]
    [0.1..., 0.1..., 0.0]
    """
    return optax.piecewise_constant_schedule(weight_decay, {steps // 2: 0.0})
