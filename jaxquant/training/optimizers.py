"""Optimizers for trees with latent weights: one for every kind of array, none for the rest."""

import jax
import optax
from jaxtyping import PyTree

from jaxquant.core.standin import is_standin
from jaxquant.training.latent import LABELS, labels, unit


def optimizer(params: PyTree, **of: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optax.multi_transform` by the labels of `labels`; what has no optimizer neither moves nor
    holds a state.

    Scales want neither weight decay nor the learning rate of weights.

    Args:
      params: the tree, for its labels.
      of: optimizers by label: weight, scale, range, other.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> p = jq.latent({"w": jnp.eye(64)}, jq.lsq(bits=4))
    >>> o = jq.optimizer(p, weight=optax.adamw(1e-4, weight_decay=0.1), scale=optax.adam(1e-5))
    >>> updates, state = o.update(p, o.init(p), p)
    """
    if unknown := set(of) - set(LABELS):
        raise ValueError(f"unknown labels {sorted(unknown)}; there are {', '.join(LABELS)}")
    rest = {label: optax.set_to_zero() for label in LABELS if label not in of}
    return optax.multi_transform({**rest, **of}, labels(params))


def relative() -> optax.GradientTransformation:
    """Updates times the units of what they update, so that a learning rate is of relative changes.

    A unit is the number's size; of zero points, offsets and logits another (`latent.unit`).

    After Adam, for scales: these differ from weight to weight by orders of magnitude, and an
    absolute step that suits one takes another below zero.

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
    known = {n: a for n, a in update.named.items() if isinstance(a, jax.Array)}  # the rest: masked
    new = {n: a * unit(n, named[n], named) for n, a in known.items()}
    return update.with_named(update.named | new)
