"""Layers apart: the same weights, and what each deserves in bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.ptq.layer_stacks import layers_of
from jaxquant.tuning.heal import Healing, heal, heal_blocks
from jaxquant_models import load
from jaxquant_models.architectures.cache import init_cache
from jaxquant_models.runs.healing import heal_model
from tests.support.arrays import draw
from tests.support.tiny_llama import BASE, random_tensors, write_folder

LAYERS = 11  # "10" sorts before "2"


def made(layers=LAYERS):
    params = {"stack": {"a": draw(layers, 32, 64) / 6, "b": draw(layers, 64, 32, seed=1) / 8}}
    params["head"] = draw(32, 32, seed=2) / 5

    def fn(p, x):
        block = lambda h, w: (h + jnp.tanh(h @ w["a"]) @ w["b"], None)
        return jax.lax.scan(block, x, p["stack"])[0] @ p["head"]

    return fn, params, np.asarray(draw(4, 16, 32, seed=3))


def test_there_and_back():
    _, params, _ = made()
    apart = jq.ptq.unstack(params, "stack")
    assert apart["stack"]["10"]["a"].shape == (32, 64)
    mapped = jax.tree.map(lambda a: a + 0, apart)  # has the layers in the order of their names
    for tree in (apart, mapped):
        jax.tree.map(np.testing.assert_array_equal, jq.ptq.restack(tree, "stack"), params)


def test_statistics_are_those_of_the_layers():
    """One method for all layers gives the codes that it gives the stack."""
    fn, params, x = made(3)
    stats = jq.calibrate(fn, params, x, loss=lambda y, x: jnp.mean(y**2), output=["*"])
    apart, known = jq.ptq.unstack(params, "stack"), jq.ptq.unstack_stats(stats, "stack")
    for i in range(3):
        one = f"stack/{i}/b"
        np.testing.assert_array_equal(known.gram(one), stats.gram("stack/b")[i])
        np.testing.assert_array_equal(known.output_gram(one), stats.output_gram("stack/b")[i])
    whole = jq.quantize(params, jq.gptq(3, 16), stats)
    alike = jq.ptq.restack(jq.quantize(apart, jq.gptq(3, 16), known), "stack")
    assert jq.bits_per_weight(alike) == jq.bits_per_weight(whole)
    for (path, a), (_, b) in zip(
        jq.core.path_leaves(alike), jq.core.path_leaves(whole), strict=True
    ):
        assert isinstance(a, jq.QTensor)
        np.testing.assert_array_equal(a.dequantize(), b.dequantize(), err_msg=path)


def test_methods_of_their_own():
    """In a function that wants the stack, packed layers of any kind serve."""
    fn, params, x = made()
    apart = jq.ptq.unstack(params, "stack")
    rules = [
        ("stack/10/*", jq.rtn(2, 16)),
        ("stack/0/a", jq.normal_float(4, 16)),
        ("head", jq.KEEP),
    ]
    q = jq.quantize(apart, jq.Recipe([*rules, ("*", jq.rtn(4, 16))]))
    whole = lambda p, x: fn(jq.ptq.restack(p, "stack"), x)
    got = jax.jit(jq.quantized(whole))(q, x)
    dense = jq.dequantize(q)
    wanted = fn(
        {**params, "stack": jax.tree.map(lambda *a: jnp.stack(a), *layers_of(dense, "stack"))}, x
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, jq.ptq.restack(q, "stack")["stack"]["a"],
                 jq.ptq.restack(dense, "stack")["stack"]["a"])  # fmt: skip


def test_healing_of_layers_apart():
    """Decoded, layers of other rates are one stack; their codes stay what they were."""
    fn, params, _ = made(2)
    x = np.asarray(draw(24, 16, 32, seed=3))
    apart = jq.ptq.unstack(params, "stack")
    stats = jq.ptq.unstack_stats(jq.calibrate(fn, params, x), "stack")
    rules = [(f"stack/{i}/a", jq.entropy_coded(2 + i, states=8)) for i in range(2)]
    q = jq.quantize(apart, jq.Recipe([*rules, ("*", jq.KEEP)]), stats)
    block = lambda p, h: h + jnp.tanh(h @ p["a"]) @ p["b"]
    healing = Healing(steps=20, learning_rate=0.02)
    one = jq.ptq.restack(jq.tuning.decoded(q), "stack")
    assert isinstance(one["stack"]["a"], jq.QTensor)
    blocks = {**one, "stack": heal_blocks(block, one["stack"], params["stack"], x, healing)}
    both = heal(fn, blocks, params, x, healing)
    states = [q, *(jq.tuning.rejoined(q, jq.ptq.unstack(tree, "stack")) for tree in (blocks, both))]
    for i in range(2):
        before, after = (state["stack"][f"{i}"]["a"] for state in states[::2])
        assert after.format == before.format
        np.testing.assert_array_equal(after.data["codes"], before.data["codes"])
    far = lambda p: float(
        jnp.mean((fn(jq.ptq.restack(jq.dequantize(p), "stack"), x) - fn(params, x)) ** 2)
    )
    assert far(states[0]) > far(states[1]) > far(states[2])


def test_the_model_takes_its_layers_apart(tmp_path):
    model = load(write_folder(tmp_path / "m", BASE, random_tensors(BASE)))
    tokens = jnp.arange(12)[None]
    apart = jq.ptq.unstack(model.params, "layers")
    want = model.apply_fn(model.params, tokens)
    np.testing.assert_allclose(model.apply_fn(apart, tokens), want, rtol=1e-4, atol=1e-5)
    cache = init_cache(model.config, 1, 12)
    first, cache = model.apply_cached(apart, tokens[:, :7], cache)
    second, cache = model.apply_cached(apart, tokens[:, 7:], cache)
    got = jnp.concatenate([first, second], axis=1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_layers_that_do_not_stack_are_not_healed(tmp_path):
    model = load(write_folder(tmp_path / "m", BASE, random_tensors(BASE)))
    rules = [("layers/0/*kernel", jq.rtn(2, 8)), ("layers/*kernel", jq.rtn(3, 8)), ("*", jq.KEEP)]
    q = jq.quantize(jq.ptq.unstack(model.params, "layers"), jq.Recipe(rules))
    with pytest.raises(ValueError, match="healed as one stack"):
        heal_model(
            model, dataclasses.replace(model, params=q), None, None, Healing(), progress=print
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: jq.ptq.unstack(p, "stak"), "an entry 'stak'"),
        (lambda p: jq.ptq.unstack([p], "stack"), "expected a dict"),
        (
            lambda p: jq.ptq.unstack({"stack": {"a": jnp.ones(2), "b": jnp.ones(3)}}, "stack"),
            "leading",
        ),
        (
            lambda p: jq.ptq.restack(p, "stack"),
            "expected layers '0', '1', ... in 'stack', got a, b",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(made()[1])


# --- what they deserve ----------------------------------------------------------------------


def layer(scale, seed=0):
    """A weight, its H and G; the loss is scale^2 times as great as at 1."""
    h, g = (draw(64, 96, seed=seed + i) for i in (1, 2))
    return scale * draw(64, 64, seed=seed), h @ h.T / 96, g @ g.T / 96


def seen(weights):
    """Statistics with these moments."""
    fn = lambda p, x: [x @ w for w in p.values()]
    params = {name: w for name, (w, _, _) in weights.items()}
    stats = jq.calibrate(fn, params, [jnp.eye(64)], loss=lambda y, x: sum(map(jnp.sum, y)),
                         output=["*"])  # fmt: skip
    sums = {
        stats.holder[n]: stats.sums[stats.holder[n]]._replace(gram=h, rows=jnp.ones(()), output=g)
        for n, (_, h, g) in weights.items()
    }
    return params, jq.Stats(stats.sites, sums, stats.holder)


def test_a_bit_for_a_factor_of_four():
    """Theory's value: rates differ by log4 of the loss, whichever of W and H it is in."""
    w, h, g = layer(1.0)
    weights = {"a": (w, h, g), "b": (2 * w, h, g), "c": (w, 16 * h, g), "d": (w, h, 9 * g)}
    params, stats = seen(weights)
    found = jq.ptq.shares(params, stats)
    np.testing.assert_allclose(sum(found.values()), 0, atol=1e-5)
    np.testing.assert_allclose([found[n] - found["a"] for n in "bcd"], [1, 2, 0], atol=1e-4)


