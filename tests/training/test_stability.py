"""Oscillating codes, drifting scales: what is measured, and that the remedies remedy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.core.sites import Site
from jaxquant.training import stability
from tests.support.arrays import draw

MIDDLE = 0.3  # of a bin, where the optimum lies


def toy(steps, rate, remedy=lambda p, state: (state, p), dampen=0.0):
    """STE's toy: minimise (round(w) - target)^2 / 2, which no code can. Codes step by step."""
    w = jnp.zeros((64, 4)).at[0].set(7.0)  # the scale is one
    p = jq.latent({"w": w}, jq.lsq(4, 64, init="range", scale_dtype="float32"))
    target = jnp.full((64, 4), MIDDLE).at[0].set(7.0)

    def loss(codes):
        data = p["w"].data | {"codes": codes}
        now = {"w": p["w"].__class__(data, p["w"].format, p["w"].view, "float32")}
        far = jnp.sum((now["w"].dequantize() - target) ** 2) / 2
        return far + dampen * 256 * stability.dampening(now)

    step = jax.jit(lambda c: c - rate * jax.grad(loss)(c))
    seen, state = [], stability.oscillations(p)
    for _ in range(steps):
        data = p["w"].data | {"codes": step(p["w"].data["codes"])}
        p = {"w": p["w"].__class__(data, p["w"].format, p["w"].view, "float32")}
        state, p = remedy(p, state)
        seen.append(np.asarray(p["w"].dequantize())[1:])
    return np.stack(seen), state


@pytest.mark.parametrize("rate", [0.1, 0.01])
def test_codes_oscillate_whatever_the_rate(rate):
    """Their mean over time is the optimum, and 2 min(f, 1 - f) of the steps turn back."""
    seen, _ = toy(600, rate)
    late = seen[300:]
    assert late.mean() == pytest.approx(MIDDLE, abs=0.04)
    moves = np.diff(late, axis=0)
    assert np.mean(moves != 0) == pytest.approx(2 * MIDDLE, abs=0.1)


def test_dampening_stops_it():
    seen, _ = toy(300, 0.1, dampen=1.0)
    assert not np.any(np.diff(seen[200:], axis=0))
    weak, _ = toy(600, 0.1, dampen=0.2)
    free, _ = toy(600, 0.1)
    rate = lambda s: np.mean(np.diff(s[300:], axis=0) != 0)
    assert 0 < rate(weak) < 0.8 * rate(free)


def test_freezing_stops_it_for_good():
    hold = jax.jit(lambda p, state: stability.hold(state, p, 0.1, 0.02))
    seen, state = toy(300, 0.1, hold)
    assert bool(jnp.all(state["w"].frozen[1:])) and not bool(jnp.any(state["w"].frozen[0]))
    assert not np.any(np.diff(seen[150:], axis=0))
    assert set(np.unique(seen[150:])) <= {0.0, 1.0}  # a code, and the nearer one mostly
    assert np.mean(seen[-1] == 0) > 0.9


def test_a_code_of_a_table_is_held_among_its_neighbours():
    """Of MXFP4 code 1 is 1/2 and code 9 is -1/2: between them is 0, not code 5, which is 3."""
    format = jq.formats.MXFP4(pad=True)
    made = jq.Method("made", jq.rtn().rounder, format)
    p = jq.latent({"w": jnp.full((32, 1), 0.5).at[0].set(6.0)}, made)
    state = stability.oscillations(p)
    for i in range(60):
        sign = 1 - 2 * (i % 2)
        codes = p["w"].data["codes"].at[1:].set(0.5 * sign)
        w = p["w"].__class__({**p["w"].data, "codes": codes}, p["w"].format, p["w"].view, "float32")
        state, held = stability.hold(state, {"w": w}, 0.2, 0.05)
    assert bool(jnp.all(state["w"].frozen[1:]))
    assert float(jnp.max(jnp.abs(held["w"].dequantize()[1:]))) <= 0.5


