"""Reverse water-filling: the textbook's numbers, optimality against SciPy, energies, bad input."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jaxquant.theory.integer_allocation import integer_allocation
from jaxquant.theory.rate_distortion import gaussian_distortion
from jaxquant.theory.water_filling import (
    component_energies,
    high_rate_gain,
    reverse_water_filling,
)

VARIANCES = np.array([16.0, 4.0, 1.0, 0.25])


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_the_textbook(asarray):
    one = reverse_water_filling(asarray(VARIANCES), loss=1.0)
    assert one.level == 0.25 and one.rates.tolist() == [3, 2, 1, 0] and one.bits == 6
    two = reverse_water_filling(asarray(VARIANCES), loss=2.0)
    assert two.level == pytest.approx(0.583333, abs=1e-6)
    np.testing.assert_allclose(two.rates, [2.38880, 1.38880, 0.38880, 0], atol=5e-6)
    np.testing.assert_allclose(two.distortions, [two.level] * 3 + [0.25])
    # The twin: the same level for all, or equal rates, is not what comes out.
    assert two.level != pytest.approx(2.0 / 4)
    assert two.loss < np.sum(gaussian_distortion(two.bits / 4, VARIANCES))


@pytest.mark.parametrize("seed", range(3))
def test_no_rates_do_better(seed):
    """SciPy's minimum over all rates, from equal ones."""
    rng = np.random.default_rng(seed)
    var, h, n = rng.exponential(size=(3, 6)) + 0.05
    bits = n.sum() * rng.uniform(0.2, 2)
    found = reverse_water_filling(var, h, n, bits=bits)
    assert found.bits == pytest.approx(bits)
    assert np.sum(n * h * found.distortions) == pytest.approx(found.loss)
    np.testing.assert_allclose(found.distortions, gaussian_distortion(found.rates, var))
    best = optimize.minimize(
        lambda r: np.sum(n * h * gaussian_distortion(r, var)),
        np.full(6, bits / n.sum()),
        bounds=[(0, None)] * 6,
        constraints={"type": "eq", "fun": lambda r: n @ r - bits},
    )
    assert found.loss <= best.fun * (1 + 1e-9) and found.loss == pytest.approx(best.fun, rel=1e-4)


def test_bits_and_loss_are_inverse_at_every_rate():
    rng = np.random.default_rng(0)
    var, h, n = rng.lognormal(sigma=3, size=(3, 40))
    for bits in n.sum() * np.array([0, 1e-6, 0.1, 1.0, 8.0, 30.0]):
        there = reverse_water_filling(var, h, n, bits=bits)
        back = reverse_water_filling(var, h, n, loss=there.loss)
        assert back.bits == pytest.approx(bits, rel=1e-9, abs=1e-9 * n.sum())


def test_components_without_energy_take_nothing():
    found = reverse_water_filling(np.array([4.0, 0.0, 1.0]), np.array([1.0, 5.0, 0.0]), bits=3.0)
    assert found.rates.tolist() == [3, 0, 0] and found.distortions.tolist() == [0.0625, 0, 1]
    none = reverse_water_filling(np.zeros(2), bits=3.0)
    assert none.loss == 0 and none.bits == 0


def test_the_gain_is_what_water_filling_saves_at_many_bits():
    rng = np.random.default_rng(0)
    var, h, n = rng.lognormal(size=(3, 20))
    equal = np.sum(n * h * gaussian_distortion(8.0, var))
    filled = reverse_water_filling(var, h, n, bits=8.0 * n.sum()).loss
    assert equal / filled == pytest.approx(high_rate_gain(var, h, n), rel=1e-9)
    few = reverse_water_filling(var, h, n, bits=0.5 * n.sum()).loss
    assert np.sum(n * h * gaussian_distortion(0.5, var)) / few < high_rate_gain(var, h, n)
    assert high_rate_gain(np.array([1.0, 0.0])) == np.inf


def test_energies_of_correlated_inputs():
    rng = np.random.default_rng(0)
    x, var = rng.normal(size=(100, 8)) @ rng.normal(size=(8, 8)), rng.exponential(size=8)
    h = x.T @ x / 100
    own = component_energies(h, var)
    assert np.sum(own) == pytest.approx(np.diag(h) @ var)
    assert np.exp(np.mean(np.log(own))) == pytest.approx(
        np.linalg.det(h) ** (1 / 8) * np.exp(np.mean(np.log(var)))
    )
    # Hadamard: as if they were uncorrelated, the same bits leave a greater loss.
    apart = reverse_water_filling(np.diag(h) * var, bits=16.0).loss
    assert reverse_water_filling(own, bits=16.0).loss < 0.8 * apart
    plain = component_energies(np.diag(np.diag(h)), var)
    np.testing.assert_allclose(plain, np.sort(np.diag(h) * var))


