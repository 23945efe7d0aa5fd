"""Several adapters on one base, chosen for every row of a batch: `together`, `selected`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxquant.adapters.adapted import is_adapted
from jaxquant.adapters.lora import IDS, LoRA, base_of
from jaxquant.adapters.lora import A as LORA_A
from jaxquant.core.arguments import check_arguments
from jaxquant.core.paths import path_leaves, replace_leaves
from jaxquant.core.tensor import QTensor


def together(trees: Sequence[PyTree]) -> PyTree:
    """Combine trees that differ only in the values of their LoRA adapters into one.

    The base is held once. `selected` then says which row of a batch uses which adapter.

    Args:
      trees: two or more trees of one base, with `LoRA` adapters of equal settings, without `dora`,
        on the same weights. An `init` of "pissa" or "loftq" may change the base, and such trees can
        then not be combined.
    Returns:
      One tree, whose adapters have an axis over the trees; `selected` must be applied to it.
    Raises:
      ValueError: there are fewer than two trees, they differ in more than the values of their
        adapters, an adapter is not a `LoRA` without `dora`, a tree holds several adapters already,
        or none has adapters.
    """
    check_arguments(together, locals())
    if len(trees) < 2:
        raise ValueError(f"expected at least two trees, got {len(trees)}")
    first, *others = [dict(path_leaves(tree)) for tree in trees]
    new = {}
    for i, other in enumerate(others, 1):
        _check_alike(first, other, i)
    for path, w in first.items():
        if is_adapted(w):
            new[path] = _combined([w, *(other[path] for other in others)])
    if not new:
        raise ValueError("nothing to combine: no weight of the trees has an adapter")
    return replace_leaves(trees[0], new)


def _check_alike(first: Mapping[str, Any], other: Mapping[str, Any], i: int) -> None:
    """Raise ValueError unless a tree differs from the first in values of adapters alone."""
    if odd := sorted(first.keys() ^ other.keys()):
        raise ValueError(f"{odd[0]}: only one of trees 0 and {i} has this leaf")
    for path, w in first.items():
        another = other[path]
        if not (is_adapted(w) or is_adapted(another)):
            _check_equal(path, w, another, i)
            continue
        same = is_adapted(w) and is_adapted(another) and w.format == another.format
        if not same or w.shape != another.shape:
            raise ValueError(f"{path}: trees 0 and {i} differ here in format, shape or adapter")
        if not isinstance(w.format.adapter, LoRA) or w.format.adapter.dora:
            raise ValueError(f"{path}: only adapters that are LoRA without dora can be combined")
        if w.data[LORA_A].ndim - w.leading() != 2:
            raise ValueError(f"{path}: tree 0 holds several adapters already")
        _check_equal(path, _base(w), _base(another), i)


def _base(w: QTensor) -> QTensor:
    return dataclasses.replace(w, data=base_of(w.data))


def _check_equal(path: str, a: PyTree, b: PyTree, i: int) -> None:
    arrays, others = jax.tree.leaves(a), jax.tree.leaves(b)
    equal = len(arrays) == len(others) and all(map(_equal, arrays, others))
    if not equal:
        raise ValueError(
            f"{path}: tree {i} holds other values than tree 0, so they cannot share them; adapters "
            "only fit the model that they were trained on"
        )


def _equal(a: Array, b: Array) -> bool:
    if a is b:
        return True
    return jnp.shape(a) == jnp.shape(b) and np.array_equal(np.asarray(a), np.asarray(b))


def _combined(several: list[QTensor]) -> QTensor:
    w, base = several[0], base_of(several[0].data)
    own = [name for name in w.data if name not in base]
    stack = lambda name: jnp.stack([one.data[name] for one in several], axis=w.leading())
    return dataclasses.replace(w, data={**base, **{name: stack(name) for name in own}})


def selected(params: PyTree, ids: Sequence[int] | Array) -> PyTree:
    """Say which adapter each sequence of a batch uses, in a tree made by `together`.

    Args:
      params: the tree.
      ids: index of the adapter for every entry of the batch, int [batch], from 0. It may be traced;
        the outputs of an entry whose traced index is out of range are NaN. The batch must be the
        first axis of the function's inputs; do not map the function over it with `jax.vmap`.
    Returns:
      The tree, for functions of batches of this size.
    Raises:
      ValueError: `ids` is not a vector of integers in range, or `together` did not make the tree.

    >>> import jaxquant as jq
    >>> q = jq.quantize({"w": jnp.eye(64)}, jq.nf4())
    >>> one, two = (jq.adapt(q, jq.adapters.LoRA(2), key=jax.random.key(i)) for i in (0, 1))
    >>> both = selected(together([one, two]), [1, 0, 1])
    >>> jq.quantized(lambda p, x: x @ p["w"])(both, jnp.ones((3, 5, 64))).shape
    (3, 5, 64)
    """
    check_arguments(selected, locals())
    ids = jnp.asarray(ids)
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer) or not ids.size:
        raise ValueError(f"ids must be a vector of integers, got {ids.dtype}{list(ids.shape)}")
    new = {}
    for path, w in path_leaves(params):
        if is_adapted(w):
            new[path] = _selected(path, w, ids)
    if not new:
        raise ValueError("nothing to select from: no weight of the tree has an adapter")
    return replace_leaves(params, new)


def _selected(path: str, w: QTensor, ids: Array) -> QTensor:
    lead = w.data["codes"].shape[: w.leading()]
    a = w.data.get(LORA_A)
    if a is None or a.ndim - len(lead) != 3:
        raise ValueError(
            f"{path}: the weight has one adapter, so there is nothing to select: combine trees "
            "with jaxquant.training.together"
        )
    count = a.shape[len(lead)]
    if not isinstance(ids, jax.core.Tracer):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= count:
            raise ValueError(
                f"ids must be from 0 to {count - 1}, since there are {count} adapters, got "
                f"{low if low < 0 else high}"
            )
    at = jnp.broadcast_to(ids.astype(jnp.int32), (*lead, *ids.shape))
    return dataclasses.replace(w, data={**w.data, IDS: at})
