"""Opening a quantized tree for training: what is continuous in it becomes factors near one.

Codes stay. Of a format train the float arrays that it names in `trained` (scales, codebooks); of
transforms the factors of channels, signs as real factors among them. A format that names none is
given a `Scaling` on every side that has no transform, 16 bits a channel. Of plain leaves train
those the user names. Each value is start * (1 + change), so that one learning rate suits them all.
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
    """A tree to run with the trained values put in, and these values at the start."""

    params: PyTree
    start: Values


def open_tree(params: PyTree, also: Sequence[str] = ()) -> Opened:
    """A quantized tree opened for training.

    Args:
      params: from `quantize`.
      also: globs of plain floating leaves to train with it ("*norm*").
    Raises:
      ValueError: nothing in it can be trained; a glob that matches none, or integers.
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
        raise ValueError("nothing to train: no leaf is quantized, and `also` names none")
    return Opened(replace_leaves(params, leaves), start)


def check_globs(params: PyTree, also: Sequence[str]) -> None:
    """Raise ValueError unless every glob matches a leaf, and no leaf but floating ones."""
    for glob in also:
        found = [w for path, w in path_leaves(params) if matches(path, glob)]
        plain = [w for w in found if not isinstance(w, QTensor)]
        if not found or not all(jnp.issubdtype(jnp.result_type(w), jnp.floating) for w in plain):
            raise ValueError(f"also: expected floating leaves, and {glob!r} matches other or none")


def _opened(w: QTensor) -> tuple[QTensor, dict[str, Array]]:
    """The weight with its codes decoded if nothing in the format is trained; its trained arrays."""
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
    """`params` with codes decoded where all that trains are factors about them.

    What is many programs to decode (a stream for every matrix) is so decoded once, on the host if
    JAX has been given it as a platform; and weights packed in unlike formats may be stacked for
    training if their transforms are alike. `heal` changes such a tree as it would `params`;
    `rejoined` takes what it found back.

    >>> import jaxquant as jq
    >>> coded = jq.Method("coded", jq.rtn().rounder, jq.EntropyCoded(4, states=1, lanes=4))
    >>> q = {"w": jq.quantize_array(jnp.ones((64, 32)), coded)}
    >>> decoded(q)["w"].format, rejoined(q, decoded(q))["w"].format == q["w"].format
    (Dense(), True)
    """
    new = {}
    for path, w in path_leaves(params):
        if not isinstance(w, QTensor):
            continue
        new[path] = dataclasses.replace(w, shared="", method="")  # names tell like from like
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
    """`params` with what healing has made of decoded(params): their codes, its factors.

    Raises:
      ValueError: the trees' leaves are not those of one another.
    """
    found = dict(path_leaves(healed))

    def one(path: str, w: PyTree) -> PyTree:
        new = found.get(path)
        if new is None or isinstance(w, QTensor) != isinstance(new, QTensor):
            raise ValueError(f"{path}: expected the leaf that decoded() made, healed; got {new!r}")
        if not isinstance(w, QTensor):
            return new
        data = w.data if new.format == Dense() else new.data
        arrays = new.arrays._replace(data=data)
        return w.with_arrays(arrays, input=new.input, output=new.output, shared="")

    return replace_leaves(params, {path: one(path, w) for path, w in path_leaves(params)})


def _scaled(w: QTensor) -> QTensor:
    """With factors of one on the sides that have no transform."""
    batch, new = w.stored_shape()[: w.leading()], {}
    for side, sizes in (("input", w.view.k), ("output", w.view.n)):
        if getattr(w, side) is None:
            new[side] = jnp.ones((*batch, math.prod(sizes)), jnp.float16)
    arrays = w.arrays._replace(**{side: {"factors": ones} for side, ones in new.items()})
    made: dict[str, Transform] = dict.fromkeys(new, Scaling())
    return w.with_arrays(arrays, **made)


def as_dense(w: QTensor, values: Array) -> QTensor:
    """The weight with these floats [*batch, k, n] in place of codes; its transforms stay."""
    return dataclasses.replace(w, format=Dense(), data={"codes": values}, shared="")


def at_start(opened: Opened) -> Values:
    """Factors of zero: the tree as it was."""
    return jax.tree.map(jnp.zeros_like, opened.start)


def trained(opened: Opened, change: Values) -> PyTree:
    """The tree with start * (1 + change) in place; differentiable in `change`."""
    values = jax.tree.map(lambda a, d: a * (1 + d), opened.start, change)
    leaves = dict(path_leaves(opened.params))
    return replace_leaves(opened.params, {p: _with(leaves[p], v) for p, v in values.items()})


def _with(leaf: PyTree, values: dict[str, Array]) -> PyTree:
    if not isinstance(leaf, QTensor):
        return values[""].astype(leaf.dtype)
    return leaf.with_named(leaf.named | values)


def close_tree(params: PyTree, opened: Opened, change: Values) -> PyTree:
    """The quantized tree with the trained values stored: factors in float16."""
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
