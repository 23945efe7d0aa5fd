"""Optimizers for trees with latent weights: one per kind of array."""

from collections.abc import Sequence

import jax
import optax
from jaxtyping import PyTree

from jaxquant.core.standin import is_standin
from jaxquant.training.latent import LABELS, OTHER, labels, unit


def optimizer(
    params: PyTree, *, also: Sequence[str] | None = None, **of: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Combine one optimizer per label into an `optax.multi_transform`.

    Arrays whose label has no optimizer do not change and have no optimizer state. Scales should get
    neither weight decay nor the learning rate of weights.

    Args:
      params: the tree, for its `labels`.
      also: globs of plain leaves that "other" trains. Default: all if it is given, else those of
        `labels`.
      of: optimizers by label: weight, scale, range, lora_a, lora_b, magnitude, ternary, other.
    Returns:
      The optimizer of the whole tree.
    Raises:
      ValueError: a label is unknown.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> p = jq.latent({"w": jnp.eye(64)}, jq.lsq(bits=4))
    >>> weight, scale = optax.adamw(1e-4, weight_decay=0.1), optax.adam(1e-5)
    >>> o = jq.training.optimizer(p, weight=weight, scale=scale)
    >>> updates, state = o.update(p, o.init(p), p)
    """
    if unknown := set(of) - set(LABELS):
        raise ValueError(f"unknown labels {sorted(unknown)}; there are {', '.join(LABELS)}")
    rest = {label: optax.set_to_zero() for label in LABELS if label not in of}
    also = ("*",) if also is None and OTHER in of else also
    return optax.multi_transform({**rest, **of}, labels(params, also))


def relative() -> optax.GradientTransformation:
    """Return a transformation that multiplies updates by the units of what they update.

    The learning rate then means relative changes. A unit is the magnitude of the number; zero
    points, offsets and logits have others (`latent.unit`). Use it after Adam, for scales: these
    differ between weights by orders of magnitude, so that an absolute step that suits one makes
    another negative.

    Returns:
      The transformation; its update needs the parameters.

    >>> import jax.numpy as jnp
    >>> chain = optax.chain(optax.adam(0.1), relative())
    >>> p = {"large": jnp.array(100.0), "small": jnp.array(0.01)}
    >>> updates, _ = chain.update(p, chain.init(p), p)
    >>> {name: round(float(u / p[name]), 3) for name, u in updates.items()}
    {'large': -0.1, 'small': -0.1}
    """

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError("relative() needs the parameters: update(updates, state, params)")
        return jax.tree.map(_times_units, updates, params, is_leaf=is_standin), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _times_units(update: PyTree, param: PyTree) -> PyTree:
    if not is_standin(update):
        return update * unit("", param, {})
    named = param.named
    known = {n: a for n, a in update.named.items() if isinstance(a, jax.Array)}  # others are masked
    new = {n: a * unit(n, named[n], named) for n, a in known.items()}
    return update.with_named(update.named | new)