def test_a_singular_second_moment_has_energies_of_zero():
    x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    found = component_energies(x.T @ x, np.ones(6))
    assert np.all(found >= 0) and np.all(found[:3] < 1e-6) and found[3] > 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reverse_water_filling(VARIANCES), "either bits or loss, got bits=None"),
        (lambda: reverse_water_filling(VARIANCES, bits=1.0, loss=1.0), "either bits or loss"),
        (
            lambda: reverse_water_filling(VARIANCES, bits=-1.0),
            "bits must be finite and nonnegative",
        ),
        (lambda: reverse_water_filling(VARIANCES, bits=np.nan), "bits must be finite and nonneg"),
        (lambda: reverse_water_filling(VARIANCES, loss=0.0), "loss must be above 0 and at most"),
        (lambda: reverse_water_filling(VARIANCES, loss=22.0), "without bits, 21.25, got 22.0"),
        (lambda: reverse_water_filling(np.ones(0), bits=1.0), r"with t >= 1, got \[0\]"),
        (lambda: reverse_water_filling(-VARIANCES, bits=1.0), "variances must be finite and"),
        (lambda: reverse_water_filling(VARIANCES * np.nan, bits=1.0), "variances must be finite"),
        (lambda: reverse_water_filling(VARIANCES, np.ones(3), bits=1.0), r"\[4\], \[3\] and"),
        (lambda: reverse_water_filling(VARIANCES, None, np.zeros(4), bits=1.0), "must be positive"),
        (lambda: high_rate_gain(np.zeros(2)), "a component with positive weight and variance"),
        (lambda: component_energies(np.ones((2, 3)), np.ones(2)), r"gram \[k, k\] and variances"),
        (lambda: component_energies(np.eye(2)[::-1], np.ones(2)), "positive semidefinite, but it"),
        (lambda: component_energies(np.triu(np.ones((2, 2))), np.ones(2)), "and symmetric; pass"),
        (lambda: component_energies(np.eye(2) * np.nan, np.ones(2)), "finite and symmetric"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- integer allocation -------------------------------------------------------------------------


def best_of_all(losses, bits, sizes, budget):
    """The least loss of any choice within the budget."""
    every = itertools.product(range(len(bits)), repeat=len(losses))
    total = lambda c: sum(losses[i][j] for i, j in enumerate(c))
    return min(total(c) for c in every if np.take(bits, c) @ sizes <= budget)


@pytest.mark.parametrize("budget", range(0, 21, 4))
def test_integer_bits_have_the_least_loss_of_all(budget):
    """Equal sizes and convex losses: exact."""
    rng = np.random.default_rng(budget)
    bits = [0, 1, 2, 3, 4, 5]
    losses = rng.exponential(size=(4, 1)) * gaussian_distortion(np.array(bits))
    found = integer_allocation(losses, bits, budget)
    assert found.sum() == budget
    loss = sum(losses[i][int(b)] for i, b in enumerate(found))
    assert loss == pytest.approx(best_of_all(losses, bits, [1] * 4, budget))


def test_unequal_sizes_have_the_least_loss_for_what_they_spend_or_a_step_of_it():
    rng = np.random.default_rng(0)
    bits, exact = [2, 3, 4, 8], 0
    for _ in range(20):
        sizes = rng.integers(1, 9, 4)
        losses = (sizes * rng.exponential(size=4))[:, None] * gaussian_distortion(np.array(bits))
        budget = 3.4 * sizes.sum()
        found = integer_allocation(losses, bits, budget, sizes)
        spent = float(found @ sizes)
        assert spent <= budget
        loss = sum(losses[i][bits.index(b)] for i, b in enumerate(found))
        best = best_of_all(losses, bits, sizes, spent)
        exact += loss <= best * (1 + 1e-9)
        assert loss <= 1.2 * best
    assert exact >= 15


def test_integers_are_near_the_continuous_rates():
    found = integer_allocation(VARIANCES[:, None] * 4.0 ** -np.arange(5), range(5), budget=6)
    assert found.tolist() == reverse_water_filling(VARIANCES, bits=6.0).rates.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"losses": np.ones(3)}, r"expected losses \[t, o\] and o bits, got \[3\] and \[2\]"),
        ({"losses": np.full((3, 2), np.nan)}, "losses finite"),
        ({"bits": [1, 1]}, "bits must be all different"),
        ({"bits": [-1, 1]}, "bits must be finite and 0 or more"),
        ({"budget": 2.0}, "budget must be at least 3 bits in total, got 2.0"),
        ({"budget": np.nan}, "budget must be at least 3 bits in total, got nan"),
        ({"sizes": np.zeros(3)}, "expected 3 positive sizes"),
    ],
)
def test_bad_arguments_of_integer_allocation(change, message):
    right = {"losses": np.ones((3, 2)), "bits": [1, 2], "budget": 5.0}
    with pytest.raises(ValueError, match=message):
        integer_allocation(**right | change)


def test_what_float64_cannot_hold():
    with pytest.raises(ValueError, match="too small for float64"):
        reverse_water_filling(np.ones(1), bits=2000.0)
    for size in (1e200, 1e-200):
        with pytest.raises(ValueError, match="too large or too small for float64"):
            reverse_water_filling(np.full(1, size), np.full(1, size), bits=2.0)
        with pytest.raises(ValueError, match="too large or too small for float64"):
            high_rate_gain(np.full(2, size), np.full(2, size))
