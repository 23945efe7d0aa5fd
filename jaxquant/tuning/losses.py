"""Losses of training: by vectors, by distributions, and by the next token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def relative_error(y: Array, wanted: Array) -> Array:
    """Return the mean over vectors of the squared error relative to the vector's energy.

    Args:
      y, wanted: vectors along the last axis, and their targets of the same shape.
    Returns:
      The mean, float32.

    >>> float(relative_error(jnp.array([[3.0, 0.0]]), jnp.array([[2.0, 0.0]])))
    0.25
    """
    y, wanted = y.astype(jnp.float32), wanted.astype(jnp.float32)  # squares overflow float16
    energy = lambda a: jnp.sum(a**2, axis=-1)
    return jnp.mean(energy(y - wanted) / (energy(wanted) + 1e-12))


def divergence(logits: Array, target: Array) -> Array:
    """Return KL(softmax(target) || softmax(logits)) over the last axis, in nats.

    Args:
      logits, target: [..., v] logits of the student and of the teacher.
    Returns:
      The divergences [...].

    >>> f"{divergence(jnp.zeros(2), jnp.array([0.0, -99.0])):.4f}"
    '0.6931'
    """
    log_p = jax.nn.log_softmax(target.astype(jnp.float32))
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def next_token_loss(logits: Float[Array, "b t v"], tokens: Int[Array, "b t"]) -> Array:
    """Return the mean cross-entropy of the next token, in nats.

    The last position is masked instead of sliced off, because a slice would copy the logits: 100 MB
    for 512 tokens and a vocabulary of 49,152.

    Args:
      logits: predictions at each token.
      tokens: the tokens.
    Returns:
      The mean over all tokens but the first of each row.

    >>> f"{next_token_loss(jnp.zeros((1, 3, 2)), jnp.array([[0, 1, 0]])):.4f}"
    '0.6931'
    """
    following = jnp.roll(tokens, -1, axis=1)[..., None]
    nll = (
        jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, following, axis=-1)[..., 0]
    )
    return jnp.mean(nll[:, :-1])
