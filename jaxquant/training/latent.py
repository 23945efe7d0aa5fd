"""Latent weights into a tree and out of it: `latent`, `thaw`, `freeze`; and what trains there."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxquant.calibration.statistics import Stats
from jaxquant.core.arguments import check_arguments
from jaxquant.core.paths import matches, path_leaves, replace_leaves
from jaxquant.core.protocols import Format, LevelFormat
from jaxquant.core.sites import Site
from jaxquant.core.tensor import Arrays, QTensor
from jaxquant.estimators.latent_format import Latent, batched
from jaxquant.estimators.weight_estimators import StraightThrough, spread
from jaxquant.methods.method import Method
from jaxquant.ptq.quantize import quantize
from jaxquant.recipes.recipe import Recipe

ACTIVATIONS = "activations."
# What a label says of an array.
WEIGHT, SCALE, RANGE, OTHER, FROZEN = LABELS = ("weight", "scale", "range", "other", "frozen")


def latent(
    params: PyTree,
    recipe: Recipe | Method,
    stats: Stats | Mapping[str, Site] | None = None,
    **options: PyTree,
) -> PyTree:
    """The tree with latent weights where the recipe says so: `quantize`, then `thaw`.

    `jq.quantized(loss)` of it has derivatives, by `jax.grad`, in the weights as in the scales that
    the method learns. Training starts at what the method's rounder makes of the weights, GPTQ's
    codes as well as the nearest ones.

    Args:
      params: tree of floating arrays.
      recipe: of methods made for training (`ste`, `lsq`, `bitnet`, ...) or of any others, whose
        weights are then trained straight through.
      stats, options: as `quantize` takes them.
    Raises:
      ValueError: as `quantize`; a format that the estimator cannot train.

    >>> import jaxquant as jq
    >>> p = jq.latent({"w": jnp.eye(64), "b": jnp.zeros(64)}, jq.lsq(bits=4))
    >>> loss = lambda p, x: jnp.sum((x @ p["w"] + p["b"]) ** 2)
    >>> g = jax.grad(jq.quantized(loss))(p, jnp.ones((1, 64)))
    >>> sorted(g["w"].data), g["b"].shape
    (['codes', 'scale'], (64,))
    """
    check_arguments(latent, locals())
    return thaw(quantize(params, recipe, stats, **options), recipe, floats=params)


def thaw(params: PyTree, recipe: Recipe | Method, *, floats: PyTree = None) -> PyTree:
    """The tree with quantized weights as latent ones, which begin at their codes.

    Args:
      params: from `quantize`, or a checkpoint.
      recipe: how they train: methods' estimators, by path. What it keeps stays frozen, and formats
        are those of the tree.
      floats: the tree that it was made of. A weight begins as its float, moved no further than into
        the bounds of its code; without floats as what its code means.
    Raises:
      ValueError: nothing in it is quantized where the recipe has a method, or a pattern of it
        matches nothing; a format that the estimator cannot train.
    """
    check_arguments(thaw, locals())
    rules = [("*", recipe)] if isinstance(recipe, Method) else list(recipe.rules)
    leaves = path_leaves(params)
    for pattern, _ in rules:
        if not any(matches(path, pattern) for path, _ in leaves):
            raise ValueError(f"pattern {pattern!r} matches no leaf of the tree")
    before = {} if floats is None else dict(path_leaves(floats))
    new = {}
    for path, w in leaves:
        method = next((m for glob, m in rules if matches(path, glob)), None)
        if isinstance(w, QTensor) and isinstance(method, Method):
            try:
                new[path] = _thawed(w, method, before.get(path))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
    if not new:
        raise ValueError("nothing to train: the recipe has a method for no quantized weight")
    return replace_leaves(params, new)


def _thawed(w: QTensor, method: Method, leaf: Array | None) -> QTensor:
    if isinstance(w.format, Latent):
        raise ValueError("the weight is latent already")
    estimator = method.estimator or StraightThrough()
    estimator.check(w.format)
    inputs = method.input_estimator
    if inputs is not None:
        inputs.check(w.activations)
    data, axes = w.data, w.leading()
    values = w.stored()
    if leaf is not None:
        near = partial(_near, w.format)
        values = batched(near, axes)(_as_stored(w, leaf), values, data)
    start = batched(lambda v, data: estimator.start(v, w.format, data), axes)
    ranges = w.activations_data
    if inputs is not None:
        ranges = batched(lambda d: inputs.start(d, w.activations), axes)(ranges)
    return dataclasses.replace(
        w,
        data={"codes": values} | start(values, data),
        format=Latent(w.format, estimator, inputs),
        shared="",
        activations_data=ranges,
    )


def _as_stored(w: QTensor, leaf: Array) -> Float[Array, "... s t"]:
    """A weight's floats, as the format's matrix has them."""
    if leaf.shape != w.shape:
        raise ValueError(f"floats of shape {list(leaf.shape)} for a weight {list(w.shape)}")
    back = tuple(sorted(range(leaf.ndim), key=w.axes().__getitem__))
    batch = w.stored_shape()[: w.leading()]
    k, n = math.prod(w.view.k), math.prod(w.view.n)
    matrices = jnp.transpose(leaf.astype(jnp.float32), back).reshape(*batch, k, n)

    def one(m: Float[Array, "k n"], arrays: Arrays) -> Float[Array, "s t"]:
        if w.input is not None:
            m = w.input.inverse(m.T, arrays.input).T
        return m if w.output is None else w.output.inverse(m, arrays.output)

    return batched(one, len(batch))(matrices, w.arrays)


def _near(
    format: Format, w: Float[Array, "k n"], value: Float[Array, "k n"], data: dict[str, Array]
) -> Float[Array, "k n"]:
    """w where its code is the stored one; else the code's value, or as near to w as it stays."""
    if not isinstance(format, LevelFormat):
        return w
    rows = spread(format.stored_grid(data), format, w.shape)
    same = lambda a: format.round(a, rows)[1] == value
    nearer = value + jnp.clip(w - value, -0.45 * rows.scale, 0.45 * rows.scale)
    return jnp.where(same(w), w, jnp.where(same(nearer), nearer, value))


