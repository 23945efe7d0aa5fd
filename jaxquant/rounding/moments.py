"""Second moments as rounders use them: dead channels isolated, damped and factored."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxquant.core.protocols import Format, GridFormat


def row_by_row(format: Format) -> GridFormat:
    """Return the format if it chooses codes row by row for a given grid.

    Args:
      format: the format.
    Raises:
      ValueError: it does not, and so cannot be rounded with error feedback.
    """
    if not isinstance(format, GridFormat):
        raise ValueError(
            "expected a format that chooses codes row by row (a GridFormat), got "
            f"{format}; use the rounder made for it (Waterfill for EntropyCoded), or "
            "Nearest"
        )
    return format


def measured(gram: Float[Array, "k k"] | None) -> Float[Array, "k k"]:
    """Return the second moment; ValueError if it is None, which it is if it was not measured.

    Args:
      gram: second moment [k, k], or None.
    """
    if gram is None:
        raise ValueError(
            "error feedback needs the second moment of this side: pass the result of calibrate"
        )
    return gram


def living(
    gram: Float[Array, "k k"] | None, order: Int[Array, "k"] | None = None
) -> tuple[Float[Array, "k k"], Bool[Array, "k"]]:
    """Return the second moment with dead channels isolated, and which channels are dead.

    A dead channel is one that is always zero. It keeps only a diagonal entry, the mean energy of
    the other channels, and is therefore rounded to nearest.

    Args:
      gram: second moment [k, k]; None if it was not measured.
      order: the order of channels of the result; None leaves it.
    Returns:
      The second moment [k, k], and a bool mask [k] of dead channels, both in that order.
    Raises:
      ValueError: `gram` is None.
    """
    gram = measured(gram)
    dead, diagonal = living_diagonal(gram)
    fill = jnp.where(dead, diagonal, 0.0)
    if order is not None:
        gram, dead, fill = gram[order][:, order], dead[order], fill[order]
    return jnp.where(dead[:, None] | dead[None, :], 0.0, gram) + jnp.diag(fill), dead


def living_diagonal(gram: Float[Array, "k k"]) -> tuple[Bool[Array, "k"], Float[Array, "k"]]:
    """Return which channels are dead, and the diagonal of the second moment that `living` returns.

    Args:
      gram: second moment [k, k].
    """
    diagonal = jnp.diagonal(gram)
    dead = ~(diagonal > 0)
    alive = jnp.sum(jnp.where(dead, 0.0, diagonal)) / jnp.maximum(jnp.sum(~dead), 1)
    return dead, jnp.where(dead, jnp.where(alive > 0, alive, 1.0), diagonal)


def upper(gram: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """Return the upper triangular C with C C^T = H; NaN if H is not positive definite.

    Args:
      gram: symmetric matrix H [k, k].
    """
    return jnp.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1]


TRIES = 8  # how often the damping is raised
# A matrix, or a function that makes it where it is needed, so that no copy is kept meanwhile, and
# its mean diagonal entry.
Made = Float[Array, "k k"] | Callable[[], tuple[Float[Array, "k k"], Float[Array, ""]]]


def unit_upper(
    gram: Made, damping: float, d: int = 1
) -> tuple[Float[Array, "k k"], Float[Array, ""]]:
    """Return the factor U of H + damping mean(diag H) I = U D U^T, and the damping used.

    The damping is raised tenfold, up to 8 times, until the factorization is finite.

    Args:
      gram: second moment H [k, k], or a function that returns (H, mean(diag H)).
      damping: initial damping.
      d: block size; for d > 1, U is block-unit upper triangular and D is block-diagonal.

    >>> u, _ = unit_upper(jnp.array([[2.0, 1.0], [1.0, 1.0]]), 1e-9)
    >>> u.round(3).tolist()
    [[1.0, 1.0], [0.0, 1.0]]
    """
    c, damp = _lower(gram, damping)
    if d == 1:
        return (c / jnp.diagonal(c))[::-1, ::-1], damp
    return _unit(c[::-1, ::-1], d), damp


def believed(g: Float[Array, "n n"], share: float) -> Float[Array, "n n"]:
    """Return G with its off-diagonal entries multiplied by `share`.

    Args:
      g: second moment G [n, n].
      share: factor from 0 to 1.
    """
    own = jnp.diag(jnp.diagonal(g))
    return own + share * (g - own)


def feedback_energies(
    gram: Float[Array, "k k"], damping: float
) -> tuple[Float[Array, "k"], Float[Array, ""]]:
    """Return diag D of H + damping mean(diag H) I = U D U^T, and the damping used.

    Args:
      gram: second moment H [k, k].
      damping: initial damping, raised as in `unit_upper`.
    """
    mean = jnp.mean(jnp.diagonal(gram))
    c, damp = _lower(gram, damping)
    return mean * jnp.diagonal(c)[::-1] ** 2, damp


def block_energies(
    gram: Float[Array, "k k"], damping: float, d: int
) -> tuple[Float[Array, "k k"], Float[Array, "k"]]:
    """Return U and diag D of H + damping mean(diag H) I = U D U^T, with U block-unit.

    Args:
      gram: second moment H [k, k].
      damping: initial damping, raised as in `unit_upper`.
      d: block size.
    """
    mean = jnp.mean(jnp.diagonal(gram))
    c = _lower(gram, damping)[0][::-1, ::-1]
    own = jnp.einsum("bibj->bij", c.reshape(-1, d, len(c) // d, d))
    return _unit(c, d), mean * jnp.sum(own**2, axis=-1).reshape(-1)


def _lower(gram: Made, damping: float) -> tuple[Array, Array]:
    """Return the factor C of H / mean(diag H) + damping I = C C^T, turned around, and the damping.

    C is upper triangular. Turned around, C[::-1, ::-1] is lower triangular, as LAPACK makes it;
    to turn it back is left to the caller, who may do so together with other work.
    """

    def factor(damp: Array) -> Array:
        h, mean = gram() if callable(gram) else (gram, jnp.mean(jnp.diagonal(gram)))
        h = h / mean + damp * jnp.eye(len(h), dtype=h.dtype)
        return jnp.linalg.cholesky(h[::-1, ::-1])

    def failed(state: tuple[Array, Array, Array]) -> Array:
        _, c, tries = state
        return ~jnp.all(jnp.isfinite(c)) & (tries < TRIES)

    def raised(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        damp, c, tries = state
        # The condition always holds. XLA does not see that, and computes nothing of this in
        # advance, which would keep a matrix in memory for a loop that is hardly ever entered.
        c = jax.lax.cond(tries < TRIES, lambda: factor(10 * damp), lambda: c)
        return 10 * damp, c, tries + 1

    start = jnp.float32(damping)
    damp, c, _ = jax.lax.while_loop(failed, raised, (start, factor(start), jnp.int32(0)))
    return c, damp


def _unit(c: Float[Array, "k k"], d: int) -> Float[Array, "k k"]:
    """Return U of C = U S, where S holds the diagonal blocks of C of size d."""
    if d == 1:
        return c / jnp.diagonal(c)
    return _right_divided(c.reshape(len(c), -1, d), d).reshape(c.shape)


def _right_divided(c: Float[Array, "k b d"], d: int) -> Float[Array, "k b d"]:
    """Multiply each block of d columns by the inverse of its (upper triangular) diagonal block.

    The substitution is written out because jaxlib's batched triangular solves wait for jaxlib's
    thread pool from within it. Two such solves at once, one for the moment of each side, wait
    forever (jaxlib 0.10.2, two cores).
    """
    b = jnp.arange(c.shape[1])
    block = c.reshape(-1, d, *c.shape[1:])[b, :, b]  # [b, d, d]
    ahead = jnp.triu(block, 1)

    def divided(j: Array, left: Array) -> Array:
        x = left[..., j] / block[:, j, j]
        return (left - x[..., None] * ahead[:, j]).at[..., j].set(x)

    return jax.lax.fori_loop(0, d, divided, c)
