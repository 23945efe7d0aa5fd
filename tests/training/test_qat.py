"""QAT's loops: what they reach, that they go on to the same bits, and how they stop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.tuning.losses import divergence
from tests.support.arrays import draw

WIDTH = 32
X = np.asarray(draw(12, 4, WIDTH, seed=7))
TEACHER = {"a": draw(WIDTH, 48) / 5, "b": draw(48, WIDTH, seed=1)}
HOW = jq.training.QAT(steps=20, learning_rate=5e-3, scale_rate=1e-2, batch_size=4, save_every=5)


def fn(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def latents(bits=2):
    return jq.latent(TEACHER, jq.lsq(bits, 16))


def far(params):
    return float(jnp.mean(divergence(jq.quantized(fn)(params, X), fn(TEACHER, X))))


def same(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


REMEDIES = {
    "none": {},
    "dampening": {"dampening": 0.1},
    "holding": {"holding": 0.01},
    "steadying": {"steadying": 0.3},
    "kurtosis": {"kurtosis": 1e-3},
    "accumulated": {"batch_size": 12},
    "in steps": {"in_steps": True, "learning_rate": 0.1},
    "weights alone": {"scale_rate": 0.0},
    "scales alone": {"scale_rate": 0.05, "learning_rate": 1e-9},
}


@pytest.mark.parametrize("remedy", REMEDIES)
def test_it_comes_nearer_to_the_teacher(remedy):
    how = dataclasses.replace(HOW, watch=True, **REMEDIES[remedy])
    p, told = latents(), []
    better = jq.qat(fn, p, X, how, teacher=TEACHER, progress=told.append)
    assert far(jq.freeze(better)) < 0.9 * far(jq.freeze(p))
    assert far(jq.freeze(better)) == far(better)
    last = told[-1].measured
    assert last["loss"] > 0 and last["gradient"] > 0 and 0 <= last["flips"] < 0.5
    assert ("frozen" in last) == ("holding" in REMEDIES[remedy])
    moved = np.any(better["a"].data["scale"] != p["a"].data["scale"])
    assert moved == (remedy != "weights alone")
    assert any(done.measured["drift"] > 0 for done in told) == moved


FORWARD = jq.training.ZeroQAT(steps=20, learning_rate=0.05, batch_size=4, save_every=5)


@pytest.mark.parametrize("kinds", [("scale",), ("weight", "scale")])
def test_forward_only_it_comes_nearer_too(kinds):
    """Of 2 steps x samples forward passes; what is not among the kinds stays."""
    zeroth = dataclasses.replace(FORWARD.zeroth, kinds=kinds, sizes=(), samples=4, epsilon=0.1)
    how = dataclasses.replace(FORWARD, steps=100, zeroth=zeroth, batch_size=12)
    p, told = latents(), []
    better = jq.qat(fn, p, X, how, teacher=TEACHER, progress=told.append)
    assert how.forward_passes == 800 and len(told) == 100
    assert far(better) < 0.9 * far(p)
    assert far(jq.freeze(better)) == far(better)
    stays = np.array_equal(better["a"].data["codes"], p["a"].data["codes"])
    assert stays == ("weight" not in kinds)


def test_a_forward_only_step_is_as_long_as_the_rate_says():
    """Whatever the size of the loss: of two steps, the first at rate 0, at most 1.4 times it."""
    zeroth = jq.training.Zeroth(
        epsilon=1e-3, drawing=jq.estimators.Drawing(signs=True), kinds=("scale",), sizes=(0.5,)
    )
    how = jq.training.ZeroQAT(steps=2, learning_rate=0.1, batch_size=4, zeroth=zeroth)
    p = latents()
    better = jq.qat(fn, p, X, how, teacher=TEACHER)
    moved = np.abs(better["a"].data["scale"] - p["a"].data["scale"])
    assert np.ptp(moved) < 1e-6 and 0.01 * 0.05 < moved[0, 0] < 1.4 * 0.05


@pytest.mark.parametrize("how", ["none", "holding", "steadying", "forward"])
def test_killed_and_resumed_it_gives_the_same_bits(how):
    how = FORWARD if how == "forward" else dataclasses.replace(HOW, **REMEDIES[how])
    kept = {}

    def stop(done):
        if done.step == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jq.qat(fn, latents(), X, how, teacher=TEACHER, progress=stop, finished=kept)
    steps = []
    told = lambda done: steps.append(done.step)
    again = jq.qat(fn, latents(), X, how, teacher=TEACHER, progress=told, finished=kept)
    assert steps[0] == 11  # from what was kept after ten
    assert same(again, jq.qat(fn, latents(), X, how, teacher=TEACHER))


def test_what_says_nothing_by_its_size_trains_too():
    """Zero points of 0, and norms in float16, which a small step would not change."""
    teacher = {**TEACHER, "norm": jnp.ones(WIDTH, jnp.float16)}
    run = lambda p, x: fn(p, x * p["norm"].astype(jnp.float32))
    recipe = jq.Recipe([("norm", jq.KEEP), ("*", jq.lsq(2, 16, symmetric=False))])
    p = jq.latent(teacher, recipe)
    how = dataclasses.replace(HOW, also=("norm",))
    better = jq.qat(run, p, X, how, teacher=teacher)
    assert better["norm"].dtype == jnp.float16 and np.mean(better["norm"] != 1) > 0.5
    before, after = (t["a"].data["zero"] for t in (p, better))
    assert np.mean(after[before == 0] != 0) > 0.5 if np.any(before == 0) else True
    flat = jq.trained(p, "scale")
    zero = jax.tree.map(jnp.zeros_like, p)
    chain = jq.training.relative()
    ones = jax.tree.map(jnp.ones_like, p)
    updates, _ = chain.update(ones, chain.init(zero), zero)
    assert np.all(updates["a"].data["zero"] == 1) and not np.any(updates["a"].data["scale"])
    assert flat["a"].data["zero"]
    with pytest.raises(ValueError, match="'nrom' must match floating leaves"):
        jq.qat(run, p, X, dataclasses.replace(HOW, also=("nrom",)), teacher=teacher)


def test_a_packed_teacher():
    packed = jq.quantize(TEACHER, jq.rtn(8, 16))
    how = dataclasses.replace(HOW, steps=5)
    ours, theirs = (
        jq.qat(fn, latents(), X, how, teacher=t) for t in (packed, jq.dequantize(packed))
    )
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4)
    jax.tree.map(near, ours, theirs)


def test_from_tokens():
    """Without a teacher the next token is told, as the text has it."""
    vocabulary = 32
    tokens = np.tile(np.arange(8, dtype=np.int32), (16, 2))  # a text anyone can learn
    run = lambda p, t: jax.nn.one_hot(t, vocabulary) @ p["w"]
    p = jq.latent({"w": draw(vocabulary, vocabulary)}, jq.lsq(4, 16))
    told = []
    how = jq.training.QAT(steps=60, learning_rate=0.1, validate_every=30)
    jq.qat(run, p, tokens, how, progress=told.append, validation=tokens[:1])
    assert told[-1].loss < 0.3 * told[0].loss and told[-1].validation < 0.3 * told[0].loss


def test_blocks_in_order():
    teacher = {"w": jnp.stack([draw(WIDTH, WIDTH, seed=s) / 5 for s in range(3)])}
    block = lambda p, h: h + jnp.tanh(h @ p["w"])

    def whole(p, x):
        return jax.lax.scan(lambda h, one: (block(one, h), None), x, p)[0]

    sites = jq.sites(whole, teacher, X[0])
    p = jq.latent(teacher, jq.lsq(2, 16), sites)
    how = jq.training.QAT(steps=40, learning_rate=5e-3, batch_size=16, validate_every=10)
    hidden = np.asarray(draw(64, 4, WIDTH, seed=3))
    better = jq.training.qat_blocks(block, p, teacher, hidden, how)
    error = lambda p: float(jnp.sum((jq.quantized(whole)(p, X[0]) - whole(teacher, X[0])) ** 2))
    assert error(jq.freeze(better)) < 0.8 * error(jq.freeze(p))
    assert jax.tree.structure(better) == jax.tree.structure(p)
    with pytest.raises(ValueError, match="as many blocks as the teacher has, 3, got 2"):
        jq.training.qat_blocks(block, jax.tree.map(lambda a: a[:2], p), teacher, X, how)
    with pytest.raises(ValueError, match="at least two inputs"):
        jq.training.qat_blocks(block, p, teacher, X[:1], how)


def test_a_loss_that_is_no_number_stops_it_and_loses_nothing():
    kept, bad = {}, X.copy()
    bad[HOW.batch(12, 12)[0]] = np.nan
    first = []
    with pytest.raises(ValueError, match=r"step \d+: the (loss|gradient) is nan; lower"):
        jq.qat(fn, latents(), bad, HOW, teacher=TEACHER, finished=kept, progress=first.append)
    assert all(np.isfinite(a).all() for a in kept["qat"].values()) if kept else len(first) < 5


def test_another_recipe_does_not_go_on_from_it():
    kept = {}

    def stop(done):
        if done.step == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jq.qat(fn, latents(), X, HOW, teacher=TEACHER, progress=stop, finished=kept)
    before = {name: a.copy() for name, a in kept["qat"].items()}
    other = jax.tree.map(jnp.negative, TEACHER)
    for p, x, how, teacher in (
        (latents(3), X, HOW, TEACHER),
        (latents(), X, jq.training.QAT(steps=30), TEACHER),
        (latents(), -X, HOW, TEACHER),
        (latents(), X, HOW, other),
    ):
        with pytest.raises(ValueError, match="at step 10, belongs to another training"):
            jq.qat(fn, p, x, how, teacher=teacher, finished=kept)
    with pytest.raises(ValueError, match="at step 10, belongs to another training"):
        jq.qat(fn, latents(), X, HOW, teacher=TEACHER, validation=X[:1], finished=kept)
    assert all(np.array_equal(a, kept["qat"][name]) for name, a in before.items())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: jq.qat(fn, latents(), X[:3], HOW), "at least batch_size = 4 sequences, got 3"),
        (lambda: jq.qat(fn, TEACHER, X, HOW), "nothing to train"),
        (lambda: jq.training.QAT(holding=0.001), "holding must be 0, or above"),
        (lambda: jq.training.QAT(dampening=-1.0), "dampening must not be negative"),
        (lambda: jq.training.QAT(learning_rate=0.0), "learning_rate"),
        (
            lambda: jq.training.Zeroth(kinds=("scale",), sizes=(1.0, 1.0)),
            "one for each of the kinds",
        ),
        (lambda: jq.qat(fn, TEACHER, X, FORWARD), "nothing to train"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
