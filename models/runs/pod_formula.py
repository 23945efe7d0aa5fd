"""Formulas for the temporaries and collectives of a program, for use without a compiler for TPUs.

The collectives are those that the products need; those that the compiler adds for look-ups and
attention are small, and are left out. The temporaries are the largest arrays that are alive at the
same time.
"""

import math
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.distributed.collectives import Collective
from jaxquant_models.runs.pod_bytes import tree_device_bytes
from jaxquant_models.runs.pod_mesh import Axes
from jaxquant_models.runs.pod_programs import Program, gathers
from jaxquant_models.runs.pod_request import PodRequest
from pallas_kernels.partition import axes_of

# Number of products with a weight in a step: forward; forward again, because the activations of a
# layer are not stored; the transposed product; and the product for the gradient of the weight.
PASSES = {"decode": 1, "prefill": 1, "qlora": 3, "qat": 4}
# Number of times that a weight is gathered; the products of the backward pass share one.
GATHERED = {"decode": 0, "prefill": 1, "qlora": 2, "qat": 2}
EXPERTS = "layers/mlp/experts/"
# Dtypes as HLO text spells them.
NAMES = {
    "bool": "pred", "bfloat16": "bf16", "float16": "f16", "float32": "f32", "float8_e4m3": "f8e4m3",
    "float8_e4m3fn": "f8e4m3fn", "float8_e5m2": "f8e5m2", "float8_e8m0fnu": "f8e8m0fnu",
    "float4_e2m1fn": "f4e2m1fn", **{f"int{n}": f"s{n}" for n in (2, 4, 8, 16, 32)},
    **{f"uint{n}": f"u{n}" for n in (2, 4, 8, 16, 32)},
}  # fmt: skip


def expected_collectives(request: PodRequest, program: Program, mesh: Axes) -> list[Collective]:
    """Return the collectives that the products of a step need.

    Args:
      request: the request.
      program: the program of the request.
      mesh: name and size of each mesh axis.
    Returns:
      The collectives in which more than one device takes part.
    Raises:
      ValueError: a weight has an array of a dtype that is not in `NAMES`.
    """
    found: list[Collective] = []
    at = dict(jq.core.path_leaves(program.placed))
    for path, w in jq.core.path_leaves(program.weights):
        if path.startswith("layers/") or path == "head/kernel":
            found.extend(_of_weight(request, w, at[path], dict(mesh), path))
    if request.trains:
        found.extend(_of_gradients(program, dict(mesh)))
    return [one for one in found if one.group_size > 1]


def xla_name(dtype: np.dtype) -> str:
    """Return a dtype as HLO text spells it.

    Args:
      dtype: the dtype.
    Raises:
      ValueError: the dtype is not in `NAMES`.

    >>> xla_name(np.dtype("uint8"))
    'u8'
    """
    if dtype.name not in NAMES:
        raise ValueError(f"the dtype must be one of {', '.join(NAMES)}, got {dtype.name}")
    return NAMES[dtype.name]


def expected_temporaries(request: PodRequest, program: Program, mesh: Axes) -> int:
    """Return the bytes of the largest arrays, without arguments, that are alive at the same time.

    They are the logits; the words of two layers, if they are gathered; and the attention scores and
    the hidden units of the MLP of one layer. In training, the input of every layer and the
    gradients of the trained arrays are added.

    Args:
      request: the request.
      program: the program of the request.
      mesh: name and size of each mesh axis.
    Returns:
      The bytes on one device.
    """
    c, sizes = request.config, dict(mesh)
    model = sizes.get("model", 1)
    split = gathers(request, sizes)
    rows = request.batch * request.tokens // (sizes.get("data", 1) if split else 1)
    held = request.batch // math.gcd(request.batch, sizes.get("data", 1))  # sequences in attention
    logits = rows * c.vocab_size // model * (4 + 2)  # in bfloat16, then in float32
    scores = 4 * held * request.tokens * request.context * c.n_heads // model
    scores = scores if request.tokens > 1 else 0  # the compiler fuses the scores of one query
    mlp, words = _mlp(request, rows, model), 2 * _layer_bytes(program, split)
    if request.trains:
        kept = 2 * rows * c.d_model * c.n_layers
        slopes = tree_device_bytes(program.arguments["trained"], program.shardings["trained"])
        return 2 * logits + kept + slopes + 2 * mlp + 2 * scores + words
    return max(logits, mlp + 2 * scores) + words


