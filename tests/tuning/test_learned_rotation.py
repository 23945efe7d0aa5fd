"""Learned rotations: orthonormal, the same function, nearer to the floats once rounded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from jaxquant.tuning.cayley import Cayley
from jaxquant.tuning.learned_rotation import _loss, _Stream
from jaxquant.tuning.losses import divergence
from jaxquant.tuning.trainable import Opened
from jaxquant.tuning.trainer import Trainer
from tests.support.arrays import draw

D = 24
STREAM = jq.ptq.Residual(["embed", "down"], {"gains": ["up"], "gain": ["head"]})
PARAMS = {
    "embed": (draw(16, D) / 4).at[:, 5].mul(20), "head": draw(D, 40, seed=1) / 5,
    "up": draw(2, D, 48, seed=2) / 5, "down": draw(2, 48, D, seed=3) / 7,
    "gains": 1 + 0.3 * draw(2, D, seed=4), "gain": 1 + 0.3 * draw(D, seed=5),
}  # fmt: skip
X = np.asarray(draw(12, 32, 16, seed=6))
TRAINING = jq.tuning.Healing(steps=30, learning_rate=0.1, validate_every=10)
START = jnp.eye(D)


def fn(p, x):
    norm = lambda h: h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)
    layer = lambda h, w: (h + jnp.tanh(norm(h) * w[2] @ w[0]) @ w[1], None)
    h = jax.lax.scan(layer, x @ p["embed"], (p["up"], p["down"], p["gains"]))[0]
    return norm(h) * p["gain"] @ p["head"]


def recipe(bits=16, reads=None, writes=None, form="int4"):
    method = lambda side: jq.Method("m", jq.rtn().rounder, format, side, activations=form)
    format = jq.formats.Dense() if bits == 16 else jq.formats.Integer(bits, "channel")
    return jq.Recipe([("up", method(reads)), ("down", method(writes)), ("*", jq.KEEP)])


def sites():
    return jq.sites(fn, PARAMS, jnp.asarray(X[0]))


def learned(recipe, healing=TRAINING, **options):
    given = {"start": START, "stats": sites(), "validation": X[8:]} | options
    return jq.tuning.learn_rotation(fn, PARAMS, STREAM, recipe, X[:8], healing, **given)


def served(recipe, rotation, stats=None):
    """How far the rotated and quantized model is from the floats, on held-out inputs."""
    turned = jq.ptq.rotate_residual(PARAMS, STREAM, rotation)
    q = jq.quantize(turned, recipe, stats or sites())
    return float(jnp.mean(divergence(jq.quantized(fn)(q, X[8:]), fn(PARAMS, X[8:]))))


def far(rotation):
    r = np.asarray(rotation, np.float64)
    return np.max(np.abs(r @ r.T - np.eye(len(r))))


@pytest.mark.parametrize("bits", [16, 4])
def test_learning_keeps_the_function_and_lowers_the_loss(bits):
    chosen, told = recipe(bits, writes=jq.transforms.Rotation(signed=False)), []
    rotation = learned(chosen, progress=told.append)
    assert far(rotation) < 1e-6
    turned = jq.ptq.rotate_residual(PARAMS, STREAM, rotation)
    np.testing.assert_allclose(fn(turned, X), fn(PARAMS, X), rtol=1e-5, atol=1e-5)
    assert served(chosen, rotation) < 0.7 * served(chosen, START)
    assert {u.name for u in told} == {"rotation"} and len(told) == TRAINING.steps


@pytest.mark.parametrize(
    ("bits", "reads", "writes", "form"),
    [
        (16, None, None, "int4,asymmetric,clip=0.9"),
        (16, None, jq.transforms.Rotation(), "int8"),
        (4, None, jq.transforms.Rotation(signed=False), "int8,asymmetric"),
        (
            4,
            jq.transforms.Smooth(),
            jq.transforms.Chain((jq.transforms.Smooth(), jq.transforms.Rotation())),
            "int4",
        ),
        (16, jq.transforms.Smooth(), jq.transforms.Smooth(None), "float8"),
    ],
)
def test_the_loss_is_that_of_what_is_served(bits, reads, writes, form):
    """The stream stays as it is in the loop; turned, folded and quantized, it is as far off."""
    chosen, seen = recipe(bits, reads, writes, form), []

    turn = jnp.linalg.qr(draw(D, D, seed=7))[0]
    stats = jq.calibrate(fn, jq.ptq.rotate_residual(PARAMS, STREAM, turn), X[:8], sample=32)
    once = jq.tuning.Healing(steps=1, learning_rate=1e-9, validate_every=1)
    learned(chosen, once, start=turn, stats=stats, validation=X[8:], progress=seen.append)
    np.testing.assert_allclose(seen[0].validation, served(chosen, turn, stats), rtol=2e-2)


def test_weights_may_stay_floats_in_the_loop():
    told = []
    for chosen, floats in ((recipe(16), False), (recipe(2), False), (recipe(2), True)):
        once = jq.tuning.Healing(steps=1)
        learned(chosen, once, round_weights=floats, validation=None, progress=told.append)
    a, b, c = (u.loss for u in told)
    assert a == b < c


def test_what_was_learned_goes_on():
    """Stopped and gone on: the same bits as never stopped."""

    class Stop(Exception):
        pass

    def stop(update):
        if update.step == 17:
            raise Stop

    finished = {}
    with pytest.raises(Stop):
        learned(recipe(), progress=stop, finished=finished)
    assert int(finished["rotation"]["0"]) == 10
    np.testing.assert_array_equal(learned(recipe(), finished=finished), learned(recipe()))


class Plain:
    """The twin: the same steps, straight on and not along the manifold."""

    def init(self, opened):
        return opened.start, None

    def update(self, loss, change, slots, opened, *batch):
        value, slope = jax.value_and_grad(loss)(change, opened, *batch)
        step = jax.tree.map(lambda g: -0.1 * g / (jnp.linalg.norm(g) / D**0.5), slope)
        return optax.apply_updates(change, step), slots, {"loss": value}


def test_steps_that_do_not_turn_leave_the_manifold():
    todo = jq.recipes.resolve(recipe(), PARAMS, sites()).weights
    stream = _Stream.of(todo, STREAM, D, True)
    folded = jq.ptq.rotate_residual(PARAMS, STREAM, START)
    opened = Opened((folded, {"up": {}, "down": {}}), {"residual": {"rotation": START}})
    loss = lambda *args: _loss(fn, stream, *args)
    for rule, on in ((Plain(), False), (Cayley(TRAINING), True)):
        trainer = Trainer(loss, TRAINING, rule)
        found = trainer.fit(opened, lambda ids: (jnp.asarray(X[ids]),), 8, name="")
        rotation = found["residual"]["rotation"]
        assert (far(rotation) < 1e-6) == on
        if not on:
            assert far(rotation) > 1e-2
            with pytest.raises(ValueError, match="orthonormal"):
                jq.ptq.rotate_residual(PARAMS, STREAM, rotation)


def test_bad_input():
    raises = lambda message: pytest.raises(ValueError, match=message)
    with raises("nothing to learn"):
        learned(recipe(form=None))
    with raises("nothing to learn"):
        learned(recipe(4, form=None), round_weights=False)
    with raises("nothing to learn"):  # only what does not read the stream is rounded
        learned(jq.Recipe([("down", recipe().rules[1][1]), ("*", jq.KEEP)]))
    with raises("static scales can only be computed once the rotation is known"):
        learned(recipe(form="int4,static"))
    with raises("fitted to inputs; pass the statistics"):
        learned(recipe(reads=jq.transforms.Smooth()))
    with raises("orthonormal"):
        learned(recipe(), start=2 * START)
    with raises("does not allow an output transform"):
        learned(jq.Recipe([("up", jq.quip_sharp(4)), ("*", jq.KEEP)]))
    with raises("expected 23 channels"):
        learned(recipe(), start=jnp.eye(23))
    with raises("at least batch_size = 9"):
        learned(recipe(), jq.tuning.Healing(steps=1, batch_size=9))
