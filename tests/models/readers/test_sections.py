"""Sections of GGUF and safetensors files: every byte is in one, every block has a layout."""

import json
import struct

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxquant.lossless import Record
from jaxquant_models.readers import sections
from jaxquant_models.readers.gguf_blocks import BLOCKS
from jaxquant_models.readers.sections import Span, covering, sections_of


def test_every_type_of_ggml_has_a_layout():
    """Of as many bytes and numbers as the type has in a block."""
    for kind, (numbers, nbytes) in gguf.GGML_QUANT_SIZES.items():
        record = BLOCKS[kind.name]
        assert (record.numbers, record.stride) == (numbers, nbytes), kind.name
    assert set(BLOCKS) == {kind.name for kind in gguf.GGML_QUANT_SIZES}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_the_scales_of_a_block_are_where_the_layout_says(kind):
    """The first field, a float16, doubles with the weights; the codes stay the same."""
    rows = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[kind]
    one, two = (gguf.quants.quantize(scale * rows, kind).reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
                for scale in (1, 2))  # fmt: skip
    floats = [field for field in BLOCKS[kind.name].fields if field.width == 2]
    at = 2 * len(floats)
    assert (one[:, at:] == two[:, at:]).all()
    assert (one[:, :at].copy().view(np.float16) * 2 == two[:, :at].copy().view(np.float16)).all()


def gguf_file(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(["a", "b", "c"] * 50)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(8, 256)).astype(np.float32)
    for name in ("F32", "F16", "Q4_1", "Q8_0"):
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(f"t.{name}", gguf.quants.quantize(rows, kind), raw_dtype=kind)
    writer.add_tensor("odd", rng.normal(size=3).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tmp_path):
    gguf_file(tmp_path / "m.gguf")
    found = sections_of(tmp_path / "m.gguf")
    assert sum(s.nbytes for s in found) == (tmp_path / "m.gguf").stat().st_size
    names = [(s.name, s.dtype) for s in found]
    assert names == [
        ("header", ""), ("t.F32", "F32"), ("t.F16", "F16"), ("t.Q4_1", "Q4_1"), ("t.Q8_0", "Q8_0"),
        ("odd", "F32"), ("padding", ""),
    ]  # fmt: skip
    assert [s.numbers for s in found] == [0, 2048, 2048, 2048, 2048, 3, 0]


def test_safetensors_of_every_dtype(tmp_path):
    kinds = [np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8, np.bool_]
    tensors = {np.dtype(k).name: np.ones((3, 5), k) for k in kinds}
    tensors |= {"none": np.ones((0, 7), np.float32), "scalar": np.float32(1)[None][0:1]}
    save_file(tensors, tmp_path / "m.safetensors")
    found = sections_of(tmp_path / "m.safetensors")
    assert sum(s.nbytes for s in found) == (tmp_path / "m.safetensors").stat().st_size
    for section in found[1:]:
        assert section.numbers == tensors[section.name].size
        assert section.record.stride == tensors[section.name].itemsize


def raw_safetensors(path, dtype, shape, nbytes):
    header = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}})
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(nbytes))


def test_types_that_are_not_read_are_bytes(tmp_path):
    raw_safetensors(tmp_path / "m.safetensors", "F8_E4M3", [5], 5)
    assert sections_of(tmp_path / "m.safetensors")[1].record == Record("u1")
    raw_safetensors(tmp_path / "m.safetensors", "F3_NEW", [5], 5)
    with pytest.warns(UserWarning, match="compressed as bytes without structure"):
        assert sections_of(tmp_path / "m.safetensors") is None


def test_files_without_structure(tmp_path):
    for name, data in (("a.json", b"{}"), ("empty.gguf", b""), ("empty.safetensors", b"")):
        (tmp_path / name).write_bytes(data)
        assert sections_of(tmp_path / name) is None
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.warns(UserWarning, match="not a complete GGUF file"):
        assert sections_of(tmp_path / "broken.gguf") is None


def test_tensors_cover_what_is_theirs():
    record = Record("f4")
    spans = [Span(20, 28, "b", "F32", record), Span(8, 16, "a", "F32", record)]
    found = [(s.name, s.nbytes) for s in covering(spans, 30)]
    assert found == [("header", 8), ("a", 8), ("padding", 4), ("b", 8), ("padding", 2)]
    assert [s.name for s in covering([], 5)] == ["header"] and covering([], 0) == []
    for wrong in (Span(15, 19, "c", "F32", record), Span(28, 32, "c", "F32", record)):
        with pytest.raises(ValueError, match="over another one or beyond"):
            covering([*spans, wrong], 30)


def test_exponents_of_every_float_are_whole():
    assert sections.RECORDS["BF16"] == Record("f2") == BLOCKS["BF16"]
    assert np.dtype(ml_dtypes.bfloat16).itemsize == sections.RECORDS["BF16"].stride
