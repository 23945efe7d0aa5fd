"""Temperatures are equal where `shares` and `allocate` call an allocation optimal, and only so."""

from functools import lru_cache

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.core.greedy_allocation import lower_hull
from jaxquant.rounding.moments import believed
from jaxquant.theory.rate_distortion import gaussian_distortion
from jaxquant.theory.temperature import (
    gaussian_temperature,
    in_equilibrium,
    measured_temperature,
    spread,
    step_temperatures,
)
from jaxquant.theory.water_filling import component_energies, reverse_water_filling
from tests.support.arrays import draw

# --- continuous rates: `shares` ----------------------------------------------------------------

SHAPES = {"a": (48, 32), "b": (32, 64), "c": (64, 24)}


@pytest.fixture(scope="module")
def shared():
    """Bits above the average by path, and each weight's loss at 0 bits on its 4^-R."""
    params = {name: draw(*shape, seed=i) / 8 for i, (name, shape) in enumerate(SHAPES.items())}
    params["a"] *= 3
    fn = lambda p, x: (jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]
    x = [draw(512, 48, seed=7) @ draw(48, 48, seed=8) / 7]
    stats = jq.calibrate(fn, params, x, loss=lambda y, x: jnp.mean(y**2), output=["*"])
    return jq.ptq.shares(params, stats), {p: at_no_bits(w, p, stats) for p, w in params.items()}


def at_no_bits(w, path, stats):
    """Geometric mean of D_i F_j sigma_ij^2 by eigenvalues, with the damping of `entropy_coded`."""
    damped = lambda g, by: g + by * np.mean(np.diag(g)) * np.eye(len(g))
    log = lambda a: np.mean(np.log(a))
    h = damped(np.asarray(stats.gram(path), np.float64), 0.02)
    g = np.asarray(believed(stats.output_gram(path), 0.5), np.float64)
    squares = np.asarray(w, np.float64) ** 2
    inputs = log(component_energies(h, squares.mean(axis=1)))
    outputs = log(component_energies(damped(g / np.trace(g), 0.05), squares.mean(axis=0)))
    return np.exp(inputs + outputs) / squares.mean()


def temperatures(rates, at_no_bits):
    """Of every weight, per weight."""
    return np.array([gaussian_temperature(loss(rates[p], at_no_bits[p])) for p in SHAPES])


def loss(share, at_no_bits):
    """Per weight, at an average of 4 bits."""
    return gaussian_distortion(4 + share, at_no_bits)


def total(rates, at_no_bits):
    size = {p: np.prod(shape) for p, shape in SHAPES.items()}
    return sum(size[p] * loss(rates[p], at_no_bits[p]) for p in SHAPES)


def test_shares_are_in_equilibrium(shared):
    bits, start = shared
    assert max(bits.values()) - min(bits.values()) > 1  # there is something to share
    assert in_equilibrium(temperatures(bits, start))
    assert not in_equilibrium(temperatures(dict.fromkeys(bits, 2.0), start))


@pytest.mark.parametrize("path", SHAPES)
def test_half_a_bit_more_for_one_tensor_is_no_equilibrium(shared, path):
    bits, start = shared
    hot = temperatures(bits | {path: bits[path] + 0.5}, start)
    assert not in_equilibrium(hot) and spread(hot) == pytest.approx(2, rel=0.01)


def test_a_swap_of_a_tenth_of_a_bit_raises_the_loss(shared):
    bits, start = shared
    size = {p: np.prod(shape) for p, shape in SHAPES.items()}
    for one in SHAPES:
        for other in set(SHAPES) - {one}:
            less = bits[other] - 0.1 * size[one] / size[other]
            swapped = bits | {one: bits[one] + 0.1, other: less}
            assert total(swapped, start) > total(bits, start) * 1.0001


def test_water_filling_is_in_equilibrium():
    rng = np.random.default_rng(0)
    var, h, n = rng.exponential(size=(3, 30))
    found = reverse_water_filling(var, h, n, bits=10.0)
    hot = gaussian_temperature(h * found.distortions)
    some = found.rates > 0
    assert 0 < some.sum() < 30 and in_equilibrium(hot[some])
    assert np.all(hot[~some] <= hot[some].max() * (1 + 1e-9))  # those without bits are colder


# --- listed options: `allocate` ----------------------------------------------------------------

K, N = 120, 32
METHODS = [jq.rtn(b, g) for b in (2, 3, 4) for g in (20, 24, 30, 40, 60, 120)]  # .15 bit apart
AT_NO_BITS = {"a": 3.0, "b": 1.0, "c": 40.0}


@lru_cache
def made():
    params = {name: draw(K, N, seed=i) / 8 * 1.5**i for i, name in enumerate("abc")}
    fn = lambda p, x: jnp.concatenate([x @ p[name] for name in "abc"], axis=-1)
    x = draw(512, K, seed=9)
    return params, jq.calibrate(fn, params, [x], loss=lambda y, x: jnp.mean(y**2))


def chosen_and_curves(found, seen):
    """Bits of every weight of an `Allocation`, and the options (bits, losses) there were."""
    of = {}
    for o in sorted(seen, key=lambda o: (o.bytes, -o.loss)):
        of.setdefault(o.path, {})[8.0 * o.bytes] = o.loss
    curves = {p: (np.array(list(c)), np.array(list(c.values()))) for p, c in of.items()}
    return {o.path: 8.0 * o.bytes for o in found.chosen}, curves


