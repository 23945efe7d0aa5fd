"""Files from outside with every kind of wrong value: one line that names the field, and no more."""

import json
import os
import struct

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxquant_models import load
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.rope import frequencies
from jaxquant_models.readers.encoder import bert_config_from_hf
from jaxquant_models.readers.gguf_file import open_gguf
from jaxquant_models.readers.gguf_metadata import config_from_gguf
from jaxquant_models.readers.gguf_tokenizer import tokenizer_from_gguf
from jaxquant_models.readers.huggingface_config import config_from_hf
from jaxquant_models.readers.safetensors import DTYPES, Tensors
from jaxquant_models.readers.tokenizer import Tokenizer
from jaxquant_models.runs.calibration import calibrate_model
from jaxquant_models.schemas.strict import parse_json, read_json
from tests.support import gguf_files, tiny_bert
from tests.support.gguf_vocabularies import byte_fields, piece_fields
from tests.support.tiny_llama import (
    BASE,
    LLAMA3,
    byte_tokenizer_json,
    random_tensors,
    shard,
    write_folder,
)

DEEP = "[" * 100_000 + "]" * 100_000
LINEAR = {"rope_type": "linear", "factor": 4.0}


def one_line(call, match):
    with pytest.raises(ValueError, match=match) as caught:
        call()
    assert type(caught.value) is ValueError
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


# Field of config.json, and values that no model means.
NO_SIZE = [0, -1, 2**63, "24", 24.5, True, [24], {}]
NO_NUMBER = [0, 0.0, -1e-5, float("nan"), float("inf"), 1e300, "1e-5", True, [1.0], {}, 10**400]
WRONG = {
    "model_type": [None, 3, "", ["llama"], {}],
    "vocab_size": NO_SIZE,
    "hidden_size": NO_SIZE,
    "intermediate_size": NO_SIZE,
    "num_hidden_layers": NO_SIZE,
    "num_attention_heads": [*NO_SIZE, 3],
    "num_key_value_heads": [*NO_SIZE, 3],
    "head_dim": [*NO_SIZE, 7],
    "max_position_embeddings": NO_SIZE,
    "rms_norm_eps": [None, 2.0, 1e-50, *NO_NUMBER],
    "rope_theta": [None, 0.5, *NO_NUMBER],
    "hidden_act": [None, 3, "gelu", []],
    "tie_word_embeddings": ["false", 0, 1, [], {}],
    "attention_bias": ["true", 1],
    "mlp_bias": ["true", 1],
    "eos_token_id": [{}, "2", -1, 2.5, True, [[2]], [None], 2**31, 261],
    "bos_token_id": [{}, "2", -1, 2.5, 2**31, 261],
    "rope_scaling": ["linear", [], 4.0, True],
    "rope_parameters": ["linear", [], 4.0, True],
}


@pytest.mark.parametrize("field", WRONG)
def test_config_refuses_by_the_fields_name(field):
    for value in WRONG[field]:
        one_line(lambda value=value: config_from_hf(BASE | {field: value}), field)


@pytest.mark.parametrize("field", ["factor", "low_freq_factor", "high_freq_factor"])
def test_rope_factors(field):
    for value in (None, *NO_NUMBER, -8.0):
        rope = {"rope_scaling": LLAMA3 | {field: value}}
        one_line(lambda rope=rope: config_from_hf(BASE | rope), field)
    crossed = LLAMA3 | {"low_freq_factor": 4.0}
    one_line(lambda: config_from_hf(BASE | {"rope_scaling": crossed}), "must be below")


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [  # As LlamaConfig.from_dict of transformers 5.24 has them.
        ({"rope_scaling": LINEAR, "rope_theta": 77.0}, 77.0, 4.0),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 50.0}}, 10000.0, 4.0),
        (
            {"rope_scaling": LINEAR, "rope_theta": 77.0, "rope_parameters": {"rope_theta": 50.0}},
            77.0,
            4.0,
        ),
        ({"rope_scaling": {}, "rope_parameters": LINEAR | {"rope_theta": 50.0}}, 50.0, 4.0),
        ({"rope_scaling": None, "rope_parameters": LINEAR | {"rope_theta": 50.0}}, 50.0, 4.0),
        ({"rope_theta": 77.0, "rope_parameters": {"rope_theta": 50.0}}, 50.0, None),
        ({"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 4.0}}, 1e4, None),
    ],
)
def test_rope_scaling_goes_before_rope_parameters(rope, theta, scaling):
    plain = {k: v for k, v in BASE.items() if k != "rope_theta"}
    config = config_from_hf(plain | rope)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)
    slow = frequencies(config) * (scaling or 1.0)
    np.testing.assert_allclose(slow, theta ** (-np.arange(4) / 4))


