"""Experts that are looked up, and slices of weights: found, calibrated, served packed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from tests.support.arrays import check, draw

EXPERTS, X = draw(8, 32, 16), draw(10, 32, seed=1)
IDS = jnp.array([0, 1, 2, 3, 0, 1, 2, 6, 6, 6])
COUNTS = [2, 2, 2, 1, 0, 0, 3, 0]
ROWS = {i: X[jnp.equal(IDS, i)] for i, n in enumerate(COUNTS) if n}
MEAN = {i: x.T @ x / len(x) for i, x in ROWS.items()}


def at(i, p):
    return jax.lax.dynamic_index_in_dim(p["up"], i, keepdims=False)


LOOK_UPS = {
    "index": lambda p, x: jnp.einsum("td,tdf->tf", x, p["up"][IDS]),
    "take": lambda p, x: jnp.einsum("td,tdf->tf", x, jnp.take(p["up"], IDS, axis=0)),
    "take, clipped": lambda p, x: jnp.einsum(
        "td,tdf->tf", x, jnp.take(p["up"], IDS, axis=0, mode="clip")
    ),
    "vmap of take": lambda p, x: jax.vmap(lambda x, i: x @ jnp.take(p["up"], i, axis=0))(x, IDS),
    "vmap of dynamic index": lambda p, x: jax.vmap(lambda x, i: x @ at(i, p))(x, IDS),
    "scan over tokens": lambda p, x: jax.lax.scan(
        lambda c, xi: (c, xi[0] @ p["up"][xi[1]]), 0, (x, IDS)
    )[1],
    "scan over what was looked up": lambda p, x: jax.lax.scan(
        lambda c, xw: (c, xw[0] @ xw[1]), 0, (x, p["up"][IDS])
    )[1],
    "from a slice": lambda p, x: jnp.einsum("td,tdf->tf", x, p["up"][:7][IDS]),
    "twice": lambda p, x: jnp.einsum("td,tdf->tf", x, p["up"][jnp.arange(8)][IDS]),
    "along another axis": lambda p, x: jnp.einsum(
        "td,dtf->tf", x, jnp.take(p["up"].transpose(1, 0, 2), IDS, axis=1)
    ),
    "checkpoint": jax.checkpoint(lambda p, x: jnp.einsum("td,tdf->tf", x, p["up"][IDS])),
}


@pytest.mark.filterwarnings("ignore:.*no input reached", "ignore:.*statistics are zero")
@pytest.mark.parametrize("name", LOOK_UPS)
def test_experts_that_are_looked_up(name):
    """Each expert's statistics are those of its own tokens; nothing is made dense."""
    fn, params = LOOK_UPS[name], {"up": EXPERTS}
    stats = jq.calibrate(fn, params, [X], sample=4)
    site = stats.sites["up"]
    assert (site.contracted, site.batch) == ((1,), (0,))
    assert stats.of("up").rows.tolist() == COUNTS
    for i, want in MEAN.items():
        np.testing.assert_allclose(stats.gram("up")[i], want, rtol=1e-4, atol=1e-5)
    if "scan" not in name:  # there each token is a product of its own, and bounds add up
        for i in MEAN:
            high = jnp.maximum(jnp.max(ROWS[i], axis=0), 0)
            np.testing.assert_allclose(stats.of("up").high[i], high, rtol=1e-6)
            kept = stats.of("up").extreme[i][: min(4, COUNTS[i])]
            assert all(np.any(np.all(np.isclose(row, X), axis=1)) for row in kept)
    # The twin: with the tokens of another expert the numbers are others.
    assert np.abs(stats.gram("up")[0] - MEAN[1]).max() > 0.1
    check(fn, params, jq.quantize(params, jq.gptq(4, 16), stats), X)


