"""What SmoothQuant, AWQ, DuQuant and FlatQuant promise of activations with outliers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.core.protocols import Moments
from jaxquant.rounding import LDLQ
from jaxquant.transforms import Chain, Channels, Rotation, Smooth
from jaxquant.transforms.greedy import spreading
from jaxquant.transforms.kronecker import nearly_square
from tests.support.arrays import draw, outlying

KEY = jax.random.key(0)


def calibrated(sample):
    return jq.calibrate(lambda p, x: x @ p["w"], {"w": draw(48, 8)}, [outlying()], sample=sample)


def known(k=48):
    return Channels.of(draw(40, k, seed=1), outlying(k=k))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_shares_sizes_out(alpha):
    """max|x| / s = (max|x| max|w|)^(1 - alpha): at 1/2, inputs and weights are alike.

    All but for a factor that all channels have in common, and the weights its inverse.
    """
    side, channels = jq.transforms.Smooth(alpha), known()
    arrays = side.fit(channels, KEY)
    after = channels.through(side, arrays)
    w = jnp.max(jnp.abs(after.weights), 0)
    together = channels.largest * jnp.max(jnp.abs(channels.weights), 0)
    common = after.largest[0] / together[0] ** (1 - alpha)
    np.testing.assert_allclose(after.largest, common * together ** (1 - alpha), rtol=4e-3)
    np.testing.assert_allclose(w * common, together**alpha, rtol=4e-3)
    sized = channels._replace(low=3e20 * channels.low, high=3e20 * channels.high)
    same = side.fit(sized, KEY)["factors"] / arrays["factors"]
    np.testing.assert_allclose(same, same[0], rtol=2e-3)


def test_smoothing_leaves_dead_channels_alone():
    x = outlying().at[:, 7].set(0)
    factors = jq.transforms.Smooth(0.5).fit(Channels.of(draw(40, 48, seed=1), x), KEY)["factors"]
    assert factors[7] == 1 and jnp.all(jnp.isfinite(factors)) and jnp.all(factors > 0)


def test_weights_of_one_input_are_smoothed_together():
    """The maximum is over all of them; the twin takes each one's own."""
    p = {"a": draw(32, 32), "b": 9 * draw(32, 32, seed=1)}
    fn = lambda p, x: (x @ p["a"], x @ p["b"])
    stats = jq.calibrate(fn, p, [outlying(k=32)])
    q = jq.quantize(p, jq.smoothquant(), stats)
    np.testing.assert_array_equal(q["a"].named["input.factors"], q["b"].named["input.factors"])
    assert q["a"].shared == q["b"].shared != ""
    both = jnp.concatenate([p["a"], p["b"]], 1)
    alone = lambda w: jq.transforms.Smooth(0.5).fit(Channels.of(w.T, outlying(k=32)), KEY)[
        "factors"
    ]
    np.testing.assert_array_equal(q["a"].named["input.factors"], alone(both))
    assert not np.allclose(q["a"].named["input.factors"], alone(p["a"]), rtol=0.1)


def test_the_best_alpha_is_found():
    """It serves better than both ends, by the error of the products it is judged by."""
    x, w = outlying(512, 64), draw(64, 48, seed=1)
    error = lambda alpha: float(
        jnp.sum((jq.quantized(lambda w, x: x @ w)(
            jq.quantize_array(w, jq.smoothquant(alpha=alpha), inputs=x), x) - x @ w) ** 2)
    )  # fmt: skip
    assert error(None) <= 1.02 * min(error(a) for a in (0.0, 0.25, 0.5, 0.75, 1.0))


def test_the_spreading_matrix():
    """As the paper describes it: the first row flat, the first column of three entries."""
    for size in (4, 64, 128):
        r = spreading(size)
        np.testing.assert_allclose(r @ r.T, np.eye(size), atol=1e-15)
        np.testing.assert_allclose(r[0], size**-0.5)
        column = np.zeros(size)
        column[0], column[-2] = size**-0.5, -(((size - 1) / size) ** 0.5)
        np.testing.assert_allclose(r[:, 0], column, atol=1e-15)


GREEDY = [
    jq.transforms.Greedy(16, 64),
    jq.transforms.Greedy(16, 64, shared=True),
    jq.transforms.Greedy(16, 64, flat=True),
    jq.transforms.Greedy(16, 64, shared=True, by_row=True),
]


