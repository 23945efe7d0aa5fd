"""Learned clipping: derivatives by the surrogate, and where it begins."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from tests.support.arrays import draw

ROWS, EDGE = 16, 2e-6  # what lies at an end is inside
FORMATS = [
    jq.formats.Integer(2, ROWS, scale_dtype="float32"),
    jq.formats.Integer(4, ROWS, scale_dtype="float32"),
    jq.formats.Integer(3, ROWS, symmetric=True, scale_dtype="float32"),
]
formats = pytest.mark.parametrize("format", FORMATS, ids=str)
CLIPPING = jq.estimators.LearnedClipping()


def surrogate(format, w, high, low, base):
    """Rounded weights of parts (high, low), roundings held at those of `base`; float64."""
    bottom, top = format.limits
    sigmoid = lambda a: 1 / (1 + np.exp(-a))
    groups = w.reshape(-1, ROWS, w.shape[1])

    def grid(high, low):
        if format.symmetric:
            scale = sigmoid(high) * np.abs(groups).max(1) / top
            return scale, np.zeros_like(scale)
        ends = [sigmoid(a) * e for a, e in zip((high, low), extremes(groups), strict=True)]
        scale = (ends[0] - ends[1]) / (top - bottom)
        return scale, bottom - ends[1] / scale

    (s, z), (s0, z0) = grid(high, low), grid(*base)
    s, s0, z, cz = (np.repeat(a, ROWS, axis=0) for a in (s, s0, z, np.round(z0) - z0))
    if format.symmetric:  # clipped, then rounded
        inside = lambda v: np.clip(v, bottom - EDGE, top + EDGE)
        return s * (inside(w / s) + np.round(inside(w / s0)) - inside(w / s0))
    c, z = np.round(w / s0) - w / s0, z + cz
    return s * (np.clip(w / s + c + z, bottom - EDGE, top + EDGE) - z)


def extremes(groups):
    return np.maximum(groups, 0).max(1), np.minimum(groups, 0).min(1)


@formats
def test_derivatives_are_those_of_the_surrogate(format):
    w, g = draw(32, 6, seed=3), draw(32, 6, seed=4)
    learned = CLIPPING.start(w, format, format.encode(w * 0.6))
    value = lambda w, learned: jnp.sum(g * CLIPPING.value(w, learned, format))
    dw, got = jax.grad(value, (0, 1))(w, learned)
    wide = np.asarray(w, np.float64)
    base = [np.asarray(learned.get(n, learned["high"]), np.float64) for n in ("high", "low")]
    total = lambda *at: np.sum(np.asarray(g, np.float64) * surrogate(format, wide, *at, base))
    # The twin with the whole range clips nothing, and so is another function.
    assert abs(total(*base) - total(base[0] + 3, base[1] + 3)) > 0.1
    h = 1e-7
    for i, name in enumerate(n for n in ("high", "low") if n in learned):
        for index in np.ndindex(*got[name].shape):
            ends = [[a.copy() for a in base] for _ in range(2)]
            ends[0][i][index] += h
            ends[1][i][index] -= h
            want = (total(*ends[0]) - total(*ends[1])) / (2 * h)
            np.testing.assert_allclose(got[name][index], want, rtol=2e-4, atol=2e-4)
    assert set(np.unique(np.round(dw / g, 4))) == {0.0, 1.0}


@formats
def test_it_begins_at_the_ranges_found(format):
    w = draw(32, 6)
    for part in (0.6, 1.0):
        data = format.encode(w * part)
        grid = CLIPPING.grid(w, CLIPPING.start(w, format, data), format)
        reached = min(part, 0.9933)  # a whole range is no sigmoid
        np.testing.assert_allclose(grid.scale, data["scale"] * reached / part, rtol=2e-3)


def test_it_finds_the_range_of_least_error():
    """By descent from the whole range, within a tenth of what a search over ranges finds."""
    format = jq.formats.Integer(2, 64, scale_dtype="float32")
    w = draw(64, 128)
    error = lambda a: float(jnp.mean((a - w) ** 2))
    learned = CLIPPING.start(w, format, format.encode(w))
    loss = lambda learned: jnp.sum((CLIPPING.value(w, learned, format) - w) ** 2)
    adam = optax.adam(0.1)

    @jax.jit
    def step(learned, state):
        updates, state = adam.update(jax.grad(loss)(learned), state)
        return optax.apply_updates(learned, updates), state

    state = adam.init(learned)
    for _ in range(100):
        learned, state = step(learned, state)
    searched = jq.formats.Integer(2, 64, mse=True, scale_dtype="float32")
    best = error(searched.dequantize(searched.encode(w), 64))
    assert error(CLIPPING.value(w, learned, format)) < 1.1 * best
    assert best < 0.7 * error(format.dequantize(format.encode(w), 64))


def test_bad_input():
    with pytest.raises(ValueError, match="needs an integer format"):
        CLIPPING.check(jq.formats.NormalFloat(4, 16))
