"""Conversion between a Hugging Face config.json and a `LlamaConfig`."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from jaxquant_models.architectures.config import Llama3Scaling, LlamaConfig, RopeScaling
from jaxquant_models.schemas.decoder import HFConfig, Rope
from jaxquant_models.schemas.fields import as_list
from jaxquant_models.schemas.files import GenerationConfig
from jaxquant_models.schemas.strict import checked, read_json


def read_config_json(folder: Path) -> dict[str, JsonValue]:
    """Return config.json, extended by the stop tokens that generation_config.json may add.

    Args:
      folder: the Hugging Face folder.
    Raises:
      ValueError: a file is missing or is not a JSON object.
    """
    hf = read_json(folder / "config.json")
    extra = folder / "generation_config.json"
    if extra.exists():
        more = checked(GenerationConfig, read_json(extra), extra.name).eos_token_id
        hf["eos_token_id"] = [*as_list(hf.get("eos_token_id")), *more]
    return hf


def config_from_hf(hf: Mapping[str, JsonValue]) -> LlamaConfig:
    """Return the architecture that the contents of a config.json describe.

    Args:
      hf: the parsed config.json.
    Raises:
      ValueError: the family or one of its options is not supported, or a key is missing.
    """
    file = checked(HFConfig, hf, "config.json")
    heads, kv_heads, head_dim = file.sizes
    qwen2 = file.model_type == "qwen2"
    experts, chosen, width = file.experts
    return LlamaConfig(
        vocab_size=file.vocab_size,
        d_model=file.hidden_size,
        d_ff=file.intermediate_size,
        n_layers=file.num_hidden_layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=file.rms_norm_eps,
        rope_theta=float(file.theta),
        rope_scaling=_scaling(file.rope, file.max_position_embeddings),
        tie_embeddings=file.tie_word_embeddings,
        qk_norm=file.model_type in ("qwen3", "qwen3_moe"),
        qkv_bias=qwen2 or file.attention_bias,
        o_bias=file.attention_bias and not qwen2,
        mlp_bias=file.mlp_bias,
        n_experts=experts,
        experts_per_token=chosen,
        expert_d_ff=width,
        norm_topk_prob=file.norm_topk_prob or file.model_type != "qwen3_moe",
        max_position=file.max_position_embeddings,
        eos_ids=tuple(dict.fromkeys(file.eos_token_id)),
        bos_id=next(iter(file.bos_token_id), None),
    )


def _scaling(rope: Rope, max_position: int) -> RopeScaling:
    if rope.kind == "default":
        return None
    if rope.kind == "linear":
        return float(rope.factor)
    trained = rope.original_max_position_embeddings or max_position
    return Llama3Scaling(
        float(rope.factor), float(rope.low_freq_factor), float(rope.high_freq_factor), trained
    )


def config_to_hf(config: LlamaConfig) -> dict[str, JsonValue]:
    """Return the contents of a config.json, of the model family that has these options.

    Args:
      config: the architecture.
    Raises:
      ValueError: the configuration has no Hugging Face form.
    """
    family, name = _family(config)
    hf = {
        "model_type": family,
        "architectures": [name + "ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling_to_hf(config),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "max_position_embeddings": config.max_position,
        "eos_token_id": list(config.eos_ids) or None,
        "bos_token_id": config.bos_id,
        **_experts_to_hf(config),
    }
    if config_from_hf(hf) != config:
        raise ValueError(f"no Hugging Face family has this combination of settings: {config}")
    return hf


def _family(config: LlamaConfig) -> tuple[str, str]:
    """Return the family's `model_type`, and its name in the names of Transformers' classes."""
    if config.n_experts:
        return ("qwen3_moe", "Qwen3Moe") if config.qk_norm else ("mixtral", "Mixtral")
    if config.qkv_bias and not config.o_bias:
        return "qwen2", "Qwen2"
    return ("qwen3", "Qwen3") if config.qk_norm else ("llama", "Llama")


def _experts_to_hf(config: LlamaConfig) -> dict[str, JsonValue]:
    if not config.n_experts:
        return {}
    return {
        "num_experts": config.n_experts,
        "num_local_experts": config.n_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_d_ff,
        "norm_topk_prob": config.norm_topk_prob,
    }


def _scaling_to_hf(config: LlamaConfig) -> dict[str, JsonValue] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    if isinstance(scaling, float):
        return {"rope_type": "linear", "factor": scaling}
    if isinstance(scaling, Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
        }
    raise ValueError(
        "per-frequency RoPE factors (from GGUF) cannot be written in Hugging Face form"
    )
