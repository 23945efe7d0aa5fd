"""W2 by linear programs and closed forms; KL of logits by definition, to second order, and as
`evaluate` has it."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment, linprog
from scipy.stats import norm

from jaxquant.evaluation import chunk, evaluate
from jaxquant.theory.divergences import gaussian_wasserstein2, kl_divergence, wasserstein2


def transport(x, y, p, q):
    """W2 by a linear program over all couplings."""
    n, k = len(x), len(y)
    cost = (x[:, None] - y) ** 2
    rows, columns = np.kron(np.eye(n), np.ones(k)), np.kron(np.ones(n), np.eye(k))
    found = linprog(cost.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.append(p, q))
    return np.sqrt(found.fun)


@pytest.mark.parametrize("n, k", [(1, 5), (5, 5), (6, 4), (7, 3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_w2_is_the_best_coupling(n, k, weighted):
    rng = np.random.default_rng(n + k)
    x, y = rng.normal(size=n), rng.normal(1, 2, k)
    p, q = (rng.dirichlet(np.ones(m)) if weighted else np.full(m, 1 / m) for m in (n, k))
    weights = (3 * p, 5 * q) if weighted else ()
    assert wasserstein2(x, y, *weights) == pytest.approx(transport(x, y, p, q), rel=1e-7)
    if n == k and not weighted:
        i, j = linear_sum_assignment((x[:, None] - y) ** 2)
        assert wasserstein2(x, y) == pytest.approx(np.sqrt(np.mean((x[i] - y[j]) ** 2)))
    # The twin: places are compared instead of quantiles.
    if n == k and not weighted:
        assert np.sqrt(np.mean((x - y) ** 2)) > wasserstein2(x, y) + 1e-3


def test_w2_by_rows():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(3, 2, 50)), rng.normal(size=(2, 40))
    found = wasserstein2(x, y)
    assert found.shape == (3, 2)
    for i in np.ndindex(3, 2):
        assert found[i] == pytest.approx(wasserstein2(x[i], y[i[1]]))
    shared = rng.uniform(size=50)
    weighted = wasserstein2(x, y, shared)
    assert weighted[2, 1] == pytest.approx(wasserstein2(x[2, 1], y[1], shared))
    assert wasserstein2(jnp.zeros(3), jnp.full(2, 1.5, jnp.bfloat16)) == 1.5


def test_w2_is_a_distance_of_distributions():
    rng = np.random.default_rng(1)
    x, y, z = rng.normal(size=30), rng.normal(2, 1, 45), rng.laplace(size=20)
    assert wasserstein2(x, rng.permutation(np.repeat(x, 3))) == pytest.approx(0, abs=1e-7)
    assert wasserstein2(x, x + 2) == pytest.approx(2) and wasserstein2(x, y) == wasserstein2(y, x)
    assert wasserstein2(x, z) <= wasserstein2(x, y) + wasserstein2(y, z)
    weights = np.array([2.0, 0.0, 1.0])  # points without weight are no points
    assert wasserstein2(x[:3], y, weights) == pytest.approx(wasserstein2(x[[0, 0, 2]], y))


def test_w2_of_gaussians():
    assert gaussian_wasserstein2(np.array([1.0, 0.0]), 2.0, 4.0, np.array([6.0, 2.0])).tolist() == [
        5.0,
        4.0,
    ]
    u = (np.arange(100_000) + 0.5) / 100_000
    x, y = norm.ppf(u), norm(1, 3).ppf(u[::2])
    assert wasserstein2(x, y) == pytest.approx(gaussian_wasserstein2(0.0, 1.0, 1.0, 3.0), rel=1e-3)
    rng = np.random.default_rng(0)  # a bound for other distributions
    x, y = rng.uniform(size=40), rng.exponential(size=30)
    bound = gaussian_wasserstein2(x.mean(), x.std(), y.mean(), y.std())
    assert wasserstein2(x, y) >= bound


def test_shrunken_weights_are_seen_by_w2():
    """Two outputs of one squared error: noise that keeps the deviation, and shrinkage."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=100_000)
    shrunk = 0.8 * w
    c = 1 - 0.04 / 2  # at which D = .04 too
    noisy = c * w + np.sqrt(1 - c * c) * rng.normal(size=w.shape)
    assert np.mean((w - noisy) ** 2) == pytest.approx(np.mean((w - shrunk) ** 2), rel=0.02)
    assert wasserstein2(w, shrunk) ** 2 == pytest.approx(0.04, rel=0.02)
    assert wasserstein2(w, noisy) ** 2 < 1e-3


