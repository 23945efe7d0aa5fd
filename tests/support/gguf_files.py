"""GGUF files of tiny models, written with `gguf.GGUFWriter`."""

import gguf
import numpy as np
from tokenizers import pre_tokenizers

from tests.support.tiny_llama import (
    HD,
    HEADS,
    KV,
    expert_names,
    inverse_frequencies,
)

# One merge, for GGUF has no empty lists; so 256 bytes, one pair, four control tokens.
MERGES = ["Ġ a"]


VOCABULARY = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "<a>", "<b>", "<c>", "<d>"]


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
    "self_attn.o_proj": "attn_output",
    "self_attn.": "attn_",
    "mlp.": "ffn_",
    "block_sparse_moe.": "ffn_",
    "ffn_gate.weight": "ffn_gate_inp.weight",
    "w1.": "gate.",
    "w2.": "down.",
    "w3.": "up.",
    "_proj": "",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(rows, heads):
    """What llama.cpp's converter does to q and k of "llama": half-split to interleaved pairs."""
    split = rows.reshape(heads, 2, HD // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def to_gguf(hf, tensors):
    out = {}
    for name, value in tensors.items():
        if hf["model_type"] in ("llama", "mistral", "mixtral") and (
            "q_proj" in name or "k_proj" in name
        ):
            value = interleaved(value, HEADS if "q_proj" in name else KV)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        out[name] = value
    for name in [name for name in out if ".ffn_experts.0." in name]:  # experts lie in one tensor
        each = [name.replace("experts.0", f"experts.{e}") for e in range(expert_names(hf)[4])]
        start, matrix = name.split("experts.0.")
        out[f"{start}{matrix.removesuffix('.weight')}_exps.weight"] = np.stack(
            [out.pop(one) for one in each]
        )
    if hf.get("rope_scaling", {}).get("rope_type") == "llama3":
        plain = inverse_frequencies(hf | {"rope_scaling": None})
        out["rope_freqs.weight"] = (plain / inverse_frequencies(hf)).astype(np.float32)
    return out


def write(path, hf, tensors, kinds=None, **changes):
    """kinds: tensor name to the type it is stored in; changes: metadata after the arch's dot."""
    arch = {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe"}.get(
        hf["model_type"], hf["model_type"]
    )
    writer = gguf.GGUFWriter(path, changes.pop("arch", arch))
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_key_length(HD)
    writer.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    writer.add_rope_freq_base(hf["rope_theta"])
    if hf.get("rope_scaling", {}).get("type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(hf["rope_scaling"]["factor"])
    if experts := expert_names(hf)[4]:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(hf["num_experts_per_tok"])
    if "moe_intermediate_size" in hf:
        writer.add_expert_feed_forward_length(hf["moe_intermediate_size"])
    for key, value in changes.items():
        writer.add_uint32(f"{arch}.{key.replace('__', '.')}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([1] * 257 + [3] * 4)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(257)
    writer.add_bos_token_id(256)
    for name, value in tensors.items():
        kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
