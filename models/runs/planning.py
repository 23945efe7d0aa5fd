"""What quantizing a model layer by layer will take of memory.

Nothing is read but headers. XLA says what each of the programs takes that are compiled for the
shapes of the model; the rest is counted.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.calibration.one_block import calibration_memory
from jaxquant.core.tree import tree_bytes
from jaxquant.ptq.round_stacked import rounding_memory
from jaxquant.recipes.recipe import WeightEntry
from jaxquant_models.readers.model import Model
from jaxquant_models.runs.healing import BLOCK_SEQUENCES
from jaxquant_models.runs.needs import Needs
from jaxquant_models.runs.passes import (
    IN_MEMORY,
    functions,
    layer_outline,
    outer_outline,
    passes_memory,
    states_bytes,
)
from jaxquant_models.runs.quantization_request import QuantizationRequest
from jaxquant_models.runs.sequences import MEASURED, context_length

LIBRARIES = 430_000_000  # bytes of Python, JAX, Orbax and the programs that round to nearest
COMPILED = 200_000_000  # bytes that compiling the programs of other methods leaves behind
LAYERS = "layers/"


class Stage(NamedTuple):
    """A stage of a run, and the largest number of bytes that it has in memory."""

    name: str
    bytes: int


class Expected(NamedTuple):
    """What a run is expected to take.

    Attributes:
      stages: the stages and their memory.
      layer: bytes of one layer in float32.
      outer: bytes of embedding and output matrix in float32.
      statistics: bytes of the statistics of one layer.
      states: bytes of the hidden states.
      in_files: whether they are kept in files.
    """

    stages: list[Stage]
    layer: int
    outer: int
    statistics: int
    states: int
    in_files: bool

    @property
    def peak(self) -> int:
        """The largest number of bytes in memory."""
        return max(stage.bytes for stage in self.stages)

    @property
    def bound(self) -> int:
        """The bound of `runs.layerwise`."""
        return max(2 * (self.layer + self.statistics), 3 * self.outer // 2) + 10**9


def expected(
    outline: Model, plan: jq.recipes.Plan, needs: Needs, request: QuantizationRequest
) -> Expected:
    """Return what a layer-by-layer quantization takes.

    Args:
      outline: the model, with shapes in place of arrays.
      plan: the resolved recipe.
      needs: what its methods require.
      request: the request.
    """
    weighting, length = request.weighting, context_length(outline)
    layer, outer = layer_outline(outline), outer_outline(outline)
    of_layer, of_outer = tree_bytes(layer), tree_bytes(outer)
    # Beside them in float32 are the pages of one of them as its file has it.
    last_read = max(4 * a.size for a in jax.tree.leaves(outer)) // 2
    compiled = COMPILED if needs.statistics else 0
    stages = [Stage("embedding and output matrix", of_outer + last_read + compiled)]
    states = statistics = every = 0
    if needs.statistics:
        tokens = request.calibration_tokens // length * length
        every = states_bytes(outline.config, max(length, tokens))
        states = every if every <= IN_MEMORY else 0
        forward, last = passes_memory(outline, length)
        stages.append(Stage("hidden states", states + of_layer + forward))
        if weighting == "gradient":
            stages.append(Stage("gradients at the output", states + of_outer + last))
        outputs = [e.path for e in plan.weights if e.method.needs_output]
        statistics, work = _calibration(outline, layer, needs, weighting, length, outputs)
        held = states + of_layer + statistics + compiled
        stages.append(Stage("statistics", held + work))
    for path, held in _rounding(outline, plan, needs, weighting):
        stages.append(Stage(f"rounding {path}", states + held + compiled))
    one = 4 * length * outline.config.d_model  # bytes of the hidden states of a sequence
    if request.recipe is None:  # those of the model, and with each kind of weight rounded
        kinds = 1 + len(plan.weights)
        stages.append(Stage("comparing", states + 2 * of_layer + kinds * MEASURED * one))
    if request.heals:  # its input, and the outputs of both
        stages.append(Stage("healing", 3 * of_layer + 3 * BLOCK_SEQUENCES * one + compiled))
    stages = [Stage(name, LIBRARIES + size) for name, size in stages]
    return Expected(stages, of_layer, of_outer, statistics, every, every > IN_MEMORY)


def least(outline: Model, plan: jq.recipes.Plan, needs: Needs, weighting: str) -> int:
    """Return the bytes that a layer-by-layer quantization has in memory at one time at least.

    They are those of the libraries and one layer with its statistics, or embedding and output
    matrix. Nothing is compiled.

    Args:
      outline, plan, needs, weighting: as in `expected`.
    """
    held = _by_input(outline, plan, needs, weighting)
    alone = max(tree_bytes(layer_outline(outline)), tree_bytes(outer_outline(outline)))
    return LIBRARIES + max(alone, sum(size for _, size in held))


def served_bytes(plan: jq.recipes.Plan) -> int:
    """Return the bytes of a model in memory when it is served.

    Packed weights are as in the checkpoint, and so is an embedding that is not the output matrix
    too; the others are float32.

    Args:
      plan: the resolved recipe.
    """
    kept = {entry.path for entry in plan.weights}
    if any(entry.path.startswith("head/") for entry in plan.entries):
        kept.add("embed/embedding")
    size = lambda entry: entry.bytes if entry.path in kept else 4 * entry.size
    return sum(map(size, plan.entries))


def _calibration(
    outline: Model, layer: PyTree, needs: Needs, weighting: str, length: int, outputs: list[str]
) -> tuple[int, int]:
    run = functions(outline.config, jax.numpy.dtype(outline.dtype))
    h = jax.ShapeDtypeStruct((1, length, outline.config.d_model), outline.dtype)
    return calibration_memory(
        run.block, layer, h, weighting=weighting, gram=needs.gram,
        output=tuple(path.removeprefix(LAYERS) for path in outputs), sample=needs.sample,
    )  # fmt: skip


def _rounding(
    outline: Model, plan: jq.recipes.Plan, needs: Needs, weighting: str
) -> Iterator[tuple[str, int]]:
    """Yield (path, bytes in memory while its matrices are rounded) of the weights of a layer.

    What is left of the layer and of its statistics counts too; see `LayerwiseJob`.
    """
    held = _by_input(outline, plan, needs, weighting)
    for n, (members, _) in enumerate(held):
        for entry in members:
            yield entry.path, sum(size for _, size in held[n:]) + rounding_memory(entry)


def _by_input(
    outline: Model, plan: jq.recipes.Plan, needs: Needs, weighting: str
) -> list[tuple[list[WeightEntry], int]]:
    """Return the weights of a layer by input, in the order of rounding, and the bytes of each."""
    sites = outline.sites()
    groups: dict[tuple[str, int, str], list[WeightEntry]] = {}
    for entry in plan.weights:
        if entry.path.startswith(LAYERS):
            module, k = entry.path.split("/")[1], entry.matrix[-2]
            groups.setdefault((module, k, sites[entry.path].input or entry.path), []).append(entry)
    layers = outline.config.n_layers
    return [(groups[key], _held(groups[key], needs, weighting, layers)) for key in sorted(groups)]


def _held(members: list[WeightEntry], needs: Needs, weighting: str, layers: int) -> int:
    """Return the bytes of the weights that read one input, and of their statistics, in a layer."""
    weights = sum(4 * entry.size for entry in members) // layers
    k = members[0].matrix[-2]
    experts = math.prod(members[0].matrix[1:-2])  # 1 without any; they have moments of their own
    moments = 4 * k * k * (len(members) if weighting == "gradient" else 1) * needs.gram
    outputs = sum(4 * entry.matrix[-1] ** 2 for entry in members if entry.method.needs_output)
    return weights + experts * (moments + outputs)
