"""Layers that are quantized in turn have the bits that they have when quantized together."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.ptq.quantize import importance
from jaxquant.ptq.round_stacked import planned
from tests.support.arrays import draw

L, K, N = 3, 64, 32
METHODS = {
    "rtn": jq.rtn(bits=3, group_size=16),
    "gptq": jq.gptq(bits=3, group_size=16),
    "qtip": jq.qtip(bits=2),
    "trellis": jq.trellis(bits=1.5, block=32),
    "entropy_coded": jq.entropy_coded(bits=2),
    "aqlm": jq.aqlm(),
    "smoothquant": jq.smoothquant(),
    "quarot": jq.quarot(),
    "awq": jq.awq(group_size=16),
}
every_method = pytest.mark.parametrize("name", METHODS)


def model(params, x):
    def layer(h, p):
        x = h * p["gain"]
        return h + jnp.tanh(x @ p["a"] + x @ p["b"]) @ p["c"], None

    return jax.lax.scan(layer, x, params["layers"])[0]


@pytest.fixture(scope="module")
def whole():
    """Parameters, and statistics of all layers."""
    shapes = {"a": (L, K, N), "b": (L, K, N), "c": (L, N, K)}
    layers = {name: draw(*s, seed=i) / 4 for i, (name, s) in enumerate(shapes.items())}
    params = {"layers": layers | {"gain": 1 + jnp.abs(draw(L, K, seed=5))}}
    stats = jq.calibrate(
        model, params, [draw(48, K, seed=7)], loss=lambda y, _: jnp.sum(y**2), sample=8
    )
    return params, stats


def cut(tree, i):
    return jax.tree.map(lambda a: a[i : i + 1], tree)


def cut_stats(stats, i):
    sites = {p: dataclasses.replace(s, shape=(1, *s.shape[1:])) for p, s in stats.sites.items()}
    return jq.Stats(sites, cut(stats.sums, i), stats.holder)


def arrays(params):
    return jax.tree.leaves(jax.tree.map(lambda w: w.named, params, is_leaf=jq.core.is_standin))


@every_method
def test_the_same_bits_layer_by_layer(whole, name):
    params, stats = whole
    rules = jq.Recipe([("layers/[abc]", METHODS[name]), ("*", jq.KEEP)])
    places = {"layers/[ab]": ["layers/gain"]}
    key = jax.random.key(3)
    folded = jq.ptq.fold(params, rules, stats, places, key=key)
    want = jq.quantize(*folded, key=key)
    parts, methods = [], dict(folded.recipe.rules)
    for path, method in methods.items():
        if isinstance(method, jq.Method) and method.format.plans:
            each = [
                importance(cut(params, i), rules, cut_stats(stats, i), key=key, first=i)[path]
                for i in range(L)
            ]
            methods[path] = planned(method, np.sum(each, 0))
    for i in range(L):
        recipe = jq.Recipe(tuple(methods.items())) if name == "trellis" else rules
        one = jq.ptq.fold(cut(params, i), recipe, cut_stats(stats, i), places, key=key, first=i)
        parts.append(jq.quantize(*one, key=key, first=i))
    for weight in "abc":
        packed = want["layers"][weight]
        for i, part in enumerate(parts):
            mine = part["layers"][weight]
            assert mine.format == packed.format
            chex.assert_trees_all_equal(mine.named, cut(packed.named, i))
    gains = jnp.concatenate([part["layers"]["gain"] for part in parts])
    np.testing.assert_array_equal(gains, want["layers"]["gain"])


def test_a_layer_quantized_as_the_first_one_has_other_signs(whole):
    """The twin: without `first` a layer draws what layer 0 draws, and is called so."""
    params, stats = whole
    rules = jq.Recipe([("layers/a", jq.qtip(bits=2)), ("*", jq.KEEP)])
    names = []
    right, wrong = (
        jq.quantize(
            cut(params, 2), rules, cut_stats(stats, 2), first=first,
            progress=lambda done: names.append(done.path),
        )["layers"]["a"]
        for first in (2, 0)
    )  # fmt: skip
    assert names == ["layers/a[2]", "layers/a[0]"]
    signs = [w.input_data["signs"] for w in (right, wrong)]
    assert not np.array_equal(*signs)