SLICES = {
    "some": lambda p, x: jnp.einsum("td,edf->tef", x, p["up"][:4]),
    "one": lambda p, x: x @ p["up"][3],
    "dynamic": lambda p, x: jnp.einsum(
        "td,edf->tef", x, jax.lax.dynamic_slice(p["up"], (IDS[1], 0, 0), (2, 32, 16))
    ),
    "fori_loop": lambda p, x: jax.lax.fori_loop(
        0, 3, lambda i, y: y + x @ p["up"][i], jnp.zeros((10, 16))
    ),
    "split": lambda p, x: [jnp.einsum("td,edf->tef", x, w) for w in jnp.split(p["up"], 2)],
    "chosen for tokens": lambda p, x: jnp.einsum("td,tkdf->tkf", x, p["up"][IDS[:, None] % 4]),
}
SEEN = {
    "some": [10] * 4 + [0] * 4,
    "one": [0, 0, 0, 10, 0, 0, 0, 0],
    "dynamic": [0, 10, 10, 0, 0, 0, 0, 0],
    "fori_loop": [10] * 3 + [0] * 5,
    "split": [10] * 8,
    "chosen for tokens": [2, 2, 5, 1, 0, 0, 0, 0],
}


@pytest.mark.filterwarnings("ignore:.*no input reached", "ignore:.*statistics are zero")
@pytest.mark.parametrize("name", SLICES)
def test_slices_of_a_stack(name):
    fn, params = SLICES[name], {"up": EXPERTS}
    stats = jq.calibrate(fn, params, [X])
    assert stats.sites["up"].batch == (0,)
    assert stats.of("up").rows.tolist() == SEEN[name]
    q = jq.quantize(params, jq.gptq(4, 16), stats)
    want = fn(jq.dequantize(q), X)
    got = jax.jit(jq.quantized(fn))(q, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
    assert jq.explain(fn, q, X).materialised == ()


def test_an_index_out_of_range_is_what_jax_gives():
    ids = IDS.at[1].set(99)
    look = lambda p, x: jnp.einsum("td,tdf->tf", x, p["up"][IDS])
    q = jq.quantize({"up": EXPERTS}, jq.rtn(4, 16), jq.sites(look, {"up": EXPERTS}, X))
    for mode in ("fill", "clip"):
        fn = lambda p, x, m=mode: jnp.einsum("td,tdf->tf", x, jnp.take(p["up"], ids, 0, mode=m))
        want = fn(jq.dequantize(q), X)
        assert bool(jnp.any(jnp.isnan(want))) == (mode == "fill")
        np.testing.assert_allclose(jq.quantized(fn)(q, X), want, rtol=1e-4, atol=1e-4)


def test_nothing_dense_is_made_of_experts():
    """The compiled program holds no floating array of the size of the stack."""
    params = {"up": draw(64, 32, 16)}
    fn = lambda p, x: jnp.einsum("td,tdf->tf", x, p["up"][IDS[:2]])
    q = jq.quantize(params, jq.rtn(4, 16), jq.sites(fn, params, X[:2]))
    text = jax.jit(jq.quantized(fn)).lower(q, X[:2]).as_text()
    assert "64x32x16xf32" not in text
    assert "64x32x16xf32" in jax.jit(fn).lower(jq.dequantize(q), X[:2]).as_text()


@pytest.mark.filterwarnings("ignore:.*no input reached")
def test_experts_without_tokens_are_named():
    fn, params = LOOK_UPS["index"], {"up": EXPERTS}
    with pytest.warns(
        UserWarning, match=r"up: no input reached 3 of 8 matrices, \[4\], \[5\], \[7\]"
    ):
        stats = jq.calibrate(fn, params, [X])
    done = []
    with pytest.warns(UserWarning, match=r"up\[4\], up\[5\], up\[7\]: the statistics are zero"):
        jq.quantize(params, jq.gptq(4, 16), stats, progress=done.append)
    assert [d.path for d in done if np.isnan(d.loss)] == ["up[4]", "up[5]", "up[7]"]
    assert all(d.loss > 0 for d in done if not np.isnan(d.loss))


def test_a_table_stays_a_table():
    """Rows of a table that meet a weight are activations, though the table has three axes."""
    params = {"table": draw(20, 4, 8), "w": draw(4, 8, 16, seed=1)}
    fn = lambda p, ids: jnp.einsum("thd,hdf->tf", p["table"][ids], p["w"])
    found = jq.sites(fn, params, IDS)
    assert (found["table"].contracted, found["table"].gathered) == ((), 0)
    assert found["w"].contracted == (0, 1)


# --- slices of one matrix ---------------------------------------------------------------------

W, Y = draw(64, 96), draw(20, 64, seed=2)
A, B = Y[:, :32], 2 * Y[:, 32:]
PARTS = {
    "three": lambda p, x: (x @ p["w"][:, :32], x @ p["w"][:, 32:64], x @ p["w"][:, 64:]),
    "split": lambda p, x: [x @ w for w in jnp.split(p["w"], 3, axis=1)],
    "every other": lambda p, x: (x @ p["w"][:, ::2], x @ p["w"][:, 1::2]),
    "of the transpose": lambda p, x: (x @ p["w"].T[:32].T, x @ p["w"].T[32:].T),
    "only one": lambda p, x: x @ p["w"][:, 32:],
    "the whole, then a part": lambda p, x: (x @ p["w"], x @ p["w"][:, 32:]),
}


@pytest.mark.parametrize("name", PARTS)
def test_slices_of_the_outputs_have_the_statistics_of_the_whole(name):
    whole = jq.calibrate(lambda p, x: x @ p["w"], {"w": W}, [Y], sample=4)
    stats = jq.calibrate(PARTS[name], {"w": W}, [Y], sample=4)
    assert (stats.sites["w"].contracted, stats.sites["w"].batch) == ((0,), ())
    for field, got in stats.of("w")._asdict().items():
        if got is not None:
            want = getattr(whole.of("w"), field)
            if field == "typical":  # in an order that hangs on the last bits
                got, want = (a[jnp.argsort(a[:, 0])] for a in (got, want))
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    method = jq.gptq(3, 16)
    got, want = (jq.quantize({"w": W}, method, s)["w"].dequantize() for s in (stats, whole))
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(got - jq.quantize({"w": W}, jq.rtn(3, 16))["w"].dequantize()).max() > 0.01


def test_gradients_at_slices_are_those_of_the_whole():
    loss = lambda y, _: sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(y))
    whole = jq.calibrate(lambda p, x: x @ p["w"], {"w": W}, [Y], loss=loss, output=["w"])
    stats = jq.calibrate(PARTS["split"], {"w": W}, [Y], loss=loss, output=["w"])
    np.testing.assert_allclose(stats.gram("w"), whole.gram("w"), rtol=1e-4, atol=1e-4)
    for i in range(0, 96, 32):  # of two slices that are multiplied apart, nothing is known together
        block = np.s_[i : i + 32, i : i + 32]
        got, want = stats.output_gram("w")[block], whole.output_gram("w")[block]
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_slices_of_the_inputs_fill_blocks():
    fn = lambda p, x: A @ p["w"][:32] + B @ p["w"][32:]
    stats = jq.calibrate(fn, {"w": W}, [Y])
    want = np.zeros((64, 64), np.float32)
    want[:32, :32], want[32:, 32:] = A.T @ A / 20, B.T @ B / 20
    np.testing.assert_allclose(stats.gram("w"), want, rtol=1e-4, atol=1e-5)
    q = jq.quantize({"w": W}, jq.gptq(3, 16), stats)
    np.testing.assert_allclose(
        jq.quantized(fn)(q, Y), fn(jq.dequantize(q), Y), rtol=1e-4, atol=1e-4
    )


