"""The contract of every rounder. A new one enters by one line in ROUNDERS."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.core.protocols import Moments
from jaxquant.recipes.serialize import from_json, to_json
from jaxquant.theory.rate_distortion import gap_in_bits
from tests.support.layer import problem, relative_loss
from tests.support.rounders import ROUNDERS

K, N, DEAD = 48, 32, (7, 30)
KEY = jax.random.key(0)
every_rounder = pytest.mark.parametrize(
    ("rounder", "format"),
    ROUNDERS,
    ids=[f"{type(r).__name__}-{i}" for i, (r, _) in enumerate(ROUNDERS)],
)


@lru_cache
def statistics():
    """A matrix, the correlated second moment of its inputs, and that of the gradients."""
    w, h = problem(K, N)
    g = problem(N, 4, seed=1)[1]
    return w, h, g


@lru_cache
def compiled(rounder, format):
    """The rounder as `quantize` calls it: traced, with the matrix decoded beside its arrays."""

    def run(w, h, g):
        data, report = rounder(w, format, Moments(h, g), KEY)
        return data, report, format.dequantize(data, K)

    return jax.jit(run)


@lru_cache
def rounded(rounder, format):
    return compiled(rounder, format)(*statistics())


def feeds_back(rounder, format):
    """Whether errors are fed back by a factor of the damped second moment."""
    return rounded(rounder, format)[1]["damping"] > 0


@every_rounder
def test_it_returns_what_the_format_stores(rounder, format):
    data, report, value = rounded(rounder, format)
    assert format.outputs(data) == N
    assert set(data) == set(jax.eval_shape(format.encode, jnp.zeros((K, N))))
    assert value.shape == (K, N) and bool(jnp.all(jnp.isfinite(value)))
    assert set(report) == {"damping", "dead"} and report["dead"] == 0


@every_rounder
def test_it_needs_the_statistics_that_it_names(rounder, format):
    """Without them it says so; what it does not name changes no code."""
    w, h, g = statistics()
    want = rounded(rounder, format)[2]
    for needed, without in (
        (rounder.needs_gram, Moments(None, g)),
        (rounder.needs_output, Moments(h, None)),
    ):
        if needed:
            with pytest.raises(ValueError, match="moment|statistics"):
                jax.eval_shape(lambda m=without: rounder(jnp.asarray(w), format, m, KEY))
        else:
            got = compiled(rounder, format)(w, *without)[2]
            np.testing.assert_array_equal(got, want)


@every_rounder
def test_statistics_lower_the_loss(rounder, format):
    """Told how inputs correlate, it loses less on them than told that they do not.

    A tenth less if errors are fed back; a search of ranges for each group gains little.
    """
    w, h, g = statistics()
    value = rounded(rounder, format)[2]
    blind = compiled(rounder, format)(w, np.eye(K, dtype=np.float32), g)[2]
    if rounder.needs_gram:
        share = 0.9 if feeds_back(rounder, format) else 1.0
        assert relative_loss(w, value, h) < share * relative_loss(w, blind, h)
    else:
        np.testing.assert_array_equal(value, blind)


@every_rounder
def test_no_rounder_beats_shannon(rounder, format):
    """On independent Gaussian weights, which `problem` draws, with all bytes counted."""
    w, one = statistics()[0], lambda size: np.eye(size, dtype=np.float32)
    data, _, value = compiled(rounder, format)(w, one(K), one(N))
    bits = 8 * sum(a.nbytes for a in jax.tree.leaves(data)) / w.size
    assert gap_in_bits(bits, np.mean((w - value) ** 2), np.mean(w**2)) > -0.01


@every_rounder
def test_the_unit_of_statistics_changes_no_code(rounder, format):
    w, h, g = statistics()
    other = compiled(rounder, format)(w, np.float32(2**20) * h, np.float32(2**-20) * g)
    jax.tree.map(np.testing.assert_array_equal, other[0], rounded(rounder, format)[0])


@every_rounder
def test_channels_without_inputs_are_counted_and_rounded(rounder, format):
    w, h, g = statistics()
    h = h.copy()
    for i in DEAD:
        h[i] = h[:, i] = 0
    _, report, value = compiled(rounder, format)(w, h, g)
    assert report["dead"] == (len(DEAD) if feeds_back(rounder, format) else 0)
    assert bool(jnp.all(jnp.isfinite(value)))
    if rounder.needs_gram:  # near to the weights there too: nothing is added to dead channels
        error = np.abs(np.asarray(value) - w)[list(DEAD)]
        assert error.max() < 1.5 * np.abs(w).max()


@every_rounder
def test_it_is_a_value(rounder, format):
    """Equal by its fields, hashable, and written to JSON and back."""
    del format
    assert from_json(to_json(rounder)) == rounder
    assert hash(rounder) == hash(from_json(to_json(rounder)))
