"""Making weights latent for training, and packing them again: `latent`, `thaw`, `freeze`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxquant.adapters.adapted import LABELS as ADAPTER
from jaxquant.adapters.adapted import Adapted, is_adapted
from jaxquant.calibration.statistics import Stats
from jaxquant.core.arguments import check_arguments
from jaxquant.core.paths import matches, path_leaves, replace_leaves
from jaxquant.core.protocols import Estimator, Format, LevelFormat, RangeEstimator
from jaxquant.core.sites import Site
from jaxquant.core.tensor import Arrays, QTensor
from jaxquant.estimators.bins import in_bin
from jaxquant.estimators.latent_format import Latent, batched
from jaxquant.estimators.weight_estimators import StraightThrough, spread
from jaxquant.methods.method import Method
from jaxquant.ptq.quantize import quantize
from jaxquant.recipes.recipe import Recipe
from pallas_kernels.context import compiled

ACTIVATIONS = "activations."
# The labels of arrays, see `labels`.
WEIGHT, SCALE, RANGE, OTHER, FROZEN = ("weight", "scale", "range", "other", "frozen")
LABELS = (WEIGHT, SCALE, RANGE, *ADAPTER, OTHER, FROZEN)


def latent(
    params: PyTree,
    recipe: Recipe | Method,
    stats: Stats | Mapping[str, Site] | None = None,
    **options: PyTree,
) -> PyTree:
    """Return `params` with every weight that the recipe covers replaced by a latent weight.

    A latent weight holds trainable floats (its array "codes"), which are rounded in every forward
    pass. `latent` is equivalent to `quantize` followed by `thaw` with `floats=params`.

    `jax.grad` of `jq.quantized(loss)` then gives gradients for the weights and for the scales that
    the method learns. Training starts from the codes that the method's rounder chooses, whether by
    rounding to nearest or by GPTQ.

    Args:
      params: tree of floating-point arrays.
      recipe: recipe or method. Methods made for training (`ste`, `lsq`, `bitnet`, ...) have their
        own estimator; the weights of all others are trained with the straight-through estimator.
      stats: as in `quantize`.
      **options: the other keyword arguments of `quantize`.
    Returns:
      The tree, with latent weights.
    Raises:
      ValueError: as in `quantize`, or the estimator cannot train a format.

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
    """Make quantized weights latent, starting from their codes.

    Args:
      params: tree from `quantize` or a checkpoint.
      recipe: a recipe or method. The method it assigns to a weight's path decides which estimator
        the weight is trained with; the formats remain those of `params`. Weights to which it
        assigns no method stay frozen.
      floats: the floating-point tree from which `params` was made. Each weight starts at its values
        in this tree. In formats with levels (`LevelFormat`), values that would round to other codes
        than the stored ones, on the stored grid, are moved just far enough to round to those.
        Default: each weight starts at the values of its codes.
    Returns:
      The tree, with latent weights.
    Raises:
      ValueError: the recipe assigns no method to any of the quantized weights, a pattern matches
        nothing, a weight is already latent or has a different shape in `floats`, or the estimator
        cannot train a format.
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
        raise ValueError("nothing to train: the recipe gives a method to no quantized weight")
    return replace_leaves(params, new)


def _thawed(w: QTensor, method: Method, leaf: Array | None) -> QTensor:
    if isinstance(w.format, Latent):
        raise ValueError("the weight is already latent")
    if is_adapted(w):
        raise ValueError("the weight has an adapter: merge it first, with jaxquant.merge")
    if w.format.exact:
        raise ValueError(
            "the format keeps the bits of weights, so they cannot be trained in it; leave the "
            "weight in floating point"
        )
    estimator = method.estimator or StraightThrough()
    estimator.check(w.format)
    inputs = method.input_estimator
    if inputs is not None:
        inputs.check(w.activations)
    data, ranges = _started(estimator, inputs, w.unnamed(), leaf)
    form = Latent(w.format, estimator, inputs)
    return dataclasses.replace(w, data=data, format=form, shared="", activations_data=ranges)


@partial(compiled, static_argnums=(0, 1))
def _started(
    estimator: Estimator, inputs: RangeEstimator | None, w: QTensor, leaf: Array | None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the arrays of a latent weight and of its activations."""
    axes, values, ranges = w.leading(), w.stored(), w.activations_data
    if leaf is not None:
        near = partial(_near, w.format)
        values = batched(near, axes)(as_stored(w, leaf), values, w.data)
    start = batched(lambda v, data: estimator.start(v, w.format, data), axes)
    if inputs is not None:
        ranges = batched(lambda d: inputs.start(d, w.activations), axes)(ranges)
    return {"codes": values} | start(values, w.data), ranges


