"""Trees of every kind; `python -m tests.support.saved_trees DIR` reads and saves them again."""

import sys
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

import jaxquant as jq
from jaxquant.storage import checkpoint

W = np.linspace(-1, 1, 64 * 32, dtype=np.float32).reshape(64, 32)
DTYPES = [
    "bool", "int2", "int4", "int8", "int32", "uint2", "uint4", "uint8", "uint32", "bfloat16",
    "float4_e2m1fn", "float8_e4m3fn", "float8_e5m2", "float8_e4m3", "float8_e8m0fnu", "float16",
    "float32", "complex64",
]  # fmt: skip


class Pair(NamedTuple):
    left: jax.Array
    right: "Pair | None" = None


class Net(nnx.Module):
    """Of everything that a state may hold: lists, statistics, counters, random keys."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(32, 32, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(32, use_running_average=True, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.norm(x)


def net():
    return Net(nnx.Rngs(0))


def floats():
    return {"a": {"w": jnp.asarray(W)}, "b": jnp.zeros(3)}


def packed():
    return jq.quantize(
        floats(), jq.Recipe([("a/*", jq.rtn(bits=3, group_size=16)), ("*", jq.KEEP)])
    )


def latent():
    return jq.latent(floats(), jq.Recipe([("a/*", jq.lsq(bits=4)), ("*", jq.KEEP)]))


def quantized_state():
    recipe = jq.Recipe([("layers/*/kernel", jq.rtn(4, 16)),
                        ("*", jq.KEEP)])  # fmt: skip
    return jq.quantize(nnx.state(net()), recipe)


def training():
    """A whole training state; the optimizer's has no moments of what it does not train."""
    params = latent()
    optimizer = jq.training.optimizer(params, weight=optax.adamw(1e-3))
    return TrainState.create(apply_fn=jnp.dot, params=params, tx=optimizer)


def partitioned():
    params = latent()
    return eqx.partition(params, jq.trained(params, "weight"))


def quantized_mlp():
    """An Equinox module, whose weights are [outputs, inputs]."""
    mlp = eqx.nn.MLP(32, 32, 64, 2, key=jax.random.key(0))
    sites = jq.sites(lambda mlp, x: mlp(x), mlp, jnp.ones(32))
    return jq.quantize(mlp, jq.rtn(4, 16), sites)


TREES = {
    "dicts": lambda: {"0": {"a": jnp.ones(2)}, "e": {}, "n": None},
    "integers": lambda: {"layers": {0: jnp.ones(2), 10: {"w": jnp.zeros(2)}, 9: jnp.ones(1)}},
    "sequences": lambda: [jnp.ones(2), (jnp.zeros(1), [], ()), None, [{"a": (3, "x")}]],
    "scalars": lambda: {"i": 3, "f": 0.1, "b": True, "c": 1 - 2j, "s": "é", "n": np.float32(2),
                        "big": 10**30, "inf": -float("inf")},
    "slashes": lambda: {"mlp/~/linear_0": {"w": jnp.ones(2)}, "mlp/~/linear_1": {"w": jnp.ones(3)}},
    "named tuples": lambda: Pair(jnp.ones(2), Pair(jnp.zeros(1))),
    "ordered": lambda: OrderedDict(b=jnp.ones(1), a=jnp.zeros(1)),
    "linen": lambda: nn.FrozenDict({"params": {"w": nn.Partitioned(jnp.asarray(W), ("x", None))}}),
    "equinox": lambda: eqx.nn.MLP(2, 3, 4, 2, key=jax.random.key(0)),
    "equinox, quantized": quantized_mlp,
    "variables": lambda: {"w": nnx.Param(jnp.asarray(W)), "s": [nnx.BatchStat(jnp.ones(2))]},
    "module": net,
    "state": lambda: nnx.state(net()),
    "split": lambda: nnx.split(net()),
    "quantized state": quantized_state,
    "packed": packed,
    "latent": latent,
    "partitioned": partitioned,
    "optax": lambda: optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(floats()),
    "nnx optimizer": lambda: nnx.state(nnx.Optimizer(net(), optax.adam(1e-3), wrt=nnx.Param)),
    "training": training,
    "keys": lambda: {"one": jax.random.key(3), "raw": jax.random.PRNGKey(3),
                     "many": jax.random.split(jax.random.key(1, impl="rbg"), 4)},
    "dtypes": lambda: {d: jnp.asarray([[1, 0, 1]]).astype(d) for d in DTYPES},
    "wide": lambda: {d: np.arange(3).astype(d) for d in ("float64", "int64", "complex128")},
    "nothing of": lambda: {"a": jnp.zeros((0, 3), jnp.bfloat16), "b": jnp.ones(1)},
    "only numbers": lambda: {"step": 3},
}  # fmt: skip


def abstract(tree):
    """The tree with shapes in the place of its arrays."""
    shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype) if isinstance(a, jax.Array) else a
    return jax.tree.map(shape, tree)


def check_same(got, want):
    """Raise AssertionError unless two trees are equal, their containers and dtypes included."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if hasattr(b, "dtype"):
            assert a.dtype == b.dtype and np.shape(a) == np.shape(b)
            if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            np.testing.assert_array_equal(
                np.asarray(a, np.complex128), np.asarray(b, np.complex128)
            )
        else:
            assert type(a) is type(b) and a == b


def main(place):
    """Reads every tree of a folder and saves it again; another process may round otherwise."""
    for name, make in TREES.items():
        tree = checkpoint.load(place / name, like=abstract(make()))
        checkpoint.save(place / f"{name} again", tree)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
