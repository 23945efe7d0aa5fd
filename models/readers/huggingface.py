"""Hugging Face folders: config.json, safetensors (single or sharded) and tokenizer.json."""

import json
from pathlib import Path

import numpy as np
from flax import traverse_util
from jaxtyping import PyTree
from safetensors.numpy import save_file

from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import Llama
from jaxquant_models.readers.chat_template import ChatTemplate
from jaxquant_models.readers.dfloat11 import CONFIG, DFloat11Tensors
from jaxquant_models.readers.huggingface_config import (
    config_from_hf,
    config_to_hf,
    read_config_json,
)
from jaxquant_models.readers.safetensors import Tensors
from jaxquant_models.readers.tokenizer import Tokenizer
from jaxquant_models.readers.weights import Weights, check_room, tensor_names, tensor_shapes
from jaxquant_models.schemas.files import ShardIndex, TokenizerConfig
from jaxquant_models.schemas.strict import checked, read_json, read_text_file

_BOTH = (("kernel", "weight"), ("bias", "bias"))
_LAYER = {
    **{f"attn/{p}/{ours}": f"self_attn.{p}_proj.{hf}" for p in "qkvo" for ours, hf in _BOTH},
    **{
        f"mlp/{p}/{ours}": f"mlp.{p}_proj.{hf}"
        for p in ("gate", "up", "down")
        for ours, hf in _BOTH
    },
    "attn/q_norm/scale": "self_attn.q_norm.weight",
    "attn/k_norm/scale": "self_attn.k_norm.weight",
    "attn_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
}  # fmt: skip
_EXPERTS = {  # of Qwen3-MoE
    "mlp/router/kernel": "mlp.gate.weight",
    **{f"mlp/experts/{p}/kernel": "mlp.experts.{}." + p + "_proj.weight"
       for p in ("gate", "up", "down")},
}  # fmt: skip
_MIXTRAL = {
    "mlp/router/kernel": "block_sparse_moe.gate.weight",
    **{f"mlp/experts/{p}/kernel": "block_sparse_moe.experts.{}." + w + ".weight"
       for p, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))},
}  # fmt: skip
TENSORS = {
    "embed/embedding": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
    **{f"layers/{path}": "model.layers.{}." + name for path, name in (_LAYER | _EXPERTS).items()},
}
TensorFile = Tensors | DFloat11Tensors
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def tensors_of(config: LlamaConfig) -> dict[str, str]:
    """Return the tensor of every parameter, as in `weights.tensor_names`.

    Args:
      config: the architecture. With experts and no norms of queries and keys, it is Mixtral's,
        whose tensors have names of their own.
    """
    own = _MIXTRAL if config.n_experts and not config.qk_norm else {}
    return TENSORS | {f"layers/{path}": "model.layers.{}." + name for path, name in own.items()}


def read_hf(folder: str | Path) -> tuple[LlamaConfig, Weights, Tokenizer]:
    """Open a model in a Hugging Face folder; its weights are read later.

    Args:
      folder: holds config.json, tokenizer.json, and model.safetensors or its shards and index. With
        `dfloat11_config` in config.json, it holds any safetensors files, and their compressed
        weights are decoded when they are read.
    Returns:
      (config, weights, tokenizer).
    Raises:
      ValueError: a file, shard or tensor is missing, unreadable or not as expected; the message is
        one line.
    """
    folder = Path(folder)
    hf = read_config_json(folder)
    config = config_from_hf(hf)
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json", read_chat_template(folder))
    tokenizer.check_rows(config.vocab_size)
    if CONFIG in hf:
        compressed = DFloat11Tensors(folder, hf[CONFIG])
        tensors: dict[str, TensorFile] = dict.fromkeys(compressed.shapes, compressed)
    else:
        tensors = dict(tensor_files(folder))
    nbytes = sum(file.nbytes for file in set(tensors.values()))
    check_room(config, nbytes, str(folder / "config.json"))
    model, templates = Llama(config), tensors_of(config)
    wanted = tensor_shapes(model, templates)
    shapes = {
        name: file.shaped(name, wanted.get(name))
        for name, file in tensors.items()
        if not _ignored(name, config)
    }
    read = lambda name: tensors[name].read(name).reshape(shapes[name])
    ahead = lambda name: tensors[name].prefetch(name)
    return config, Weights(model, templates, shapes, read, ahead), tokenizer


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """Return the chat template of a Hugging Face folder, or None if it has none.

    The file chat_template.jinja takes precedence over tokenizer_config.json, as in Transformers.

    Args:
      folder: the folder.
    Raises:
      ValueError: a file is malformed.
    """
    options, own = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    data = read_json(options) if options.exists() else {}
    held = checked(TokenizerConfig, data, options.name)
    source = read_text_file(own) if own.exists() else held.template
    return None if source is None else ChatTemplate(source, held.tokens)


def save_hf(folder: str | Path, config: LlamaConfig, params: PyTree, tokenizer_json: str) -> None:
    """Write a folder that `read_hf` and Transformers can read, with one safetensors file.

    Args:
      folder: where to write it; created if it does not exist.
      config: the architecture.
      params: inner "params" tree; each leaf keeps its dtype.
      tokenizer_json: the contents of tokenizer.json.
    Raises:
      ValueError: the configuration has no Hugging Face form.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(params, sep="/")
    tensors = {}
    for path, names in tensor_names(Llama(config), tensors_of(config)).items():
        leaf = np.asarray(flat[path])
        spread = leaf.ndim - (2 if path.endswith(("/kernel", "/embedding")) else 1)
        for value, name in zip(leaf.reshape(-1, *leaf.shape[spread:]), names, strict=True):
            value = value.T if path.endswith("/kernel") else value
            tensors[name] = np.ascontiguousarray(value)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config), indent=2))
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def tensor_files(folder: Path) -> dict[str, Tensors]:
    """Return the file that holds each tensor of a Hugging Face folder.

    Args:
      folder: holds model.safetensors, or its shards and index.
    Raises:
      ValueError: a file or a shard is missing or incomplete.
    """
    index = folder / INDEX
    if not index.exists():
        single = Tensors(folder / SINGLE)
        return dict.fromkeys(single.shapes, single)
    weight_map = checked(ShardIndex, read_json(index), str(index)).weight_map
    shards = {name: Tensors(folder / name) for name in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard].shapes:
            raise ValueError(
                f"{INDEX} lists tensor {name!r:.80} in {shard}, which does not contain it"
            )
    return {name: shards[shard] for name, shard in weight_map.items()}


def _ignored(name: str, config: LlamaConfig) -> bool:
    """Return whether a tensor is not read.

    Old checkpoints store RoPE's frequencies, and those with tied embeddings may store the matrix
    twice.
    """
    return name.endswith("rotary_emb.inv_freq") or (
        config.tie_embeddings and name == TENSORS["head/kernel"]
    )
