"""Parameter trees by path: leaves are named by "/"-joined keys, and a stand-in is one leaf."""

import fnmatch
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey
from jaxtyping import PyTree

from jaxquant.core.standin import is_standin


def path_leaves(params: PyTree) -> list[tuple[str, Any]]:
    """List the leaves of a tree with their paths, in tree order.

    Keys, attribute names and indices are joined by "/". The box of a Flax NNX `Variable` or a linen
    `Partitioned` ("value") is not part of the path.

    Args:
      params: parameter tree.

    Returns:
      [(path, leaf), ...].

    Raises:
      ValueError: two leaves have the same path.

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
    """Return the path of one leaf, from its JAX key path."""
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
    """Replace leaves of a tree.

    Args:
      params: parameter tree.
      new: new leaves by path; all others are kept.
    """

    def swap(keys: tuple[Any, ...], leaf: PyTree) -> Any:
        return new.get(path_name(keys), leaf)

    return jax.tree_util.tree_map_with_path(swap, params, is_leaf=is_standin)


def stack_size(params: PyTree) -> int:
    """Return the number of blocks in a tree whose leaves have a leading axis over blocks.

    Args:
      params: the stacked tree.

    Raises:
      ValueError: leaves differ in the size of that axis, or have no axes.

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
    """Return the number of blocks in a stacked tree and in that of its teacher.

    Args:
      params: the stacked tree.
      teacher: the teacher's stacked tree.

    Raises:
      ValueError: the numbers differ, or `stack_size` fails.
    """
    blocks, given = stack_size(teacher), stack_size(params)
    if given != blocks:
        raise ValueError(f"expected as many blocks as the teacher has, {blocks}, got {given}")
    return blocks


def matches(path: str, pattern: str) -> bool:
    """Return whether a path equals a pattern or matches it as a glob ("[" may occur in paths)."""
    return path == pattern or fnmatch.fnmatchcase(path, pattern)
