"""Stage: what bounds the model on every chip."""

import jaxquant as jq
from jaxquant.core.tree import leaf_bytes, tree_bytes
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.runs.analysis.subjects import Subjects
from jaxquant_models.schemas.report import ChipRow
from pallas_kernels.cost.chips import CHIPS, Chip

CACHED = 2  # bytes of a key's or value's number in the cache: bfloat16
SOURCE = "pallas_kernels.cost.chips (the makers' data sheets)"


def roofline_rows(subjects: Subjects) -> list[ChipRow]:
    """Return the bounds of MODEL on every chip.

    Args:
      subjects: the models and the text.
    """
    config, params = subjects.model.config, subjects.model.params
    read = tree_bytes(params)
    table = dict(jq.core.path_leaves(params))["embed/embedding"]
    multiplied = jq.size(params).weights
    if not config.tie_embeddings:  # of which one row is looked up
        read -= leaf_bytes(table)
        multiplied -= table.size
    context = min(subjects.request.context, config.max_position)
    cache = context * cache_bytes_per_token(config)
    attention = 4 * context * config.n_layers * config.n_heads * config.head_dim
    held = tree_bytes(params) + cache
    return [
        _row(name, chip, read, cache, 2.0 * multiplied + attention, held, context)
        for name, chip in CHIPS.items()
    ]


def cache_bytes_per_token(config: LlamaConfig) -> int:
    """Return the bytes that a token takes in the cache of keys and values.

    Args:
      config: the architecture.
    """
    return 2 * CACHED * config.n_layers * config.n_kv_heads * config.head_dim


def _row(
    name: str, chip: Chip, read: int, cache: int, operations: float, held: int, context: int
) -> ChipRow:
    memory, compute = (read + cache) / chip.bandwidth, operations / chip.flops
    # Of B sequences, time of compute B F / peak meets that of memory (W + B C) / bandwidth.
    margin = compute - cache / chip.bandwidth
    prefill = max(read / chip.bandwidth, context * operations / chip.flops)
    return ChipRow(
        chip=name, source=SOURCE, fits=held <= chip.memory, decode=1 / max(memory, compute),
        prefill=context / prefill, wall="memory" if memory >= compute else "compute",
        critical_batch=read / chip.bandwidth / margin if margin > 0 else None,
        intensity=operations / (read + cache), ridge=chip.flops / chip.bandwidth, joules=None,
    )  # fmt: skip
