"""Entropy-coded weights in words: the very same weights, served as packed ones are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.formats.symbols import symbols
from jaxquant.ptq.layer_stacks import layers_of
from jaxquant.storage import checkpoint
from pallas_kernels import dual_scale
from pallas_kernels.codecs import entropy_stream, layout
from pallas_kernels.cpu import native
from tests.support.arrays import draw

CODED = jq.Method(
    "coded", jq.rtn().rounder, jq.formats.EntropyCoded(2.5, states=8, chain=24, lanes=4)
)
K, N = 64, 40


def hard(seed=0):
    """Outliers, so that some integers fit neither 4 bits nor 8; columns and rows without any."""
    w = draw(K, N, seed=seed).at[3, 4].set(900.0).at[:, 7].mul(0.01).at[9].set(0.0)
    return w.at[11, 5].set(-40.0)


@pytest.fixture(scope="module")
def matrix():
    return jq.quantize_array(hard(), CODED)


def same(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_the_weights_are_the_very_same(matrix):
    t = jq.formats.transcoded({"w": matrix, "b": jnp.ones(3)})
    assert isinstance(t["w"].format, jq.formats.DualScale) and t["b"].shape == (3,)
    assert int((t["w"].data["ranges"][1] - t["w"].data["ranges"][0]).sum()) > 0
    same(t["w"].dequantize(), matrix.dequantize())
    same(jax.jit(lambda w: w.dequantize())(t["w"]), jax.jit(lambda w: w.dequantize())(matrix))
    assert t["w"].shape == matrix.shape and t["w"].view == matrix.view


@pytest.mark.parametrize("bits", [4, 8])
def test_both_word_sizes_hold_every_integer(bits):
    rng = np.random.default_rng(bits)
    values = np.round(rng.standard_t(1, (K, N)) * 9).astype(np.int16)
    values[0, 0], values[-1, -1], values[:, 3] = -32768, 32766, 0
    step, scale = (rng.uniform(0.5, 2, size).astype(np.float32) for size in (K, N))
    data = jq.formats.DualScale(bits).pack(values, step, scale)
    got = jq.formats.DualScale(bits).dequantize(data, K)
    same(got, step[:, None] * scale * values)
    assert jq.formats.DualScale(bits).bytes_of(values) == 4 * (
        data["codes"].size + len(data["escapes"])
    )
    lost = data | {"escapes": data["escapes"][:-1]}  # the twin
    assert int((np.asarray(jq.formats.DualScale(bits).dequantize(lost, K)) != got).sum()) == 1


def test_the_word_size_that_takes_fewer_bytes_is_chosen():
    small = jq.quantize_array(draw(K, N), dataclasses.replace(
        CODED, format=dataclasses.replace(CODED.format, bits=2.5)))  # fmt: skip
    large = jq.quantize_array(draw(K, N), dataclasses.replace(
        CODED, format=dataclasses.replace(CODED.format, bits=5.0)))  # fmt: skip
    t = jq.formats.transcoded([small, large])
    assert [w.format.bits for w in t] == [4, 8]
    assert 4 < t[0].bits_per_weight < t[1].bits_per_weight


@pytest.mark.parametrize("form", ["float", "int8", "int8/256", "int4,asymmetric", "float8"])
@pytest.mark.parametrize("m", [1, 3, 20])
def test_products_are_those_of_the_stream(matrix, form, m):
    t = jq.formats.transcoded(matrix)
    x = draw(m, K, seed=1)
    run = jax.jit(jq.quantized(lambda w, x: x @ w))
    got, want = (run(jq.ptq.with_activations(w, form), x) for w in (t, matrix))
    np.testing.assert_allclose(got, want, atol=2e-6 * float(jnp.abs(want).max()))


def test_everything_that_a_weight_is_asked(matrix):
    t = jq.formats.transcoded(matrix)
    w, ids = np.asarray(matrix.dequantize()), jnp.array([7, 3, 9, 3])
    g = draw(2, N, seed=3)
    near = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    near(jq.quantized(lambda w, g: g @ w.T)(t, g), g @ w.T)
    same(jq.quantized(lambda w: w[ids])(t), w[ids])
    same(jq.quantized(lambda w: w[:, ids])(t), w[:, ids])
    loss = lambda w, x: jnp.sum(jnp.sin(x @ w / 100))
    x = draw(2, K, seed=4)
    near(jax.grad(jq.quantized(loss), 1)(t, x), jax.grad(loss, 1)(jnp.asarray(w), x))
    said = str(jq.explain(lambda w, x: x @ w, t, x, platform="cpu"))
    assert "dual_scale_matmul" in said and ("cpu kernel" in said or native.load())
    assert 4 * w.size / 8 < t.nbytes < 8 * w.size
    assert "dual_scale" in str(jq.explain(lambda w, x: x @ w, t, x, platform="tpu"))


def test_stacks_transforms_and_shared_inputs():
    """Of layers that a scan runs, rotated, two of which read one input."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {n: jax.random.normal(k, (3, K, K)) / 8 for n, k in zip("qk", keys, strict=True)}

    def fn(params, x):
        body = lambda x, p: (jnp.tanh(x @ p["q"] + x @ p["k"]), None)
        return jax.lax.scan(body, x, params)[0]

    method = dataclasses.replace(
        CODED, input=jq.transforms.Rotation(), output=jq.transforms.Rotation()
    )
    x = draw(2, K, seed=5)
    q = jq.quantize(params, method, jq.sites(fn, params, x))
    t = jq.formats.transcoded(q, threads=1)
    for name in "qk":
        same(t[name].dequantize(), q[name].dequantize())
    got = jax.jit(jq.quantized(fn))(t, x)
    np.testing.assert_allclose(got, fn(jq.dequantize(q), x), atol=1e-4)
    apart = jq.ptq.unstack({"layers": t}, "layers")

    def in_turn(params, x):
        for p in layers_of(params, "layers"):
            x = jnp.tanh(x @ p["q"] + x @ p["k"])
        return x

    np.testing.assert_allclose(jq.quantized(in_turn)(apart, x), got, atol=1e-4)
    use = [u.why for u in jq.explain(in_turn, apart, x, platform="cpu").uses]
    assert native.load() or all("one call for 2" in why for why in use)
    whole = jq.ptq.restack(jq.formats.transcoded(apart), "layers")["layers"]
    for name in "qk":
        same(whole[name].dequantize(), q[name].dequantize())
    each = jq.formats.transcoded(jq.ptq.unstack({"layers": q}, "layers"))  # escapes of many sizes
    same(jq.dequantize(jq.ptq.restack(each, "layers"))["layers"]["q"], q["q"].dequantize())


