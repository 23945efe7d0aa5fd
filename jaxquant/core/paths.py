"""Leaves of a parameter tree by their "/"-joined path, a stand-in counting as one leaf."""

import fnmatch
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey
from jaxtyping import PyTree

from jaxquant.core.standin import is_standin


def path_leaves(params: PyTree) -> list[tuple[str, Any]]:
    """[(path, leaf)] in tree order.

    Keys, attribute names and indices are joined by "/". The box of a Flax NNX `Variable` or a
    linen `Partitioned` ("value") is not part of the path.

    >>> path_leaves({"a": {"kernel": 1.0}, "b": [2.0]})
    [('a/kernel', 1.0), ('b/0', 2.0)]
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_standin)
    named = [(path_name(keys), leaf) for keys, leaf in leaves]
    seen: set[str] = set()
    for path, _leaf in named:
        if path in seen:
            raise ValueError(f"two leaves of the tree have the same path {path!r}")
        seen.add(path)
    return named


def path_name(keys: tuple[Any, ...]) -> str:
    """The path of one leaf."""
    parts = [_part(k) for k in keys]
    if len(parts) > 1 and parts[-1] == "value" and not isinstance(keys[-1], DictKey):
        parts = parts[:-1]
    return "/".join(parts)


def _part(key: Any) -> str:
    match key:
        case DictKey(key=k) | FlattenedIndexKey(key=k):
            return str(k)
        case GetAttrKey(name=name):
            return name
        case SequenceKey(idx=i):
            return str(i)
    return str(key)


def replace_leaves(params: PyTree, new: Mapping[str, Any]) -> PyTree:
    """The same tree with the leaves at the given paths replaced."""

    def swap(keys: tuple[Any, ...], leaf: PyTree) -> Any:
        return new.get(path_name(keys), leaf)

    return jax.tree_util.tree_map_with_path(swap, params, is_leaf=is_standin)


def stack_size(params: PyTree) -> int:
    """Blocks of a tree whose leaves carry a leading axis over blocks.

    Raises:
      ValueError: leaves that disagree, or have no axes.

    >>> import jax.numpy as jnp
    >>> stack_size({"w": jnp.ones((3, 4)), "b": jnp.ones(3)})
    3
    """
    shapes = [jnp.shape(a) for a in jax.tree.leaves(params)]
    counts = {shape[:1] for shape in shapes}
    if len(counts) != 1 or () in counts:
        raise ValueError(
            f"leaves must share a leading axis over blocks, got shapes that begin with {counts}"
        )
    return shapes[0][0]


def common_stack_size(params: PyTree, teacher: PyTree) -> int:
    """Blocks of a tree and of its teacher.

    Raises:
      ValueError: they have different numbers; as `stack_size`.
    """
    blocks, given = stack_size(teacher), stack_size(params)
    if given != blocks:
        raise ValueError(f"expected as many blocks as the teacher has, {blocks}, got {given}")
    return blocks


def matches(path: str, pattern: str) -> bool:
    """A path names itself, whatever "[" or "*" is in it."""
    return path == pattern or fnmatch.fnmatchcase(path, pattern)
