"""The least time of a model's products on a chip: what is read, what binds, what fits."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jaxquant as jq
from jaxquant.ptq.layer_stacks import unstack
from jaxquant.theory import roofline as module
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import Llama
from pallas_kernels.cost.chips import CHIPS

TOKENS = jax.ShapeDtypeStruct((1, 8), jnp.int32)
LLAMA_3_8B = LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128)
FOUR = jq.rtn(4, 128, symmetric=True)


def abstract(config):
    """The model's function and the shapes of its bfloat16 weights; no memory is used."""
    model = Llama(config, jnp.bfloat16)
    shapes = jax.eval_shape(lambda t: model.init(jax.random.key(0), t)["params"], TOKENS)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), shapes)
    return lambda p, tokens: model.apply({"params": p}, tokens), shapes


def packed(shapes, *rules, sites=None):
    recipe = jq.Recipe([*rules, ("*", jq.KEEP)])
    return jax.eval_shape(lambda p: jq.quantize(p, recipe, sites), shapes)


def by_path(found):
    return {b.path: b for b in found.bounds}


@pytest.fixture(scope="module")
def llama():
    fn, shapes = abstract(LLAMA_3_8B)
    sites = jq.sites(fn, shapes, TOKENS)
    return shapes, sites, packed(shapes, ("layers/*kernel", FOUR), sites=sites)


def test_a_token_reads_one_row_of_a_table(llama):
    _, sites, q = llama
    whole, rows = jq.roofline(q, "v5e"), jq.roofline(q, "v5e", sites=sites)
    d, vocabulary = LLAMA_3_8B.d_model, LLAMA_3_8B.vocab_size
    assert by_path(whole)["embed/embedding"].read == 2 * d * vocabulary
    assert by_path(rows)["embed/embedding"].read == 2 * d
    assert whole.bytes == rows.bytes == jq.size(q).bytes
    assert whole.read - rows.read == 2 * d * (vocabulary - 1)
    assert whole.seconds - rows.seconds == pytest.approx(2 * d * (vocabulary - 1) / 819e9)
    assert "no sites given" in str(whole) and "no sites" not in str(rows)
    # At 512 tokens a row for each of them, at a million all rows; no product in either case.
    of = lambda tokens: by_path(jq.roofline(q, "v5e", tokens, sites=sites))["embed/embedding"]
    assert of(512).read == 512 * 2 * d
    assert of(1 << 20).read == 2 * d * vocabulary and of(1 << 20).bound == "memory"


def test_a_tied_table_counts_whole():
    fn, shapes = abstract(dataclasses.replace(LLAMA_3_8B, tie_embeddings=True))
    found = jq.roofline(shapes, "v5e", sites=jq.sites(fn, shapes, TOKENS))
    table = by_path(found)["embed/embedding"]
    assert table.read == table.bytes == 2 * LLAMA_3_8B.d_model * LLAMA_3_8B.vocab_size


def test_a_packed_table_that_is_looked_up(llama):
    shapes, sites, _ = llama
    q = packed(shapes, ("embed/embedding", FOUR), sites=sites)
    table = by_path(jq.roofline(q, "v5e", 3, sites=sites))["embed/embedding"]
    assert table.bytes == q["embed"]["embedding"].nbytes
    assert table.read == pytest.approx(3 * table.bytes / LLAMA_3_8B.vocab_size, abs=1)


def test_what_binds():
    """One matrix [k, n] by hand: bytes over bandwidth, then operations over the peak."""
    k, n, chip = 4096, 8192, CHIPS["v5e"]
    w = jax.ShapeDtypeStruct((k, n), jnp.bfloat16)
    one, many = jq.roofline([w], "v5e"), jq.roofline([w], "v5e", 1024)
    assert one.seconds == pytest.approx(2 * k * n / chip.bandwidth) and one.bound == "memory"
    assert many.seconds == pytest.approx(2 * k * n * 1024 / chip.flops)
    assert many.bound == "multiplying"
    assert many.tokens_per_second == pytest.approx(1024 / many.seconds)
    assert jq.roofline([jax.ShapeDtypeStruct((k, n), jnp.float32)], "v5e").read == 4 * k * n
    vector = jq.roofline([jax.ShapeDtypeStruct((k,), jnp.bfloat16)], "v5e", 1 << 20)
    assert vector.seconds == 2 * k / chip.bandwidth


def test_integer_inputs_have_the_integer_peak():
    w = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}
    rule = lambda form: dataclasses.replace(FOUR, activations=form)
    of = lambda form, chip: jq.roofline(packed(w, ("w", rule(form))), chip, 4096).seconds
    assert of("int8", "v5e") == pytest.approx(of(None, "v5e") / 2)
    assert of("int8", "tpu7x") == of(None, "tpu7x")  # which multiplies no integers


