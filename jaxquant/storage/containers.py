"""Containers of a saved tree: which are allowed, what is stored of them, how they are restored.

A tree consists of nested mappings whose keys are names or integers: dicts, and Flax NNX's `State`,
whose lists have integer keys. A leaf may be in a box (an NNX `Variable`, a linen `Partitioned`). On
disk each leaf has a path, a text; boxes and container classes are not stored.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxquant.core.paths import path_leaves, path_name
from jaxquant.core.standin import is_standin

Keys = tuple[str, ...]


def unsaid_by_paths(tree: Any) -> dict[str, Any]:
    """Describe, as JSON values, what the paths of the leaves do not tell.

    Args:
      tree: the tree to save.

    Returns:
      "empty": the paths of empty mappings; "integer_keys": for every mapping whose keys are
      integers, the keys that lead to it. Empty entries are left out.

    Raises:
      ValueError: a container is not a mapping, or a key is neither a name nor an integer.

    >>> unsaid_by_paths({"layers": {0: {"w": np.ones(2)}, 1: {}}})
    {'empty': ['layers/1'], 'integer_keys': [['layers']]}
    """
    empty: list[str] = []
    integer_keys: list[Keys] = []
    _visit(tree, (), empty, integer_keys)
    found = {"empty": empty, "integer_keys": [list(keys) for keys in integer_keys]}
    return {name: value for name, value in found.items() if value}


def _visit(tree: Any, path: Keys, empty: list[str], integer_keys: list[Keys]) -> None:
    if not isinstance(tree, Mapping) or jax.tree_util.all_leaves([tree]):
        raise ValueError(
            f"a checkpoint holds nested dicts of arrays, or an NNX State, got {type(tree).__name__}"
            f"{' at ' + repr('/'.join(path)) if path else ''}; convert it first (nnx.state(module) "
            f"of an NNX module, nnx.to_pure_dict of a state)"
        )
    if _are_integers(list(tree), path):
        integer_keys.append(path)
    for key, value in tree.items():
        inner = (*path, str(key))
        if isinstance(value, Mapping) and not value:
            empty.append("/".join(inner))
        elif not _is_leaf(value):
            _visit(value, inner, empty, integer_keys)


def _are_integers(keys: list[PyTree], path: Keys) -> bool:
    """Return whether a mapping's keys are integers; raise ValueError if only some are."""
    integers = [type(key) is int for key in keys]
    for key, integer in zip(keys, integers, strict=True):
        if not integer and (not isinstance(key, str) or "/" in key):
            raise ValueError(f'keys must be integers, or strings without "/", got {key!r}')
        try:
            str(key).encode()
        except UnicodeEncodeError:
            raise ValueError(f"keys must be text that UTF-8 can encode, got {key!r}") from None
    if any(integers) and not all(integers):
        raise ValueError(
            f"the keys of one mapping must be all integers or all strings, got {keys[:4]!r} at "
            f"{'/'.join(path)!r}"
        )
    return any(integers)


def _is_leaf(value: Any) -> bool:
    """Return whether it is an array or a stand-in, with or without a box."""
    if isinstance(value, Mapping):
        return False
    leaves, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=is_standin)
    if len(leaves) != 1:
        return False
    keys, leaf = leaves[0]
    return path_name(keys) in ("", "value") and (is_standin(leaf) or hasattr(leaf, "dtype"))


def with_integer_keys(tree: dict[str, Any], integer_keys: list[list[str]]) -> dict[Any, Any]:
    """Convert keys to integers, in place, in the mappings listed.

    Args:
      tree: nested dicts with text keys.
      integer_keys: for every mapping to convert, the keys that lead to it.

    Returns:
      The same tree.

    >>> with_integer_keys({"layers": {"0": 1.0}}, [["layers"]])
    {'layers': {0: 1.0}}
    """
    for keys in sorted(integer_keys, key=len, reverse=True):
        node: dict[Any, Any] = tree
        for key in keys:
            node = node[key]
        items = {int(key): value for key, value in node.items()}
        node.clear()
        node.update(items)
    return tree


def placed(like: Any, tree: Any) -> PyTree:
    """Put the leaves of `tree` into the containers and boxes of `like`, path by path.

    Args:
      like: the tree that gives the containers.
      tree: the tree that gives the leaves.

    Raises:
      ValueError: the trees differ in a path, or in the shape of a leaf.

    >>> placed([0.0, {"b": 0.0}], {"0": 1.0, "1": {"b": 2.0}})
    [1.0, {'b': 2.0}]
    """
    leaves = dict(path_leaves(tree))
    wanted = path_leaves(like)
    paths = [path for path, _ in wanted]
    for lacking, which in (
        (sorted(set(paths) - set(leaves)), "`like` has and the checkpoint lacks"),
        (sorted(set(leaves) - set(paths)), "the checkpoint has and `like` lacks"),
    ):
        if lacking:
            raise ValueError(
                f"`like` must have the leaves of the checkpoint; {which} {len(lacking)} of them, "
                f"{lacking[0]!r} first: pass the tree of the model that was saved"
            )
    for path, leaf in wanted:
        if np.shape(leaf) != np.shape(leaves[path]):
            raise ValueError(
                f"{path!r} has shape {np.shape(leaf)} in `like`, and was saved with shape "
                f"{np.shape(leaves[path])}: pass the tree of the model that was saved"
            )
    structure = jax.tree.structure(like, is_leaf=is_standin)
    return jax.tree.unflatten(structure, [leaves[path] for path in paths])


def as_numbers(leaf: PyTree) -> tuple[PyTree, dict[str, str]]:
    """Convert a leaf to the array to store and its description; random keys become numbers.

    Args:
      leaf: an array or a random key.

    Returns:
      The array, and {"key": kind of key} for a random key, {} otherwise.

    >>> as_numbers(jax.random.key(3))
    (Array([0, 3], dtype=uint32), {'key': 'threefry2x32'})
    """
    if not jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
        return leaf, {}
    return jax.random.key_data(leaf), {"key": str(jax.random.key_impl(leaf))}


def from_numbers(array: Any, said: dict[str, Any]) -> PyTree:
    """Invert `as_numbers`: return the leaf."""
    return jax.random.wrap_key_data(array, impl=said["key"]) if "key" in said else array