def gaussian_allocation(bits):
    """What `allocate` chooses if every weight has the loss of a Gaussian at its bits."""
    params, stats = made()
    seen = []
    loss = lambda e: e.size * gaussian_distortion(8 * e.bytes / e.size, AT_NO_BITS[e.path])
    choices = jq.ptq.Choices.of(params, METHODS, stats.sites)
    return chosen_and_curves(choices.allocated(bits, loss, progress=seen.append), seen)


def steps(chosen, curves):
    """Least and greatest temperature of every weight."""
    return np.array([step_temperatures(*curves[p], bits) for p, bits in chosen.items()]).T


def with_half_a_bit_more(path, chosen, curves):
    """The same allocation with one more option, between two others, for one weight."""
    (x, loss), more = curves[path], chosen[path] + K * N / 2
    between = np.exp(np.interp(more, x, np.log(loss)))
    curve = (x, loss) if more in x else (np.append(x, more), np.append(loss, between))
    return chosen | {path: more}, curves | {path: curve}


@pytest.mark.parametrize("bits", [3.0, 3.3, 3.65])
def test_allocations_are_in_equilibrium_and_half_a_bit_more_is_not(bits):
    found = gaussian_allocation(bits)
    assert len(set(found[0].values())) == 3  # every weight has bits of its own
    assert in_equilibrium(*steps(*found), tolerance=0)
    for path in found[0]:
        assert not in_equilibrium(*steps(*with_half_a_bit_more(path, *found)))


def within_a_step(chosen, curves):
    """Whether some multiplier has its optimum within a step of every choice."""

    def near(x, loss, bits, price):
        hull = lower_hull(x.tolist(), loss.tolist())
        best = min(range(len(hull)), key=lambda j: loss[hull[j]] + price * x[hull[j]])
        return x[hull[max(best - 1, 0)]] <= bits <= x[hull[min(best + 1, len(hull) - 1)]]

    prices = steps(chosen, curves)
    prices = prices[(prices > 0) & np.isfinite(prices)] * 1.000001
    return any(all(near(*curves[p], b, c) for p, b in chosen.items()) for c in prices)


@pytest.mark.parametrize("bits", [2.5, 2.9, 3.2, 4.0])
def test_measured_losses_are_in_equilibrium_within_a_step(bits):
    """Steps differ in size: one may not fit into what is left, and smaller ones then fill it."""
    (params, stats), seen = made(), []
    allocation = jq.ptq.allocate(params, METHODS, bits, stats, progress=seen.append)
    found = chosen_and_curves(allocation, seen)
    assert within_a_step(*found)
    assert not within_a_step(*with_half_a_bit_more("a", *found))


# --- the functions themselves -------------------------------------------------------------------


def test_the_gaussian_temperature_is_the_slope_of_its_curve():
    rate = np.linspace(0.5, 4, 8)
    slope = (gaussian_distortion(rate - 1e-5, 3.0) - gaussian_distortion(rate + 1e-5, 3.0)) / 2e-5
    np.testing.assert_allclose(gaussian_temperature(gaussian_distortion(rate, 3.0)), slope, 1e-8)


def test_measured_points_give_the_slope_between_them():
    bits = np.array([4.0, 1.0, 2.5, 3.0])  # in any order
    at = np.array([1.0, 2.5, 2.7, 4.0])
    found = measured_temperature(bits, 5 * 4.0**-bits, at)
    np.testing.assert_allclose(found, gaussian_temperature(5 * 4.0**-at), 1e-9)
    # ln(loss) = R^2 / 4 - 2 R, whose slope at a point is found to second order.
    bits = np.linspace(0, 3, 31)
    loss = np.exp(bits**2 / 4 - 2 * bits)
    found = measured_temperature(bits, loss, bits)
    np.testing.assert_allclose(found, (2 - bits / 2) * loss, 1e-9)
    assert measured_temperature(np.array([1.0, 2.0]), np.array([1.0, 2.0]), 1.5) < 0  # it lost


def test_steps_skip_what_is_above_the_hull():
    bits, losses = np.array([0.0, 1.0, 2.0, 3.0]), np.array([9.0, 8.5, 1.0, 0.0])
    assert step_temperatures(bits, losses, 0.0) == (4.0, np.inf)
    assert step_temperatures(bits, losses, 2.0) == (1.0, 4.0)
    assert step_temperatures(bits, losses, 3.0) == (0.0, 1.0)
    following, last = step_temperatures(bits, losses, 1.0)
    assert following > last  # no multiplier makes it the best option
    assert not in_equilibrium(np.array([following]), np.array([last]))


def test_bits_that_save_nothing_are_no_equilibrium():
    assert spread(np.array([1.0, 0.0])) == np.inf
    assert spread(np.array([0.0, 0.0])) == 1
    assert spread(np.array([0.0]), np.array([-1.0])) == np.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaussian_temperature(-1.0), "distortion must be nonnegative, got -1"),
        (lambda: gaussian_temperature(np.nan), "distortion must be nonnegative, got nan"),
        (lambda: measured_temperature(np.ones(1), np.ones(1), 1.0), r"n 2 or more, got \[1\] and"),
        (lambda: measured_temperature(np.ones(2), np.ones(2), 1.0), "no bits may occur twice"),
        (lambda: measured_temperature(np.arange(2), np.arange(2), 1.0), "losses must be positive"),
        (lambda: measured_temperature(np.arange(2), np.ones(2), 1.5), "expected bits from 0 to 1"),
        (lambda: step_temperatures(np.arange(2), np.ones(2), 0.5), "no option has 0.5 bits; there"),
        (lambda: spread(np.ones(0)), r"one shape \[t\], got \[0\]"),
        (lambda: spread(np.array([np.nan])), "none may be NaN"),
        (lambda: spread(np.ones(2), np.ones(3)), r"got \[2\] and \[3\]"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
