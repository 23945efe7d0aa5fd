"""LDLQ and nearest against a float64 NumPy GPTQ written the classical way (inverse Hessian)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.rounding import Moments
from jaxquant.rounding.moments import unit_upper
from tests.support.arrays import draw
from tests.support.layer import problem


def grid64(w, bits, symmetric):
    low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
    bottom, top = -(1 << bits - 1), (1 << bits - 1) - 1
    if symmetric:
        return np.float16(np.maximum(-low, high) / top).astype(float), np.zeros(w.shape[1])
    s = np.float16((high - low) / (top - bottom)).astype(float)
    return s, np.clip(np.round(bottom - low / s), bottom, top)


def round64(w, grid, bits):
    s, z = grid
    return s * (np.clip(np.round(w / s) + z, -(1 << bits - 1), (1 << bits - 1) - 1) - z)


def gptq64(w, h, bits, g, symmetric, act_order, damping=0.01):
    """Frantar et al., algorithm 1: column by column with the Cholesky factor of the inverse."""
    w = w.astype(float).copy()
    h = h.astype(float) + damping * np.mean(np.diag(h)) * np.eye(len(h))
    k = len(w)
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(k)
    fixed = [grid64(w[i : i + g], bits, symmetric) for i in range(0, k, g)]
    w, h = w[order], h[order][:, order]
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    q = np.zeros_like(w)
    for j in range(k):
        if act_order:
            grid = fixed[order[j] // g]
        elif j % g == 0:
            grid = grid64(w[j : j + g], bits, symmetric)
        q[j] = round64(w[j], grid, bits)
        w[j:] -= np.outer(u[j, j:], (w[j] - q[j]) / u[j, j])
    out = np.zeros_like(q)
    out[order] = q
    return out


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_is_the_classical_algorithm(bits, symmetric, act_order):
    w, h = problem()
    method = jq.gptq(bits, 16, symmetric=symmetric, act_order=act_order, block_size=32)
    got = np.asarray(jq.quantize_array(jnp.asarray(w), method, jnp.asarray(h)).dequantize())
    want = gptq64(w, h, bits, 16, symmetric, act_order)
    # A tie broken the other way moves its column's later codes: columns agree or hold a tie.
    columns = np.mean(np.all(np.abs(got - want) < 1e-3, axis=0))
    assert columns > 0.8
    loss = lambda q: np.trace((w - q).T @ h @ (w - q))
    np.testing.assert_allclose(loss(got), loss(want), rtol=0.05)
    wrong = gptq64(w, h, bits, 24, symmetric, act_order)  # the twin: another grouping
    assert np.mean(np.all(np.abs(got - wrong) < 1e-3, axis=0)) < 0.5


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_nearest(bits, symmetric):
    w, _ = problem()
    got = jq.quantize_array(jnp.asarray(w), jq.rtn(bits, 16, symmetric=symmetric)).dequantize()
    groups = [w[i : i + 16].astype(float) for i in range(0, 48, 16)]
    want = np.concatenate([round64(g, grid64(g, bits, symmetric), bits) for g in groups])
    assert np.mean(np.abs(got - want) < 1e-4) > 0.995  # ties between float32 and float64


@pytest.mark.parametrize(
    "method", [jq.gptq(3, 16), jq.gptq(3, 16, act_order=False), jq.ternary(16, feedback=True)]
)
def test_feedback_without_correlation_is_nearest(method):
    w, _ = problem()
    plain = jq.Method("plain", jq.rtn().rounder, method.format)
    got = jq.quantize_array(jnp.asarray(w), method, jnp.eye(48)).dequantize()
    np.testing.assert_array_equal(got, jq.quantize_array(jnp.asarray(w), plain).dequantize())


def test_block_size_changes_speed_only():
    w, h = problem()
    a, b = (
        jq.quantize_array(jnp.asarray(w), jq.gptq(4, 16, block_size=s), jnp.asarray(h)).dequantize()
        for s in (16, 128)
    )
    assert np.mean(np.abs(a - b) < 1e-5) > 0.9


def test_hard_hessians():
    w, h = problem()
    dead = h.copy()
    dead[5], dead[:, 5] = 0, 0
    q = jq.quantize_array(jnp.asarray(w), jq.gptq(4, 16), jnp.asarray(dead)).dequantize()
    assert np.all(np.isfinite(q))
    assert np.abs(q[5] - w[5]).max() < 0.5  # nearest, not zeroed
    few = draw(3, 48)
    q = jq.quantize_array(jnp.asarray(w), jq.gptq(4, 16), few.T @ few / 3).dequantize()
    assert np.all(np.isfinite(q))
    with pytest.warns(UserWarning, match="not positive definite; damping was raised from 0.01"):
        q = jq.quantize_array(
            jnp.asarray(w),
            jq.gptq(4, 16),
            jnp.asarray(h - 0.2 * np.trace(h) / 48 * np.eye(48, dtype=np.float32)),
        )
    assert np.all(np.isfinite(q.dequantize()))
    with pytest.warns(UserWarning, match="zero throughout, so it was rounded to nearest"):
        q = jq.quantize_array(jnp.asarray(w), jq.gptq(4, 16), jnp.zeros((48, 48))).dequantize()
    assert np.all(np.isfinite(q))


@pytest.mark.parametrize("d", [1, 4])
def test_unit_upper_factors_the_hessian(d):
    _, h = problem()
    u, damping = unit_upper(jnp.asarray(h), 1e-3, d)
    h = h / np.mean(np.diag(h)) + float(damping) * np.eye(48)
    inverse = np.linalg.inv(np.asarray(u, float))
    middle = inverse @ h @ inverse.T
    blocks = np.kron(np.eye(48 // d), np.ones((d, d)))
    assert np.abs(middle * (1 - blocks)).max() < 1e-3 * np.abs(middle).max()


def test_clip_search_never_hurts():
    w = jnp.asarray(problem()[0])
    plain, searched = (
        float(jnp.mean((w - jq.quantize_array(w, jq.rtn(3, 16, mse=m)).dequantize()) ** 2))
        for m in (False, True)
    )
    assert searched < plain


def test_it_maps_over_outputs():
    """Columns are independent, so splitting n (sharding, vmap) changes nothing."""
    w, h = problem()
    method = jq.gptq(4, 16)
    whole = jq.quantize_array(jnp.asarray(w), method, jnp.asarray(h)).dequantize()
    round_half = jax.vmap(lambda w: method.rounder(w, method.format, Moments(jnp.asarray(h)))[0], 1)
    halves = round_half(jnp.asarray(w).reshape(48, 2, 10))
    parts = jax.vmap(lambda d: method.format.dequantize(d, 48))(halves)
    assert np.mean(np.abs(np.concatenate(list(parts), 1) - whole) < 1e-5) > 0.9
