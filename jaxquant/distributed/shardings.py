"""The shardings of a quantized tree, from the logical axes of the floating-point model."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jaxquant.core.arguments import check_arguments
from jaxquant.core.paths import path_leaves, path_name, replace_leaves
from jaxquant.core.shardings import packed_sharding
from jaxquant.core.tensor import QTensor
from pallas_kernels.shard_specs import axes_of, size_of, spec_of

Names = Sequence[str | None] | P | None
Rules = Iterable[tuple[str, str | tuple[str, ...] | None]]


def sharding(qparams: PyTree, mesh: Mesh | AbstractMesh, rules: Rules, axes: PyTree) -> PyTree:
    """Return the shardings of the arrays of a quantized tree over a mesh.

    Pass the result to `jax.device_put`, to `jax.jit` and, for a mesh with Auto axes, to
    `jaxquant.quantized`.

    Args:
      qparams: tree of `QTensor`s and arrays; the arrays may be `jax.ShapeDtypeStruct`s.
      mesh: the mesh. It may be an `AbstractMesh`, whose devices need not exist, for planning.
      rules: pairs (name of a logical axis, mesh axis or tuple of mesh axes that split it), or a
        mapping of the same. None as the mesh axis leaves the logical axis whole. If a name has
        several rules, the first one applies whose mesh axes do not split an earlier axis of the
        same weight already, as in Flax. A logical axis without a rule is whole. A rule whose name
        no weight has is ignored, as in Flax, so that models can share one list of rules.
      axes: tree with the logical axes of every leaf: a tuple or list with a name or None for each
        axis, or a `PartitionSpec` of names, as Flax linen's get_partition_spec returns. Those of a
        `QTensor` are the axes of the floating-point weight. None leaves a weight whole. A flat dict
        whose keys are paths, such as "layers/attn/q/kernel", is accepted too.
    Returns:
      The tree with `NamedSharding`s in place of arrays.
    Raises:
      ValueError: `axes` lacks a leaf, has names for a path that is no leaf, has more names than a
        leaf has axes, or has a plain string in place of a tuple; a rule is not a pair, or names an
        axis that the mesh lacks; or a shard would not consist of whole words (integers that each
        hold several codes), groups (weights that share a scale) or tiles of codes.

    >>> import jax.numpy as jnp, jaxquant as jq
    >>> q = jq.quantize({"up": jnp.ones((64, 32)), "norm": jnp.ones(64)}, jq.rtn(bits=4))
    >>> mesh = jax.make_mesh((1,), ("model",))
    >>> axes = {"up": ("embed", "mlp"), "norm": ("embed",)}
    >>> found = sharding(q, mesh, [("mlp", "model")], axes)
    >>> tuple(found["up"].data["codes"].spec), tuple(found["norm"].spec)
    ((None, 'model'), (None,))
    """
    check_arguments(sharding, locals())
    ruled = _checked(rules, mesh)
    leaves = dict(path_leaves(qparams))
    named = _named(axes, leaves)
    found = {
        path: _leaf(path, w, mesh, _spec(path, w, named[path], ruled)) for path, w in leaves.items()
    }
    return replace_leaves(qparams, found)


def _checked(rules: Rules, mesh: Mesh | AbstractMesh) -> list[tuple[str, tuple[str, ...]]]:
    """Return the rules with tuples of mesh axes; raise ValueError if the mesh lacks one of them."""
    found = []
    for rule in rules.items() if isinstance(rules, Mapping) else rules:
        if not _is_pair(rule):
            raise ValueError(
                "rules: expected pairs (name of a logical axis, mesh axis or tuple of mesh axes, "
                f'or None), such as ("mlp", "model"), got {rule!r}'
            )
        name, parts = rule
        split = () if parts is None else (parts,) if isinstance(parts, str) else tuple(parts)
        if unknown := [axis for axis in split if axis not in mesh.axis_names]:
            raise ValueError(
                f"rules: {name!r} is split over {unknown}, which the mesh lacks; use some of its "
                f"axes, which are {list(mesh.axis_names)}, or None"
            )
        found.append((name, split))
    return found


def _is_pair(rule: Any) -> bool:
    if not isinstance(rule, tuple | list) or len(rule) != 2 or not isinstance(rule[0], str):
        return False
    of = rule[1]
    return of is None or isinstance(of, str) or (_are_names(of) and None not in of)


def _are_names(value: Any) -> bool:
    """Return whether a value is a tuple or list of names or None, and not a container of these."""
    sequence = isinstance(value, tuple | list) and not isinstance(value, P)
    return sequence and all(one is None or isinstance(one, str) for one in value)


def _named(axes: PyTree, leaves: Mapping[str, Any]) -> dict[str, Names]:
    """Return the names of the axes of every leaf by its path."""
    ends = lambda a: a is None or isinstance(a, P) or _are_names(a)
    found: dict[str, Any] = {}
    for keys, names in jax.tree_util.tree_flatten_with_path(axes, is_leaf=ends)[0]:
        path = path_name(keys)
        if _are_names(names) and path not in leaves and f"{path}/0" in leaves:
            found |= {f"{path}/{i}": name for i, name in enumerate(names)}  # a list of leaves
        else:
            found[path] = names
    for path, names in found.items():
        if names is not None and not isinstance(names, P) and not _are_names(names):
            raise ValueError(
                f"axes: {path}: expected a tuple with a name or None for each axis, such as "
                f'("embed", "mlp"), or None, got {names!r}'
            )
    missing = [path for path in leaves if path not in found]
    # Without names, it may be an empty container or a None of the tree, which are not leaves.
    unknown = [path for path, names in found.items() if names and path not in leaves]
    if missing or unknown:
        lists = (("no names for", missing), ("names for paths that are no leaves,", unknown))
        got = " and ".join(f"{what} {_some(paths)}" for what, paths in lists if paths)
        raise ValueError(
            f"axes: expected the logical axes of every leaf of qparams, got {got}; correct the "
            "paths, or add a tuple of names, or None for a leaf that is not split"
        )
    return {path: found[path] for path in leaves}


def _some(paths: list[str]) -> str:
    return f"{paths[:3]}{' and others' * (len(paths) > 3)}"


def _spec(path: str, w: Any, names: Names, rules: list[tuple[str, tuple[str, ...]]]) -> P:
    """Return the mesh axes that split each axis of a leaf."""
    names = () if names is None else tuple(names)
    if len(names) > len(w.shape):
        raise ValueError(
            f"axes: {path} has {len(w.shape)} axes, but {len(names)} names: {names}; give at most "
            "one name for each axis"
        )
    taken: set[str] = set()
    parts: list[tuple[str, ...]] = []
    for name in names:
        free = (split for of, split in rules if of == name and not taken & set(split))
        split = next(free, ())
        taken |= set(split)
        parts.append(split)
    return spec_of(parts)


def _leaf(path: str, w: Any, mesh: Mesh | AbstractMesh, spec: P) -> Any:
    """Return the shardings of a leaf; raise ValueError, with its path, if they are not possible."""
    if isinstance(w, QTensor):
        try:
            return packed_sharding(w, mesh, spec)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    for length, part in zip(w.shape, axes_of(spec, len(w.shape)), strict=True):
        size = size_of(mesh, part)
        if length % size:
            raise ValueError(
                f"{path}: an axis of length {length} cannot be split over the {size} devices of "
                f"{list(part)}; change the rules or the mesh"
            )
    return NamedSharding(mesh, spec)
