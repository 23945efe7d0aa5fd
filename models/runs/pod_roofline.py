"""A lower bound on the time of a step on a slice: memory, multiplication, unpacking, exchange."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.core.activations import kernel_form
from jaxquant.core.tree import leaf_bytes
from jaxquant.distributed.collectives import Collective
from jaxquant.theory.roofline import kernel_rate
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.runs.pod_bytes import tree_device_bytes
from jaxquant_models.runs.pod_formula import PASSES
from jaxquant_models.runs.pod_mesh import Axes
from jaxquant_models.runs.pod_programs import Program, gathers
from jaxquant_models.runs.pod_request import PodRequest
from pallas_kernels.cost import chips
from pallas_kernels.cost.topologies import GENERATIONS

EXPERTS = "layers/mlp/experts/"


class StepTime(NamedTuple):
    """Seconds that a step takes at least, by what limits it; these go on at the same time.

    Attributes:
      memory: reading and writing weights, cache and what training keeps.
      multiplying: multiplication at the peak of the chip.
      unpacking: unpacking codes, where the rate of the kernel is known.
      exchange: receiving what the other devices send.
    """

    memory: float
    multiplying: float
    unpacking: float
    exchange: float

    @property
    def seconds(self) -> float:
        """The time of a step at least."""
        return max(self)

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(self._fields, key=lambda name: getattr(self, name))


def step_time(
    request: PodRequest, program: Program, mesh: Axes, sent: Sequence[Collective]
) -> StepTime:
    """Return the least time of a step.

    Args:
      request: the request.
      program: its program.
      mesh: name and size of each mesh axis.
      sent: its collectives.
    """
    where, devices = request.where, request.where.devices
    chip, parts = chips.CHIPS[where.chip], GENERATIONS[where.chip].devices
    tokens, passes = request.batch * request.tokens, PASSES[request.work]
    share = 1 / math.prod(n for name, n in mesh if name != "data")  # of a weight, once gathered
    split = gathers(request, dict(mesh))
    multiplying = _attention(request) * passes / chip.flops / devices
    unpacking = read = 0.0
    for path, w in jq.core.path_leaves(program.weights):
        if len(w.shape) < 2 + path.startswith("layers/"):
            continue
        used, seen = _used(request.config, path, tokens)
        size = math.prod(w.shape)
        form = kernel_form(w.activations) if isinstance(w, jq.QTensor) else "float"
        peak = chips.peak(where.chip, form)
        multiplying += 2 * size * used * tokens * passes / peak / devices
        own = share if split else 1 / devices
        gathered = 2 * share * split  # written and read
        read += passes * seen * leaf_bytes(w) * (1 / devices + gathered)
        rate = kernel_rate(w, where.chip) if isinstance(w, jq.QTensor) else 0
        if rate:
            per_device = rate * chip.clock * chip.cores / parts
            unpacking += passes * seen * size * own / per_device
    read += _kept(request, program)
    exchange = sum(one.received for one in sent) / where.incoming
    return StepTime(read / (chip.bandwidth / parts), multiplying, unpacking, exchange)


def _used(config: LlamaConfig, path: str, tokens: int) -> tuple[float, float]:
    """Return which part of a weight a token is multiplied by, and which part is read in a step.

    A look-up reads a row for each token. Experts are taken as chosen at random.
    """
    if path == "embed/embedding" and not config.tie_embeddings:
        return 0.0, min(1.0, tokens / config.vocab_size)
    if not path.startswith(EXPERTS):
        return 1.0, 1.0
    part = config.experts_per_token / config.n_experts
    return part, 1 - (1 - part) ** tokens


def _kept(request: PodRequest, program: Program) -> float:
    """Return the bytes of cache, optimizer and kept activations that a device reads and writes."""
    here = lambda name: tree_device_bytes(program.arguments[name], program.shardings[name])
    if not request.trains:
        return here("cache")
    c, tokens = request.config, request.batch * request.tokens
    inputs = 2 * 2 * tokens * c.d_model * c.n_layers / request.where.devices
    return 2 * here("optimizer") + 2 * here("trained") + inputs


def _attention(request: PodRequest) -> float:
    """Return the operations of scores and sums of attention over what each token sees."""
    c = request.config
    seen = request.context if request.work == "decode" else (request.context + 1) / 2
    return 4.0 * request.batch * request.tokens * seen * c.n_heads * c.head_dim * c.n_layers


def weight_bytes(weights: PyTree) -> int:
    """Return the bytes of all weights, without padding.

    Args:
      weights: tree of shapes.
    """
    return sum(leaf_bytes(w) for _, w in jq.core.path_leaves(weights))
