"""Opening a quantized tree for training: continuous values are re-parameterized around their start.

Codes stay fixed. Of a format, the float arrays that it lists in `trained` (scales, codebooks) are
trained; of a transform, the channel factors and the signs, as real factors. A format that lists
none gets a `Scaling` on each side that has no transform, at 16 bits per channel. Plain leaves are
trained if the user names them. Each value is start * (1 + change), so that one learning rate suits
all of them.
"""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxquant.core.paths import matches, path_leaves, replace_leaves
from jaxquant.core.protocols import Transform
from jaxquant.core.tensor import QTensor
from jaxquant.formats.dense import Dense
from jaxquant.transforms import Scaling
from jaxquant.transforms.rotation import factors

Values = dict[str, dict[str, Array]]  # path -> name of an array ("" for a plain leaf) -> array


class Opened(NamedTuple):
    """A tree in which trained values can be substituted, and the initial values.

    Attributes:
      params: the tree.
      start: the values that are trained, at the start.
    """

    params: PyTree
    start: Values


def open_tree(params: PyTree, also: Sequence[str] = ()) -> Opened:
    """Open a quantized tree for training.

    Args:
      params: tree from `quantize`.
      also: globs of plain floating-point leaves to train as well ("*norm*").
    Returns:
      The opened tree.
    Raises:
      ValueError: nothing in the tree can be trained, or a glob matches nothing or a leaf that is
        not floating-point.
    """
    start: Values = {}
    check_globs(params, also)
    leaves = {}
    for path, leaf in path_leaves(params):
        if isinstance(leaf, QTensor):
            leaves[path], start[path] = _opened(leaf)
        elif any(matches(path, glob) for glob in also):
            start[path] = {"": leaf.astype(jnp.float32)}
    start = {path: values for path, values in start.items() if values}
    if not start:
        raise ValueError("nothing to train: no leaf is quantized, and `also` matches none")
    return Opened(replace_leaves(params, leaves), start)


def check_globs(params: PyTree, also: Sequence[str]) -> None:
    """Check that every glob names floating-point leaves.

    Args:
      params: tree of arrays and quantized weights.
      also: globs of paths. Quantized weights that match are ignored.
    Raises:
      ValueError: a glob matches no leaf, or a plain leaf that is not floating-point.
    """
    for glob in also:
        found = [w for path, w in path_leaves(params) if matches(path, glob)]
        plain = [w for w in found if not isinstance(w, QTensor)]
        if not found or not all(jnp.issubdtype(jnp.result_type(w), jnp.floating) for w in plain):
            raise ValueError(
                f"also: {glob!r} must match floating leaves, but it matches other leaves or none"
            )


def _opened(w: QTensor) -> tuple[QTensor, dict[str, Array]]:
    """Return the weight, decoded if its format trains nothing, and its trained arrays."""
    start = {name: w.data[name].astype(jnp.float32) for name in w.format.trained}
    if not start:
        w = as_dense(_scaled(w), w.stored())
    for side, sizes in (("input", w.view.k), ("output", w.view.n)):
        held = getattr(w.arrays, side)
        if "signs" in held:
            signs = factors(held["signs"], math.prod(sizes))
            start[f"{side}.signs"] = signs.astype(jnp.float32)
        if "factors" in held:
            start[f"{side}.factors"] = held["factors"].astype(jnp.float32)
    return dataclasses.replace(w, shared=""), start


def decoded(params: PyTree) -> PyTree:
    """Decode the codes of every weight whose format has nothing to train.

    Codes that take many programs to decode (one stream per matrix) are then decoded once, on the
    host if JAX has the CPU platform. Weights packed in different formats may also be stacked for
    training if their transforms are alike. `heal` trains such a tree as it would `params`, and
    `rejoined` carries the result back.

    Args:
      params: quantized tree.
    Returns:
      The tree with these weights in the format `Dense`.

    >>> import jaxquant as jq
    >>> coded = jq.Method("coded", jq.rtn().rounder, jq.formats.EntropyCoded(4, states=1, lanes=4))
    >>> q = {"w": jq.quantize_array(jnp.ones((64, 32)), coded)}
    >>> decoded(q)["w"].format, rejoined(q, decoded(q))["w"].format == q["w"].format
    (Dense(), True)
    """
    new = {}
    for path, w in path_leaves(params):
        if not isinstance(w, QTensor):
            continue
        # Layers that differ in `shared` or `method` alone could not be stacked.
        new[path] = w.unnamed()
        if not w.format.trained:
            with _host():
                stored = np.asarray(jax.tree.map(np.asarray, w).stored())
            new[path] = as_dense(new[path], jnp.asarray(stored))
    return replace_leaves(params, new)


