"""Folders in the Hugging Face layout: whole, sharded, and damaged in every way we thought of."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxquant_models import load
from jaxquant_models.readers.huggingface import save_hf
from tests.support.tiny_llama import (
    BASE,
    FAMILIES,
    byte_tokenizer_json,
    random_tensors,
    shard,
    write_folder,
)

Q0 = "model.layers.0.self_attn.q_proj.weight"


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_save_then_load(family, tmp_path):
    hf = FAMILIES[family]
    model = load(write_folder(tmp_path / "in", hf, random_tensors(hf)))
    tokenizer = byte_tokenizer_json()
    save_hf(tmp_path / "out", model.config, model.params, tokenizer)
    again = load(tmp_path / "out")
    assert again.config == model.config
    assert again.tokenizer.to_json() == model.tokenizer.to_json()
    assert_same(again.params, model.params)
    written, original = load_file(tmp_path / "out/model.safetensors"), random_tensors(hf)
    assert written.keys() == original.keys()
    assert all(np.array_equal(written[name], original[name]) for name in original)


def test_shards_equal_one_file(tmp_path):
    tensors = random_tensors(BASE)
    whole = load(write_folder(tmp_path / "a", BASE, tensors))
    shard(write_folder(tmp_path / "b", BASE, tensors), tensors)
    assert_same(load(tmp_path / "b").params, whole.params)


def test_each_tensor_has_its_own_dtype(tmp_path):
    kinds = (np.float32, np.float16, ml_dtypes.bfloat16)
    mixed = {n: v.astype(kinds[i % 3]) for i, (n, v) in enumerate(random_tensors(BASE).items())}
    model = load(write_folder(tmp_path, BASE, mixed))
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.float32)}
    q = np.asarray(model.params["layers"]["attn"]["q"]["kernel"][0])
    np.testing.assert_array_equal(q, mixed[Q0].astype(np.float32).T)


def test_bfloat16_parameters(tmp_path):
    model = load(write_folder(tmp_path, BASE, random_tensors(BASE)), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
    assert np.isfinite(jax.jit(model.apply_fn)(model.params, jnp.ones((1, 4), jnp.int32))).all()


def test_rotary_buffers_and_tied_duplicates_are_ignored(tmp_path):
    hf = FAMILIES["llama-tied"]
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "lm_head.weight": np.ones((1, 1), np.float32),
    }
    load(write_folder(tmp_path, hf, random_tensors(hf) | extra))


def test_generation_config_adds_stop_tokens(tmp_path):
    write_folder(tmp_path, BASE, random_tensors(BASE))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [258, 257]}')
    assert load(tmp_path).config.eos_ids == (257, 258)


@pytest.mark.parametrize(
    "change, message",
    [
        ({Q0: None}, f"missing tensors for this architecture: {Q0}"),
        ({"surprise": np.ones(2, np.float32)}, "unknown tensors for this architecture: surprise"),
        ({Q0: np.ones((3, 2), np.float32)}, rf"{Q0} must have shape \[32, 24\], got \[3, 2\]"),
        ({Q0: np.ones((32, 24), np.int8)}, f"{Q0} must be floating-point, got int8"),
        ({Q0: np.full((32, 24), np.nan, np.float32)}, f"{Q0} has NaN or infinite values"),
        ({Q0: np.full((32, 24), np.inf, np.float32)}, f"{Q0} has NaN or infinite values"),
    ],
)
def test_wrong_tensors(change, message, tmp_path):
    tensors = {n: v for n, v in (random_tensors(BASE) | change).items() if v is not None}
    write_folder(tmp_path, BASE, tensors)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_overflow_of_a_narrow_dtype_is_seen(tmp_path):
    tensors = random_tensors(BASE)
    tensors[Q0] *= 1e6
    write_folder(tmp_path, BASE, tensors)
    with pytest.raises(ValueError, match=f"{Q0} has NaN or infinite values in float16"):
        load(tmp_path, jnp.float16)


def test_many_missing_tensors_are_counted(tmp_path):
    write_folder(tmp_path, BASE, {"model.norm.weight": np.ones(24, np.float32)})
    with pytest.raises(ValueError, match="missing tensors .* and 24 more"):
        load(tmp_path)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", b"{", "config.json is not JSON"),
        ("config.json", b"[]", "must hold a JSON object, got a list"),
        ("tokenizer.json", None, "cannot read .*tokenizer.json: No such file"),
        ("tokenizer.json", b"{}", "tokenizer.json lacks 'model'"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("model.safetensors", b"garbage", "not a complete safetensors file"),
        ("model.safetensors.index.json", b"{}", "lacks 'weight_map'"),
    ],
)
def test_damaged_files(file, content, message, tmp_path):
    write_folder(tmp_path, BASE, random_tensors(BASE))
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_truncated_safetensors(tmp_path):
    file = write_folder(tmp_path, BASE, random_tensors(BASE)) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load(tmp_path)


def test_missing_shard_and_broken_promise(tmp_path):
    tensors = random_tensors(BASE)
    shard(write_folder(tmp_path, BASE, tensors), tensors)
    kept = {n: tensors[n] for n in sorted(tensors)[3::2]}
    save_file(kept, tmp_path / "b.safetensors")
    with pytest.raises(
        ValueError, match="lists tensor .* in b.safetensors, which does not contain it"
    ):
        load(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match="b.safetensors is missing"):
        load(tmp_path)
