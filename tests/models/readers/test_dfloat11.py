"""Folders that DFloat11 compressed: the same weights as before, and damage that is named."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxquant_models import load
from jaxquant_models.readers.dfloat11 import DFloat11Tensors
from jaxquant_models.readers.huggingface import read_hf
from tests.support.dfloat11 import PATTERNS, compressed_folder
from tests.support.tiny_llama import BASE, FAMILIES, random_tensors, write_folder

Q1 = "model.layers.1.self_attn.q_proj.weight"
WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_weights_are_those_before(family, tmp_path):
    hf = FAMILIES[family]
    rounded = compressed_folder(tmp_path / "small", hf, random_tensors(hf))
    write_folder(tmp_path / "plain", hf, rounded)
    small, plain = (read_hf(tmp_path / name)[1] for name in ("small", "plain"))
    assert small.digest() == plain.digest()  # of the bits
    a, b = small.whole(jnp.bfloat16), plain.whole(jnp.bfloat16)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    small.prefetch(1)
    layers = small.layer(1, jnp.bfloat16), plain.layer(1, jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, *layers)


def test_a_file_for_each_module(tmp_path):
    """The package writes them without an index, and the norms of a layer with its streams."""
    rounded = compressed_folder(tmp_path, BASE, random_tensors(BASE))
    tensors = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    for i in range(3):
        kept = {n: v for n, v in tensors.items() if n.startswith(f"model.layers.{i}.")}
        save_file(kept, tmp_path / f"model_layers_{i}.safetensors")
        tensors = {n: v for n, v in tensors.items() if n not in kept}
    save_file(tensors, tmp_path / WEIGHTS)
    q = load(tmp_path).params["layers"]["attn"]["q"]["kernel"][1]
    np.testing.assert_array_equal(q, rounded[Q1].astype(np.float32).T)


def test_some_weights_may_be_plain(tmp_path):
    """A tied embedding is one tensor; the patterns do not name it here."""
    hf = FAMILIES["llama-tied"]
    patterns = {p: parts for p, parts in PATTERNS.items() if parts}
    rounded = compressed_folder(tmp_path, hf, random_tensors(hf), patterns=patterns)
    table = load(tmp_path).params["embed"]["embedding"]
    np.testing.assert_array_equal(table, rounded["model.embed_tokens.weight"].astype(np.float32))


def test_weights_that_are_not_finite_have_no_code(tmp_path):
    tensors = random_tensors(BASE)
    tensors[Q1][3, 4] = np.inf
    compressed_folder(tmp_path, BASE, tensors)
    with pytest.raises(ValueError, match="stream of 'model.layers.1' is damaged: luts give codes"):
        load(tmp_path)


def config(**changes):
    def change(hf, tensors):
        hf["dfloat11_config"] |= changes

    return change


def tensor(name, value):
    def change(hf, tensors):
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name]) if callable(value) else value

    return change


LAYERS = r"model\.layers\.\d+"


@pytest.mark.parametrize(
    "change, message",
    [
        (config(bytes_per_thread=16), "dfloat11_config.bytes_per_thread must be 8, got 16"),
        (config(threads_per_block=[0]), "threads_per_block.0 must be at least 1, got 0"),
        (config(threads_per_block=[64]), "'lm_head' is damaged|is damaged: output_positions must"),
        (config(pattern_dict={}), "must have one pattern .* 'lm_head', but 0 match|but 0 match"),
        (config(pattern_dict=PATTERNS | {"lm_h..d": []}), "'lm_head', but 2 match"),
        (config(pattern_dict=PATTERNS | {"(a+)+": []}), "must have patterns of names"),
        (config(pattern_dict=PATTERNS | {LAYERS: ["mlp.up_proj"]}), r"must have shape \[0\]"),
        (config(pattern_dict=PATTERNS | {LAYERS: PATTERNS[LAYERS][::-1]}), "must have shape"),
        (tensor("lm_head.gaps", None), "tensor 'lm_head.gaps' is missing"),
        (tensor("lm_head.luts", lambda a: a.astype(np.int32)), "lm_head.luts must be uint8"),
        (tensor("lm_head.weight", np.ones(3, np.float32)), "'lm_head.weight' is in the folder tw"),
        (tensor("lm_head.sign_mantissa", lambda a: a[1:]), r"lm_head.weight must have shape \["),
        (tensor("lm_head.output_positions", lambda a: a[1:]), "must hold uint32 numbers"),
        (tensor("lm_head.output_positions", lambda a: a[4:]), "must hold 2 numbers|must rise"),
        (tensor("lm_head.encoded_exponent", lambda a: a[:-2]), "'lm_head' is damaged: "),
        (
            tensor("model.layers.1.split_positions", lambda a: a[::-1].copy()),
            "model.layers.1.split_positions must rise",
        ),
    ],
)
def test_damage_is_named(change, message, tmp_path):
    compressed_folder(tmp_path, BASE, random_tensors(BASE))
    hf, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / WEIGHTS)
    change(hf, tensors)
    write_folder(tmp_path, hf, tensors)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_files_must_be_there_and_apart(tmp_path):
    compressed_folder(tmp_path, BASE, random_tensors(BASE))
    held = json.loads((tmp_path / "config.json").read_text())["dfloat11_config"]
    save_file({"lm_head.gaps": np.ones(3, np.uint8)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match="'lm_head.gaps' is in .* and in .*more.safetensors"):
        DFloat11Tensors(tmp_path, held)
    (tmp_path / "more.safetensors").unlink()
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="has no safetensors files"):
        DFloat11Tensors(tmp_path, held)


def test_a_range_of_a_stream_is_a_weight(tmp_path):
    rounded = compressed_folder(tmp_path, BASE, random_tensors(BASE), threads=2)
    held = json.loads((tmp_path / "config.json").read_text())["dfloat11_config"]
    tensors = DFloat11Tensors(tmp_path, held)
    assert tensors.shapes.keys() == rounded.keys()
    for name, value in rounded.items():
        got = tensors.read(name)
        assert got.dtype == ml_dtypes.bfloat16 and tensors.shaped(name, value.shape) == value.shape
        np.testing.assert_array_equal(got.view(np.uint16), value.view(np.uint16).reshape(-1))