def _host() -> PyTree:
    try:
        return jax.default_device(jax.devices("cpu")[0])
    except RuntimeError:
        return contextlib.nullcontext()


def rejoined(params: PyTree, healed: PyTree) -> PyTree:
    """Combine the codes of `params` with the values that healing found for decoded(params).

    Args:
      params: quantized tree.
      healed: decoded(params) after `heal`.
    Returns:
      The healed tree, with packed codes.
    Raises:
      ValueError: the leaves of the two trees do not correspond.
    """
    found = dict(path_leaves(healed))

    def one(path: str, w: PyTree) -> PyTree:
        new = found.get(path)
        if new is None or isinstance(w, QTensor) != isinstance(new, QTensor):
            raise ValueError(
                f"{path}: expected the trained leaf of the tree that decoded() returned, "
                f"got {new!r}"
            )
        if not isinstance(w, QTensor):
            return new
        data = w.data if new.format == Dense() else new.data
        arrays = new.arrays._replace(data=data)
        return w.with_arrays(arrays, input=new.input, output=new.output, shared="")

    return replace_leaves(params, {path: one(path, w) for path, w in path_leaves(params)})


def _scaled(w: QTensor) -> QTensor:
    """Return the weight with factors of one on the sides that have no transform."""
    batch, new = w.stored_shape()[: w.leading()], {}
    for side, sizes in (("input", w.view.k), ("output", w.view.n)):
        if getattr(w, side) is None:
            new[side] = jnp.ones((*batch, math.prod(sizes)), jnp.float16)
    arrays = w.arrays._replace(**{side: {"factors": ones} for side, ones in new.items()})
    made: dict[str, Transform] = dict.fromkeys(new, Scaling())
    return w.with_arrays(arrays, **made)


def as_dense(w: QTensor, values: Array) -> QTensor:
    """Return the weight with floats in place of codes; its transforms stay.

    Args:
      w: quantized weight.
      values: floats [*batch, k, n], as the format stores the matrix.
    Returns:
      The weight in the format `Dense`.
    """
    return dataclasses.replace(w, format=Dense(), data={"codes": values}, shared="")


def at_start(opened: Opened) -> Values:
    """Return changes of zero, which leave the tree as it was.

    Args:
      opened: the opened tree.
    Returns:
      Zeros, in the structure of the trained values.
    """
    return jax.tree.map(jnp.zeros_like, opened.start)


def trained(opened: Opened, change: Values) -> PyTree:
    """Return the tree with start * (1 + change) in place of the trained values.

    Args:
      opened: the opened tree.
      change: relative changes.
    Returns:
      The tree, differentiable in `change`.
    """
    values = jax.tree.map(lambda a, d: a * (1 + d), opened.start, change)
    leaves = dict(path_leaves(opened.params))
    return replace_leaves(opened.params, {p: _with(leaves[p], v) for p, v in values.items()})


def _with(leaf: PyTree, values: dict[str, Array]) -> PyTree:
    if not isinstance(leaf, QTensor):
        return values[""].astype(leaf.dtype)
    return leaf.with_named(leaf.named | values)


def close_tree(params: PyTree, opened: Opened, change: Values) -> PyTree:
    """Return the quantized tree with the trained values stored, factors in float16.

    Args:
      params: the quantized tree.
      opened: the tree opened for training.
      change: the changes found.
    Returns:
      The trained tree.
    """
    values = jax.tree.map(lambda a, d: a * (1 + d), opened.start, change)
    leaves, scaled = dict(path_leaves(params)), dict(path_leaves(opened.params))
    new = {}
    for path, named in values.items():
        leaf, with_sides = leaves[path], scaled[path]
        if not isinstance(leaf, QTensor):
            new[path] = named[""].astype(leaf.dtype)
            continue
        stored = {
            n: a.astype(leaf.data[n].dtype if n in leaf.data else jnp.float16)
            for n, a in named.items()
        }
        sides = {"input": with_sides.input, "output": with_sides.output}
        new[path] = leaf.with_named(leaf.named | stored, **sides, shared="")
    return replace_leaves(params, new)