def freeze(params: PyTree) -> PyTree:
    """The tree with latent weights as quantized ones: packed, and what they give is the same.

    Raises:
      ValueError: a latent weight, or a scale, that is no finite number, or a scale not above zero.

    >>> import jaxquant as jq
    >>> frozen = jq.freeze(jq.latent({"w": jnp.eye(64)}, jq.lsq(bits=4)))
    >>> frozen["w"].format
    Integer(bits=4, group_size=64, symmetric=True, mse=False, scale_dtype='float16', ...)
    """
    return replace_leaves(
        params, {path: _frozen(path, w) for path, w in path_leaves(params) if is_latent(w)}
    )


def _frozen(path: str, w: QTensor) -> QTensor:
    form, format = w.activations, latent_format(w)
    for name, a in w.data.items():
        if isinstance(jnp.isfinite(a), jax.core.Tracer):
            continue
        if not bool(jnp.all(jnp.isfinite(a))):
            raise ValueError(f"{path}: {name} holds values that are not finite (NaN or infinity)")
        if name == "scale" and not bool(jnp.all(a > 0)):
            raise ValueError(f"{path}: {int(jnp.sum(a <= 0))} scales are not above zero")
    axes = w.leading()
    data = batched(format.packed, axes)(w.data)
    ranges = w.activations_data
    if (inputs := format.inputs) is not None:
        ranges = batched(lambda d: inputs.served(d, form), axes)(ranges)
    arrays = w.arrays._replace(data=data, activations=ranges)
    return w.with_arrays(arrays, format=format.format)


def latent_format(w: QTensor) -> Latent:
    """The format of a latent weight; ValueError of any other."""
    if not isinstance(w.format, Latent):
        raise ValueError(f"expected a latent weight, got one in {w.format}")
    return w.format


def is_latent(w: PyTree) -> bool:
    """Whether this is a weight that trains."""
    return isinstance(w, QTensor) and isinstance(w.format, Latent)


def labels(params: PyTree, also: Sequence[str] = ("*",)) -> PyTree:
    """What every array of a tree is to training, a tree of names for `optax.multi_transform`.

    "weight" (latent), "scale" (learned scales and zero points of weights), "range" (learned, of
    inputs), "other" (floating leaves that are not quantized and match a glob of `also`) or "frozen"
    (the rest).

    >>> import jaxquant as jq
    >>> labels(jq.latent({"w": jnp.eye(64), "b": jnp.zeros(64)}, jq.lsq(bits=4)))["w"].data
    {'codes': 'weight', 'scale': 'scale'}
    """
    check_arguments(labels, locals())

    def of_weight(w: QTensor) -> QTensor:
        found: dict[str, PyTree] = {
            name: a if a is None else _label(w.format, name) for name, a in w.named.items()
        }
        return w.with_named(found)

    def one(path: str, w: PyTree) -> PyTree:
        if isinstance(w, QTensor):
            return of_weight(w)
        known = any(matches(path, glob) for glob in also)
        return OTHER if known and jnp.issubdtype(jnp.result_type(w), jnp.inexact) else FROZEN

    return replace_leaves(params, {path: one(path, w) for path, w in path_leaves(params)})


def _label(format: Format, name: str) -> str:
    if not isinstance(format, Latent):
        return FROZEN
    if name.startswith(ACTIVATIONS):
        return FROZEN if format.inputs is None else RANGE
    if "." in name:
        return FROZEN
    return WEIGHT if name == "codes" else SCALE


def trained(params: PyTree, *kinds: str, also: Sequence[str] = ("*",)) -> PyTree:
    """A tree of booleans for `equinox.partition`: what has one of the `labels` (default: any but
    "frozen"). Trees with packed weights in them are split so before `jax.grad`, which takes floats.

    >>> import equinox as eqx, jaxquant as jq
    >>> params = {"w": jnp.eye(64), "v": jnp.eye(64)}
    >>> p = jq.latent(params, jq.Recipe([("w", jq.lsq()), ("*", jq.KEEP)]))
    >>> train, rest = eqx.partition(p, jq.trained(p, "weight", "scale"))
    >>> train["v"] is None, rest["w"].data["codes"] is None
    (True, True)
    """
    check_arguments(trained, locals())
    wanted = kinds or tuple(name for name in LABELS if name != FROZEN)
    if unknown := set(wanted) - set(LABELS):
        raise ValueError(f"unknown labels {sorted(unknown)}; there are {', '.join(LABELS)}")
    return jax.tree.map(lambda label: label in wanted, labels(params, also))


UNITS = ("zero", "high", "low")  # numbers whose size says nothing: codes, logits


def unit(name: str, a: Array, data: Mapping[str, Array]) -> Array:
    """What a small change of an array is to be measured by: its size, but where that says nothing.

    A zero point, in codes, and the logits of a range are measured by 1, an offset by its scale.

    Args:
      name: of the array in `data`, a latent weight's; "" for a leaf of its own.

    >>> unit("zero", jnp.zeros(2), {}).tolist(), unit("", jnp.array([-3.0]), {}).tolist()
    ([1.0, 1.0], [3.0])
    """
    if name.removeprefix(ACTIVATIONS) in UNITS:
        return jnp.ones_like(a)
    if name == f"{ACTIVATIONS}offset":
        return jnp.abs(data[f"{ACTIVATIONS}scale"])
    return jnp.abs(a)
