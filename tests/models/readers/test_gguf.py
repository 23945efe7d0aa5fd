"""GGUF files written here with `gguf.GGUFWriter`, read back and compared."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant_models import load
from tests.support.gguf_files import to_gguf, write
from tests.support.tiny_llama import (
    BASE,
    FAMILIES,
    forward,
    random_tensors,
)

TOKENS = np.random.default_rng(1).integers(0, 256, 20)


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
        (
            {"output_norm.weight": np.ones(7, np.float32)},
            r"output_norm.weight must have shape \[24\]",
        ),
        ({"output_norm.weight": np.full(24, np.nan, np.float32)}, "output_norm.weight has NaN"),
        ({"rope_freqs.weight": np.zeros(4, np.float32)}, "rope_freqs.weight must be 4 positive"),
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
        (
            {"expert_count": 8},
            "expert_count, expert_used_count, .* must all be 0, .* got 8, 0, 40",
        ),
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
