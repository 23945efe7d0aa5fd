"""The shardings of the weights and the cache of a Llama over a mesh."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.core.paths import matches
from jaxquant.ptq.layer_stacks import is_apart
from jaxquant_models.architectures.cache import Cache
from jaxquant_models.architectures.config import LlamaConfig

Rule = tuple[str, str | tuple[str, ...] | None]

# The logical axes of every leaf, by a pattern of its path without "layers/" and a layer's number.
AXES: dict[str, tuple[str | None, ...] | None] = {
    "embed/embedding": ("vocab", "embed"),
    "head/kernel": ("embed", "vocab"),
    "attn/q/kernel": ("embed", "heads"),
    "attn/[kv]/kernel": ("embed", "kv_heads"),
    "attn/o/kernel": ("heads", "embed"),
    "attn/q/bias": ("heads",),
    "attn/[kv]/bias": ("kv_heads",),
    "attn/sub_norm/scale": ("heads",),
    "mlp/router/kernel": ("embed", None),
    "mlp/experts/[gu]*/kernel": ("experts", "embed", "mlp"),
    "mlp/experts/down/kernel": ("experts", "mlp", "embed"),
    "mlp/[gu]*/kernel": ("embed", "mlp"),
    "mlp/down/kernel": ("mlp", "embed"),
    "mlp/[gu]*/bias": ("mlp",),
    "mlp/sub_norm/scale": ("mlp",),
    "*norm/scale": None,
    "*/bias": None,
}


def rules_for(mesh: Mesh | AbstractMesh) -> tuple[Rule, ...]:
    """Return the rules for a mesh whose axes are among "data", "model" and "expert".

    "data" splits the batch and also each weight, which is gathered for its product (fully sharded).
    "model" splits attention heads, the hidden units of the MLP and the vocabulary (tensor
    parallel). "expert" splits the experts.

    Args:
      mesh: the mesh.
    Returns:
      The rules for `jaxquant.distributed.sharding`.
    Raises:
      ValueError: the mesh has other axes.
    """
    if unknown := set(mesh.axis_names) - {"data", "model", "expert"}:
        raise ValueError(
            f'mesh: its axes must be among "data", "model" and "expert", got {sorted(unknown)}; '
            "rename them, or pass your own rules"
        )
    known: dict[str, tuple[str, ...]] = {
        "data": ("batch", "embed"),
        "model": ("heads", "kv_heads", "mlp", "vocab"),
        "expert": ("experts",),
    }
    return tuple((name, axis) for axis in mesh.axis_names for name in known[axis])


def logical_axes(params: PyTree) -> dict[str, tuple[str | None, ...] | None]:
    """Return the logical axes of every leaf of a Llama, by its path.

    Args:
      params: the inner "params" tree, with layers stacked or unstacked.
    Returns:
      For each path, the name of each axis (None for an axis that is not split), or None for a leaf
      that is not split.
    Raises:
      ValueError: a leaf does not belong to a Llama.
    """
    stack = () if is_apart(params, "layers") else ("layers",)

    def one(path: str) -> tuple[str | None, ...] | None:
        own = path.removeprefix("layers/")
        within = own.partition("/")[2] if path != own and not stack else own
        found = [names for pattern, names in AXES.items() if matches(within, pattern)]
        if not found:
            raise ValueError(
                f"params: expected the weights of a Llama, got {path}, whose axes are not known; "
                "pass your own axes to jaxquant.distributed.sharding"
            )
        return found[0] if found[0] is None or path == own else (*stack, *found[0])

    return {path: one(path) for path, _ in jq.core.path_leaves(params)}


def model_sharding(
    params: PyTree,
    config: LlamaConfig,
    mesh: Mesh | AbstractMesh,
    rules: Sequence[Rule] | None = None,
) -> PyTree:
    """Return the shardings of the arrays of a Llama over a mesh.

    Args:
      params: the inner "params" tree; its arrays may be `jax.ShapeDtypeStruct`s.
      config: the architecture.
      mesh: the mesh; it may be an `AbstractMesh`.
      rules: as in `jaxquant.distributed.sharding`. Default: those of `rules_for`.
    Returns:
      The tree with `NamedSharding`s in place of arrays.
    Raises:
      ValueError: the mesh would split a head, or a group, word or tile of codes; or it has unknown
        axes.
    """
    rules = rules_for(mesh) if rules is None else _pairs(rules)
    _check_heads(config, mesh, rules)
    return jq.distributed.sharding(params, mesh, rules, logical_axes(params))


def cache_sharding(
    cache: Cache, mesh: Mesh | AbstractMesh, rules: Sequence[Rule] | None = None
) -> Cache:
    """Return the shardings of a cache: sequences are split like the batch, heads like "kv_heads".

    Args:
      cache: an unquantized cache, or its shapes. The number of sequences must be a multiple of the
        number of devices over which the batch is split.
      mesh, rules: as in `model_sharding`.
    Returns:
      The cache with `NamedSharding`s in place of arrays.
    """
    found = dict(reversed(rules_for(mesh) if rules is None else _pairs(rules)))
    spec = (found.get("batch"), found.get("kv_heads"))
    one = lambda a: NamedSharding(mesh, P(*(None,) * (a.ndim - 4), *spec))
    whole = NamedSharding(mesh, P())
    of = lambda held: tuple(map(one, held)) if isinstance(held, tuple) else one(held)
    end = None if cache.end is None else whole
    return Cache(of(cache.k), of(cache.v), whole, end)


def _pairs(rules: Sequence[Rule] | Mapping[str, Any]) -> tuple[Rule, ...]:
    return tuple(rules.items() if isinstance(rules, Mapping) else rules)


def _check_heads(config: LlamaConfig, mesh: Mesh | AbstractMesh, rules: Sequence[Rule]) -> None:
    found = dict(reversed(rules))
    for name, heads in (("heads", config.n_heads), ("kv_heads", config.n_kv_heads)):
        parts = found.get(name) or ()
        axes = (parts,) if isinstance(parts, str) else parts
        size = math.prod(mesh.shape[axis] for axis in axes if axis in mesh.shape)
        if heads % size:
            raise ValueError(
                f"the {size} devices of {list(axes)} do not divide the {heads} {name}; make these "
                f"axes of the mesh smaller, or pass the rule ({name!r}, None), which leaves "
                f"{name} whole"
            )