def test_a_format_without_a_kernel_is_unpacked_first():
    w = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}
    q = packed(w, ("w", jq.float8()))
    found = jq.roofline(q, "v5e")
    assert found.bound == "no kernel"
    assert found.read == q["w"].nbytes + 4 * 4096 * 4096


def test_chips_without_rates_say_so(llama):
    _, sites, q = llama
    text = str(jq.roofline(q, "b200", sites=sites))
    assert "the rates of kernels on b200 are not known, so unpacking is not counted" in text
    assert "unpacking" not in str(jq.roofline(llama[0], "b200", sites=sites))  # nothing is packed


def test_several_chips(llama):
    shapes, sites, q = llama
    one, eight = (jq.roofline(q, "h100", 64, chips=c, sites=sites) for c in (1, 8))
    assert eight.seconds == pytest.approx(one.seconds / 8) and eight.bytes == one.bytes
    assert "communication" in str(eight) and "communication" not in str(one)
    dense = jq.roofline(shapes, "v5e", sites=sites)  # 16.06 GB
    assert not dense.fits and "does not fit: they take 2 chips" in str(dense)
    assert jq.roofline(shapes, "v5e", chips=2, sites=sites).fits
    assert jq.roofline(q, "v5e", sites=sites).fits


def test_the_table(llama):
    _, sites, q = llama
    lines = str(jq.roofline(q, "V5E", sites=sites)).splitlines()
    assert lines[0].split() == ["weight", "MB", "MB", "read", "us", "bound", "by"]
    assert lines[1].split() == ["embed/embedding", "1,050.67", "0.01", "0.01", "memory"]
    assert lines[-2:] == [
        "1 token on 1 v5e: at least 5.678 ms, at most 176 tokens/s; bound by memory 100%",
        "weights: 5.70 GB of 16 GB of memory, which fits",
    ]


def test_layers_share_a_row_and_small_weights_the_last(llama):
    shapes = llama[0]
    apart = jax.eval_shape(lambda p: unstack(p, "layers"), shapes)
    text = str(jq.roofline(apart, "v5e"))
    assert "layers/*/attn/q/kernel    x 32  1,073.74" in text and "layers/0/" not in text
    lone = {"layers": [{"w": jnp.ones((2, 2))}], "w2": jnp.ones((3, 3))}
    assert "layers/0/w" in str(jq.roofline(lone, "v5e")) and "w2" in str(jq.roofline(lone, "v5e"))
    many = {f"w{chr(97 + i)}": jnp.ones((2, 2 + i)) for i in range(module.ROWS + 3)}
    lines = str(jq.roofline(many, "v5e")).splitlines()
    assert len(lines) == 1 + module.ROWS + 1 + 3  # heading, rows, the others; totals and a note
    others = next(line for line in lines if line.startswith("(others)"))
    assert "x 3" in others and not any(line.startswith("wa ") for line in lines)


def test_bad_arguments(llama):
    _, sites, q = llama
    with pytest.raises(ValueError, match=r"chip must be one of v5e, .*, h100, .*, got 'v9'"):
        jq.roofline(q, "v9")
    for wrong in ({"tokens": 0}, {"chips": 0}):
        with pytest.raises(ValueError, match="tokens and chips must be 1 or more"):
            jq.roofline(q, "v5e", **wrong)
    with pytest.raises(ValueError, match="holds no floating or quantized arrays"):
        jq.roofline({"n": 3}, "v5e")
    of_packed = {p: s for p, s in sites.items() if not p.startswith("layers/mlp")}
    with pytest.raises(
        ValueError, match="'layers/mlp/down/kernel' has shape .*, but the sites do not contain it"
    ):
        jq.roofline(q, "v5e", sites=of_packed)
    other = sites | {"head/kernel": dataclasses.replace(sites["head/kernel"], shape=(3, 5))}
    with pytest.raises(
        ValueError, match=r"'head/kernel' has shape .*, but the sites give it shape \[3, 5\]"
    ):
        jq.roofline(q, "v5e", sites=other)


def test_the_sites_of_a_packed_tree_are_those_of_its_shapes():
    """What the error says to do when only the quantized tree is at hand."""
    fn = lambda p, ids: p["table"][ids] @ p["w"]
    params = {"table": jnp.ones((64, 32)), "w": jnp.ones((32, 16))}
    q = jq.quantize(params, jq.Recipe([("*", jq.rtn(4, 16))]))
    sites = jq.sites(fn, jax.eval_shape(jq.dequantize, q), jnp.zeros(3, int))
    found = by_path(jq.roofline(q, "a100", 2, sites=sites))
    assert found["table"].read == q["table"].nbytes * 2 / 64 and found["w"].read == q["w"].nbytes
