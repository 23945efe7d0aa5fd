"""One function in every framework: x -> tanh(x @ a) @ b, with 32 -> 64 -> 32 weights."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


def linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = jnp.tanh(nn.Dense(64, use_bias=False, name="a")(x))
            return nn.Dense(32, use_bias=False, name="b")(h)

    def fn(params, x):
        return Net().apply({"params": params}, x)

    return fn, lambda a, b: {"a": {"kernel": a}, "b": {"kernel": b}}, ("a/kernel", "b/kernel")


def linen_remat():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = jnp.tanh(nn.remat(nn.Dense)(64, use_bias=False, name="a")(x))
            return nn.Dense(32, use_bias=False, name="b")(h)

    def fn(params, x):
        return Net().apply({"params": params}, x)

    return fn, lambda a, b: {"a": {"kernel": a}, "b": {"kernel": b}}, ("a/kernel", "b/kernel")


def linen_general():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.DenseGeneral((4, 16), use_bias=False, name="a")(x)
            return nn.DenseGeneral(32, axis=(-2, -1), use_bias=False, name="b")(jnp.tanh(h))

    def fn(params, x):
        return Net().apply({"params": params}, x)

    def tree(a, b):
        return {"a": {"kernel": a.reshape(32, 4, 16)}, "b": {"kernel": b.reshape(4, 16, 32)}}

    return fn, tree, ("a/kernel", "b/kernel")


def linen_einsum():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Einsum((4, 32, 16), "td,hdk->thk", use_bias=False, name="a")(x)
            return nn.Einsum((4, 16, 32), "thk,hkd->td", use_bias=False, name="b")(jnp.tanh(h))

    def fn(params, x):
        return Net().apply({"params": params}, x)

    def tree(a, b):
        heads = a.reshape(32, 4, 16).swapaxes(0, 1)
        return {"a": {"kernel": heads}, "b": {"kernel": b.reshape(4, 16, 32)}}

    return fn, tree, ("a/kernel", "b/kernel")


def nnx_linear():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(32, 64, use_bias=False, rngs=rngs)
            self.b = nnx.Linear(64, 32, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.b(jnp.tanh(self.a(x)))

    return _nnx(Net, lambda m, a, b: (m.a, a, m.b, b))


def nnx_einsum():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Einsum("td,dn->tn", (32, 64), rngs=rngs)
            self.b = nnx.Einsum("td,dn->tn", (64, 32), rngs=rngs)

        def __call__(self, x):
            return self.b(jnp.tanh(self.a(x)))

    return _nnx(Net, lambda m, a, b: (m.a, a, m.b, b))


def _nnx(net, places):
    graph, state = nnx.split(net(nnx.Rngs(0)))

    def fn(params, x):
        return nnx.merge(graph, params)(x)

    def tree(a, b):
        return jax.tree.map(lambda leaf: a if leaf.shape == a.shape else b, state)

    return fn, tree, ("a/kernel", "b/kernel")


def equinox():
    def fn(params, x):
        return jax.vmap(lambda x: params[1](jnp.tanh(params[0](x))))(x)

    def tree(a, b):
        layers = [eqx.nn.Linear(*w.shape, use_bias=False, key=jax.random.key(0)) for w in (a, b)]
        return [
            eqx.tree_at(lambda m: m.weight, layer, w.T)
            for layer, w in zip(layers, (a, b), strict=True)
        ]

    return fn, tree, ("0/weight", "1/weight")


def plain():
    def fn(params, x):
        return jnp.einsum("tk,kn->tn", jnp.tanh(jnp.einsum("td,dk->tk", x, params[0])), params[1])

    return fn, lambda a, b: [a, b], ("0", "1")


def checkpoint():
    def fn(params, x):
        return jax.checkpoint(lambda p, x: jnp.tanh(x @ p[0]) @ p[1])(params, x)

    return fn, lambda a, b: [a, b], ("0", "1")


def jitted():
    def fn(params, x):
        return jax.jit(lambda p, x: jnp.tanh(x @ p[0]) @ p[1])(params, x)

    return fn, lambda a, b: [a, b], ("0", "1")


def custom_vjp_between():
    @jax.custom_vjp
    def tanh(x):
        return jnp.tanh(x)

    tanh.defvjp(lambda x: (tanh(x), x), lambda x, g: (g * (1 - jnp.tanh(x) ** 2),))

    def fn(params, x):
        return tanh(x @ params[0]) @ params[1]

    return fn, lambda a, b: [a, b], ("0", "1")


NETWORKS = [
    linen,
    linen_remat,
    linen_general,
    linen_einsum,
    nnx_linear,
    nnx_einsum,
    equinox,
    plain,
    checkpoint,
    jitted,
    custom_vjp_between,
]
