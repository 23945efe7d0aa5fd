"""Rotary position embeddings: octave means summed, ranges, rounded positions, collisions."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.theory.limits.positions import (
    collision_limit,
    effective_range,
    first_collision,
    octave_mean,
    range_limit,
    rope_kernel,
    rope_positions,
    rounding_bound,
)


def geometric(base, d):
    return float(base) ** (-np.arange(d // 2) / (d // 2))


@pytest.mark.parametrize(("base", "d"), [(1e4, 64), (1e5, 64), (5e5, 128)])
def test_octave_means_are_sums(base, d):
    theta = geometric(base, d)
    for far in (1, 2, 3, 127, 1024, 8191):
        inside = np.arange(far // 2 + 1, far + 1)
        mean = np.mean([np.mean(np.cos(theta * k)) for k in inside])
        assert octave_mean(theta, np.array(far)) == pytest.approx(mean, abs=1e-11)
    far = np.array([512, 1024, 4096])
    formula = 1 - (np.log(far) + np.euler_gamma - 1 + np.log(2)) / np.log(base) - 1 / d
    np.testing.assert_allclose(octave_mean(theta, far), formula, atol=0.02)


def test_octave_means_of_whole_turns():
    assert octave_mean(np.array([2 * np.pi, 4 * np.pi]), np.array([5, 6])).tolist() == [1, 1]


def test_known_values_and_ranges():
    means = octave_mean(geometric(1e4, 64), np.array([1024, 4096, 8192])).round(3)
    assert means.tolist() == [0.203, 0.046, 0.0]
    assert octave_mean(geometric(1e5, 64), np.array(8192)).round(3) == 0.178
    theta = geometric(1e4, 64)
    assert [effective_range(theta, x) for x in (0.5, 0.3, 0.2, 0.1)] == [66, 398, 969, 2729]
    before = octave_mean(theta, np.arange(1, 398))
    assert (before >= 0.3).all() and octave_mean(theta, np.array(398)) < 0.3
    assert effective_range(theta, -1.0, 5000) is None
    # A threshold of the kernel itself is crossed by an oscillation, much earlier.
    theta = geometric(1e5, 64)
    assert (rope_kernel(theta, np.arange(1, 300.0)) < 0.3).any()
    assert effective_range(theta, 0.3) == 2151
    row = range_limit(theta, 8192)
    assert (row.measured, row.bound, row.verdict) == (2151, 8192, "-")


@pytest.mark.parametrize(
    ("dtype", "first"),
    [
        (jnp.bfloat16, 256),
        ("float16", 2048),
        (np.float32, 2**24),
        (jnp.float8_e4m3fn, 16),
        (jnp.float8_e5m2, 8),
    ],
)
def test_positions_collide_where_the_significand_ends(dtype, first):
    assert first_collision(dtype) == first == collision_limit(dtype).bound
    x = jnp.arange(5000).astype(dtype).astype(jnp.float32)
    if first < 4999:
        equal = np.asarray(x[1:] == x[:-1])
        assert equal.argmax() == first and not equal[:first].any()


def test_angles_in_float32_keep_the_kernel_and_others_do_not():
    theta = geometric(1e4, 64)
    t = jnp.arange(4096)
    angles = t[:, None].astype(jnp.float32) * jnp.asarray(theta, jnp.float32)
    assert [r.verdict for r in rope_positions(angles, theta).limits()] == ["holds", "holds"]
    assert rounding_bound(theta, 4096) < 2e-4
    rounded = t[:, None].astype(jnp.bfloat16).astype(jnp.float32) * jnp.asarray(theta, jnp.float32)
    found = rope_positions(rounded, theta)
    assert found.equal > 3000
    assert [r.verdict for r in found.limits()] == ["violated", "violated"]
    other = rope_positions(angles, geometric(1e5, 64))  # the base of the configuration ignored
    assert [r.verdict for r in other.limits()] == ["violated", "holds"]
    shifted = rope_positions(angles + 1.0, theta)  # relative: a shift changes nothing
    assert shifted.limits()[0].verdict == "holds"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rope_kernel(np.zeros(0), np.ones(1)), "expected frequencies"),
        (lambda: rope_kernel(np.array([-1.0]), np.ones(1)), "positive and finite"),
        (lambda: rope_kernel(np.ones(1), np.array([np.nan])), "finite"),
        (lambda: octave_mean(np.ones(1), np.array(0.5)), "whole numbers"),
        (lambda: effective_range(np.ones(1), np.nan), "threshold below 1"),
        (lambda: first_collision(np.int32), "floating-point type"),
        (lambda: first_collision("positions"), "floating-point type"),
        (lambda: collision_limit(np.float64), "tells all positions apart"),
        (lambda: rounding_bound(np.ones(1), 0), "context must be"),
        (lambda: rope_positions(np.ones((1, 4)), np.ones(4)), "two positions or more"),
        (lambda: rope_positions(np.ones((3, 4)) * np.nan, np.ones(4)), "finite"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
