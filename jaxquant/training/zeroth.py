"""Zeroth-order gradients from losses alone, so that training takes the memory of inference.

Two losses at parameters +- epsilon z, with a random direction z, give the slope of the loss along
z. That number and the key of z represent the gradient, and nothing else is stored. A latent weight
is perturbed inside the matmul that uses it, layer by layer, and the update draws the same z again,
in place.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxquant.core.arguments import check_arguments
from jaxquant.core.fields import check_fields, check_positive
from jaxquant.core.paths import path_leaves, replace_leaves
from jaxquant.core.tensor import QTensor
from jaxquant.estimators.latent_format import EPSILON, KEY, NORMAL, Drawing
from jaxquant.training.latent import FROZEN, LABELS, WEIGHT, labels, latent_format, unit


class Slope(NamedTuple):
    """A gradient estimate, stored as keys and numbers: the mean over draws of number * z(key).

    The slopes of all steps are a complete log of a training: applying them again by `moved`
    reproduces its parameters.

    Attributes:
      keys: PRNG keys of the draws [q].
      numbers: slopes of the loss along the draws.
    """

    keys: Array
    numbers: Float[Array, " q"]


@dataclasses.dataclass(frozen=True)
class Zeroth:
    """Settings of a zeroth-order gradient estimate.

    With draws z_i of unit variance and c_i = (L(p + e z_i) - L(p - e z_i)) / 2e, the estimate is
    the mean of c_i z_i. Its expectation is the gradient of the loss smoothed by e z, rounding
    included. Its expected squared norm is (d + q + 1) / q times that of the gradient, where d
    numbers move, or (d + q - 1) / q if draws are signs.

    Attributes:
      epsilon: e, the length of a move.
      samples: q, the number of draws per step.
      drawing: distribution of z. With `relative`, weights move by z times their quantization step,
        and all else by z times its `unit`. The rounded loss changes only where codes do. If moves
        are below half a step, few codes change, but each by a whole step, and the variance grows as
        step / e. The estimate is then of the gradient times squared steps, which suits an update.
      kinds: labels of the arrays that move, see `labels`.
      blocks: in one draw only every `blocks`-th of the moving arrays moves, with a random offset.
      sizes: factors of e for each of `kinds`; () means 1 for all. As with `relative`, the estimate
        is then of the gradient times their squares.
      others: globs of the leaves of the kind "other" that move.

    Source:
      MeZO, Malladi et al. 2023, arXiv:2305.17333; ZeroQAT, arXiv:2509.00031.
    """

    epsilon: float = 1e-3
    samples: int = 1
    drawing: Drawing = NORMAL
    kinds: tuple[str, ...] = (WEIGHT,)
    blocks: int = 1
    sizes: tuple[float, ...] = ()
    others: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.sizes and (len(self.sizes) != len(self.kinds) or min(self.sizes) <= 0):
            raise ValueError(
                f"sizes must be positive, one for each of the kinds {self.kinds}, got {self.sizes}"
            )
        check_positive(self, "epsilon", "samples", "blocks")
        if unknown := set(self.kinds) - (set(LABELS) - {FROZEN}):
            raise ValueError(f"unknown labels {sorted(unknown)}; there are {', '.join(LABELS)}")

    def size(self, label: str) -> float:
        """Return the factor of the moves of one kind of array.

        Args:
          label: one of `kinds`.
        Returns:
          The factor, 1 by default.
        """
        return self.sizes[self.kinds.index(label)] if self.sizes else 1.0


def zo_value_and_grad(
    loss: Callable[..., Array],
    how: Zeroth = Zeroth(),
) -> Callable[..., tuple[Array, PyTree]]:
    """Return the zeroth-order counterpart of `jax.value_and_grad(loss)`.

    Args:
      loss: loss(params, *args) -> scalar.
      how: settings of the estimate.
    Returns:
      A function (params, *args, key=) -> (mean of the losses, estimate). The estimate is a tree
      like `params`, with zeros where nothing moves, and takes as much memory; `zo_step` does not
      store it.

    >>> loss = lambda p: jnp.sum(p["w"] ** 2)
    >>> run = zo_value_and_grad(loss, Zeroth(samples=4000, kinds=("other",)))
    >>> value, g = jax.jit(run)({"w": jnp.array([1.0, -2.0])}, key=jax.random.key(0))
    >>> g["w"].round(0).tolist()
    [2.0, -4.0]
    """
    check_arguments(zo_value_and_grad, locals())

    def run(params: PyTree, *args: Any, key: Array) -> tuple[Array, PyTree]:
        value, slope = estimate(loss, params, key, how, *args)
        zero = jax.tree.map(jnp.zeros_like, params)

        def add(total: Any, one: Slope) -> tuple[PyTree, None]:
            return _moved(total, params, one.keys, one.numbers / how.samples, how), None

        return value, jax.lax.scan(add, zero, slope)[0]

    return run


def zo_step(
    loss: Callable[..., Array],
    how: Zeroth = Zeroth(),
) -> Callable[..., tuple[PyTree, Array, Slope]]:
    """Return a step of gradient descent along an estimate that is never stored.

    Args:
      loss: loss(params, *args) -> scalar.
      how: settings of the estimate.
    Returns:
      A function (params, key, rate, *args) -> (params - rate * estimate, mean of the losses,
      `Slope`). Jitted with donated parameters, it updates them in place.

    >>> loss = lambda p: jnp.sum(p["w"] ** 2)
    >>> step = jax.jit(zo_step(loss, Zeroth(kinds=("other",))), donate_argnums=0)
    >>> p = {"w": jnp.array([1.0, -2.0])}
    >>> for i in range(100):
    ...     p, value, slope = step(p, jax.random.key(i), 0.1)
    >>> float(loss(p)) < 0.01
    True
    """
    check_arguments(zo_step, locals())

    def step(params: PyTree, key: Array, rate: Any, *args: Any) -> tuple[PyTree, Array, Slope]:
        value, slope = estimate(loss, params, key, how, *args)
        return moved(params, slope, rate, how), value, slope

    return step


def estimate(
    loss: Callable[..., Array], params: PyTree, key: Array, how: Zeroth, *args: Any
) -> tuple[Array, Slope]:
    """Estimate the gradient of a loss from 2 * how.samples evaluations.

    Args:
      loss: loss(params, *args) -> scalar.
      params: tree of parameters.
      key: PRNG key of the draws.
      how: settings of the estimate.
      args: further arguments of the loss.
    Returns:
      The mean of the losses, and the estimate.
    Raises:
      ValueError: nothing in the tree moves.
    """
    if not any(True for _ in _moving(params, how)):
        raise ValueError(f"nothing to train: the tree has no array of the kinds {how.kinds}")
    keys = jax.random.split(key, how.samples)

    def one(key: Array) -> tuple[Array, Array]:
        at = lambda e: loss(perturbed(params, key, e, how), *args).astype(jnp.float32)
        high, low = at(how.epsilon), at(-how.epsilon)
        return (high + low) / 2, (high - low) / (2 * how.epsilon)

    values, numbers = jax.lax.map(one, keys)
    return jnp.mean(values), Slope(keys, numbers)


def moved(params: PyTree, slope: Slope, rate: Any, how: Zeroth) -> PyTree:
    """Return params - rate * estimate, drawing the directions again.

    Args:
      params: tree of parameters.
      slope: the estimate.
      rate: learning rate.
      how: settings with which the estimate was made.
    Returns:
      The new parameters.
    """

    def one(params: PyTree, one: Slope) -> tuple[PyTree, None]:
        return _moved(params, params, one.keys, -rate * one.numbers / how.samples, how), None

    return jax.lax.scan(one, params, slope)[0]


def perturbed(params: PyTree, key: Array, epsilon: Any, how: Zeroth) -> PyTree:
    """Return the tree at params + epsilon z.

    A latent weight is not changed but given the key and epsilon, from which matmuls draw z.

    Args:
      params: tree of parameters.
      key: PRNG key of the draw.
      epsilon: length of the move, of either sign.
      how: settings of the estimate.
    Returns:
      The perturbed tree.
    """
    leaves = dict(path_leaves(params))
    for place, own, amount in _draws(params, key, epsilon, how):
        path, name, label = place
        leaf = leaves[path]
        if label == WEIGHT:
            batch = leaf.data["codes"].shape[: leaf.leading()]
            noise = {KEY: _keys(own, batch), EPSILON: jnp.broadcast_to(amount, batch)}
            format = dataclasses.replace(leaf.format, drawing=how.drawing)
            leaves[path] = dataclasses.replace(leaf, data=leaf.data | noise, format=format)
        else:
            leaves[path] = _put(leaf, name, _plus(leaf, name, own, amount, how))
    return replace_leaves(params, leaves)


def _moved(target: PyTree, params: PyTree, key: Array, amount: Any, how: Zeroth) -> PyTree:
    """Return target + amount * z, with z drawn at `params`; `target` has the same structure."""
    leaves, before = dict(path_leaves(target)), dict(path_leaves(params))
    for (path, name, label), own, size in _draws(params, key, amount, how):
        leaf, at = leaves[path], before[path]
        if label == WEIGHT:
            leaves[path] = _put(leaf, name, _shifted(leaf, at, own, size, how))
        else:
            z = _plus(at, name, own, size, how) - _at(at, name)
            leaves[path] = _put(leaf, name, _at(leaf, name) + z)
    return replace_leaves(target, leaves)


def _shifted(leaf: QTensor, at: QTensor, key: Array, amount: Array, how: Zeroth) -> Array:
    """Return the moved codes, updated matrix by matrix in place.

    Drawing for all matrices at once would take memory for a second copy.
    """
    codes, axes = leaf.data["codes"], at.leading()
    batch = codes.shape[:axes]
    flat = lambda a: a.reshape(-1, *a.shape[axes:])
    keys = flat(_keys(key, batch))
    data = {n: flat(a) for n, a in at.data.items()}

    def body(i: Array, codes: Array) -> Array:
        one = {n: a[i] for n, a in data.items()}
        z = how.drawing.of(keys[i], latent_format(at), one)
        return codes.at[i].add((amount * z).astype(codes.dtype))

    flat_codes = flat(codes)
    return jax.lax.fori_loop(0, len(flat_codes), body, flat_codes).reshape(codes.shape)


def _plus(leaf: PyTree, name: str, key: Array, amount: Any, how: Zeroth) -> Array:
    a = _at(leaf, name)
    data = leaf.named if isinstance(leaf, QTensor) else {}
    axes = leaf.leading() if isinstance(leaf, QTensor) else max(0, a.ndim - 1)
    z = how.drawing.values(key, a.shape, axes)
    if how.drawing.relative:
        z = z * unit(name, a, data)
    return a + (amount * z).astype(a.dtype)


def _draws(params: PyTree, key: Array, amount: Any, how: Zeroth) -> Iterator[tuple]:
    """Yield (place, key, amount) for every array that moves; the amount is 0 out of turn."""
    turn = jax.random.randint(jax.random.fold_in(key, 0), (), 0, how.blocks)
    for i, place in enumerate(_moving(params, how)):
        mine = jnp.where(turn == i % how.blocks, amount * how.size(place[2]), 0.0)
        yield place, jax.random.fold_in(key, i + 1), mine


def _moving(params: PyTree, how: Zeroth) -> Iterator[tuple[str, str, str]]:
    """Yield (path, name, label) of every array that moves, in the order of the tree."""
    for path, of in path_leaves(labels(params, how.others)):
        named = of.named if isinstance(of, QTensor) else {"": of}
        for name, label in sorted(named.items()):  # the order in which jit flattens a tree
            if label in how.kinds:
                yield path, name, label


def _keys(key: Array, batch: tuple[int, ...]) -> Array:
    """Return key data, one key for each matrix."""
    return jax.random.key_data(jax.random.split(key, batch))


def _at(leaf: PyTree, name: str) -> Array:
    return leaf.named[name] if name else leaf


def _put(leaf: PyTree, name: str, a: Array) -> PyTree:
    return leaf.with_named(leaf.named | {name: a}) if name else a
