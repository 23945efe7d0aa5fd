"""Healing: nothing changes at the start, the loss falls, what is stored is what was trained."""

import dataclasses
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.durable.store import Folder
from jaxquant.tuning.heal import heal, heal_blocks
from jaxquant.tuning.losses import divergence
from jaxquant.tuning.recoding import recode
from jaxquant.tuning.trainable import at_start, close_tree, open_tree, trained
from jaxquant.tuning.trainer import Healing
from tests.support.arrays import draw

METHODS = [
    jq.rtn(2, 16),
    jq.qtip(2, L=8),
    jq.quip_sharp(2, passes=0),
    jq.normal_float(2, 16),
    jq.Method(
        "m",
        jq.rtn().rounder,
        jq.formats.Integer(2, 16),
        jq.transforms.Rotation(16, sort=True),
        jq.transforms.Rotation(),
    ),
    jq.aqlm(1, 4, 4, beam=2, sweeps=1),
    jq.vptq(4, 4, 4, beam=2, sweeps=1),
    jq.Method("coded", jq.rtn().rounder, jq.formats.EntropyCoded(2, states=4, lanes=2)),
]
named = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def model():
    p = {"a": {"kernel": draw(2, 32, 32) / 5}, "norm": 1 + 0.1 * draw(32, seed=3)}

    def fn(p, x):
        h = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w) + h, None), x, p["a"]["kernel"])[0]
        return h * p["norm"]

    return fn, p, np.asarray(draw(204, 6, 32, seed=1))


def made(method, p, x):
    fn = model()[0]
    stats = jq.calibrate(fn, p, x) if method.needs_gram else jq.sites(fn, p, x[0])
    return jq.quantize(p, jq.Recipe([("a/*", method), ("*", jq.KEEP)]), stats)


def distance(fn, p, q, x):
    return float(jnp.mean(divergence(jq.quantized(fn)(q, x), fn(p, x))))


@named
def test_opening_and_closing_changes_nothing(method):
    fn, p, x = model()
    q = made(method, p, x)
    opened = open_tree(q, ["norm"])
    same = trained(opened, at_start(opened))
    np.testing.assert_allclose(
        jq.quantized(fn)(same, x), jq.quantized(fn)(q, x), rtol=1e-4, atol=1e-4
    )
    closed = close_tree(q, opened, at_start(opened))
    np.testing.assert_allclose(
        closed["a"]["kernel"].dequantize(), q["a"]["kernel"].dequantize(), atol=1e-5
    )


@named
def test_healing_brings_the_outputs_nearer(method):
    fn, p, x = model()
    q = made(method, p, x)
    healing = Healing(steps=60, learning_rate=0.02, batch_size=8, validate_every=20)
    healed = heal(fn, q, p, x[:200], healing, validation=x[200:], also=["norm"])
    assert distance(fn, p, healed, x[200:]) < 0.95 * distance(fn, p, q, x[200:])
    codes = lambda t: np.asarray(t["a"]["kernel"].data["codes"])
    np.testing.assert_array_equal(codes(healed), codes(q))
    assert healed["a"]["kernel"].format == q["a"]["kernel"].format
    assert not np.array_equal(healed["norm"], p["norm"])