def as_stored(w: QTensor, leaf: Array) -> Float[Array, "... s t"]:
    """Return the floats of a weight as the format stores the matrix, after its transforms.

    Args:
      w: the quantized weight.
      leaf: the floats that it stands for.
    Raises:
      ValueError: the shapes differ.
    """
    if leaf.shape != w.shape:
        raise ValueError(
            f"the weight has shape {list(w.shape)}, but floats holds {list(leaf.shape)} for it"
        )
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
    """Return floats near w that round to the stored codes, in formats with levels; else w."""
    if not isinstance(format, LevelFormat):
        return w
    rows = spread(format.stored_grid(data), format, w.shape)
    return in_bin(w, value, rows.scale, lambda a: format.round(a, rows)[1])


def freeze(params: PyTree) -> PyTree:
    """Pack latent weights; the packed weights give the same results.

    Args:
      params: tree with latent weights.
    Returns:
      The tree, with quantized weights.
    Raises:
      ValueError: a latent weight or scale is not finite, a scale is not positive, or a latent
        weight has an adapter.

    >>> import jaxquant as jq
    >>> frozen = jq.freeze(jq.latent({"w": jnp.eye(64)}, jq.lsq(bits=4)))
    >>> frozen["w"].format
    Integer(bits=4, group_size=64, symmetric=True, mse=False, scale_dtype='float16', ...)
    """
    for path, w in path_leaves(params):
        if is_adapted(w) and w.format.format.latent:
            raise ValueError(
                f"{path}: the latent weight has an adapter: merge it first, with jaxquant.merge"
            )
    return replace_leaves(
        params, {path: _frozen(path, w) for path, w in path_leaves(params) if is_latent(w)}
    )


def _frozen(path: str, w: QTensor) -> QTensor:
    for name, a in w.data.items():
        finite, positive = _sound(a)
        if isinstance(finite, jax.core.Tracer):
            continue
        if not bool(finite):
            raise ValueError(f"{path}: {name} holds values that are not finite (NaN or infinity)")
        if name == "scale" and not bool(positive):
            raise ValueError(f"{path}: {int(jnp.sum(a <= 0))} scales are not positive")
    return dataclasses.replace(_packed(w.unnamed()), shared=w.shared, method=w.method)


