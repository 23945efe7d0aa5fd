"""How the arrays of a quantized tree are split over a mesh, from the float model's logical axes."""

from collections.abc import Iterable, Mapping
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

Names = tuple[str | None, ...] | P | None
Rules = Iterable[tuple[str, str | tuple[str, ...] | None]]


def sharding(qparams: PyTree, mesh: Mesh | AbstractMesh, rules: Rules, axes: PyTree) -> PyTree:
    """Return how the arrays of a quantized tree are split over a mesh.

    The result can be passed to `jax.device_put`, to `jax.jit` and, for a mesh with Auto axes, to
    `jaxquant.quantized`.

    Args:
      qparams: tree of `QTensor`s and arrays; the arrays may be `jax.ShapeDtypeStruct`s.
      mesh: the mesh; an `AbstractMesh` for a plan, whose devices need not exist.
      rules: pairs of the name of a logical axis and the mesh axis, or axes, that split it; None
        leaves it whole. The first rule of a name applies whose mesh axes no earlier axis of the
        same weight has, as in Flax. An axis whose name has no rule is whole.
      axes: tree of the names of the logical axes of every leaf, those of a `QTensor` as for the
        floating-point weight: a tuple with a name or None for each axis, or a `PartitionSpec`, as
        Flax linen's get_partition_spec returns them. None leaves a weight whole. A flat dict from
        paths, such as "layers/attn/q/kernel", is accepted too.
    Returns:
      The tree with `NamedSharding`s in place of arrays.
    Raises:
      ValueError: a weight has no names, or more than axes; the mesh lacks an axis; or a shard would
        not consist of whole words, groups or tiles of codes.

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
    named = _named(axes)
    leaves = dict(path_leaves(qparams))
    if missing := [path for path in leaves if path not in named]:
        raise ValueError(
            f"axes: no names for {missing[:3]}{' and others' * (len(missing) > 3)}; give the "
            "logical axes of every leaf, or None for one that is not split"
        )
    found = {
        path: _leaf(path, w, mesh, _spec(path, w, named[path], ruled)) for path, w in leaves.items()
    }
    return replace_leaves(qparams, found)


def _checked(rules: Rules, mesh: Mesh | AbstractMesh) -> list[tuple[str, tuple[str, ...]]]:
    """Return the rules with tuples of mesh axes; ValueError if the mesh lacks one of them."""
    found = []
    for rule in rules.items() if isinstance(rules, Mapping) else rules:
        name, parts = rule
        split = () if parts is None else (parts,) if isinstance(parts, str) else tuple(parts)
        if unknown := [axis for axis in split if axis not in mesh.axis_names]:
            raise ValueError(
                f"rules: {name!r} is split over {unknown}, which the mesh lacks; its axes are "
                f"{list(mesh.axis_names)}"
            )
        found.append((name, split))
    return found


def _named(axes: PyTree) -> dict[str, Names]:
    """Return the names of the axes of every leaf by its path."""
    is_names = lambda a: a is None or isinstance(a, tuple | P)
    leaves, _ = jax.tree_util.tree_flatten_with_path(axes, is_leaf=is_names)
    return {path_name(keys): names for keys, names in leaves}


def _spec(path: str, w: Any, names: Names, rules: list[tuple[str, tuple[str, ...]]]) -> P:
    """Return the mesh axes that split each axis of a leaf."""
    names = () if names is None else tuple(names)
    if len(names) > len(w.shape):
        raise ValueError(f"axes: {path} has {len(w.shape)} axes, but {len(names)} names: {names}")
    taken: set[str] = set()
    parts: list[tuple[str, ...]] = []
    for name in names:
        free = (split for of, split in rules if of == name and not taken & set(split))
        split = next(free, ())
        taken |= set(split)
        parts.append(split)
    return spec_of(parts)


def _leaf(path: str, w: Any, mesh: Mesh | AbstractMesh, spec: P) -> Any:
    """Return the shardings of a leaf; ValueError, with its path, if it cannot be split so."""
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
