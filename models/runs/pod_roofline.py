"""A lower bound on the time of a step: memory, compute, dequantization and communication."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.adapters.lora import base_of
from jaxquant.core.activations import kernel_form
from jaxquant.core.tree import leaf_bytes
from jaxquant.distributed.collectives import Collective
from jaxquant.theory.roofline import kernel_rate
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.runs.pod_bytes import tree_device_bytes
from jaxquant_models.runs.pod_formula import EXPERTS, GATHERED, PASSES, gathered
from jaxquant_models.runs.pod_mesh import Axes
from jaxquant_models.runs.pod_programs import Program, gathers
from jaxquant_models.runs.pod_request import PodRequest
from pallas_kernels.cost import chips
from pallas_kernels.cost.topologies import GENERATIONS


class StepTime(NamedTuple):
    """Lower bounds on the time of a step, in seconds, one for each resource.

    The resources work at the same time, so the largest bound is that of the step. Neither the links
    within a chip nor the missing links at the edges of a slice are modelled: every device receives
    at an equal share of the published bandwidth of its chip.

    Attributes:
      memory: time to read and write weights and cache and, in training, the optimizer's state and
        stored activations.
      compute: time to multiply at the peak rate of the chip.
      dequantize: time to dequantize codes; None if the rate of a kernel is not known.
      communication: time to receive what other devices send.
    """

    memory: float
    compute: float
    dequantize: float | None
    communication: float

    @property
    def seconds(self) -> float:
        """The lower bound on the time of a step, in seconds."""
        return max(self.known.values())

    @property
    def bound(self) -> str:
        """The name of the largest bound."""
        return max(self.known, key=lambda name: self.known[name])

    @property
    def known(self) -> dict[str, float]:
        """The bounds that are known, by name."""
        return {name: time for name, time in self._asdict().items() if time is not None}


def step_time(
    request: PodRequest, program: Program, mesh: Axes, collectives: Sequence[Collective]
) -> StepTime:
    """Return the lower bounds on the time of a step.

    Args:
      request: the request.
      program: the program of the request.
      mesh: name and size of each mesh axis.
      collectives: the collectives of the program.
    """
    chip, passes = chips.CHIPS[request.topology.chip], PASSES[request.workload]
    at = dict(jq.core.path_leaves(program.placed))
    each = [
        _of_weight(request, path, w, at[path], dict(mesh))
        for path, w in jq.core.path_leaves(program.weights)
        if len(w.shape) >= 2 + path.startswith("layers/")
    ]
    read, compute, dequantize = (sum(times) for times in zip(*each, strict=True))
    compute += _attention(request, dict(mesh)) / chip.flops
    parts = GENERATIONS[request.topology.chip].devices  # these share the memory and units of a chip
    return StepTime(
        parts * (passes * read + _kept(request, program, dict(mesh))) / chip.bandwidth,
        parts * passes * compute,
        parts * passes * dequantize if math.isfinite(dequantize) else None,
        sum(one.received for one in collectives) / request.topology.ici_bandwidth,
    )


def _of_weight(
    request: PodRequest, path: str, w: PyTree, at: PyTree, sizes: dict[str, int]
) -> tuple[float, float, float]:
    """Return the cost of one product with a weight for a device that has its chip to itself.

    Returns:
      Bytes moved to and from memory, seconds of multiplication, and seconds of dequantization
      (NaN if the rate is not known).
    """
    name, split = request.topology.chip, gathers(request, sizes)
    chip, tokens = chips.CHIPS[name], request.batch * request.tokens
    used, seen = _used(request.config, path, tokens)
    moved = float(tree_device_bytes(w, at))
    if split and used:
        moved = sum(_with_gathering(request.workload, *one) for one in _arrays(w, at))
        at, tokens = gathered(w, at), tokens // sizes["data"]
    matrix, form = (w.data["codes"], kernel_form(w.activations)) if _packed(w) else (w, "float")
    place = at.data["codes"] if _packed(w) else at
    part = math.prod(place.shard_shape(matrix.shape)) / math.prod(matrix.shape)
    size = part * math.prod(w.shape)
    compute = 2 * size * used * tokens / chips.peak(name, form)
    dequantize = 0.0
    if _packed(w) and used:
        rate = kernel_rate(_frozen(w), name)
        moved += 0 if rate else 4 * size  # without a kernel, bfloat16 is written and read again
        known = 0 < rate < math.inf
        dequantize = seen * size / (rate * chip.clock * chip.cores) if known else math.nan
    return seen * moved, compute, dequantize


def _frozen(w: jq.QTensor) -> jq.QTensor:
    """Return the packed matrix under an adapter, whose own kernels compute the product."""
    if not isinstance(w.format, jq.adapters.Adapted) or w.format.adapter.floating:
        return w
    return dataclasses.replace(w, data=base_of(w.data), format=w.format.format)


def _arrays(w: PyTree, at: PyTree) -> Iterator[tuple[PyTree, PyTree]]:
    return zip(jax.tree.leaves(w), jax.tree.leaves(at), strict=True)


def _with_gathering(workload: str, a: PyTree, at: PyTree) -> float:
    """Return the bytes of an array that one product moves; a gathered array is written and read."""
    own, whole = tree_device_bytes(a, at), tree_device_bytes(a, gathered(a, at))
    share = GATHERED[workload] / PASSES[workload]
    return share * own + (share + 1) * whole if whole > own else own


def _packed(w: PyTree) -> bool:
    return isinstance(w, jq.QTensor)


def _used(config: LlamaConfig, path: str, tokens: int) -> tuple[float, float]:
    """Return the part of a weight that multiplies one token, and the part that a step reads.

    A look-up reads one row for each token. Tokens are assumed to choose experts at random and
    evenly over the devices; a step reads only the experts that some token chose.
    """
    if path == "embed/embedding" and not config.tie_embeddings:
        return 0.0, min(1.0, tokens / config.vocab_size)
    if not path.startswith(EXPERTS):
        return 1.0, 1.0
    part = config.experts_per_token / config.n_experts
    return part, 1 - (1 - part) ** tokens


def _kept(request: PodRequest, program: Program, sizes: dict[str, int]) -> float:
    """Return the bytes of cache, optimizer state and stored inputs that a device moves."""
    here = lambda name: tree_device_bytes(program.arguments[name], program.shardings[name])
    if not request.trains:
        return here("cache")
    c, tokens = request.config, request.batch * request.tokens // sizes.get("data", 1)
    inputs = 2 * 2 * tokens * c.d_model * c.n_layers
    return 2 * here("optimizer") + 2 * here("trained") + inputs


def _attention(request: PodRequest, sizes: dict[str, int]) -> float:
    """Return the number of operations of attention on one device, causal masking considered."""
    c, data = request.config, sizes.get("data", 1)
    seen = request.context if request.workload == "decode" else (request.context + 1) / 2
    parts = sizes.get("model", 1) * (1 if request.batch % data else data)
    return 4 * request.batch * request.tokens * seen * c.n_heads * c.head_dim * c.n_layers / parts


def weight_bytes(weights: PyTree) -> int:
    """Return the bytes of all weights, summed over all devices and without padding.

    Args:
      weights: tree of shapes.
    """
    return sum(leaf_bytes(w) for _, w in jq.core.path_leaves(weights))