def test_rates_by_shares_lose_less_than_equal_ones():
    weights = {"a": layer(1.0), "b": layer(2.5, seed=5), "c": layer(0.4, seed=9)}
    params, stats = seen(weights)
    found = jq.ptq.shares(params, stats)
    loss = {}
    for name, share in (("equal", 0.0), ("shared", 1.0), ("the other way", -0.5)):
        loss[name] = 0.0
        for n, (w, h, g) in weights.items():
            method = jq.entropy_coded(3 + share * found[n], states=8, two_sided=True)
            e = w - jq.quantize_array(w, method, h, output_gram=g).dequantize()
            loss[name] += float(jnp.sum((h @ e @ g) * e) / jnp.trace(g))
    assert loss["shared"] < 0.7 * loss["equal"] < loss["the other way"]


def test_shares_need_what_they_need():
    fn, params, x = made(2)
    stats = jq.calibrate(fn, params, x, loss=lambda y, x: jnp.mean(y**2), output=["*"])
    with pytest.raises(ValueError, match="unstack"):
        jq.ptq.shares(params, stats)
    with pytest.raises(ValueError, match="no weight with statistics matches nothing"):
        jq.ptq.shares(params, stats, ["nothing"])
    plain = jq.calibrate(fn, params, x, loss=lambda y, x: jnp.mean(y**2))
    with pytest.raises(ValueError, match="no output-side statistics"):
        jq.ptq.shares(params, plain, ["head"])