def test_flips_and_drift():
    p = jq.latent({"w": draw(64, 8), "v": draw(64, 8, seed=1)}, jq.lsq(3, 16))
    codes = stability.codes_of(p)
    assert codes["w"].shape == (64, 8) and codes["w"].dtype == jnp.int8
    assert max(map(float, stability.flips(codes, codes).values())) == 0
    scaled = {**p, "w": p["w"].__class__(
        {"codes": p["w"].data["codes"], "scale": p["w"].data["scale"] * 2},
        p["w"].format, p["w"].view, "float32",
    )}  # fmt: skip
    assert float(stability.drift(p, scaled)["w"]) == pytest.approx(np.log(2), rel=1e-5)
    assert float(stability.flips(codes, stability.codes_of(scaled))["w"]) > 0.3
    assert float(stability.flips(codes, stability.codes_of(scaled))["v"]) == 0


@pytest.mark.parametrize(
    "method", [jq.lsq(4, 16), jq.ste(2, 16), jq.bitnet(), jq.stretched_elastic(2)], ids=str
)
def test_codes_are_what_is_packed(method):
    from pallas_kernels.codecs import layout

    p = jq.latent({"w": draw(64, 8)}, method)
    packed = jq.freeze(p)["w"].data["codes"]
    got = stability.codes_of(p)["w"].astype(jnp.int32)
    bits = method.format.bits
    mask = (1 << bits) - 1
    np.testing.assert_array_equal(layout.unpack(packed, bits, 64) & mask, got & mask)


def test_stacks_are_watched_too():
    found = {"w": Site("w", (3, 64, 8), contracted=(1,), batch=(0,))}
    p = jq.latent({"w": draw(3, 64, 8)}, jq.lsq(3, 16), found)
    state, same = stability.hold(stability.oscillations(p), p, 0.1)
    assert state["w"].code.shape == (3, 64, 8)
    np.testing.assert_array_equal(same["w"].data["codes"], p["w"].data["codes"])


def test_disorder_tells_noise_from_agreement():
    p = jq.latent({"w": draw(64, 8)}, jq.lsq(3, 16))
    steady, noisy = stability.disorder(p), stability.disorder(p)
    rng = np.random.default_rng(0)

    def slope(g):
        w = p["w"]
        return {"w": w.__class__(w.data | {"scale": g}, w.format, w.view, "float32")}

    shape = p["w"].data["scale"].shape
    for _ in range(200):
        steady = stability.turned(steady, slope(jnp.ones(shape)))
        noisy = stability.turned(noisy, slope(jnp.asarray(rng.normal(size=shape), jnp.float32)))
    assert float(steady["w"].turns.max()) == 0
    assert float(noisy["w"].turns.mean()) == pytest.approx(0.5, abs=0.08)
    left = stability.frozen_scales(noisy, slope(jnp.ones(shape)), 0.25)["w"].data["scale"]
    assert float(jnp.mean(left == 0)) > 0.9
    left = stability.frozen_scales(steady, slope(jnp.ones(shape)), 0.25)["w"].data["scale"]
    assert float(jnp.mean(left == 0)) == 0


def test_a_threshold_that_one_change_passes():
    p = jq.latent({"w": draw(64, 8)}, jq.lsq(3, 16))
    with pytest.raises(ValueError, match="single change"):
        stability.hold(stability.oscillations(p), p, 0.001)


def test_a_group_with_an_outlier_moves_as_the_others_do():
    """In steps of its own grid (the wrong variant) it would move 100 times as far."""
    w = jnp.ones((64, 2, 128)).at[3, :, 0].set(100.0)  # batch, k, n: columns are groups of two
    found = {"w": Site("w", w.shape, contracted=(1,), batch=(0,))}
    p = jq.latent({"w": w}, jq.lsq(4, 2, init="range", scale_dtype="float32"), found)
    codes = p["w"].data["codes"]
    update = {"w": dataclasses.replace(p["w"], data={"codes": jnp.ones_like(codes)})}
    moved = np.asarray(stability.times_steps(update, p)["w"].data["codes"])
    np.testing.assert_allclose(moved[0], 1 / 7, rtol=1e-6)
    np.testing.assert_allclose(moved[3], (127 + 100) / 128 / 7, rtol=1e-6)
