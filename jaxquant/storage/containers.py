"""Containers of a saved tree: what is stored of them, and how they are restored.

Any JAX pytree can be stored. Dicts, lists, tuples and None come back as they were. All other
containers (a Flax NNX `State`, a named tuple, an Equinox module, an optimizer's state) come back as
dicts of their fields, or as what they were if `load` gets a tree like the one that was saved. A
leaf may be in a box (an NNX `Variable`, a linen `Partitioned`); boxes are not stored.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, Sharding
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, KeyEntry, SequenceKey
from jaxtyping import PyTree

from jaxquant.core.paths import path_name
from jaxquant.core.standin import is_array, is_standin

KeyPath = tuple[KeyEntry, ...]
Leaves = dict[str, Any]  # leaves by path
MOST = 3  # paths that an error lists


def outlined(tree: PyTree) -> tuple[Any, Leaves]:
    """Split a tree into an outline, which is a JSON value, and its leaves.

    In the outline a leaf is its number, a list is {"list": [...]}, a tuple {"tuple": [...]}, and
    any other container {"dict": [[key, ...], ...]}. None and functions, which are not stored, are
    null.

    Args:
      tree: the tree.

    Returns:
      The outline, and the leaves by path. A stand-in whose parts are all arrays is one leaf.

    Raises:
      ValueError: a key of a mapping is neither text nor an integer, or two leaves have one path.

    >>> outlined({"a": ({0: 5.0, 1: {}}, None)})
    ({'dict': [['a', {'tuple': [{'dict': [[0, 0], [1, {'dict': []}]]}, None]}]]}, {'a/0/0': 5.0})
    """
    leaves: Leaves = {}
    return _outline(tree, (), leaves), leaves


def _outline(node: Any, keys: KeyPath, leaves: Leaves) -> Any:
    if node is None or _is_function(node):
        return None
    if _is_leaf(node):
        path = path_name(keys)
        if path in leaves:
            raise ValueError(f"two leaves of the tree have the same path {path!r}; rename one")
        leaves[path] = node
        return len(leaves) - 1
    if isinstance(node, Mapping):
        _check_keys(list(node), keys)
    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    inner = [(key, _outline(child, (*keys, key), leaves)) for (key,), child in children]
    if len(inner) == 1 and _is_box(inner[0][0]) and isinstance(inner[0][1], int):
        return inner[0][1]
    if type(node) in (list, tuple):
        return {type(node).__name__: [child for _, child in inner]}
    return {"dict": [[_name(key), child] for key, child in inner if not _is_private(key, child)]}


def _is_leaf(node: Any) -> bool:
    """Return whether a node is a leaf; a stand-in that lacks arrays is a container of the rest.

    Such stand-ins are in the state of optimizers, which have no moments of what is not trained.
    """
    if is_standin(node):
        return all(map(is_array, getattr(node, "named", {}).values()))
    return jax.tree_util.all_leaves([node])


def _is_function(leaf: Any) -> bool:
    return callable(leaf) and not is_array(leaf) and jax.tree_util.all_leaves([leaf])


def _is_box(key: KeyEntry) -> bool:
    """Return whether `path_name` leaves the key out of the path."""
    return not isinstance(key, DictKey) and path_name((GetAttrKey(""), key)) == ""


def _is_private(key: KeyEntry, outline: Any) -> bool:
    """Return whether a field is the class's own, without leaves; Flax modules flatten to one."""
    private = isinstance(key, GetAttrKey) and key.name.startswith("_")
    return private and outline in (None, {"dict": []})


def _name(key: KeyEntry) -> str | int:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name) | GetAttrKey(name=name):
            return name
        case SequenceKey(idx=index):
            return index
    return str(key)


def _check_keys(keys: list[Any], at: KeyPath) -> None:
    """Raise ValueError unless a mapping's keys are all texts, or all integers."""
    place = f"at {path_name(at)!r}" if at else "at the top of the tree"
    for key in keys:
        if type(key) is not int and not isinstance(key, str):
            raise ValueError(
                f"the keys of mappings must be integers or strings, got {key!r} {place}; rename it"
            )
        try:
            str(key).encode()
        except UnicodeEncodeError:
            raise ValueError(f"keys must be text that UTF-8 can encode, got {key!r}") from None
    if len({type(key) is int for key in keys}) > 1:
        raise ValueError(
            f"the keys of one mapping must be all integers or all strings, got {keys[:4]!r} {place}"
        )


def filled(outline: Any, leaves: Sequence[Any]) -> PyTree:
    """Put leaves into an outline; the inverse of `outlined` for trees of dicts, lists and tuples.

    Args:
      outline: the outline.
      leaves: the leaves, in order.

    Raises:
      ValueError: the outline is not one that `outlined` returns.

    >>> filled({"dict": [["a", {"list": [0, None]}]]}, [5.0])
    {'a': [5.0, None]}
    """
    if outline is None:
        return None
    if isinstance(outline, int):
        return leaves[outline]
    ((kind, inner),) = outline.items()
    match kind:
        case "list":
            return [filled(child, leaves) for child in inner]
        case "tuple":
            return tuple(filled(child, leaves) for child in inner)
        case "dict":
            return {key: filled(child, leaves) for key, child in inner}
    raise ValueError(f"unknown kind of container {kind!r}")


