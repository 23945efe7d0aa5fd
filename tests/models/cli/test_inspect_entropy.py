"""`jaxquant inspect --entropy`: every kind of file, in the dtypes that it stores; bad usage."""

import json

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

import jaxquant as jq
from jaxquant.formats.symbols import Symbols
from jaxquant.theory.code_entropy import code_entropy
from jaxquant.theory.entropy import symbol_entropy
from jaxquant.theory.float_entropy import field_entropy
from jaxquant_models.cli.entropy_report import table
from jaxquant_models.readers import gguf_codes
from jaxquant_models.readers.gguf_file import Tensor
from jaxquant_models.readers.stored_tensors import stored_tensors
from jaxquant_models.runs import stored_entropy as stored_entropy_module
from jaxquant_models.runs.stored_entropy import stored_entropy
from tests.support import gguf_files, tiny_llama
from tests.support.command import fails

RANDOM = np.random.default_rng(0)
KIND = gguf.GGMLQuantizationType


def report(run, model):
    status, out, err = run("inspect", model, "--entropy", "--json")
    assert (status, out.count("\n")) == (0, 1), err
    found = json.loads(out)
    return found, {t["name"]: t for t in found["tensors"]}


def test_a_safetensors_file_is_read_in_its_own_dtypes(run, tmp_path):
    w = RANDOM.normal(0, 0.02, (64, 128)).astype(np.float32)
    tensors = {
        "b": w.astype(ml_dtypes.bfloat16),
        "h": w.astype(np.float16),
        "f": w,
        "v": np.full(3, np.nan, np.float32),
        "ids": np.arange(5),
        "none": np.zeros((0, 4)),
    }
    tensors = {name: np.ascontiguousarray(a) for name, a in tensors.items()}
    file = tmp_path / "any.safetensors"
    save_file(tensors, file)
    for model in (file, tmp_path):
        found, by_name = report(run, model)
        assert sorted(by_name) == ["b", "f", "h", "ids", "v"]
        for name, dtype in (("b", "bfloat16"), ("h", "float16"), ("f", "float32")):
            one, want = by_name[name], field_entropy(tensors[name])
            assert (one["dtype"], one["shape"], one["weights"]) == (dtype, [64, 128], 8192)
            assert one["stored"] == 8 * tensors[name].itemsize
            for field in ("sign", "exponent") + ("mantissa", "value") * (dtype != "float32"):
                assert one[field] == pytest.approx(getattr(want, field)), field
            assert one["ideal"] == pytest.approx(want.ideal)
            assert one["exponent_given_row"] < one["exponent"]
            assert 1.9 < one["alpha"] <= 2
            assert one["exponent_of_alpha"] == pytest.approx(2.55, abs=0.05)
        # bfloat16 and float32 are coded by the exponent; float16 by halves that cut the mantissa.
        assert by_name["b"]["ideal"] < by_name["b"]["huffman"] < 11.2
        assert 11.2 < by_name["b"]["planes"] < 11.6
        assert by_name["v"]["planes"] is by_name["v"]["alpha"] is None
        assert by_name["v"]["exponent"] == 0 and by_name["ids"]["stored"] == 64
        total = found["total"]
        assert total["weights"] == 3 * 8192 + 3 + 5
        stored = sum(t["weights"] * t["stored"] for t in found["tensors"])
        assert total["stored"] * total["weights"] == pytest.approx(stored)
        assert set(found["dtypes"]) == {"bfloat16", "float16", "float32", "int64"}
        pooled = found["pooled"]["float32"]
        assert pooled["weights"] == 8195


def bytes_of(a):
    """The bytes of an array's elements: all first ones, all second ones, ..."""
    a = np.asarray(a)
    return a.reshape(-1).view(np.uint8).reshape(-1, a.dtype.itemsize).T


def test_a_quantized_checkpoint_and_what_it_keeps(run, tmp_path):
    """Codes of one byte, of a stack, and lattice codes of 16 bits; and leaves that are kept."""
    w = RANDOM.normal(0, 0.02, (64, 128)).astype(np.float32)
    rtn = jq.quantize_array(w, jq.rtn(bits=4, group_size=32))
    data = {"codes": RANDOM.integers(0, 1 << 16, (8, 16)).astype(np.uint16)}
    stack = jax.tree.map(lambda a: np.stack([a, a]), rtn.arrays)
    tree = {
        "w": rtn,
        "stack": rtn.with_arrays(stack),
        "kept": w.astype(np.float16),
        "ids": data["codes"],
        "step": 3,
    }
    jq.save(tmp_path / "packed", tree)
    _, by_name = report(run, tmp_path / "packed")
    assert set(by_name) == {"w", "stack", "kept", "ids"}
    want = code_entropy(rtn).total
    for name, weights in (("w", w.size), ("stack", 2 * w.size)):
        one = by_name[name]
        assert (one["dtype"], one["weights"]) == ("rtn", weights)
        assert one["stored"] == pytest.approx(want.stored)
        assert one["value"] == pytest.approx(want.entropy)
        planes = [b for a in (rtn.data["scale"], rtn.data["zero"]) for b in bytes_of(a)]
        scales = sum(symbol_entropy(b) * b.size for b in planes) / w.size
        assert one["ideal"] < want.entropy + want.side
        if name == "w":
            assert one["ideal"] == pytest.approx(want.entropy + scales)
        assert one["exponent"] is None and one["ideal"] < one["rans"] <= one["stored"]
    assert by_name["kept"]["dtype"] == "float16" and by_name["ids"]["dtype"] == "uint16"