@jax.jit
def _sound(a: Array) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Return whether all entries are finite, and whether all are positive."""
    return jnp.all(jnp.isfinite(a)), jnp.all(a > 0)


@compiled
def _packed(w: QTensor) -> QTensor:
    axes, format, ranges = w.leading(), latent_format(w), w.activations_data
    data = batched(format.packed, axes)(w.data)
    if (inputs := format.inputs) is not None:
        ranges = batched(lambda d: inputs.served(d, w.activations), axes)(ranges)
    arrays = w.arrays._replace(data=data, activations=ranges)
    return w.with_arrays(arrays, format=format.format)


def latent_format(w: QTensor) -> Latent:
    """Return the format of a latent weight.

    Args:
      w: a latent weight.
    Returns:
      Its format.
    Raises:
      ValueError: the weight is not latent.
    """
    if not isinstance(w.format, Latent):
        raise ValueError(f"expected a latent weight, got one in {w.format}")
    return w.format


def is_latent(w: PyTree) -> bool:
    """Return whether a leaf is a latent weight.

    Args:
      w: leaf of a tree.
    Returns:
      True for latent weights.
    """
    return isinstance(w, QTensor) and isinstance(w.format, Latent)


def labels(params: PyTree, also: Sequence[str] | None = None) -> PyTree:
    """Label every array of a tree for training; the names suit `optax.multi_transform`.

    The labels are "weight" (latent weights), "scale" (learned scales, offsets and zero points of
    weights), "range" (learned ranges of inputs), "lora_a", "lora_b", "magnitude" and "ternary"
    (arrays of adapters), "other" (floating-point leaves that are not quantized and match `also`)
    and "frozen" (everything else).

    Args:
      params: tree with latent or adapted weights.
      also: globs of plain leaves to label "other". Default: all, or none if the tree holds
        adapters, which are put on models whose other weights stay fixed.
    Returns:
      A tree like `params` with a label in place of every array.

    >>> import jaxquant as jq
    >>> labels(jq.latent({"w": jnp.eye(64), "b": jnp.zeros(64)}, jq.lsq(bits=4)))["w"].data
    {'codes': 'weight', 'scale': 'scale'}
    """
    check_arguments(labels, locals())
    if also is None:
        also = () if any(is_adapted(w) for _, w in path_leaves(params)) else ("*",)

    def of_weight(w: QTensor) -> QTensor:
        found: dict[str, PyTree] = {
            name: a if a is None else _label(w.format, name) for name, a in w.named.items()
        }
        return w.with_named(found)

    def one(path: str, w: PyTree) -> PyTree:
        if isinstance(w, QTensor):
            return of_weight(w)
        known = any(matches(path, glob) for glob in also or ())
        return OTHER if known and jnp.issubdtype(jnp.result_type(w), jnp.inexact) else FROZEN

    return replace_leaves(params, {path: one(path, w) for path, w in path_leaves(params)})


def _label(format: Format, name: str) -> str:
    if isinstance(format, Adapted):
        return format.adapter.labels(format.format).get(name) or _label(format.format, name)
    if not isinstance(format, Latent):
        return FROZEN
    if name.startswith(ACTIVATIONS):
        return FROZEN if format.inputs is None else RANGE
    if "." in name:
        return FROZEN
    return WEIGHT if name == "codes" else SCALE


def trained(params: PyTree, *kinds: str, also: Sequence[str] | None = None) -> PyTree:
    """Return a tree of booleans for `equinox.partition`: whether an array has one of `kinds`.

    Trees with packed weights must be partitioned before `jax.grad`, which only accepts floats.

    Args:
      params: tree with latent or adapted weights.
      kinds: labels, see `labels`. Default: all but "frozen".
      also: as in `labels`.
    Returns:
      A tree like `params`.
    Raises:
      ValueError: a label is unknown.

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


UNITS = ("zero", "high", "low")  # codes and logits, whose unit is 1


def unit(name: str, a: Array, data: Mapping[str, Array]) -> Array:
    """Return the unit in which to measure small changes of an array: usually its magnitude.

    Where the magnitude says nothing, the unit is another one: 1 for a zero point, which is in
    codes, and for the logits of a range; the scale for an offset.

    Args:
      name: name of the array in `data`; "" for a plain leaf.
      a: the array.
      data: the arrays of the latent weight.
    Returns:
      The unit, of the shape of `a` or broadcast to it.

    >>> unit("zero", jnp.zeros(2), {}).tolist(), unit("", jnp.array([-3.0]), {}).tolist()
    ([1.0, 1.0], [3.0])
    """
    if name.removeprefix(ACTIVATIONS) in UNITS:
        return jnp.ones_like(a)
    if name.removeprefix(ACTIVATIONS) == "offset":
        return jnp.abs(data[name.removesuffix("offset") + "scale"])
    return jnp.abs(a)