def test_slices_of_a_kernel_with_heads():
    """An output axis that does not come first: heads of a `DenseGeneral` kernel."""
    w = draw(64, 4, 8)
    fn = lambda p, x: (
        jnp.einsum("td,dhk->thk", x, p["w"][:, :1]),
        jnp.einsum("td,dhk->thk", x, p["w"][:, 1:]),
    )
    stats = jq.calibrate(fn, {"w": w}, [Y])
    np.testing.assert_allclose(stats.gram("w"), Y.T @ Y / 20, rtol=1e-4, atol=1e-4)


def test_a_weight_both_ways_says_which_way_counts():
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T
    with pytest.warns(UserWarning, match=r"w is multiplied in two ways: over its axes \[0\] first"):
        stats = jq.calibrate(fn, {"w": W}, [Y])
    np.testing.assert_allclose(stats.gram("w"), Y.T @ Y / 20, rtol=1e-5, atol=1e-5)


# --- vmap outside -----------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (0, 1)], ids=str)
def test_vmap_outside_after_calibrating_through_vmap(axes):
    one = lambda p, x: jnp.tanh(x @ p["up"])
    x = {0: draw(8, 5, 32), None: draw(5, 32), 1: draw(5, 8, 32)}[axes[1]]
    params, many = {"up": EXPERTS}, jax.vmap(one, axes)
    stats = jq.calibrate(lambda p, x: many(p, x), params, [x])
    assert stats.sites["up"].batch == (0,)
    q = jq.quantize(params, jq.gptq(4, 16), stats)
    want = many(jq.dequantize(q), x)
    for run in (jax.vmap(jq.quantized(one), axes), jq.quantized(many)):
        np.testing.assert_allclose(run(q, x), want, rtol=1e-4, atol=1e-4)


