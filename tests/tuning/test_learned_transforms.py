"""Learned transforms: better than those they begin as, resumable, and refused where none is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.tuning.losses import divergence
from tests.support.arrays import draw, outlying

block = lambda p, h: h + jnp.tanh(h @ p["up"]) @ p["down"]
LAYERS = {"up": draw(2, 48, 64) / 7, "down": draw(2, 64, 48, seed=1) / 8}
PARAMS = {"layers": LAYERS}
METHOD = jq.flatquant(feedback=False)
HIDDEN = np.stack([np.asarray(outlying(32, 48)) * (1 + 0.1 * i) for i in range(9)]) / 30
RECIPE = jq.Recipe([("layers/*", METHOD)])


def run(p, x):
    return jax.lax.scan(lambda h, layer: (block(layer, h), None), x, p["layers"])[0]


STATS = jq.calibrate(run, PARAMS, [jnp.asarray(h) for h in HIDDEN])
LEARNING = jq.tuning.Healing(steps=40, learning_rate=0.01, validate_every=10)


def learned(healing=LEARNING, **options):
    return jq.tuning.learn_blocks(
        block, PARAMS, "layers", RECIPE, STATS, HIDDEN, healing, **options
    )


def error(transforms):
    q = jq.quantize(PARAMS, RECIPE, STATS, transforms=transforms)
    x = jnp.asarray(HIDDEN[-1])
    return float(jnp.linalg.norm(jq.quantized(run)(q, x) - run(PARAMS, x)))


def test_learning_lowers_the_error_of_what_is_served():
    told = []
    transforms = learned(progress=told.append)
    assert set(transforms) == {(f"layers/{n}", i) for n in ("up", "down") for i in (0, 1)}
    assert error(transforms) < 0.9 * error(None)
    assert [u.name for u in told[::40]] == ["learning of block 0", "learning of block 1"]


def head(p, x):
    return run(p, x) @ p["head"]


WHOLE = {**PARAMS, "head": draw(48, 20, seed=2)}
KEPT = jq.Recipe([("layers/*", METHOD), ("head", jq.KEEP)])


def far(transforms):
    """KL on the held-out inputs of the model as it is served."""
    q = jq.quantize(WHOLE, KEPT, jq.calibrate(head, WHOLE, [*HIDDEN]), transforms=transforms)
    x = jnp.asarray(HIDDEN[-1])
    return float(jnp.mean(divergence(jq.quantized(head)(q, x), head(WHOLE, x))))


def learned_whole(**options):
    stats = jq.calibrate(head, WHOLE, [*HIDDEN])
    healing = jq.tuning.Healing(steps=60, learning_rate=0.003, validate_every=5)
    given = {"validation": HIDDEN[-1:]} | options
    return jq.tuning.learn(head, WHOLE, KEPT, stats, HIDDEN[:-1], healing, **given)


def test_learning_end_to_end_goes_on_from_blocks():
    """What blocks begin, the whole betters; transforms are of all inputs, one for each matrix."""
    blocks = learned()
    whole = learned_whole(transforms=blocks)
    assert set(whole) == set(blocks)
    assert far(whole) < 0.95 * far(blocks) < 0.95 * far(None)
    again = learned_whole(transforms=blocks)
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_the_loss_is_that_of_what_is_served():
    """At the start: the loss before any update is the divergence of the quantized tree."""
    told = []
    learned_whole(validation=None, progress=told.append)
    stats = jq.calibrate(head, WHOLE, [*HIDDEN])
    q = jq.quantize(WHOLE, KEPT, stats)
    x = jnp.asarray(HIDDEN[jq.tuning.Healing().batch(0, 8)[0]])
    served = jnp.mean(divergence(jq.quantized(head)(q, x), head(WHOLE, x)))
    np.testing.assert_allclose(told[0].loss, served, rtol=1e-3)


def test_what_was_learned_goes_on():
    """Stopped in the first block and gone on: the same as never stopped."""

    class Stop(Exception):
        pass

    def stop(update):
        if update.step == 20:
            raise Stop

    finished = {}
    with pytest.raises(Stop):
        learned(progress=stop, finished=finished)
    again, whole = learned(finished=finished), learned()
    for place, arrays in whole.items():
        for name, a in arrays.items():
            np.testing.assert_array_equal(again[place][name], a)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": jq.Recipe([("layers/*", jq.smoothquant())])}, "nothing to learn"),
        ({"hidden": HIDDEN[:1]}, "at least two inputs"),
    ],
)
def test_bad_input(options, message):
    given = {"recipe": RECIPE, "hidden": HIDDEN} | options
    with pytest.raises(ValueError, match=message):
        jq.tuning.learn_blocks(
            block, PARAMS, "layers", given["recipe"], STATS, given["hidden"], LEARNING
        )


def test_transforms_of_another_tree():
    with pytest.raises(ValueError, match="belong to no input here"):
        jq.quantize(PARAMS, RECIPE, STATS, transforms={("other", 0): {}})
