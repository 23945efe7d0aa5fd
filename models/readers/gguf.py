"""GGUF files: configuration, tokenizer and weights, dequantized tensor by tensor.

Quantized blocks are expanded by `gguf.quants.dequantize`, for any mixture of types in the file.
"""

import dataclasses
from pathlib import Path

import gguf
import numpy as np

from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import Llama
from jaxquant_models.readers.gguf_file import Tensor, open_gguf
from jaxquant_models.readers.gguf_metadata import config_from_gguf
from jaxquant_models.readers.gguf_tokenizer import tokenizer_from_gguf
from jaxquant_models.readers.tokenizer import Tokenizer
from jaxquant_models.readers.weights import Weights, check_room, tensor_names

_LAYER = {
    "layers/attn/q/kernel": "attn_q.weight",
    "layers/attn/k/kernel": "attn_k.weight",
    "layers/attn/v/kernel": "attn_v.weight",
    "layers/attn/o/kernel": "attn_output.weight",
    "layers/attn/q/bias": "attn_q.bias",
    "layers/attn/k/bias": "attn_k.bias",
    "layers/attn/v/bias": "attn_v.bias",
    "layers/attn/o/bias": "attn_output.bias",
    "layers/attn/q_norm/scale": "attn_q_norm.weight",
    "layers/attn/k_norm/scale": "attn_k_norm.weight",
    "layers/mlp/gate/kernel": "ffn_gate.weight",
    "layers/mlp/up/kernel": "ffn_up.weight",
    "layers/mlp/down/kernel": "ffn_down.weight",
    "layers/mlp/gate/bias": "ffn_gate.bias",
    "layers/mlp/up/bias": "ffn_up.bias",
    "layers/mlp/down/bias": "ffn_down.bias",
    "layers/mlp/router/kernel": "ffn_gate_inp.weight",
    "layers/mlp/experts/gate/kernel": "ffn_gate_exps.weight",
    "layers/mlp/experts/up/kernel": "ffn_up_exps.weight",
    "layers/mlp/experts/down/kernel": "ffn_down_exps.weight",
    "layers/attn_norm/scale": "attn_norm.weight",
    "layers/mlp_norm/scale": "ffn_norm.weight",
}
TENSORS = {
    "embed/embedding": "token_embd.weight",
    "norm/scale": "output_norm.weight",
    "head/kernel": "output.weight",
    **{path: "blk.{}." + name for path, name in _LAYER.items()},
}
ROPE_FACTORS = "rope_freqs.weight"


def read_gguf(path: str | Path) -> tuple[LlamaConfig, Weights, Tokenizer]:
    """Open a model in a GGUF file; its weights are read later.

    Args:
      path: a `.gguf` file of architecture llama, qwen2, qwen3 or qwen3moe.
    Returns:
      (config, weights, tokenizer).
    Raises:
      ValueError: the file is not GGUF, truncated or unsupported, or has wrong tensors; the message
        is one line.
    """
    fields, tensors, nbytes = open_gguf(Path(path))
    config = config_from_gguf(fields)
    check_room(config, nbytes, str(path))
    config = _complete(config, tensors)
    tokenizer = tokenizer_from_gguf(fields)
    tokenizer.check_rows(config.vocab_size)
    llama = Llama(config)
    names = tensor_names(llama, TENSORS)
    reordered = _reordered_heads(str(fields["general.architecture"]), config, names)

    def read(name: str) -> np.ndarray:
        value = _dequantize(tensors[name])
        return _half_split(value, reordered[name]) if name in reordered else value

    shapes = {name: tensor.shape for name, tensor in tensors.items() if name != ROPE_FACTORS}
    return config, Weights(llama, TENSORS, shapes, read), tokenizer


def _complete(config: LlamaConfig, tensors: dict[str, Tensor]) -> LlamaConfig:
    """Set the options that GGUF expresses by the presence of a tensor."""
    scaling = config.rope_scaling
    if ROPE_FACTORS in tensors:
        factors = _dequantize(tensors[ROPE_FACTORS])
        usable = np.isfinite(factors) & (factors > 0)
        if factors.shape != (config.head_dim // 2,) or not usable.all():
            raise ValueError(f"{ROPE_FACTORS} must be {config.head_dim // 2} positive numbers")
        scaling = tuple((factors * (scaling or 1.0)).tolist())
    return dataclasses.replace(
        config,
        rope_scaling=scaling,
        tie_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        o_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
    )


def _dequantize(tensor: Tensor) -> np.ndarray:
    try:
        with np.errstate(all="ignore"):  # non-finite values are detected later, by the caller
            return gguf.quants.dequantize(tensor.data, tensor.kind)
    except NotImplementedError:
        raise ValueError(
            f"tensor {tensor.name} has type {tensor.kind.name}, which gguf cannot read"
        ) from None


def _reordered_heads(arch: str, config: LlamaConfig, names: dict[str, list[str]]) -> dict[str, int]:
    """Return the tensors whose rows llama.cpp reorders, mapped to their number of heads."""
    if arch != "llama":
        return {}
    heads = {"q": config.n_heads, "k": config.n_kv_heads}
    paths = {f"layers/attn/{p}/{leaf}": n for p, n in heads.items() for leaf in ("kernel", "bias")}
    return {name: n for path, n in paths.items() for name in names.get(path, [])}


def _half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order for "llama": pairs (2i, 2i + 1) become (i, i + head_dim / 2)."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