def test_llama3_takes_the_models_positions_where_it_names_none():
    rope = {k: v for k, v in LLAMA3.items() if not k.startswith("original")}
    config = config_from_hf(BASE | {"rope_scaling": rope})
    assert config.rope_scaling.original_max_position == BASE["max_position_embeddings"]


@pytest.mark.parametrize(
    "change",
    [
        {"norm_eps": 0.0},
        {"rope_theta": float("nan")},
        {"rope_scaling": -2.0},
        {"rope_scaling": (1.0, 2.0)},
        {"rope_scaling": "linear"},
        {"tie_embeddings": "false"},
        {"n_layers": True},
        {"bos_id": 261},
        {"eos_ids": 2},
        {"bos_id": -1},
        {"max_position": 0},
    ],
)
def test_the_same_from_a_checkpoint(change):
    good = config_from_hf(BASE).to_json()
    one_line(lambda: LlamaConfig.from_json(good | change), next(iter(change)))
    one_line(lambda: LlamaConfig.from_json([]), "not a LlamaConfig")


@pytest.mark.parametrize("field", ["layer_norm_eps", "hidden_size", "pad_token_id", "vocab_size"])
def test_encoders_too(field):
    for value in (None, "1", -1, [], {}, 2**40, float("nan")):
        one_line(lambda value=value: bert_config_from_hf(tiny_bert.HF | {field: value}), field)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8 text: byte 0"),
        (b"\xef\xbb\xbf{}", "not JSON: .*BOM"),
        (DEEP.encode(), "nested too deep"),
        (b'{"a": ' * 5000, "nested too deep|not JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1, "a": 1}', "the key 'a' appears twice"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "not JSON: .*4300 digits"),
        (b"[]", "must hold a JSON object, got a list"),
    ],
)
def test_json(text, message, tmp_path):
    (tmp_path / "x.json").write_bytes(text)
    one_line(lambda: read_json(tmp_path / "x.json"), message)


def test_files_that_cannot_be_read(tmp_path):
    write_folder(tmp_path, BASE, random_tensors(BASE))
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        one_line(lambda: load(tmp_path), f"{name}")
        (tmp_path / name).rmdir()
        (tmp_path / name).write_bytes(kept)
    (tmp_path / "m.gguf").mkdir()
    one_line(lambda: load(tmp_path / "m.gguf"), "cannot read .*m.gguf: Is a directory")
    one_line(lambda: load("x" * 5000), "no model")
    one_line(lambda: load("a\0b"), "no model")
    if os.geteuid():
        (tmp_path / "config.json").chmod(0)
        one_line(lambda: load(tmp_path), "cannot read .*config.json: Permission denied")


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "vocab_size", "head_dim"])
def test_sizes_are_judged_by_the_bytes_of_the_weights(field, tmp_path):
    large = 2**31 - 2 if field != "num_hidden_layers" else 10**8
    change = {field: large} | ({"head_dim": 8} if field == "hidden_size" else {})
    write_folder(tmp_path, BASE | change, random_tensors(BASE))
    one_line(lambda: load(tmp_path), "config.json describes at least .* cannot hold")