def test_kl_by_definition():
    rng = np.random.default_rng(0)
    z, other = rng.normal(size=(2, 4, 30))
    p, q = (np.exp(a) / np.exp(a).sum(-1, keepdims=True) for a in (z, other))
    np.testing.assert_allclose(kl_divergence(z, other), np.sum(p * np.log(p / q), -1))
    np.testing.assert_allclose(kl_divergence(z + 700, other - 700), kl_divergence(z, other))
    assert kl_divergence(z, z + 3.0).max() < 1e-14


def test_kl_of_close_logits():
    """Half the variance of the change under the teacher; then a sixth of its third cumulant."""
    rng = np.random.default_rng(0)
    z, g = rng.normal(size=(2, 5000))
    p = np.exp(z) / np.exp(z).sum()
    centered = g - p @ g
    variance, third = p @ centered**2, p @ centered**3
    for e, tolerance in ((0.3, 0.1), (0.1, 0.03), (0.01, 3e-3), (0.001, 3e-4)):
        ratio = kl_divergence(z, z + e * g) / (e * e * variance / 2)
        assert ratio == pytest.approx(1, abs=tolerance)
        assert ratio - 1 == pytest.approx(e * third / (3 * variance), abs=e * e)
    # The twin: the plain variance of the change, not that under the teacher's probabilities.
    peaked = 3 * z
    ratio = kl_divergence(peaked, peaked + 1e-3 * z) / (1e-6 * np.var(z) / 2)
    assert abs(ratio - 1) > 0.1


def test_kl_of_masked_tokens():
    z = np.array([0.0, 1.0, -np.inf])
    assert kl_divergence(z, np.array([0.5, 0.5, 9.0])) > 0
    assert kl_divergence(z, z) == 0
    assert kl_divergence(np.array([0.0, 1.0, 0.0]), z) == np.inf


def test_kl_is_that_of_evaluate():
    rng = np.random.default_rng(0)
    tables = [jnp.asarray(t, jnp.float32) for t in rng.normal(size=(2, 16, 16))]
    model = lambda table, tokens: table[tokens]
    chunks = chunk(rng.integers(0, 16, 32), 16)
    found = evaluate(model, tables[0], chunks, against=(model, tables[1]))
    scored = chunks[:, 8:-1]
    expected = kl_divergence(tables[1], tables[0])[scored].mean()
    assert found.kl == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: wasserstein2(np.zeros(0), np.ones(2)), "x must not be empty"),
        (lambda: wasserstein2(np.ones(2), np.array([1, np.inf])), "y must be finite, but 1 of 2"),
        (lambda: wasserstein2(np.ones(()), np.ones(2)), "x must have an axis of points"),
        (lambda: wasserstein2([1.0], np.ones(2)), "x: expected an array"),
        (
            lambda: wasserstein2(np.ones((2, 3)), np.ones((3, 3))),
            r"got shapes \[2, 3\] and \[3, 3\]",
        ),
        (
            lambda: wasserstein2(np.ones(2), np.ones(2), np.ones(3)),
            "weights for 2 points of x, got 3",
        ),
        (
            lambda: wasserstein2(np.ones((2, 3)), np.ones(2), np.ones((4, 3))),
            r"must broadcast, got the shapes x \[2, 3\], x_weights \[4, 3\]",
        ),
        (
            lambda: gaussian_wasserstein2(np.ones(2), 1.0, np.ones(3), 1.0),
            r"got the shapes x_mean \[2\], x_std \[\], y_mean \[3\], y_std \[\]",
        ),
        (lambda: wasserstein2(np.ones(2), np.ones(2), -np.ones(2)), "x_weights must be finite and"),
        (
            lambda: wasserstein2(np.ones(2), np.ones(2), None, np.zeros(2)),
            "y_weights must have a pos",
        ),
        (lambda: gaussian_wasserstein2(0.0, -1.0, 0.0, 1.0), "x_std must be finite and nonneg"),
        (lambda: gaussian_wasserstein2(np.nan, 1.0, 0.0, 1.0), "x_mean must be finite"),
        (lambda: kl_divergence(np.ones(3), np.ones(4)), r"one shape, got \[3\] and \[4\]"),
        (lambda: kl_divergence(np.ones((2, 0)), np.ones((2, 0))), "expected logits"),
        (lambda: kl_divergence(np.array([0, np.nan]), np.ones(2)), "1 rows hold NaN, inf or only"),
        (lambda: kl_divergence(np.full(2, -np.inf), np.ones(2)), "largest logit of every row"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
