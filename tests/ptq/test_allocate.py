"""Allocation: least loss for the bytes, what the model says counts, and bad budgets."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.ptq.choices import Option
from tests.support.arrays import draw

RATES = [jq.rtn(bits=b, group_size=16) for b in (2, 3, 4, 8)]
SIZES = {"a": (64, 32), "b": (32, 32), "c": (32, 64)}


def model(loud=30.0):
    params = {n: draw(*s, seed=i) / 8 for i, (n, s) in enumerate(SIZES.items())}
    params["stack"] = draw(2, 64, 64, seed=7) / 8

    def fn(p, x):
        h = jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]
        return loud * ((h @ p["stack"][0]) @ p["stack"][1])

    return fn, params, np.asarray(draw(6, 16, 64, seed=9))


def made():
    fn, params, x = model()
    stats = jq.calibrate(fn, params, x, loss=lambda y, x: jnp.mean(y**2))
    return fn, params, x, stats


def bits(tree):
    return {p: w.format.bits for p, w in jq.core.path_leaves(tree) if isinstance(w, jq.QTensor)}


def test_the_budget_is_kept_and_stated():
    _, params, _, stats = made()
    for wanted in (3.2, 4.0, 6.1):
        found = jq.ptq.allocate(params, RATES, wanted, stats)
        q = jq.quantize(params, found.recipe, stats)
        assert jq.bits_per_weight(q) == pytest.approx(found.bits_per_weight)
        assert wanted - 1 < found.bits_per_weight <= wanted
        assert f"{found.bits_per_weight:.3f} bits per weight (within" in str(found)


def test_more_bits_never_lose():
    _, params, _, stats = made()
    loss = [
        sum(o.loss for o in jq.ptq.allocate(params, RATES, b, stats).chosen)
        for b in (3.2, 4, 5, 6, 8)
    ]
    assert loss == sorted(loss, reverse=True)


def test_bits_go_where_the_model_says():
    """Of two equal weights the one whose loss is measured a thousand times as great gets more."""
    params = {"a": draw(64, 64), "b": draw(64, 64, seed=1)}
    fn = lambda p, x: jnp.concatenate([x @ p["a"], x @ p["b"]], -1)
    stats = jq.calibrate(fn, params, [draw(64, 64, seed=2)], loss=lambda y, x: jnp.mean(y**2))
    for heavy in ("a", "b"):
        measure = lambda t, heavy=heavy: sum(
            (1000 if p == heavy else 1) * float(jnp.mean((w.dequantize() - params[p]) ** 2))
            for p, w in jq.core.path_leaves(t)
            if isinstance(w, jq.QTensor)
        )
        found = jq.ptq.allocate(params, RATES, 4.5, stats, measure=measure)
        got = bits(jq.quantize(params, found.recipe, stats))
        assert got[heavy] > min(got.values())


def test_losses_are_kept_for_the_next_run():
    _, params, _, stats = made()
    kept: dict = {}
    measured = []
    measure = lambda t: measured.append(1) or 1.0
    first = jq.ptq.allocate(params, RATES, 4, stats, measure=measure, finished=kept)
    assert len(measured) == 4
    assert jq.ptq.allocate(params, RATES, 4, stats, measure=measure, finished=kept) == first
    assert len(measured) == 4
    other = jax.tree.map(lambda w: w**3, params)  # of which nothing is known
    got = jq.ptq.allocate(other, RATES, 4, stats, measure=measure, finished=kept)
    assert len(measured) == 8 and got == jq.ptq.allocate(other, RATES, 4, stats, measure=measure)


@pytest.mark.parametrize("method", [jq.qtip(2, L=8), RATES[0]], ids=lambda m: m.name)
def test_healing_is_counted(method):
    fn, params, x, stats = made()
    found = [
        jq.ptq.Choices.of(params, [method], stats.sites, paths=["stack"], healed=h) for h in (0, 1)
    ]
    q = jq.quantize(params, jq.Recipe([("stack", method), ("*", jq.KEEP)]), stats)
    healed = jq.heal(fn, q, params, x, jq.tuning.Healing(steps=1))
    for choices, tree in zip(found, (q, healed), strict=True):
        assert choices.lowest == choices.highest == tree["stack"].bits_per_weight


def test_rates_between_measured_ones_are_interpolated():
    _, params, _, stats = made()
    methods = [jq.rtn(bits=4, group_size=g) for g in (64, 32, 16)]  # .3 and .6 bits apart
    kept: dict = {}
    seen: list[Option] = []
    jq.ptq.allocate(params, methods, 4.6, stats, paths=["a"], finished=kept, progress=seen.append)
    assert len(kept) == 2
    x, y = ([o.bytes for o in seen], np.log([o.loss for o in seen]))
    assert (y[1] - y[0]) / (x[1] - x[0]) == pytest.approx((y[2] - y[0]) / (x[2] - x[0]))


def test_a_method_that_does_not_fit_a_weight_is_left_out():
    _, params, _, stats = made()
    methods = [jq.rtn(bits=4, group_size=64), jq.rtn(bits=2, group_size=16)]
    choices = jq.ptq.Choices.of(params, methods, stats.sites)
    count = {entries[0].path: len(entries) for entries in choices.weights}
    assert count == {"a": 2, "b": 1, "c": 1, "stack": 2}
    with pytest.raises(ValueError, match="b: .*64 does not divide"):
        jq.ptq.Choices.of(params, methods[:1], stats.sites)


def test_a_loss_measured_as_noise_below_zero_still_orders():
    _, params, _, stats = made()
    found = jq.ptq.allocate(params, RATES, 9.5, stats, measure=lambda t: -1e-9)
    assert {o.method.format.bits for o in found.chosen} == {8}


def entries(rng):
    """Entries of random sizes, as of `Choices`, and their losses, which fall with the bytes."""
    weights, loss = [], {}
    for i in range(int(rng.integers(1, 12))):
        size = int(rng.integers(1, 10**6))
        found = np.unique(rng.integers(size // 8 + 1, 2 * size + 2, 4)).tolist()
        weights.append(tuple(
            SimpleNamespace(path=f"w{i}", method=method, bytes=b, size=size)
            for b, method in zip(found, RATES, strict=False)
        ))  # fmt: skip
        loss |= {(f"w{i}", e.bytes): 4.0**-j for j, e in enumerate(weights[-1])}
    return jq.ptq.Choices(tuple(weights)), lambda e: loss[e.path, e.bytes]


def test_an_average_of_whole_bytes_can_be_reached():
    """Rounding of 8 * bytes / size loses no step, at the largest budget and at any found one."""
    rng = np.random.default_rng(0)
    lost = 0
    for _ in range(300):
        choices, loss = entries(rng)
        assert choices.allocated(choices.highest, loss).bits_per_weight == choices.highest
        lost += choices.highest * choices.size / 8 < round(choices.highest * choices.size / 8)
        between = rng.uniform(choices.lowest, choices.highest)
        once = choices.allocated(between, loss)
        again = choices.allocated(once.bits_per_weight, loss)
        assert again.bits_per_weight == once.bits_per_weight <= between
    assert lost  # models for which the plain product is too small


def test_a_step_more_than_the_budget_is_not_taken():
    """The twin: a budget short of the largest average by far more than its rounding."""
    choices, loss = entries(np.random.default_rng(1))
    short = math.nextafter(choices.highest - 4 / choices.size, 0)  # half a byte
    assert choices.allocated(short, loss).bits_per_weight < short
    for bits in (choices.lowest - 0.1, choices.highest + 0.1):
        with pytest.raises(ValueError, match="bits per weight cannot be reached"):
            choices.allocated(bits, loss)


def test_bad_budgets():
    _, params, _, stats = made()
    for wanted in (1.0, 9.6):
        with pytest.raises(
            ValueError, match=r"cannot be reached: these methods allow 3\.125 to 9\.500"
        ):
            jq.ptq.allocate(params, RATES, wanted, stats)
    with pytest.raises(ValueError, match="nothing to allocate"):
        jq.ptq.allocate(params, [], 4, stats)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        jq.ptq.allocate(params, RATES, 4, stats, samples=0)
    with pytest.raises(ValueError, match="'z' matches no leaf"):
        jq.ptq.allocate(params, RATES, 4, stats, paths=["z"])
