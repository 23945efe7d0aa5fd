"""Zeroth order: gradients from losses alone, so that training takes the memory of inference.

Two losses at parameters +- epsilon z, z drawn at random, say how the loss falls along z; that
number and the key of z are the gradient. Nothing is stored but these: a latent weight is moved
where a product needs it, layer by layer, and the update draws the same z again, in place.
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
    """A gradient as keys and numbers: the mean over draws of number x z(key).

    Those of all steps are a training's whole log: `moved` by them again, parameters come out again.
    """

    keys: Array
    numbers: Float[Array, " q"]


@dataclasses.dataclass(frozen=True)
class Zeroth:
    """How derivatives are estimated.

    With draws z_i of unit variance and c_i = (L(p + e z_i) - L(p - e z_i)) / 2e, the estimate is
    the mean of c_i z_i. Its mean is the gradient of the loss smoothed by e z, roundings included;
    the mean of its squared norm is (d + q + 1) / q times the gradient's, for d numbers that move,
    and (d + q - 1) / q if draws are signs.

    Attributes:
      epsilon: e.
      samples: q draws a step.
      drawing: of z; `relative`: weights move by z times their step, all else by z times its
        `unit`.
        A rounded loss only changes where codes do: below half a step few do, and those by far, so
        that the variance grows as step / e. The estimate is then of the gradient times squared
        steps, which suits an update.
      kinds: labels of what moves, see `labels`.
      sizes: of the moves of each kind, times e; (): 1 each. As with `relative`, the estimate is
        then of the gradient times their squares.
      others: of the kind "other", globs of the leaves that move.
      blocks: of the arrays that move, every n-th does in one step, which ones by chance.

    Source: MeZO, Malladi et al. 2023, arXiv:2305.17333; ZeroQAT, arXiv:2509.00031.
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
            raise ValueError(f"sizes must be positive, one of each of {self.kinds}: {self.sizes}")
        check_positive(self, "epsilon", "samples", "blocks")
        if unknown := set(self.kinds) - (set(LABELS) - {FROZEN}):
            raise ValueError(f"unknown labels {sorted(unknown)}; there are {', '.join(LABELS)}")

    def size(self, label: str) -> float:
        """Of the moves of a kind."""
        return self.sizes[self.kinds.index(label)] if self.sizes else 1.0


def zo_value_and_grad(
    loss: Callable[..., Array],
    how: Zeroth = Zeroth(),
) -> Callable[..., tuple[Array, PyTree]]:
    """As `jax.value_and_grad(loss)`, from two losses a draw and no derivative.

    Returns:
      (params, *args, key=) -> (the mean of the losses, the estimate, a tree like params, of zeros
      where nothing moves). It is as large as the parameters; `zo_step` needs none.

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
    """A step of gradient descent along an estimate that is never stored.

    Returns:
      (params, key, rate, *args) -> (params - rate x estimate, the mean of the losses, the estimate
      as keys and numbers). Jitted with the parameters donated it updates them in place.

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
    """The mean of the losses, and the estimate.

    Raises:
      ValueError: nothing in the tree moves.
    """
    if not any(True for _ in _moving(params, how)):
        raise ValueError(f"nothing moves: the tree has no array of the kinds {how.kinds}")
    keys = jax.random.split(key, how.samples)

    def one(key: Array) -> tuple[Array, Array]:
        at = lambda e: loss(perturbed(params, key, e, how), *args).astype(jnp.float32)
        high, low = at(how.epsilon), at(-how.epsilon)
        return (high + low) / 2, (high - low) / (2 * how.epsilon)

    values, numbers = jax.lax.map(one, keys)
    return jnp.mean(values), Slope(keys, numbers)


def moved(params: PyTree, slope: Slope, rate: Any, how: Zeroth) -> PyTree:
    """params - rate x estimate, drawn again."""

    def one(params: PyTree, one: Slope) -> tuple[PyTree, None]:
        return _moved(params, params, one.keys, -rate * one.numbers / how.samples, how), None

    return jax.lax.scan(one, params, slope)[0]


def perturbed(params: PyTree, key: Array, epsilon: Any, how: Zeroth) -> PyTree:
    """The tree at params + epsilon z; of latent weights it holds the key, and draws in products."""
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
    """target + amount z, for the z that is drawn at params; target is of their form."""
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
    """The codes, matrix by matrix in place: all their draws at once would be a second copy."""
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
    """(place, its key, its amount) of every array that moves; 0 for those whose turn it is not."""
    turn = jax.random.randint(jax.random.fold_in(key, 0), (), 0, how.blocks)
    for i, place in enumerate(_moving(params, how)):
        mine = jnp.where(turn == i % how.blocks, amount * how.size(place[2]), 0.0)
        yield place, jax.random.fold_in(key, i + 1), mine


def _moving(params: PyTree, how: Zeroth) -> Iterator[tuple[str, str, str]]:
    """(path, name, label) of every array that moves, in the order of the tree."""
    for path, of in path_leaves(labels(params, how.others)):
        named = of.named if isinstance(of, QTensor) else {"": of}
        for name, label in sorted(named.items()):  # as flattening does: a jitted tree has it
            if label in how.kinds:
                yield path, name, label


def _keys(key: Array, batch: tuple[int, ...]) -> Array:
    """Key data, one for each matrix."""
    return jax.random.key_data(jax.random.split(key, batch))


def _at(leaf: PyTree, name: str) -> Array:
    return leaf.named[name] if name else leaf


def _put(leaf: PyTree, name: str, a: Array) -> PyTree:
    return leaf.with_named(leaf.named | {name: a}) if name else a