def test_a_checkpoint_holds_it(matrix, tmp_path):
    t = jq.formats.transcoded({"w": matrix, "none": jq.quantize_array(draw(K, N), CODED)})
    checkpoint.save(tmp_path / "c", t)
    got = checkpoint.load(tmp_path / "c")
    assert got["w"].format == t["w"].format
    for name in t:
        same(got[name].dequantize(), t[name].dequantize())


def test_what_cannot_be_read_is_an_error_that_names_it(matrix):
    words = matrix.data["codes"]
    damaged = dataclasses.replace(matrix, data={"codes": words.at[3, 3].add(1)})
    with pytest.raises(ValueError, match=r"layer/w: the entropy-coded stream is damaged"):
        jq.formats.transcoded({"layer": {"w": damaged}})
    stack = jax.tree.map(lambda a, b: jnp.stack([a, b]), matrix, damaged)
    with pytest.raises(ValueError, match=r"w\[1\]: the entropy-coded stream is damaged"):
        jq.formats.transcoded({"w": stack})
    for traced in (jax.jit, lambda f: lambda w: jax.eval_shape(f, w)):
        with pytest.raises(ValueError, match="w: expected concrete arrays"):
            traced(lambda w: jq.formats.transcoded({"w": w})["w"].dequantize())(matrix)
    with pytest.raises(ValueError, match=r"bits must be one of \(4, 8\), got 3"):
        jq.formats.DualScale(3)


def test_more_rows_than_an_escape_can_name_stay_as_they_are(monkeypatch, matrix):
    monkeypatch.setattr(dual_scale, "MOST_ROWS", K - 1)
    assert jq.formats.transcoded({"w": matrix})["w"] is matrix
    with pytest.raises(ValueError, match=f"at most {K - 1} rows, got {K}"):
        jq.formats.DualScale().encode(draw(K, N))


def test_ranges_of_any_part_of_the_columns_serve():
    """What a tile of the reference, or a shard, sees of them; and escapes that say nonsense."""
    values = np.round(np.random.default_rng(0).standard_t(1, (K, N)) * 9).astype(np.int16)
    ones = lambda count: np.ones(count, np.float32)
    data = jax.tree.map(jnp.asarray, jq.formats.DualScale().pack(values, ones(K), ones(N)))
    part = data | {name: data[name][..., 7:19] for name in ("codes", "scale", "ranges")}
    same(jq.formats.DualScale().dequantize(part, K), values[:, 7:19])
    nonsense = {
        "ranges": jnp.full((2, N), 1 << 30, jnp.int32).at[0].set(-5),
        "escapes": jnp.full(3, -1, jnp.int32),
    }
    y = jq.formats.DualScale().matmul(draw(2, K), data | nonsense)
    assert y.shape == (2, N) and bool(jnp.isfinite(y).all())


def test_scales_are_those_of_the_stream(matrix):
    """The twin: steps from the stream's logarithms by another function are not the same bits."""
    got, _ = entropy_stream.read(
        matrix.data["codes"].reshape(-1), K, N, lanes=4, states=8, chain=24
    )
    step, _ = entropy_stream.scales(got.base, got.steps, got.widths)
    same(jq.formats.transcoded(matrix).data["step"], step)
    codes = layout.unpack(jq.formats.transcoded(matrix).data["codes"], 4, K)
    assert int(jnp.sum(codes != got.values)) > 0  # some are beyond four bits


def test_its_integers_are_those_that_the_stream_codes(matrix):
    """Of the code k of quantizer q, v = 2 k - q."""
    t = jq.formats.transcoded(matrix)
    of = lambda w: symbols(w.format, w.data, w.stored_rows)
    kinds = of(matrix)
    assert len(kinds) == 2
    coded = np.concatenate([2 * kind.codes - q for q, kind in enumerate(kinds)])
    [integers] = of(t)
    np.testing.assert_array_equal(np.sort(integers.codes), np.sort(coded))
    words = layout.unpack(t.data["codes"], t.format.bits, K)  # without the escapes: the twin
    assert (np.sort(words, None) != np.sort(coded)).any()