def test_trained_signs_are_float16_and_counted():
    fn, p, x = model()
    q = made(jq.qtip(2, L=8), p, x)
    healed = heal(fn, q, p, x, Healing(steps=2))["a"]["kernel"]
    assert healed.named["input.signs"].dtype == jnp.float16
    before = q["a"]["kernel"].nbytes
    assert healed.nbytes == before + 2 * 2 * (32 * 2 - 32 // 8)


def test_going_on_is_the_same_as_not_stopping():
    fn, p, x = model()
    q = made(METHODS[1], p, x)
    healing = Healing(steps=8, validate_every=3, save_every=2)
    whole = heal(fn, q, p, x, healing, validation=x[:2])

    def stop(done):
        if done.step == 5:
            raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as place:
        kept = Folder(place, {})
        with pytest.raises(KeyboardInterrupt):
            heal(fn, q, p, x, healing, validation=x[:2], progress=stop, finished=kept)
        steps: list[int] = []
        again = heal(
            fn, q, p, x, healing, validation=x[:2], progress=lambda d: steps.append(d.step),
            finished=kept,
        )  # fmt: skip
    assert steps == [5, 6, 7, 8]
    chex.assert_trees_all_equal(again, whole)


def test_the_best_on_held_out_data_comes_back():
    """A rate so high that training diverges: with validation the start is no worse than before."""
    fn, p, x = model()
    q = made(METHODS[0], p, x)
    wild = Healing(steps=20, learning_rate=3.0, validate_every=1)
    kept = heal(fn, q, p, x[:200], wild, validation=x[200:])
    lost = heal(fn, q, p, x[:200], wild)
    assert distance(fn, p, kept, x[200:]) <= distance(fn, p, q, x[200:]) + 1e-6
    assert distance(fn, p, kept, x[200:]) < distance(fn, p, lost, x[200:])


@pytest.mark.parametrize("method", [METHODS[0], METHODS[1], METHODS[-1]], ids=lambda m: m.name)
def test_blocks_are_brought_nearer_one_by_one(method):
    """Also after blocks that are quantized themselves, and going on where it was stopped."""
    _, p, x = model()
    x = x[:32]
    q = made(method, p, x)
    block = lambda p, h: jnp.tanh(h @ p["kernel"]) + h
    healing = Healing(steps=30, learning_rate=0.02, batch_size=4, validate_every=10)

    def error(tree):
        h = want = jnp.asarray(x)
        for i in range(2):
            student, teacher = (jax.tree.map(lambda a, i=i: a[i], t) for t in (tree, p["a"]))
            h, want = jq.quantized(block)(student, h), block(teacher, want)
        return float(jnp.mean((h - want) ** 2))

    kept: dict = {}
    healed = heal_blocks(block, q["a"], p["a"], x, healing, finished=kept)
    assert error(healed) < 0.97 * error(q["a"])
    again = heal_blocks(block, q["a"], p["a"], x, healing, finished=kept)
    chex.assert_trees_all_equal(again, healed)


LEARNED = [m for m in METHODS if m.name in ("aqlm", "vptq")]
SHORT = Healing(steps=100, learning_rate=0.02, batch_size=8, validate_every=20)


@pytest.mark.parametrize("sizes", [(1, 4, 4), (2, 4, 8), (0, 4, 4)])
def test_codes_train_where_healing_ends(sizes):
    count, bits, length = sizes
    options = {"beam": 2, "sweeps": 1}
    method = jq.aqlm(*sizes, **options) if count else jq.vptq(length, bits, 0, **options)
    fn, p, x = model()
    long = dataclasses.replace(SHORT, steps=150, validate_every=50)
    healed = heal(fn, made(method, p, x), p, x[:200], long, validation=x[200:])
    both = recode(fn, healed, p, x[:200], SHORT, validation=x[200:])
    assert distance(fn, p, both, x[200:]) < 0.97 * distance(fn, p, healed, x[200:])
    before, after = (t["a"]["kernel"] for t in (healed, both))
    for name in method.format.trained:
        np.testing.assert_array_equal(after.data[name], before.data[name])
    assert after.nbytes == before.nbytes


@pytest.mark.parametrize("method", LEARNED, ids=lambda m: m.name)
def test_an_update_changes_a_share_of_the_codes(method):
    """And each to one that is nearer; a matrix that is its own target keeps all."""
    q = jq.quantize_array(draw(64, 32), method, jnp.eye(64))
    target = q.stored() + 0.7 * draw(64, 32, seed=5)
    at = lambda target, share: q.data | method.format.recoded(q.data, target, share)
    new = dataclasses.replace(q, data=at(target, 0.05))
    moved = jnp.sum((new.stored() != q.stored()).astype(int)) / q.size
    assert 0 < moved <= 0.05
    error = lambda w: float(jnp.sum((w.stored() - target) ** 2))
    assert error(new) < error(q)
    jax.tree.map(np.testing.assert_array_equal, at(q.stored(), 1.0), q.data)


def test_recoding_goes_on_where_it_stopped():
    fn, p, x = model()
    q, kept = made(LEARNED[0], p, x), {}
    healing = dataclasses.replace(SHORT, steps=6, save_every=2)

    def stop(done):
        if done.step == 3:
            raise KeyboardInterrupt

    whole = recode(fn, q, p, x, healing)
    with pytest.raises(KeyboardInterrupt):
        recode(fn, q, p, x, healing, progress=stop, finished=kept)
    again = recode(fn, q, p, x, healing, finished=kept)
    jax.tree.map(np.testing.assert_array_equal, whole, again)


def test_training_of_another_start_is_another_training():
    """Healing and codes in turn with one `finished`: no round takes another's state for its own."""
    fn, p, x = model()
    q, kept, few = made(LEARNED[0], p, x), {}, Healing(steps=3)
    once = recode(fn, heal(fn, q, p, x, few, finished=kept), p, x, few, finished=kept)
    twice = recode(fn, heal(fn, once, p, x, few, finished=kept), p, x, few, finished=kept)
    fresh = recode(fn, heal(fn, once, p, x, few), p, x, few)
    jax.tree.map(np.testing.assert_array_equal, twice, fresh)


def test_bad_input():
    fn, p, x = model()
    with pytest.raises(ValueError, match="nothing to train"):
        heal(fn, p, p, x)
    with pytest.raises(ValueError, match="at least batch_size = 2 sequences, got 1"):
        heal(fn, made(METHODS[0], p, x), p, x[:1], Healing(batch_size=2))
    with pytest.raises(ValueError, match="learned codebook"):
        recode(fn, made(METHODS[0], p, x), p, x)
    with pytest.raises(ValueError, match="share must be in"):
        recode(fn, made(LEARNED[0], p, x), p, x, share=0.0)
    q = made(METHODS[0], p, x)
    with pytest.raises(ValueError, match="as many blocks as the teacher has, 2, got 1"):
        heal_blocks(fn, jax.tree.map(lambda a: a[:1], q["a"]), p["a"], x)
    with pytest.raises(ValueError, match="b: expected the trained leaf of the tree that decoded"):
        jq.tuning.rejoined({"b": p["norm"]}, {"a": p["norm"]})
    with pytest.raises(ValueError, match="steps must be at least 1"):
        Healing(steps=0)
