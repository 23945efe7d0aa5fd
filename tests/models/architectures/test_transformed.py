"""Rotations and scalings leave a whole model's function as it is, before anything is rounded."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.core.paths import matches, replace_leaves
from jaxquant.formats.dense import Dense
from jaxquant.recipes.recipe import layout_of
from jaxquant.transforms import Channels
from jaxquant_models import load
from jaxquant_models.architectures.llama import LAYER_MATRICES
from tests.support.tiny_llama import BASE, random_tensors, write_folder

SIDES = [
    (jq.transforms.Rotation(), jq.transforms.Rotation()),
    (jq.transforms.Rotation(64, sort=True), jq.transforms.Rotation()),
    (jq.transforms.Scaling(-0.5), jq.transforms.Scaling(-0.5)),
    (
        jq.transforms.Chain(
            (
                jq.transforms.Smooth(),
                jq.transforms.Greedy(8, 16),
                jq.transforms.Zigzag(8),
                jq.transforms.Greedy(8, 16),
            )
        ),
        None,
    ),
]


def transformed(model, sides):
    """The layers' weights behind transforms of their own, stored as floats."""
    leaves, new = dict(jq.core.path_leaves(model.params)), {}
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    sites = jq.sites(model.apply_fn, model.params, tokens)
    for path, w in leaves.items():
        if not matches(path, LAYER_MATRICES):
            continue
        view, order = layout_of(w.shape, sites[path])
        k, n = math.prod(view.k), math.prod(view.n)
        batch = w.shape[: len(w.shape) - len(view.k) - len(view.n)]

        def one(w, key, k=k, n=n):
            fields = {}
            for axis, name, side, size in ((0, "input", sides[0], k), (1, "output", sides[1], n)):
                if side is None:
                    continue
                rows = jax.random.normal(jax.random.fold_in(key, axis), (64, size))
                rows *= jnp.exp(jax.random.normal(jax.random.fold_in(key, 4 + axis), (size,)))
                known = Channels.of(rows[:32], rows[32:])
                arrays = side.fit(known, jax.random.fold_in(key, 2 + axis))
                turned = w.T if axis == 0 else w
                turned = side.inverse(turned, arrays)
                w = turned.T if axis == 0 else turned
                fields[f"{name}_data"] = arrays
            return {"data": {"codes": w}, **fields}

        matrices = jnp.transpose(w, order).reshape(-1, k, n)
        fields = jax.vmap(one)(matrices, jax.random.split(jax.random.key(len(new)), len(matrices)))
        fields = jax.tree.map(lambda a, b=batch: a.reshape(*b, *a.shape[1:]), fields)
        new[path] = jq.QTensor(
            format=Dense(), view=view, logical_dtype=w.dtype.name,
            input=sides[0], output=sides[1], **fields,
        )  # fmt: skip
    assert len(new) == 7
    return replace_leaves(model.params, new)


def difference(model, sides, tokens):
    want = model.apply_fn(model.params, tokens)
    got = jax.jit(jq.quantized(model.apply_fn))(transformed(model, sides), tokens)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@pytest.mark.parametrize("sides", SIDES, ids=lambda s: str(s[0]))
def test_a_small_model(tmp_path, sides):
    model = load(write_folder(tmp_path / "m", BASE, random_tensors(BASE)))
    assert difference(model, sides, jnp.arange(24)[None]) < 1e-5


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize(
    "sides",
    [SIDES[0], *(pytest.param(s, marks=pytest.mark.thorough) for s in SIDES[1:])],
    ids=lambda s: str(s[0]),
)
def test_the_real_model(sides):
    model = load("smollm2-135m")
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 128))
    assert difference(model, sides, jnp.asarray(tokens)) < 1e-5
