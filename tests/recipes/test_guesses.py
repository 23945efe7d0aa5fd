"""Quantizing without sites is a guess that says so; with sites the axes are the function's own."""

import warnings

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant as jq

RTN = jq.rtn(bits=4, group_size=-1)
X = jax.random.normal(jax.random.key(0), (2, 8, 64))
IDS = jnp.arange(16).reshape(2, 8)
NAMES_SITES = r"jq\.quantize\(params, method, jq\.sites\(fn, params, x\)\)$"


class NNXModel(nnx.Module):
    """A table, a norm, attention, a convolution and a matrix."""

    def __init__(self, rngs):
        self.table = nnx.Embed(32, 64, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
        self.conv = nnx.Conv(64, 64, (3,), rngs=rngs)
        self.head = nnx.Linear(64, 32, rngs=rngs)

    def __call__(self, ids):
        return self.head(self.conv(self.attention(self.norm(self.table(ids)))))


class LinenModel(nn.Module):
    """The same in linen."""

    @nn.compact
    def __call__(self, ids):
        x = nn.LayerNorm(name="norm")(nn.Embed(32, 64, name="table")(ids))
        x = nn.Conv(64, (3,), name="conv")(nn.MultiHeadAttention(4, name="attention")(x))
        return nn.Dense(32, name="head")(x)


class EquinoxModel(eqx.Module):
    """The same in Equinox, which stores [outputs, inputs]."""

    table: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    conv: eqx.nn.Conv1d
    head: eqx.nn.Linear

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 4)
        self.table = eqx.nn.Embedding(32, 64, key=keys[0])
        self.norm = eqx.nn.LayerNorm(64)
        self.attention = eqx.nn.MultiheadAttention(4, 64, key=keys[1])
        self.conv = eqx.nn.Conv1d(64, 64, 3, padding=1, key=keys[2])
        self.head = eqx.nn.Linear(64, 32, key=keys[3])

    def __call__(self, ids):
        x = jax.vmap(self.norm)(jax.vmap(self.table)(ids))
        return jax.vmap(self.head)(self.conv(self.attention(x, x, x).T).T)


def nnx_model():
    graph, state = nnx.split(NNXModel(nnx.Rngs(0)))
    heads = ((64,), (4, 16))
    views = {f"attention/{name}/kernel": heads for name in ("query", "key", "value")}
    views |= {"attention/out/kernel": heads[::-1], "head/kernel": ((64,), (32,))}
    return lambda state, ids: nnx.merge(graph, state)(ids), state, views


def linen_model():
    params = LinenModel().init(jax.random.key(0), IDS)["params"]
    return lambda p, ids: LinenModel().apply({"params": p}, ids), params, nnx_model()[2]


def equinox_model():
    names = [f"attention/{name}_proj/weight" for name in ("query", "key", "value", "output")]
    views = dict.fromkeys(names, ((64,), (64,))) | {"head/weight": ((64,), (32,))}
    return lambda model, ids: jax.vmap(model)(ids), EquinoxModel(), views


@pytest.mark.parametrize("model", [nnx_model, linen_model, equinox_model])
def test_sites_know_the_axes_of_every_layer_of_a_framework(model):
    fn, params, views = model()
    kept = (
        "conv/.*: the function uses them in an .*; table/.*: the function only looks up their rows"
    )
    with pytest.warns(UserWarning, match=kept) as said:
        packed = jq.quantize(params, RTN, jq.sites(fn, params, IDS))
    assert len(said) == 1
    assert "bias" not in str(said[0].message).replace("conv/bias", "")
    found = {
        p: (w.view.k, w.view.n) for p, w in jq.core.path_leaves(packed) if isinstance(w, jq.QTensor)
    }
    assert found == views
    explained = jq.explain(fn, packed, IDS)
    assert {use.path for use in explained.uses} == set(views)
    assert not explained.materialised
    want = fn(jq.dequantize(packed), IDS)
    np.testing.assert_allclose(jq.quantized(fn)(packed, IDS), want, rtol=1e-4, atol=1e-4)


def warned(params, method):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        packed = jq.quantize(params, method)
    return packed, [str(w.message) for w in said if "assumed" in str(w.message)]


def test_without_sites_an_equinox_linear_warns():
    linear = eqx.nn.Linear(64, 32, key=jax.random.key(0))
    with pytest.warns(UserWarning, match=r"assumed to be the input of weight \[32, 64\]") as said:
        jq.quantize(linear, RTN)
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    assert said[0].filename == __file__
    with pytest.warns(UserWarning, match=NAMES_SITES):
        jq.quantize(linear, jq.Recipe([("weight", RTN), ("*", jq.KEEP)]))
    with pytest.warns(UserWarning, match=NAMES_SITES):
        jq.latent(linear, jq.lsq(4, group_size=16))


def test_without_sites_attention_warns_once_and_its_biases_are_kept():
    state = nnx.state(nnx.MultiHeadAttention(4, 64, decode=False, rngs=nnx.Rngs(0)))
    packed, said = warned(state, RTN)
    assert len(said) == 1
    assert (
        "key/kernel [64, 4, 16], out/kernel [4, 16, 64], query/kernel [64, 4, 16] and 1" in said[0]
    )
    rounded = [p for p, w in jq.core.path_leaves(packed) if isinstance(w, jq.QTensor)]
    assert rounded == [f"{name}/kernel" for name in ("key", "out", "query", "value")]
    # The warning comes before the error that a wrong guess ends in.
    with pytest.warns(UserWarning, match=NAMES_SITES), pytest.raises(ValueError, match="k = 4"):
        jq.quantize(state, jq.rtn(bits=4, group_size=64))


def test_without_sites_tables_are_kept_and_named():
    params = {"table": {"embedding": jnp.ones((32, 64))}, "head": {"kernel": jnp.ones((64, 8))}}
    with pytest.warns(
        UserWarning, match="table/embedding .*: without sites they look like embedding tables"
    ):
        packed = jq.quantize(params, RTN)
    assert packed["table"]["embedding"] is params["table"]["embedding"]
    assert isinstance(packed["head"]["kernel"], jq.QTensor)
    with pytest.raises(
        ValueError, match=r"looks like the weight of a matmul; .* embedding.* or pass jq\.sites"
    ):
        jq.quantize(params["table"], RTN)
    with pytest.warns(UserWarning, match=NAMES_SITES):  # whoever names a table gets it
        packed = jq.quantize(params, jq.Recipe([("*", RTN)]))
    assert isinstance(packed["table"]["embedding"], jq.QTensor)


def test_matrices_are_those_of_the_library_and_sites_silence():
    params = {"w": jnp.ones((64, 32)), "up": {"kernel": jnp.ones((32, 64)), "bias": jnp.ones(64)}}
    assert warned(params, RTN)[1] == []
    stack = {"layers": {"kernel": jnp.ones((3, 64, 64)), "bias": jnp.ones((3, 64))}}
    assert len(warned(stack, RTN)[1]) == 1
    fn = lambda p, x: jax.lax.scan(
        lambda x, w: (x @ w["kernel"] + w["bias"], None), x, p["layers"]
    )[0]
    packed = jq.quantize(stack, RTN, jq.sites(fn, stack, X))  # a warning would be an error
    assert isinstance(packed["layers"]["kernel"], jq.QTensor)
    assert packed["layers"]["bias"] is stack["layers"]["bias"]