def test_vmap_of_vmap_and_of_columns():
    one = lambda p, x: x @ p["up"]
    twice = jax.vmap(jax.vmap(one, (0, None)), (0, None))
    found = jq.sites(twice, {"up": EXPERTS.reshape(2, 4, 32, 16)}, X)
    assert found["up"].batch == (0, 1)
    columns = jax.vmap(one, ({"up": 1}, None), 1)  # one matrix, though columns are mapped over
    assert jq.sites(columns, {"up": EXPERTS[0]}, X)["up"].batch == ()


# --- what stays floating ------------------------------------------------------------------------


def test_what_a_bare_method_leaves_is_told():
    params = {"table": draw(40, 32), "w": draw(32, 16), "conv": draw(3, 8, seed=2)}
    fn = lambda p, ids: p["table"][ids] @ p["w"] + jnp.sum(p["conv"].reshape(-1))
    found = jq.sites(fn, params, IDS)
    with pytest.warns(UserWarning, match=r"table \(70.5%\): the function only looks up their rows"):
        q = jq.quantize(params, jq.rtn(4, 16), found)
    size = jq.size(q)
    assert size.floating == (("table", 1280), ("conv", 24))
    assert size.weights == 1816
    assert size.bytes == 4 * (1280 + 24) + q["w"].nbytes
    assert size.bits_per_weight == 8 * size.bytes / 1816
    assert size.share == 512 / 1816
    assert jq.bits_per_weight(q) == q["w"].bits_per_weight
    assert "over all weights, 28.2% of them quantized; floating: table (70.5%)" in str(size)


def test_vectors_of_a_stack_are_left_alone():
    tree = {"layers": {"w": draw(4, 32, 16), "norm": draw(4, 32)}, "head": draw(32, 64)}
    with pytest.warns(UserWarning, match="one vector for each layer of a stack|assumed") as said:
        q = jq.quantize(tree, jq.rtn(4, 16))
    packed = [p for p, w in jq.core.path_leaves(q) if isinstance(w, jq.QTensor)]
    assert packed == ["head", "layers/w"]
    kept, guessed = (str(w.message) for w in said)
    assert "layers/norm (3" in kept
    assert "the input of layers/w [4, 32, 16];" in guessed
    named = jq.Recipe([("*", jq.rtn(4, 4))])
    with pytest.warns(UserWarning, match="assumed"):
        assert isinstance(jq.quantize(tree, named)["layers"]["norm"], jq.QTensor)
