"""Sums of power laws: their slopes lie between the exponents, unless a constant is left in them."""

import numpy as np
import pytest

from jaxquant.theory.limits.exponents import local_exponent, power_laws, secants

SIZES = np.logspace(-8, 9, 40)
LAW = [1.0, 3.0], [0.3, 0.08]


def test_the_local_exponent_is_the_derivative():
    x = np.array([1e-8, 3 ** (-1 / 0.22), 1.0, 1e3, 1e9])
    found = local_exponent(x, *LAW)
    by_hand = (0.3 * x**-0.3 + 0.24 * x**-0.08) / (x**-0.3 + 3 * x**-0.08)
    np.testing.assert_allclose(found, by_hand, rtol=1e-12)
    assert found.round(4).tolist() == [0.2891, 0.19, 0.135, 0.095, 0.0808]
    step = 1e-5
    numeric = -np.log(power_laws(x * (1 + step), *LAW) / power_laws(x * (1 - step), *LAW))
    np.testing.assert_allclose(numeric / np.log((1 + step) / (1 - step)), found, rtol=1e-6)


def test_all_slopes_lie_between_the_exponents():
    found = secants(SIZES[::-1], power_laws(SIZES[::-1], *LAW), LAW[1])
    assert np.all(np.diff(found.secants) < 0)
    assert 0.285 < max(found.secants) < 0.3 and 0.08 < min(found.secants) < 0.082
    assert found.limits()[0].verdict == "holds"
    single = secants(SIZES, power_laws(SIZES, [2.0], [0.3]), [0.3])
    assert single.limits()[0].verdict == "holds"  # on the bound, but for rounding


@pytest.mark.parametrize(
    ("coefficients", "exponents"), [([1.0, 3.0, 0.5], [0.3, 0.08, 0.0]), ([8.0, -0.5], [0.3, 0.08])]
)
def test_a_constant_or_a_negative_term_is_seen(coefficients, exponents):
    x = SIZES[(SIZES > 1e-3) & (SIZES < 1e3)]
    found = secants(x, power_laws(x, coefficients, exponents), LAW[1])
    assert found.limits()[0].verdict == "violated"


def test_noise_needs_its_tolerance():
    noisy = power_laws(SIZES, *LAW) * np.exp(0.01 * np.cos(np.arange(40) * np.pi))
    assert secants(SIZES, noisy, [0.08, 0.3], 0.0).limits()[0].verdict == "violated"
    assert secants(SIZES, noisy, [0.08, 0.3], 0.0101).limits()[0].verdict == "holds"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: secants(np.ones(1), np.ones(1), [0.3]), "two or more distinct"),
        (lambda: secants(np.ones(2), np.ones(2), [0.3]), "two or more distinct"),
        (lambda: secants(np.zeros(0), np.zeros(0), [0.3]), "two or more distinct"),
        (lambda: secants(SIZES, SIZES * np.nan, [0.3]), "positive and finite"),
        (lambda: secants(SIZES, SIZES, []), "exponents and error"),
        (lambda: secants(SIZES, SIZES, [0.3], -1.0), "exponents and error"),
        (lambda: power_laws(SIZES, [1.0], [0.3, 0.1]), "one finite exponent"),
        (lambda: local_exponent(SIZES, [-1.0], [0.3]), "positive and finite"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