# --- the index and its shards


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": []}, "weight_map must be a valid dictionary"),
        ({"weight_map": None}, "lacks 'weight_map'"),
        *(({"weight_map": {"x": v}}, "weight_map.x.* must be a valid string")
          for v in (1, None, [], {}, True, 1e9)),
        *(({"weight_map": {"x": v}}, "files in its own folder")
          for v in ("../a", "/etc/x", "", ".", "..", "a/b", "a\0b", "\ud800", "x" * 300)),
        ({"weight_map": {"x": "none.safetensors"}}, "none.safetensors is missing"),
        ({"weight_map": {"\ud800\n": 1}}, "must be a valid string"),
    ],
)  # fmt: skip
def test_index(index, message, tmp_path):
    tensors = random_tensors(BASE)
    shard(write_folder(tmp_path, BASE, tensors), tensors)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    one_line(lambda: load(tmp_path), message)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_is_read(kind, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = random_tensors(BASE)
    tensors[name] = tensors[name].astype(getattr(ml_dtypes, kind))
    model = load(write_folder(tmp_path, BASE, tensors))
    got = np.asarray(model.params["layers"]["mlp"]["up"]["kernel"][1])
    np.testing.assert_array_equal(got, tensors[name].astype(np.float32).T)
    assert len(np.unique(got)) < 256  # and the twin, unrounded, is not
    assert len(np.unique(random_tensors(BASE)[name])) > 256


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        DEEP.encode(),
        b'{"x": 3}',
        b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 16]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}',
        b'{"x": {"dtype": "nope", "shape": [4], "data_offsets": [0, 16]}}',
    ],
)
def test_safetensors_headers(header, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    one_line(lambda: Tensors(path), "x.safetensors")
    path.write_bytes(struct.pack("<Q", 2**63 - 1) + header)
    one_line(lambda: Tensors(path), "x.safetensors")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tensor_of_every_type(dtype, tmp_path):
    """The oldest safetensors that pyproject.toml allows knows them all."""
    values = np.array([1, 2]).astype(DTYPES[dtype])
    entry = {"dtype": dtype, "shape": [2], "data_offsets": [0, values.nbytes]}
    header = json.dumps({"x": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + values.tobytes())
    np.testing.assert_array_equal(Tensors(path).read("x"), values)


def test_a_tensor_of_no_numpy_type(tmp_path):
    save_file({"x": np.ones(4, np.float32)}, tmp_path / "x.safetensors")
    tensors = Tensors(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(tensors.read("x"), np.ones(4))
    tensors._entries["x"] = tensors._entries["x"].model_copy(update={"dtype": "F4"})
    one_line(lambda: tensors.read("x"), "type F4, which is not supported")


# --- GGUF


def gguf_bytes(*pairs, tensors=b"", counts=None):
    """A header; a pair is (key, type, bytes of the value)."""
    text = lambda s: struct.pack("<Q", len(s)) + s
    body = b"".join(text(k) + struct.pack("<I", kind) + value for k, kind, value in pairs)
    n_tensors, n_pairs = counts or (bool(tensors), len(pairs))
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_pairs) + body + tensors


def tensor_bytes(dims, kind=0, offset=0, rank=None):
    name = struct.pack("<Q", 1) + b"x"
    rank = len(dims) if rank is None else rank
    return (
        name + struct.pack("<I", rank) + b"".join(struct.pack("<Q", d) for d in dims)
        + struct.pack("<IQ", kind, offset) + bytes(64)
    )  # fmt: skip


def array(kind, count, rest=b""):
    return struct.pack("<IQ", kind, count) + rest


HUGE = 2**63 - 1


@pytest.mark.parametrize(
    "data",
    [
        gguf_bytes((b"a", 9, array(4, HUGE))),
        gguf_bytes((b"a", 9, array(8, HUGE))),
        gguf_bytes((b"a", 9, array(9, HUGE))),
        gguf_bytes((b"a", 9, array(4, 2**40, bytes(100)))),
        gguf_bytes((b"a", 9, array(8, 10**6, bytes(10**4)))),
        gguf_bytes((b"a", 9, array(9, 1, array(9, 1, array(9, 1, array(9, 1, array(9, 0))))))),
        gguf_bytes((b"a", 8, struct.pack("<Q", HUGE))),
        gguf_bytes((b"a", 8, struct.pack("<Q", 2) + b"\xff\xff")),
        gguf_bytes((b"a", 13, bytes(8))),
        gguf_bytes((b"a", 4, bytes(4)), (b"a", 4, bytes(4))),
        gguf_bytes(counts=(0, HUGE)),
        gguf_bytes(counts=(HUGE, 0)),
        gguf_bytes((b"general.alignment", 4, bytes(4))),
        gguf_bytes((b"general.alignment", 8, bytes(8))),
        gguf_bytes(tensors=tensor_bytes([2**32, 2**32])),
        gguf_bytes(tensors=tensor_bytes([0, HUGE])),
        gguf_bytes(tensors=tensor_bytes([4], offset=HUGE)),
        gguf_bytes(tensors=tensor_bytes([4], kind=99)),
        gguf_bytes(tensors=tensor_bytes([33], kind=8)),
        gguf_bytes(tensors=tensor_bytes([4], rank=2**31)),
        gguf_bytes(tensors=tensor_bytes([4]), counts=(2, 0)),
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        b"GGUF",
        b"",
    ],
)
def test_gguf_sizes_are_judged_by_the_bytes(data, tmp_path):
    (tmp_path / "m.gguf").write_bytes(data)
    one_line(lambda: open_gguf(tmp_path / "m.gguf"), "not a complete GGUF file")


def test_gguf_values_are_those_of_the_library(tmp_path):
    """Of a file that the library wrote, and nested arrays, which it flattens."""
    tensors = gguf_files.to_gguf(BASE, random_tensors(BASE))
    path = gguf_files.write(tmp_path / "m.gguf", BASE, tensors)
    reader = gguf_files.gguf.GGUFReader(path)
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    fields, found, nbytes = open_gguf(path)
    assert fields == theirs and nbytes == path.stat().st_size
    assert list(found) == [t.name for t in reader.tensors]
    for tensor in reader.tensors:
        np.testing.assert_array_equal(found[tensor.name].data.view(np.float32), tensor.data)
    nested = array(9, 2, array(5, 2, struct.pack("<2i", 1, -2)) + array(7, 1, b"\1"))
    (tmp_path / "n.gguf").write_bytes(gguf_bytes((b"a", 9, nested)))
    assert open_gguf(tmp_path / "n.gguf")[0] == {"a": [[1, -2], [True]]}


def fields_of(tmp_path):
    path = gguf_files.write(tmp_path / "m.gguf", BASE, {"x": np.ones(2, np.float32)})
    return open_gguf(path)[0]


@pytest.mark.parametrize("field", [
    "embedding_length", "feed_forward_length", "block_count", "context_length",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.layer_norm_rms_epsilon", "rope.freq_base",
])  # fmt: skip
def test_gguf_metadata(field, tmp_path):
    fields = fields_of(tmp_path)
    for value in (0, -1, "3", [3], True, 1e300, float("nan")):
        wrong = fields | {f"llama.{field}": value}
        one_line(lambda wrong=wrong: config_from_gguf(wrong), f"llama.{field}")


@pytest.mark.parametrize(
    ("kind", "factor", "old", "scaling"),
    [(None, 4.0, None, 4.0), (None, None, 2.0, 2.0), (None, 0.0, None, None),
     ("linear", 4.0, 2.0, 4.0), ("none", 4.0, None, None), (None, None, None, None)],
)  # fmt: skip
def test_gguf_factors_scale_without_a_type(kind, factor, old, scaling, tmp_path):
    """As in llama.cpp: linear is what a factor means, in its old place too."""
    given = {"scaling.type": kind, "scaling.factor": factor, "scale_linear": old}
    more = {f"llama.rope.{k}": v for k, v in given.items() if v is not None}
    assert config_from_gguf(fields_of(tmp_path) | more).rope_scaling == scaling


def test_gguf_block_count(tmp_path):
    hf = BASE | {"num_hidden_layers": 10**8}
    path = gguf_files.write(tmp_path / "m.gguf", hf, {"x": np.ones(2, np.float32)})
    one_line(lambda: load(path), "describes at least .* cannot hold")


# --- tokenizers


@pytest.mark.parametrize(
    "fields",
    [
        byte_fields(tokens=["a", 3]),
        byte_fields(tokens="abc"),
        byte_fields(tokens=[["a"]]),
        byte_fields(merges=[1]),
        byte_fields(merges=["ab"]),
        byte_fields(token_type=["1"]),
        byte_fields(token_type=[1]),
        byte_fields(bos_token_id=10**6),
        byte_fields(bos_token_id=-1),
        byte_fields(bos_token_id=[1]),
        byte_fields(pre=3),
        byte_fields(add_bos_token="yes"),
        piece_fields(scores=["0"] * 276),
        piece_fields(scores=[float("nan")] * 276),
        piece_fields(scores=[0.0]),
        piece_fields(unknown_token_id=276),
        piece_fields(tokens=["a" * 10**5, *piece_fields()["tokenizer.ggml.tokens"][1:]],
                     token_type=[1] * 276),
    ],
)  # fmt: skip
def test_gguf_tokenizers(fields):
    one_line(lambda: tokenizer_from_gguf(fields), "tokenizer.ggml.")


def changed(change):
    data = json.loads(byte_tokenizer_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["model"]["vocab"].update(A=2**31), "model.vocab.A must be below"),
        (lambda d: d["model"]["vocab"].update(A=-1), "model.vocab.A must be at least"),
        (lambda d: d["model"]["vocab"].update(A="1"), "model.vocab.A must be a valid integer"),
        (lambda d: d["model"]["vocab"].update(A=1), "vocab gives the id 1 to two tokens"),
        (lambda d: d["model"].update(vocab=3), "model.vocab must be a valid dictionary"),
        (lambda d: d["added_tokens"][0].update(id=2**31), "added_tokens.0.id must be below"),
        (
            lambda d: d["added_tokens"][0].update(id=1000),
            "the id 1000, but after the vocabulary its id is 256",
        ),
        (lambda d: d["added_tokens"][0].update(content=7), "added_tokens.0.content must be"),
        (lambda d: d.update(added_tokens={}), "added_tokens must be a valid list"),
        (lambda d: d.update(model=[]), "model must be a valid dictionary"),
        (lambda d: d.update(pre_tokenizer={"type": "Nope"}), "not the contents"),
        (lambda d: d.update(model={"type": "Unigram", "vocab": [[1, "a"]], "unk_id": 0}), "not"),
        (lambda d: d.update(model={"type": "Unigram", "vocab": ["a"]}), "model.vocab.0 must be"),
    ],
)
def test_tokenizer_json(change, message):
    one_line(lambda: Tokenizer.from_json(changed(change)), message)


