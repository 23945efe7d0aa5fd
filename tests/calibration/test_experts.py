"""Experts in `jax.lax.ragged_dot`: found, calibrated on their own tokens, completed where few."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.calibration.few_tokens import Pools
from jaxquant.calibration.routed import product
from jaxquant.core.jax_private import ragged_dot_general_p
from tests.support.arrays import draw

E, K, N = 5, 16, 8
LEAST = K // 2  # tokens that an expert needs for statistics of its own
IDS = np.array([0] * 40 + [1] * 3 + [3] * 60 + [4] * 20)[np.random.default_rng(0).permutation(123)]
COUNTS = [40, 3, 0, 60, 20]
X = draw(123, K, seed=1) @ draw(K, K, seed=9) / 4  # channels that are correlated
PARAMS = {"up": draw(E, K, N), "gate": draw(E, K, N, seed=2), "down": draw(E, N, K, seed=3)}


def grouped(x, w, sizes, over=1):
    """`ragged_dot`, with the weight stored [E, k, n], or [E, n, k] if it is contracted over 2."""
    numbers = jax.lax.RaggedDotDimensionNumbers((((1,), (over,)), ((), ())), (0,), (0,))
    return jax.lax.ragged_dot_general(x, w, sizes, numbers)


def experts(p, x, ids=IDS):
    order = jnp.argsort(jnp.asarray(ids))
    sizes = jnp.bincount(jnp.asarray(ids), length=E).astype(jnp.int32)
    rows = x[order]
    y = jnp.tanh(grouped(rows, p["up"], sizes)) * grouped(rows, p["gate"], sizes)
    return grouped(y, p["down"], sizes)[jnp.argsort(order)]


def by_hand(rows, ids=IDS):
    """The second moments of the rows of every expert."""
    each = [np.asarray(rows, np.float64)[ids == e] for e in range(E)]
    return np.stack([r.T @ r for r in each])


def calibrated(fn=experts, params=PARAMS, x=X, **options):
    return jq.calibrate(fn, params, [x], **options)


few = pytest.mark.filterwarnings(
    "ignore:.*no input reached", "ignore:.*fewer than", "ignore:.*statistics are zero"
)


@few
def test_each_expert_has_the_moments_of_its_tokens():
    stats = calibrated(sample=4)
    site = stats.sites["up"]
    assert (site.contracted, site.batch, site.experts) == ((1,), (0,), (0,))
    assert stats.holder["up"] == stats.holder["gate"] != stats.holder["down"]
    assert stats.of("up").rows.tolist() == COUNTS
    np.testing.assert_allclose(stats.of("up").gram, by_hand(X), rtol=1e-4, atol=1e-4)
    w = {name: np.asarray(a)[IDS] for name, a in PARAMS.items()}
    times = lambda name: np.einsum("tk,tkn->tn", X, w[name])
    hidden = np.tanh(times("up")) * times("gate")
    np.testing.assert_allclose(stats.of("down").gram, by_hand(hidden), rtol=1e-3, atol=1e-3)
    for e, count in enumerate(COUNTS):
        own, probe = np.asarray(X)[e == IDS], jax.tree.map(lambda a, e=e: a[e], stats.of("up"))
        np.testing.assert_allclose(probe.high, own.max(0, initial=0), rtol=1e-6)
        np.testing.assert_allclose(probe.magnitude, np.abs(own).sum(0), rtol=1e-5, atol=1e-6)
        kept = [row for row in np.asarray(probe.typical) if row.any()]
        assert len(kept) == min(4, count)
        assert all(np.any(np.all(np.isclose(row, own), axis=1)) for row in kept)
    # The twin: another expert's tokens have other moments.
    assert np.abs(stats.of("up").gram[0] - by_hand(X)[3]).max() > 1


@few
def test_gradients_weight_the_tokens_of_each_expert():
    """The weight of a token is the squared norm of the gradient at the output of its expert."""
    g = np.asarray(draw(123, K, seed=5))
    loss = lambda y, _: jnp.sum(y * g)
    stats = calibrated(loss=loss, output=["down"])
    energy = np.sum(g**2, axis=1)
    w = {name: np.asarray(a)[IDS] for name, a in PARAMS.items()}
    times = lambda name: np.einsum("tk,tkn->tn", X, w[name])
    hidden = np.tanh(times("up")) * times("gate")
    want = by_hand(hidden * np.sqrt(energy)[:, None])
    np.testing.assert_allclose(stats.of("down").gram, want, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(stats.of("down").output, by_hand(g), rtol=1e-4, atol=1e-4)
    assert stats.holder["up"] != stats.holder["gate"]  # each by its own gradients


WAYS = {
    "scan over layers": lambda p, x: jax.lax.scan(lambda h, q: (h + experts(q, h), None), x, p)[0],
    "remat": lambda p, x: jax.checkpoint(experts)(jax.tree.map(lambda a: a[0], p), x),
    "jit": lambda p, x: jax.jit(experts)(jax.tree.map(lambda a: a[1], p), x),
}


@few
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_reach_the_experts(way):
    params = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), PARAMS)
    stats = calibrated(WAYS[way], params)
    site = stats.sites["up"]
    assert (site.contracted, site.batch, site.experts) == ((2,), (0, 1), (1,))
    layer = 1 if way == "jit" else 0
    np.testing.assert_allclose(stats.of("up").gram[layer], by_hand(X), rtol=1e-4, atol=1e-4)
    packed = jq.quantize(params, jq.gptq(4, 8), stats)
    want = WAYS[way](jq.dequantize(packed), X)
    got = jax.jit(jq.quantized(WAYS[way]))(packed, X)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@few
def test_a_stack_that_is_contracted_over_its_last_axis():
    fn = lambda p, x: grouped(x[jnp.argsort(IDS)], p["w"], jnp.array(COUNTS, jnp.int32), over=2)
    stats = calibrated(fn, {"w": draw(E, N, K)})
    site = stats.sites["w"]
    assert (site.contracted, site.batch, site.output) == ((2,), (0,), (1,))
    np.testing.assert_allclose(stats.of("w").gram, by_hand(X), rtol=1e-4, atol=1e-4)


@few
@pytest.mark.parametrize("sizes", [[0, 0, 1, 0, 0], [0, 64, 0, 0, 0], [65, 0, 1, 64, 63],
                                   [1, 2, 128, 200, 7], [0, 3, 0, 0, 4]])  # fmt: skip
def test_groups_of_any_size(sizes):
    ids = np.repeat(np.arange(E), sizes)
    x = draw(len(ids), K, seed=6)
    stats = calibrated(lambda p, x: experts(p, x, ids), x=x)
    assert stats.of("up").rows.tolist() == sizes
    np.testing.assert_allclose(stats.of("up").gram, by_hand(x, ids), rtol=1e-4, atol=1e-4)


@few
def test_rows_past_the_last_group_belong_to_no_expert():
    fn = lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([2, 3, 0, 0, 1], jnp.int32))
    stats = calibrated(fn, {"w": PARAMS["up"]})
    ids = np.repeat([0, 1, 4, 9], [2, 3, 1, 117])
    assert stats.of("w").rows.tolist() == [2, 3, 0, 0, 1]
    np.testing.assert_allclose(stats.of("w").gram, by_hand(X, ids), rtol=1e-4, atol=1e-4)


def test_other_ragged_products_are_not_followed():
    """A product of two ragged operands has no stack of matrices; it is computed as it is."""
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    sizes = jnp.array([2, 3], jnp.int32)
    fn = lambda p, x: jax.lax.ragged_dot_general(x, p["w"], sizes, numbers)
    params, x = {"w": draw(5, 4)}, draw(5, 3)
    site = jq.sites(fn, params, x)["w"]
    assert site.otherwise and not site.contracted
    want = jnp.stack([x[:2].T @ params["w"][:2], x[2:].T @ params["w"][2:]])
    np.testing.assert_allclose(fn(params, x), want, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 2])
def test_the_product_by_groups_is_that_of_jax(k):
    x, w, sizes = X, PARAMS["up"], jnp.array([40, 3, 0, 60, 11], jnp.int32)  # 9 rows of no group
    w = w if k == 1 else w.swapaxes(1, 2)
    got = product(x, w, sizes, k, None)
    np.testing.assert_allclose(got, grouped(x, w, sizes, over=k), rtol=1e-5, atol=1e-5)
    text = jax.jit(lambda *a: product(*a, k, None)).lower(x, w, sizes).as_text()
    assert f"{E}x{len(x)}x" not in text  # there is no copy of the rows for every expert
    assert f"{E}x{len(x)}x" in jax.jit(jax.lax.ragged_dot).lower(x, PARAMS["up"], sizes).as_text()


@few
def test_rows_of_other_experts_do_not_leak_into_statistics():
    """Not even if they are not finite."""
    x = X.at[int(np.flatnonzero(IDS == 4)[0])].set(jnp.inf)
    stats = calibrated(lambda p, x: grouped(x[jnp.argsort(IDS)], p["up"], jnp.array(COUNTS)), x=x)
    finite = np.isfinite(np.asarray(stats.of("up").gram)).all(axis=(1, 2))
    assert finite.tolist() == [True, True, True, True, False]


def test_the_primitive_is_the_one_that_jax_binds():
    jaxpr = jax.make_jaxpr(jax.lax.ragged_dot)(X, PARAMS["up"], jnp.array(COUNTS, jnp.int32))
    assert [e.primitive for e in jaxpr.eqns] == [ragged_dot_general_p]


# --- few tokens ---------------------------------------------------------------------------------


def completed_by_hand():
    own, rows = by_hand(X), np.array(COUNTS)[:, None, None]
    mean = own.sum(0) / sum(COUNTS)
    missing = np.maximum(LEAST - rows, 0)
    return (own + missing * mean) / (rows + missing)


@few
def test_moments_of_few_tokens_are_completed():
    stats = calibrated(sample=4)
    sums = jq.ptq.round_stacked.Sums.measured("up", stats)
    got = np.stack([sums.moments(e).input for e in range(E)])
    np.testing.assert_allclose(got, completed_by_hand(), rtol=1e-4, atol=1e-4)
    own = by_hand(X) / np.maximum(np.array(COUNTS), 1)[:, None, None]
    for e in (0, 3, 4):  # enough: their own
        np.testing.assert_allclose(got[e], own[e], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[2], X.T @ X / len(X), rtol=1e-4, atol=1e-4)  # none: all
    assert np.linalg.matrix_rank(own[1]) == 3 < np.linalg.matrix_rank(got[1]) == K


@few
def test_all_statistics_are_completed():
    probe = (stats := calibrated(sample=4)).of("up")
    pools = Pools.from_sums(probe, stats.sites["up"])
    of = lambda e: pools.completed(jax.tree.map(lambda a: a[e], probe), e)
    none, many, some = of(2), of(0), of(1)
    assert (float(none.rows), float(some.rows), float(many.rows)) == (LEAST, LEAST, 40)
    np.testing.assert_allclose(none.high, np.max(X, axis=0), rtol=1e-6)
    np.testing.assert_allclose(none.magnitude / LEAST, np.abs(X).mean(0), rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, many, jax.tree.map(lambda a: a[0], probe))
    own, all_of = np.asarray(probe.high[1]), np.max(X, axis=0)
    np.testing.assert_allclose(some.high, 3 / LEAST * own + (1 - 3 / LEAST) * all_of, rtol=1e-5)
    rows = np.asarray(some.extreme)
    np.testing.assert_array_equal(rows[:3], probe.extreme[1][:3])
    assert rows[3].any() and any(np.allclose(rows[3], row) for row in np.asarray(X))
    for whole in (none, some):
        assert np.all(np.any(np.asarray(whole.typical) != 0, axis=1))


@few
def test_layers_are_not_pooled_with_each_other():
    params = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), PARAMS)
    stats = calibrated(WAYS["scan over layers"], params)
    sums = jq.ptq.round_stacked.Sums.measured("up", stats)
    entry = jq.recipes.resolve(jq.Recipe([("*", jq.gptq(4, 8))]), params, stats.sites).weights[-1]
    flat = sums.matrices(entry)
    np.testing.assert_allclose(flat.moments(2).input, X.T @ X / 123, rtol=1e-4, atol=1e-4)
    second = np.asarray(stats.of("up").gram[1]).sum(0) / 123
    np.testing.assert_allclose(flat.moments(E + 2).input, second, rtol=1e-4, atol=1e-4)
    assert np.abs(second - X.T @ X / 123).max() > 0.1


@pytest.mark.filterwarnings("ignore:.*no input reached")
def test_rounding_uses_the_completed_moments_and_says_so():
    stats = calibrated()
    text = r"up\[2\] \(0\), up\[1\] \(3\): fewer than 8 tokens reached 2 of 5 experts"
    with pytest.warns(UserWarning, match=text):
        packed = jq.quantize(PARAMS, jq.Recipe([("up", jq.gptq(3, 8)), ("*", jq.KEEP)]), stats)
    want = completed_by_hand().astype(np.float32)
    for e in range(E):
        one = jq.quantize_array(PARAMS["up"][e], jq.gptq(3, 8), jnp.asarray(want[e]))
        got = packed["up"].dequantize()[e]
        # Codes at the edge between two values may differ, for sums were taken in another order.
        assert np.mean(np.isclose(got, one.dequantize(), atol=1e-5)) > 0.95
    nearest = jq.quantize_array(PARAMS["up"][2], jq.rtn(3, 8)).dequantize()
    assert np.mean(np.isclose(packed["up"].dequantize()[2], nearest, atol=1e-5)) < 0.9


@few
@pytest.mark.parametrize("method", [jq.awq(4, 8), jq.smoothquant(), jq.rtn(4, 8),
                                    jq.gptq(4, 8, activations="int8,static")])  # fmt: skip
def test_methods_for_experts(method):
    stats = calibrated(sample=16)
    packed = jq.quantize(PARAMS, method, stats)
    got, want = jq.quantized(experts)(packed, X), experts(PARAMS, X)
    assert np.linalg.norm(got - want) < 0.25 * np.linalg.norm(want)


@few
def test_a_resumed_quantization_is_the_same():
    stats, finished, done = calibrated(), {}, []
    first = jq.quantize(PARAMS, jq.gptq(3, 8), stats, finished=finished)
    again = jq.quantize(PARAMS, jq.gptq(3, 8), stats, finished=finished, progress=done.append)
    assert all(d.seconds == 0 for d in done) and len(done) == 3 * E
    jax.tree.map(np.testing.assert_array_equal, first, again)
