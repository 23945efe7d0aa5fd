"""The architecture and the tokenizer as described by the metadata of a GGUF file."""

from collections.abc import Mapping

from pydantic import JsonValue

from jaxquant.core.fields import shown
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.readers.chat_template import ChatTemplate
from jaxquant_models.schemas.files import GGUFArchitecture, GGUFTokenizer
from jaxquant_models.schemas.strict import checked

# GGUF calls Mistral and Mixtral "llama".
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe")
GGUF = "the GGUF metadata"


def config_from_gguf(fields: Mapping[str, JsonValue]) -> LlamaConfig:
    """Return the architecture that the metadata describe.

    Options that only the tensors reveal keep their defaults: `readers.gguf` sets tie_embeddings,
    biases and per-frequency RoPE factors. The weights of a token's experts are divided by their
    sum, as in llama.cpp.

    Args:
      fields: the metadata, as plain values.
    Raises:
      ValueError: the architecture or one of its options is not supported, or a key is missing.
    """
    arch = fields.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(f"general.architecture must be one of {ARCHITECTURES}; got {shown(arch)}")
    own = checked(GGUFArchitecture, _below(fields, f"{arch}."), GGUF, f"{arch}.")
    words = tokenizer_fields(fields)
    ends = (words.eos_token_id, words.eot_token_id)
    return LlamaConfig(
        vocab_size=own.vocab_size or len(words.tokens),
        d_model=own.embedding_length,
        d_ff=own.feed_forward_length,
        n_layers=own.block_count,
        n_heads=own.heads,
        n_kv_heads=own.kv_heads or own.heads,
        head_dim=own.head_dim,
        norm_eps=own.norm_eps,
        rope_theta=own.theta,
        rope_scaling=own.rope_factor,
        qk_norm=arch in ("qwen3", "qwen3moe"),
        n_experts=own.experts,
        experts_per_token=own.experts_per_token,
        expert_d_ff=own.expert_d_ff,
        max_position=own.context_length,
        eos_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
        bos_id=words.bos_token_id,
    )


def chat_template_from_gguf(fields: Mapping[str, JsonValue]) -> ChatTemplate | None:
    """Return the chat template in the metadata, or None if there is none.

    Args:
      fields: the metadata, as plain values.
    Raises:
      ValueError: it is not a text.
    """
    source = fields.get("tokenizer.chat_template")
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"tokenizer.chat_template must be a string, got {shown(source)}")
    own = tokenizer_fields(fields)
    ids = {"bos_token": own.bos_token_id, "eos_token": own.eos_token_id}
    return ChatTemplate(source, {n: own.tokens[i] for n, i in ids.items() if i is not None})


def tokenizer_fields(fields: Mapping[str, JsonValue]) -> GGUFTokenizer:
    """Return the checked tokenizer metadata.

    Args:
      fields: the metadata, as plain values.
    Raises:
      ValueError: a field is missing or invalid.
    """
    prefix = "tokenizer.ggml."
    return checked(GGUFTokenizer, _below(fields, prefix), GGUF, prefix)


def _below(fields: Mapping[str, JsonValue], prefix: str) -> dict[str, JsonValue]:
    return {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}