def test_tokenizer_json_that_is_no_text(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b'{"model": "\xff"}')
    one_line(lambda: Tokenizer.from_file(tmp_path / "tokenizer.json"), "not UTF-8 text: byte 11")
    one_line(lambda: Tokenizer.from_json(DEEP), "nested too deep")
    one_line(lambda: Tokenizer.from_json(None), "must be a string, got None")
    one_line(lambda: Tokenizer.from_json(byte_tokenizer_json()).decode([-1]), "must be at least 0")


def test_vocabulary_counts_rows_over_holes():
    whole = Tokenizer.from_json(byte_tokenizer_json())
    assert whole.vocab_size == 261
    holes = changed(lambda d: d.update(added_tokens=[]) or d["model"]["vocab"].update({"Ā": 300}))
    assert Tokenizer.from_json(holes).vocab_size == 301


# --- ids beyond the embedding


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    """Fewer tokens than rows are fine: BASE is one with 261 of both, 512 rows are padded."""
    added = changed(lambda d: d["added_tokens"].append(d["added_tokens"][0]
                    | {"id": 261, "content": "<more>"}))  # fmt: skip
    write_folder(tmp_path, BASE, random_tensors(BASE))
    (tmp_path / "tokenizer.json").write_text(added)
    one_line(lambda: load(tmp_path), "token '<more>' with id 261, but the embedding has 261 rows")
    hf = BASE | {"vocab_size": 512}
    tensors = random_tensors(BASE)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.resize(tensors[name], (512, tensors[name].shape[1]))
    write_folder(tmp_path, hf, tensors)
    assert load(tmp_path).tokenizer.vocab_size == 261