@pytest.mark.parametrize("side", GREEDY, ids=str)
def test_greedy_rotations_spread_outliers(side):
    channels = known()
    arrays = side.fit(channels, KEY)
    for r in np.asarray(arrays["rotation"], np.float64):
        np.testing.assert_allclose(r @ r.T, np.eye(16), atol=1e-6)
    x = channels.sample
    y = side.apply(x, arrays)
    assert jnp.max(jnp.abs(y)) <= jnp.max(jnp.abs(x))
    # A spike v alone in its block can become no smaller than v / sqrt(block).
    assert 900 / 16**0.5 <= jnp.max(jnp.abs(y)) < 900 / 2
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=1), jnp.linalg.norm(x, axis=1), rtol=1e-5)


def test_a_permutation_and_a_second_rotation_spread_further():
    channels, sizes = known(), []
    for side in (GREEDY[0], jq.transforms.Chain((GREEDY[0], jq.transforms.Zigzag(16), GREEDY[0]))):
        sizes.append(jnp.max(jnp.abs(side.apply(channels.sample, side.fit(channels, KEY)))))
    assert sizes[1] < 0.75 * sizes[0]


def test_nothing_is_rotated_that_only_gets_worse():
    """Rows of one size in all channels are as small as they can be: the identity is kept."""
    x = jnp.where(jax.random.bernoulli(KEY, 0.5, (4096, 4)), 1.0, -1.0)
    rotation = jq.transforms.Greedy(4, 4).fit(Channels.of(jnp.ones((1, 4)), x), KEY)["rotation"]
    np.testing.assert_allclose(rotation[0], np.eye(4), atol=1e-6)


def test_zigzag_deals_channels_out():
    """Every channel once; blocks get sums alike, where in rank order the first had all."""
    side, channels = jq.transforms.Zigzag(12), known()
    order = np.asarray(side.fit(channels, KEY)["order"])
    np.testing.assert_array_equal(np.sort(order), np.arange(48))
    size = np.asarray(channels.largest)
    ranked = np.argsort(-size, kind="stable")
    rounds = np.arange(48).reshape(12, 4)
    rounds[1::2] = rounds[1::2, ::-1]
    np.testing.assert_array_equal(order, ranked[rounds.T.ravel()])
    spread = lambda order: np.var(np.sort(size[order].reshape(4, 12), 1)[:, :11].mean(1))
    assert spread(order) < 0.1 * spread(ranked)


def test_duquant_makes_inputs_smaller_at_every_site():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    p, x = {"a": draw(48, 64), "b": draw(64, 32, seed=1)}, outlying()
    stats = jq.calibrate(fn, p, [x], sample=64)
    q = jq.quantize(p, jq.duquant(block=16, steps=32), stats)
    for name, rows in (("a", x), ("b", jnp.tanh(x @ p["a"]))):
        turned = q[name].transformed(rows, q[name].arrays)
        smooth = jq.transforms.Smooth(0.6).apply(
            rows, {"factors": q[name].named["input.0.factors"]}
        )
        assert jnp.max(jnp.abs(turned)) <= jnp.max(jnp.abs(smooth))


def test_a_kronecker_product_is_one():
    side, channels = jq.transforms.Kronecker(), known()
    arrays = side.fit(channels, KEY)
    arrays = side.learned(arrays, {n: 0.1 * draw(*a.shape, seed=3) for n, a in arrays.items()})
    x = draw(3, 48, seed=4)
    both = np.kron(np.asarray(arrays["left"], float), np.asarray(arrays["right"], float))
    want = np.asarray(x * arrays["factors"].astype(float), float) @ both
    np.testing.assert_allclose(side.apply(x, arrays), want, rtol=1e-4, atol=1e-4)
    w = draw(48, 8, seed=5)
    met = side.inverse(w.T, arrays).T
    np.testing.assert_allclose(side.apply(x, arrays) @ met, x @ w, rtol=1e-3, atol=1e-3)


def test_learned_rotations_stay_rotations():
    side = jq.transforms.Kronecker(orthogonal=True)
    arrays = side.fit(known(), KEY)
    arrays = side.learned(arrays, {n: draw(*a.shape, seed=3) for n, a in arrays.items()})
    for name in ("left", "right"):
        r = np.asarray(arrays[name], float)
        np.testing.assert_allclose(r @ r.T, np.eye(len(r)), atol=1e-5)


def test_sizes_that_have_no_two_factors():
    assert nearly_square(11008) == (86, 128) and nearly_square(13) == (1, 13)


