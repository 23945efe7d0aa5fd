"""GGUF files written here with `gguf.GGUFWriter`, read back and compared."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from jaxquant_models import load
from tests.models.tiny_llama import (
    BASE,
    FAMILIES,
    HD,
    HEADS,
    KV,
    forward,
    inverse_frequencies,
    random_tensors,
)

TOKENS = np.random.default_rng(1).integers(0, 256, 20)
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
        if hf["model_type"] in ("llama", "mistral") and ("q_proj" in name or "k_proj" in name):
            value = interleaved(value, HEADS if "q_proj" in name else KV)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        out[name] = value
    if hf.get("rope_scaling", {}).get("rope_type") == "llama3":
        plain = inverse_frequencies(hf | {"rope_scaling": None})
        out["rope_freqs.weight"] = (plain / inverse_frequencies(hf)).astype(np.float32)
    return out


def write(path, hf, tensors, kinds=None, **changes):
    """kinds: tensor name to the type it is stored in; changes: metadata after the arch's dot."""
    arch = "llama" if hf["model_type"] == "mistral" else hf["model_type"]
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


@pytest.mark.parametrize("family", list(FAMILIES))
def test_forward_equals_numpy(family, tmp_path):
    hf = FAMILIES[family]
    tensors = random_tensors(hf)
    model = load(write(tmp_path / "m.gguf", hf, to_gguf(hf, tensors)))
    assert model.config.eos_ids == (257,)
    got = jax.jit(model.apply_fn)(model.params, jnp.asarray(TOKENS)[None])[0]
    np.testing.assert_allclose(got, forward(hf, tensors, TOKENS), atol=2e-4)


def test_each_tensor_has_its_own_type(tmp_path):
    tensors = to_gguf(BASE, random_tensors(BASE))
    # 32 columns: o is the one matrix of the tiny model that has whole blocks.
    kind = gguf.GGMLQuantizationType
    kinds = {"blk.0.attn_output.weight": kind.Q8_0, "blk.1.attn_output.weight": kind.Q4_1}
    kinds |= {"blk.2.attn_output.weight": kind.F16, "token_embd.weight": kind.BF16}
    model = load(write(tmp_path / "m.gguf", BASE, tensors, kinds))
    for i, name in enumerate(list(kinds)[:3]):
        stored = gguf.quants.quantize(tensors[name], kinds[name])
        expected = gguf.quants.dequantize(stored, kinds[name]).T
        np.testing.assert_array_equal(model.params["layers"]["attn"]["o"]["kernel"][i], expected)


def test_tokenizer_comes_along(tmp_path):
    model = load(write(tmp_path / "m.gguf", BASE, to_gguf(BASE, random_tensors(BASE))))
    text = "an <a> é\n\x00  "
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text
    assert {256, 257} <= set(model.tokenizer.encode(text.replace("an", " an")))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"blk.1.ffn_up.weight": None}, "missing tensors .*: blk.1.ffn_up.weight"),
        ({"surprise": np.ones(2, np.float32)}, "unknown tensors .*: surprise"),
        ({"output_norm.weight": np.ones(7, np.float32)}, r"output_norm.weight should be \[24\]"),
        ({"output_norm.weight": np.full(24, np.nan, np.float32)}, "output_norm.weight has NaN"),
        ({"rope_freqs.weight": np.zeros(4, np.float32)}, "rope_freqs.weight should be 4 positive"),
    ],
)
def test_wrong_tensors(change, message, tmp_path):
    tensors = to_gguf(BASE, random_tensors(BASE)) | change
    tensors = {name: value for name, value in tensors.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "m.gguf", BASE, tensors))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"arch": "mamba"}, "general.architecture must be one of .* got 'mamba'"),
        ({"expert_count": 8}, "mixture-of-experts"),
        ({"attention__sliding_window": 32}, "sliding-window attention is not supported"),
        ({"rope__dimension_count": 4}, "rope.dimension_count must equal head_dim 8, got 4"),
    ],
)
def test_unsupported_metadata(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "m.gguf", BASE, {"x": np.ones(2, np.float32)}, **change))


@pytest.mark.parametrize("keep", [0, 3, 20, 200, 3000, 0.5, -64])
def test_truncated_files(keep, tmp_path):
    path = write(tmp_path / "m.gguf", BASE, to_gguf(BASE, random_tensors(BASE)))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="not a complete GGUF file") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_not_a_gguf_file(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"just some text, long enough to hold a header" * 10)
    with pytest.raises(ValueError, match="not a complete GGUF file .*magic"):
        load(path)