def _mlp(request: PodRequest, rows: int, model: int) -> int:
    """Return the bytes of the inputs, hidden units and outputs of an MLP.

    With experts, every token has a row for each of its experts: inputs and outputs are bfloat16,
    the sums in between float32.
    """
    c = request.config
    if not c.n_experts:
        return rows * (2 * c.d_model + 3 * c.d_ff // model) * 2
    sorted_rows = rows * c.experts_per_token
    return sorted_rows * ((2 + 2 + 4) * c.d_model + 3 * c.expert_d_ff // model * 2)


def _layer_bytes(program: Program, split: bool) -> int:
    """Return the bytes of a layer or of the output matrix after gathering, whichever is larger."""
    if not split:
        return 0
    at, sizes = dict(jq.core.path_leaves(program.placed)), {"layers": 0, "head": 0}
    for path, w in jq.core.path_leaves(program.weights):
        part = path.split("/")[0]
        if part in sizes:
            places = jax.tree.leaves(gathered(w, at[path]))
            for a, s in zip(jax.tree.leaves(w), places, strict=True):
                layers = a.shape[0] if part == "layers" else 1
                sizes[part] += math.prod(s.shard_shape(a.shape)) // layers * a.dtype.itemsize
    return max(sizes.values())


def gathered(w: PyTree, at: PyTree) -> PyTree:
    """Return the shardings of a weight after an all-gather over "data".

    Args:
      w: the weight, or its shapes.
      at: its shardings before the all-gather.
    """
    return jax.tree.map(lambda a, s: _without(s, "data", a.ndim), w, at)


def _of_weight(
    request: PodRequest, w: PyTree, at: PyTree, sizes: dict[str, int], path: str
) -> Iterator[Collective]:
    if len(w.shape) < 2 + path.startswith("layers/"):
        return
    split = gathers(request, sizes)
    layers = w.shape[0] if path.startswith("layers/") else 1
    passes = layers * GATHERED[request.workload]
    data = sizes.get("data", 1)
    if split:
        places = jax.tree.leaves(at), jax.tree.leaves(gathered(w, at))
        for a, s, whole in zip(jax.tree.leaves(w), *places, strict=True):
            if any("data" in part for part in axes_of(s.spec, a.ndim)):
                shape = whole.shard_shape(a.shape)[path.startswith("layers/") :]
                yield Collective("all-gather", xla_name(a.dtype), shape, data, passes)
    matrix = at.data["codes"] if isinstance(w, jq.QTensor) else at
    *stack, rows, columns = axes_of(matrix.spec, len(w.shape))
    own = lambda part: tuple(name for name in part if not (split and name == "data"))
    tokens = request.batch * request.tokens // (data if split else 1)
    of_experts = path.startswith(EXPERTS)  # each device multiplies the rows of its own experts
    experts = stack[-1] if of_experts else ()
    tokens *= request.config.experts_per_token if of_experts else 1
    dtype = "f32" if of_experts else "bf16"
    ways = [(own(rows), w.shape[-1], own(columns), layers)]
    if request.trains:  # forward twice, and the transposed product
        ways = [(own(rows), w.shape[-1], own(columns), 2 * layers)]
        ways.append((own(columns), w.shape[-2], own(rows), layers))
    for summed, length, kept, times in ways:
        group = math.prod(sizes[name] for name in (*experts, *summed))
        shape = (tokens, length // math.prod(sizes[name] for name in kept))
        yield Collective("all-reduce", dtype, shape, group, times)


def _of_gradients(program: Program, sizes: dict[str, int]) -> Iterator[Collective]:
    """Yield the sums over "data" of the gradients of the trained arrays."""
    trained = (program.arguments["trained"], program.shardings["trained"])
    for a, s in zip(*map(jax.tree.leaves, trained), strict=True):
        kept = any("data" in part for part in axes_of(s.spec, a.ndim))
        kind = "reduce-scatter" if kept else "all-reduce"
        shape = s.shard_shape(a.shape)
        yield Collective(kind, xla_name(a.dtype), shape, sizes.get("data", 1), 1)


def _without(s: NamedSharding, axis: str, ndim: int) -> NamedSharding:
    """Return a sharding that no longer splits anything over one axis of its mesh."""
    parts = [tuple(n for n in part if n != axis) or None for part in axes_of(s.spec, ndim)]
    return NamedSharding(s.mesh, jax.sharding.PartitionSpec(*parts))