@pytest.mark.parametrize("duo", [False, True])
def test_awq_protects_the_channels_that_matter(duo):
    """Better than nearest by the loss it is judged by, and never worse: r = 0 is the identity."""
    x, w = outlying(512, 128), draw(128, 64, seed=1)
    loss = {}
    for name, method in (("rtn", jq.rtn(3, 64)), ("awq", jq.awq(3, 64, duo=duo, clip=False))):
        q = jq.quantize_array(w, method, inputs=x)
        loss[name] = float(jnp.sum((x @ (q.dequantize() - w)) ** 2))
    assert loss["awq"] < 0.7 * loss["rtn"]


def test_clipping_lowers_the_loss_that_it_is_judged_by():
    x, w = draw(512, 128) * jnp.linspace(0.1, 3, 128), draw(128, 64, seed=1) ** 3
    loss = {}
    for name, rounder in (("nearest", jq.rtn().rounder), ("clipped", jq.awq().rounder)):
        q = jq.quantize_array(w, jq.Method(name, rounder, jq.formats.Integer(3, 64)), inputs=x)
        e = (q.dequantize() - w).reshape(2, 64, 64)
        h = x.T @ x / 512
        blocks = jnp.stack([h[:64, :64], h[64:, 64:]])
        loss[name] = jnp.einsum("gin,gij,gjn->", e, blocks, e)
    assert loss["clipped"] < 0.95 * loss["nearest"]


def test_feedback_makes_up_for_what_is_clipped():
    """The twin rounds the clipped matrix, and loses what was clipped off."""
    x, w = draw(512, 128) @ draw(128, 128, seed=2), draw(128, 64, seed=1) ** 3
    format, clip = jq.formats.Integer(3, 64), jq.awq(feedback=True).rounder
    moments = Moments(x.T @ x / 512)
    assert isinstance(clip.rounder, LDLQ)

    def loss(data):
        return float(jnp.sum((x @ (format.dequantize(data, 128) - w)) ** 2))

    ours = loss(clip(w, format, moments)[0])
    twin = loss(clip.rounder(clip._clipped(w, format, moments.input), format, moments)[0])
    assert ours < 0.95 * twin


@pytest.mark.parametrize("form", ["int8,static", "int8,asymmetric,static"])
def test_static_scales_are_those_of_all_that_was_seen(form):
    w, x = draw(48, 32), outlying()
    method = jq.Method(
        "s",
        jq.rtn().rounder,
        jq.formats.Integer(8, -1),
        jq.transforms.Smooth(0.5),
        activations=form,
    )
    q = jq.quantize_array(w, method, inputs=x)
    smooth = jq.transforms.Smooth(0.5).apply(x, {"factors": q.named["input.factors"]})
    step = (
        (jnp.max(smooth) - jnp.min(smooth)) / 254 if "asym" in form else jnp.max(abs(smooth)) / 127
    )
    np.testing.assert_allclose(q.named["activations.scale"], step, rtol=1e-5)
    run = jq.quantized(lambda w, x: x @ w)
    rows = jnp.zeros((4, 48)).at[0].set(x[0])
    np.testing.assert_allclose(run(q, rows)[0], run(q, x[:1])[0], rtol=1e-5)  # padding is nothing
    assert not np.any(run(q, rows)[1:])
    assert q.nbytes == sum(a.nbytes for a in q.named.values())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: jq.transforms.Smooth(1.5), r"alpha must be in \[0, 1\]"),
        (lambda: jq.smoothquant(alpha=-0.1), r"alpha must be in \[0, 1\]"),
        (lambda: jq.quantize_array(draw(48, 8), jq.duquant(block=36), inputs=outlying()),
         "blocks of 36 do not divide 48 channels; blocks of 24 do"),
        (lambda: jq.quantize_array(draw(48, 8), jq.smoothquant()), "needs inputs="),
        (lambda: jq.quantize_array(draw(48, 8), jq.smoothquant(), inputs=draw(3, 40)),
         r"inputs must be \[t, 48\]"),
        (lambda: jq.quantize({"w": draw(48, 8)}, jq.smoothquant(activations="int8,static")),
         "needs statistics"),
        (lambda: jq.quantize({"w": draw(48, 8)}, jq.duquant(block=16), calibrated(sample=0)),
         "calibrate with sample=256"),
        (lambda: Chain(()), "one or more transforms"),
        (lambda: Chain((Rotation(), Smooth(None))), "only the first transform of a chain"),
        (lambda: jq.transforms.Greedy(1), "block must be at least 2 channels"),
        (lambda: jq.formats.Integer(4, clip=0.0), "clip must be in"),
        (lambda: jq.duquant(activations=jq.Activations(9)), "must be 2 to 8, got 9"),
    ],
)  # fmt: skip
def test_bad_input(bad, message):
    with pytest.raises(ValueError, match=message):
        bad()