def outline_of_paths(paths: list[str], empty: list[str], integer_keys: list[list[str]]) -> Any:
    """Return the outline of a checkpoint of version 1, which held nested mappings.

    Args:
      paths: the paths of the leaves.
      empty: the paths of empty mappings.
      integer_keys: for every mapping whose keys are integers, the keys that lead to it.

    >>> outline_of_paths(["a/0"], ["b"], [["a"]])
    {'dict': [['a', {'dict': [[0, 0]]}], ['b', {'dict': []}]]}
    """
    tree: dict[str, Any] = {}
    for number, path in enumerate(paths):
        *parents, last = path.split("/")
        _node(tree, parents)[last] = number
    for path in empty:
        _node(tree, path.split("/"))
    integers = [tuple(keys) for keys in integer_keys]

    def outline(node: Any, at: tuple[str, ...]) -> Any:
        if not isinstance(node, dict):
            return node
        kind = int if at in integers else str
        return {"dict": [[kind(key), outline(child, (*at, key))] for key, child in node.items()]}

    return outline(tree, ())


def _node(tree: dict[str, Any], names: list[str]) -> dict[str, Any]:
    for name in names:
        tree = tree.setdefault(name, {})
    return tree


def placed(like: PyTree, leaves: Leaves) -> PyTree:
    """Put leaves into the containers and boxes of a tree, by their paths.

    Args:
      like: the tree that gives the containers, the functions, and the devices of the leaves that it
        spreads over several. Its other leaves may be abstract.
      leaves: the leaves by path.

    Raises:
      ValueError: as in `check_like`.

    >>> placed([0.0, {"b": 0.0}], {"0": 1.0, "1/b": 2.0})
    [1.0, {'b': 2.0}]
    """
    keyed, structure = jax.tree_util.tree_flatten_with_path(like, is_leaf=_is_standin_leaf)
    wanted = [(path_name(keys), leaf) for keys, leaf in keyed]
    check_like(like, leaves)
    return jax.tree.unflatten(
        structure, [_spread(leaf, leaves[p]) if p in leaves else leaf for p, leaf in wanted]
    )


def check_like(like: PyTree, leaves: Leaves) -> None:
    """Raise ValueError unless leaves can be put into the containers of a tree, and on its devices.

    Args:
      like: the tree, as in `placed`.
      leaves: the leaves by path, which may be abstract.

    Raises:
      ValueError: the trees differ in a path, or in the shape of a leaf; or the sharding of a leaf
        in `like` does not divide its shape evenly.
    """
    keyed = jax.tree_util.tree_flatten_with_path(like, is_leaf=_is_standin_leaf)[0]
    wanted = [(path_name(keys), leaf) for keys, leaf in keyed]
    _check_paths({path for path, leaf in wanted if not _is_function(leaf)}, set(leaves))
    for path, leaf in wanted:
        if path not in leaves:
            continue
        if np.shape(leaf) != np.shape(leaves[path]):
            raise ValueError(
                f"{path!r} has shape {np.shape(leaf)} in `like`, and was saved with shape "
                f"{np.shape(leaves[path])}: pass the tree of the model that was saved"
            )
        here, there = (getattr(w, "named", {"": w}) for w in (leaf, leaves[path]))
        for name, a in here.items():
            # Arrays that differ were packed meanwhile, and their shardings are not used.
            if name in there and np.shape(there[name]) == np.shape(a):
                _check_sharding(f"{path}:{name}" if name else path, a)


def _check_sharding(path: str, a: Any) -> None:
    """Raise ValueError if the sharding of an array does not divide its shape evenly."""
    sharding = _sharding(a)
    if sharding is None:
        return
    try:
        sharding.shard_shape(np.shape(a))
    except ValueError as error:
        over = f"{sharding}"
        if isinstance(sharding, NamedSharding):
            sizes = ", ".join(f"{name}={size}" for name, size in sharding.mesh.shape.items())
            over = f"{sharding.spec} over the mesh axes {sizes}"
        raise ValueError(
            f"the sharding of {path!r} in `like` must divide its shape {np.shape(a)} evenly, but "
            f"it is {over}; leave the axis that it does not divide whole (None), or use a mesh "
            "whose axis divides its length"
        ) from error


def _sharding(a: Any) -> Sharding | None:
    """Return the sharding of an array if it is on several devices, which must exist."""
    sharding = getattr(a, "sharding", None)
    abstract = isinstance(getattr(sharding, "mesh", None), AbstractMesh)
    if sharding is None or abstract or len(sharding.device_set) == 1:
        return None
    return sharding


def _is_standin_leaf(node: Any) -> bool:
    return is_standin(node) and _is_leaf(node)


def _check_paths(wanted: set[str], held: set[str]) -> None:
    found = [
        f"{which} {some(sorted(paths))}"
        for which, paths in (
            ("the checkpoint lacks", wanted - held),
            ("`like` lacks", held - wanted),
        )
        if paths
    ]
    if found:
        raise ValueError(
            f"`like` must have the leaves of the checkpoint; {', and '.join(found)}: pass the tree "
            f"that was saved, or its `jax.eval_shape`; without `like` the containers are dicts"
        )


def some(names: list[str]) -> str:
    """List the first names, and how many more there are.

    >>> some(["a", "b", "c", "d"])
    "'a', 'b', 'c' and 1 more"
    """
    more = len(names) - MOST
    return ", ".join(map(repr, names[:MOST])) + (f" and {more} more" if more > 0 else "")


def _spread(like: Any, leaf: Any) -> Any:
    """Move a leaf to the devices of the leaf in `like`, if those are several."""

    def put(like: Any, a: Any) -> Any:
        sharding = _sharding(like)
        return a if sharding is None else jax.device_put(a, sharding)

    leaves, structure = jax.tree.flatten(leaf)
    places, placing = jax.tree.flatten(like)
    if placing != structure:  # type: ignore[operator]  # a weight that was packed meanwhile
        return leaf
    return jax.tree.unflatten(structure, map(put, places, leaves))