def test_codes_of_more_than_256_values_are_two_bytes():
    kind = Symbols(np.arange(1 << 16), np.zeros(1 << 16, np.int64), 1 << 16, 16)
    tables = stored_entropy_module._tables(kind)
    assert [(counts.tolist(), bits) for counts, bits in tables] == 2 * [([256] * 256, 8)]


def test_gguf_codes_and_floats(run, tmp_path):
    tensors = gguf_files.to_gguf(tiny_llama.BASE, tiny_llama.random_tensors(tiny_llama.BASE))
    o = "blk.{}.attn_output.weight".format
    kinds = {o(0): KIND.Q8_0, o(1): KIND.Q4_1, "token_embd.weight": KIND.BF16}
    file = gguf_files.write(tmp_path / "m.gguf", tiny_llama.BASE, tensors, kinds)
    _, by_name = report(run, file)
    assert by_name["token_embd.weight"]["dtype"] == "bfloat16"
    want = field_entropy(tensors["token_embd.weight"], "bfloat16")
    assert by_name["token_embd.weight"]["value"] == pytest.approx(want.value)
    packed = gguf.quants.quantize(tensors[o(1)], KIND.Q4_1).reshape(-1, 20)
    nibbles = np.stack([packed[:, 4:] & 15, packed[:, 4:] >> 4])
    assert by_name[o(1)]["value"] == pytest.approx(symbol_entropy(nibbles))
    assert (by_name[o(1)]["stored"], by_name[o(0)]["stored"]) == (5, 8.5)


@pytest.mark.parametrize("name", list(gguf_codes.SIDE))
def test_codes_of_gguf_types(name):
    """Random blocks have every code; with scales of one, blocks are their codes."""
    weights, size = gguf.GGML_QUANT_SIZES[KIND[name]]
    data = RANDOM.integers(0, 256, (4, 40 * size)).astype(np.uint8)
    tensor = Tensor("t", KIND[name], (4, 40 * weights), data, 0)
    found = np.concatenate(list(gguf_codes.codes(tensor)))
    ternary = name.startswith("TQ")
    stored = gguf_codes.code_bits(tensor)
    if ternary:
        assert set(found.tolist()) <= {-1, 0, 1, 2}
    else:
        assert stored == len(np.unique(found)).bit_length() - 1
        assert np.log2(len(np.unique(found))) == stored
    assert found.size == 160 * weights and np.abs(found).max() <= 128
    # Scales are not seen: other ones leave the codes as they are.
    for place, scales in gguf_codes.SIDE[name].items():
        blocks = data.reshape(-1, size)
        blocks[:, place : place + len(scales)] ^= 255
    np.testing.assert_array_equal(np.concatenate(list(gguf_codes.codes(tensor))), found)


def test_the_table_fits_the_terminal(tiny, run):
    status, out, _ = run("inspect", tiny, "--entropy")
    assert status == 0 and "\x1b" not in out and "float32, one table for all" in out
    assert max(map(len, out.splitlines())) <= 140 and "H(E|row)" in out and "mantissa" in out
    found = stored_entropy(stored_tensors(tiny))
    for width, shown in ((80, False), (120, True)):
        console = Console(width=width)
        with console.capture() as page:
            console.print(table(found, width))
        text = page.get()
        assert ("H(E)" in text) == shown and "rANS" in text and "…" in text
        assert max(map(len, text.splitlines())) <= width
        rows = [line for line in text.splitlines() if "model.layers" in line]
        assert rows and not any("…" in row.split(" ", 2)[2] for row in rows)  # only names are cut


def test_bad_usage(tiny, run, tmp_path):
    both = run("inspect", tiny, "--entropy", "--outliers", "--text", "builtin")
    fails(both, 2, "two reports; give one of them")
    fails(
        run("inspect", "/nowhere", "--entropy"), 1, "no model '/nowhere': not a path, and not one"
    )
    fails(run("inspect", tmp_path, "--entropy"), 1, "neither a jaxquant checkpoint nor a folder")
    other = tmp_path / "m.bin"
    other.write_bytes(b"x")
    fails(run("inspect", other, "--entropy"), 1, "neither a .gguf nor a .safetensors file")
    save_file({"w": np.zeros((0, 3), np.float32)}, tmp_path / "e.safetensors")
    bad = run("inspect", tmp_path / "e.safetensors", "--entropy")
    assert bad[0] == 1 and "all tensors are empty" in bad[2]


@pytest.mark.model
def test_nibbles_of_smollm2():
    """3.855 bits of 4, and 3.95 at most in Huffman codes, by the tensors of three layers."""
    tensors = stored_tensors("smollm2-135m")
    packed = lambda t: isinstance(t.read(), Tensor) and t.read().kind == KIND.Q4_1
    some = [t for t in tensors if t.name.startswith(("blk.0.", "blk.13.", "blk.29."))]
    total = stored_entropy(some).total("Q4_1")
    assert total.value == pytest.approx(3.855, abs=0.01)
    assert total.stored == 5 and total.ideal < total.rans < total.huffman < 4.7
    blocks = np.concatenate([t.read().data.reshape(-1, 20)[:, :4] for t in some if packed(t)])
    scales = sum(symbol_entropy(plane) for plane in blocks.T) / 32  # weights of a block
    assert total.ideal == pytest.approx(total.value + scales, abs=0.03)  # one table for all
