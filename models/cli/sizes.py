"""Sizes of a model and of its cache, as shown in reports."""

from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.core.tree import tree_bytes
from jaxquant.formats.kv_cache import KVFormat
from jaxquant_models.architectures.config import LlamaConfig


def sizes_of(params: PyTree) -> dict[str, float]:
    """Return bits per quantized weight, bits over all weights, and bytes of all parameters.

    Args:
      params: parameters, packed or not.
    """
    return {
        "bits_per_weight": jq.bits_per_weight(params),
        "bits_over_all_weights": jq.size(params).bits_per_weight,
        "bytes": tree_bytes(params),
    }


def kv_sizes(kv: KVFormat | None, config: LlamaConfig) -> dict[str, float]:
    """Return bits per cached value and bytes per token, or {} for an unquantized cache.

    Args:
      kv: the cache format, or None.
      config: the architecture.
    """
    if kv is None:
        return {}
    per_token = kv.bytes_per_token(config.n_layers, config.n_kv_heads, config.head_dim)
    return {"kv_bits_per_value": kv.bits_per_value, "kv_bytes_per_token": per_token}
