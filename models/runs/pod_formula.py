"""What a program takes beside its arguments, by formula: where no compiler for TPUs is at hand.

Collectives are those that the products need. What the compiler adds for look-ups and for attention
is left out, as it is small. Temporaries are the largest arrays that are alive together.
"""

import math
from collections.abc import Iterator

import jax
from jax.sharding import NamedSharding
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.distributed.collectives import Collective
from jaxquant_models.runs.pod_mesh import Axes
from jaxquant_models.runs.pod_programs import Program, gathers
from jaxquant_models.runs.pod_request import PodRequest
from pallas_kernels.partition import axes_of

# Passes over a weight in a step: forward, again since a layer's activations are not kept, the
# transposed product, and that of the weight's own gradient.
PASSES = {"decode": 1, "prefill": 1, "qlora": 3, "qat": 4}
GATHERED = {"decode": 0, "prefill": 1, "qlora": 2, "qat": 2}  # the backward passes share one
NAMES = {"int32": "s32", "uint8": "u8", "uint16": "u16", "float16": "f16", "bfloat16": "bf16"}


def expected_collectives(request: PodRequest, program: Program, mesh: Axes) -> list[Collective]:
    """Return the collectives that the products of a step need.

    Args:
      request: the request.
      program: its program.
      mesh: name and size of each mesh axis.
    """
    found: list[Collective] = []
    at = dict(jq.core.path_leaves(program.placed))
    for path, w in jq.core.path_leaves(program.weights):
        if path.startswith("layers/") or path == "head/kernel":
            found.extend(_of_weight(request, w, at[path], dict(mesh), path))
    return [one for one in found if one.group > 1]


def expected_temporaries(request: PodRequest, program: Program, mesh: Axes) -> int:
    """Return the bytes of the largest arrays that are alive together, without arguments.

    They are the logits; the words of two layers, if they are gathered; and the scores of attention
    and the hidden units of the MLP of one layer. In training, the input of every layer is kept.

    Args:
      request: the request.
      program: its program.
      mesh: name and size of each mesh axis.
    """
    c, sizes = request.config, dict(mesh)
    model = sizes.get("model", 1)
    split = gathers(request, sizes)
    share = sizes.get("data", 1) if split else 1
    rows = request.batch * request.tokens // share
    held = -(-request.batch // math.gcd(request.batch, sizes.get("data", 1)))  # by attention
    width = max(c.d_ff, c.experts_per_token * c.expert_d_ff) // model
    logits = rows * c.vocab_size // model * (2 if request.work == "decode" else 6)
    mlp = rows * (2 * c.d_model + 3 * width) * 2
    scores = 4 * held * request.tokens * request.context * c.n_heads // model
    scores = scores if request.tokens > 1 else 0  # those of one query are fused
    if request.trains:
        kept = 2 * rows * c.d_model * c.n_layers
        return 2 * logits + kept + 2 * mlp + 2 * scores + 2 * _gathered(program, split)
    return max(logits, mlp + 2 * scores) + 2 * _gathered(program, split)


def _gathered(program: Program, split: bool) -> int:
    """Return the largest number of bytes of a layer, or of the output matrix, after gathering."""
    if not split:
        return 0
    at, sizes = dict(jq.core.path_leaves(program.placed)), {"layers": 0, "head": 0}
    for path, w in jq.core.path_leaves(program.weights):
        part = path.split("/")[0]
        if part in sizes:
            for a, s in zip(jax.tree.leaves(w), jax.tree.leaves(at[path]), strict=True):
                whole = math.prod(_without(s, "data", a.ndim).shard_shape(a.shape))
                layers = a.shape[0] if part == "layers" else 1
                sizes[part] += whole // layers * a.dtype.itemsize
    return max(sizes.values())


def _of_weight(
    request: PodRequest, w: PyTree, at: PyTree, sizes: dict[str, int], path: str
) -> Iterator[Collective]:
    if len(w.shape) < 2 + path.startswith("layers/"):
        return
    split = gathers(request, sizes)
    layers = w.shape[0] if path.startswith("layers/") else 1
    passes = layers * GATHERED[request.work]
    data = sizes.get("data", 1)
    if split:
        for a, s in zip(jax.tree.leaves(w), jax.tree.leaves(at), strict=True):
            if any("data" in part for part in axes_of(s.spec, a.ndim)):
                shape = _without(s, "data", a.ndim).shard_shape(a.shape)[layers > 1 :]
                yield Collective("all-gather", NAMES.get(a.dtype.name, "f32"), shape, data, passes)
    matrix = at.data["codes"] if isinstance(w, jq.QTensor) else at
    rows, columns = axes_of(matrix.spec, len(w.shape))[-2:]
    own = lambda part: tuple(name for name in part if not (split and name == "data"))
    tokens = request.batch * request.tokens // (data if split else 1)
    ways = [(own(rows), w.shape[-1], own(columns), layers)]
    if request.trains:  # forward twice, and the transposed product
        ways = [(own(rows), w.shape[-1], own(columns), 2 * layers)]
        ways.append((own(columns), w.shape[-2], own(rows), layers))
    for summed, length, kept, times in ways:
        group = math.prod(sizes[name] for name in summed)
        shape = (tokens, length // math.prod(sizes[name] for name in kept))
        yield Collective("all-reduce", "bf16", shape, group, times)


def _without(s: NamedSharding, axis: str, ndim: int) -> NamedSharding:
    """Return a sharding without one axis of its mesh."""
    parts = [tuple(n for n in part if n != axis) or None for part in axes_of(s.spec, ndim)]
    return NamedSharding(s.mesh, jax.sharding.PartitionSpec(*parts))
