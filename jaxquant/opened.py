"""Opening a quantized tree for training: what is continuous in it becomes factors near one.

Codes stay. Of a rotated weight train the signs, as real factors on both sides; of other formats
the float arrays that they name in `trained` (scales, codebooks); of plain leaves those the user
names. Each value is start * (1 + factor), so that one learning rate suits them all.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxquant.codebooks.dense import Dense
from jaxquant.paths import matches, path_leaves, replace_leaves
from jaxquant.tensor import QTensor
from jaxquant.transforms.rotation import factors

Values = dict[str, dict[str, Array]]  # path -> name of an array ("" for a plain leaf) -> array


class Opened(NamedTuple):
    """A tree to run with the trained values put in, and these values at the start."""

    params: Any
    start: Values


def open_tree(params: Any, also: Sequence[str] = ()) -> Opened:
    """A quantized tree opened for training.

    Args:
      params: from `quantize`.
      also: globs of plain floating leaves to train with it ("*norm*").
    Raises:
      ValueError: nothing in it can be trained.
    """
    start: Values = {}
    leaves = {}
    for path, leaf in path_leaves(params):
        if isinstance(leaf, QTensor):
            leaves[path], start[path] = _opened(leaf)
        elif any(matches(path, glob) for glob in also):
            start[path] = {"": leaf.astype(jnp.float32)}
    start = {path: values for path, values in start.items() if values}
    if not start:
        raise ValueError("nothing to train: no quantized leaf has scales, signs or codebooks")
    return Opened(replace_leaves(params, leaves), start)


def _opened(w: QTensor) -> tuple[QTensor, dict[str, Array]]:
    """The weight with its codes decoded if nothing in the format is trained; its trained arrays."""
    start = {name: w.data[name].astype(jnp.float32) for name in getattr(w.format, "trained", ())}
    if not start:
        w = _dense(w)
    for side, sizes in (("input", w.view.k), ("output", w.view.n)):
        if f"{side}.signs" in w.data:
            signs = factors(w.data[f"{side}.signs"], math.prod(sizes))
            start[f"{side}.signs"] = signs.astype(jnp.float32)
    return dataclasses.replace(w, shared=""), start


def _dense(w: QTensor) -> QTensor:
    transforms = {name: a for name, a in w.data.items() if "." in name}
    return dataclasses.replace(w, format=Dense(), data={"codes": w.stored(), **transforms})


def at_start(opened: Opened) -> Values:
    """Factors of zero: the tree as it was."""
    return jax.tree.map(jnp.zeros_like, opened.start)


def trained(opened: Opened, change: Values) -> Any:
    """The tree with start * (1 + change) in place; differentiable in `change`."""
    values = jax.tree.map(lambda a, d: a * (1 + d), opened.start, change)
    leaves = dict(path_leaves(opened.params))
    return replace_leaves(opened.params, {p: _with(leaves[p], v) for p, v in values.items()})


def _with(leaf: Any, values: dict[str, Array]) -> Any:
    if not isinstance(leaf, QTensor):
        return values[""].astype(leaf.dtype)
    return dataclasses.replace(leaf, data={**leaf.data, **values})


def close_tree(params: Any, opened: Opened, change: Values) -> Any:
    """The quantized tree with the trained values stored: signs in float16, others as they were."""
    values = jax.tree.map(lambda a, d: a * (1 + d), opened.start, change)
    leaves = dict(path_leaves(params))
    new = {}
    for path, named in values.items():
        leaf = leaves[path]
        if not isinstance(leaf, QTensor):
            new[path] = named[""].astype(leaf.dtype)
            continue
        data = dict(leaf.data)
        for name, value in named.items():
            packed = data[name].dtype == jnp.uint8
            data[name] = value.astype(jnp.float16 if packed else data[name].dtype)
        new[path] = dataclasses.replace(leaf, data=data, shared="")
    return replace_leaves(params, new)