def test_gguf_with_more_tokens_than_rows(tmp_path):
    tensors = gguf_files.to_gguf(BASE, random_tensors(BASE))
    for name in ("token_embd.weight", "output.weight"):
        tensors[name] = tensors[name][:260]
    path = gguf_files.write(tmp_path / "m.gguf", BASE, tensors, vocab_size=260)
    one_line(lambda: load(path), "with id 260, but the embedding has 260 rows")


def test_ids_from_a_user_are_checked_before_any_compute(tmp_path):
    model = load(write_folder(tmp_path, BASE, random_tensors(BASE)))
    for ids in ([[0, 261]], [[-1, 3]]):
        one_line(lambda ids=ids: calibrate_model(model, np.array(ids)), r"must lie in \[0, 261\)")
        one_line(lambda ids=ids: model.apply_fn(model.params, jnp.asarray(ids)), "must lie in")
    one_line(lambda: model.apply_fn(model.params, jnp.ones((1, 2))), "must be integers")
    jax.eval_shape(model.apply_fn, model.params, jax.ShapeDtypeStruct((1, 2), jnp.int32))


def test_strict_json_still_reads_what_is_json():
    assert parse_json('{"a": [1, 2.5e3, null, true, "é\\u00e9"]}', "x") == {
        "a": [1, 2500.0, None, True, "éé"]
    }
