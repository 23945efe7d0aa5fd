"""Stage: what bounds the model on every chip, and the energy of a token."""

import dataclasses

import jaxquant as jq
from jaxquant.core.paths import matches
from jaxquant.theory.energy import energy_per_token
from jaxquant.theory.energy_constants import NODES, EnergyConstants
from jaxquant.theory.hardware import HARDWARE, Hardware
from jaxquant.theory.serving_roofline import critical_batch, decode, prefill
from jaxquant.theory.workload import Attention, Workload, workload
from jaxquant_models.architectures.llama import LAYER_MATRICES
from jaxquant_models.runs.analysis.subjects import Subjects
from jaxquant_models.schemas.report import ChipRow, Energy

NODE = "7 nm"  # the technology whose constants are used
# The memory of the chips for which a constant is known; a key of `energy_constants.MEMORIES`.
MEMORY = {
    "v4": "HBM2", "a100": "HBM2E", "h200": "HBM3E", "b200": "HBM3E", "tpu7x": "HBM3E",
    "m4": "LPDDR5X", "m4 pro": "LPDDR5X", "m4 max": "LPDDR5X",
    "laptop ddr5-5600": "DDR5", "laptop lpddr5x-8533": "LPDDR5X",
}  # fmt: skip
WIDTHS = (16.0, 8.0, 6.0, 4.0, 3.0, 2.0, 1.58)  # bits per weight of the figure


def workload_of(subjects: Subjects) -> Workload:
    """Return what a token of MODEL asks of a machine.

    Args:
      subjects: the models and the text.
    """
    model = subjects.model
    c = model.config
    sites = dataclasses.replace(model, params=jq.dequantize(model.params)).sites()
    attention = Attention(c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim)
    last = ("embed/embedding",) if c.tie_embeddings else ("head/kernel",)
    chosen = c.experts_per_token if c.n_experts else None
    return workload(
        model.params, attention, sites=sites, experts_per_token=chosen, last=last,
        name=subjects.request.model,
    )  # fmt: skip


def context_of(subjects: Subjects) -> int:
    """Return the number of tokens in the cache: that of the request, or all that MODEL has."""
    return min(subjects.request.context, subjects.model.config.max_position)


def roofline_rows(subjects: Subjects) -> list[ChipRow]:
    """Return the bounds of MODEL on every chip.

    Args:
      subjects: the models and the text.
    """
    of, context = workload_of(subjects), context_of(subjects)
    return [_row(of, hardware, context) for hardware in HARDWARE.values()]


def _row(of: Workload, hardware: Hardware, context: int) -> ChipRow:
    point, prompt = decode(of, hardware, 1, context), prefill(of, hardware, context)
    joules = None
    if (memory := MEMORY.get(hardware.name)) is not None:
        joules = energy_per_token(of, NODES[NODE].with_memory(memory), 1, context).total
    return ChipRow(
        chip=hardware.title,
        source=f"{hardware.source} ({hardware.date})",
        fits=point.fits,
        decode=point.tokens_per_second,
        prefill=prompt.tokens_per_second,
        wall=point.wall,
        critical_batch=critical_batch(of, hardware, context),
        intensity=point.intensity,
        ridge=point.ridge,
        joules=joules,
        bandwidth=hardware.bandwidth,
        prefill_intensity=prompt.intensity,
    )


def energy(subjects: Subjects) -> Energy:
    """Return the energy of a decoded token of MODEL under the constants of `NODE`.

    Args:
      subjects: the models and the text.
    """
    of, context, constants = workload_of(subjects), context_of(subjects), NODES[NODE]
    found = energy_per_token(of, constants, 1, context)
    widths = [(bits, *_at(of, bits, constants, context)) for bits in WIDTHS]
    return Energy(
        node=f"{NODE}, {constants.memory_kind}",
        constants=constants.constants(),
        sources=constants.sources(),
        weights=found.weights,
        cache=found.cache,
        arithmetic=found.arithmetic,
        landauer=found.landauer,
        by_bits=widths,
    )


def _at(of: Workload, bits: float, constants: EnergyConstants, context: int) -> tuple[float, float]:
    """Return movement and arithmetic if the matrices of the layers had other widths."""
    sized = tuple(
        dataclasses.replace(w, bytes=round(w.multiplied * bits / 8))
        if matches(w.path, LAYER_MATRICES)
        else w
        for w in of.operands
    )
    found = energy_per_token(dataclasses.replace(of, operands=sized), constants, 1, context)
    return found.movement, found.arithmetic
