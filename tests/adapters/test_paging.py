"""Paged optimizers: the same updates, from state in host memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxquant as jq
from jaxquant.adapters.adam_8bit import adam8bit
from jaxquant.adapters.paging import paged

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
SCHEDULE = optax.warmup_cosine_decay_schedule(0, 1e-2, 5, 50)
LABELS = {"stack": "a", "w": "b", "bias": "a", "frozen": "c"}
OPTIMIZERS = {
    "adamw": lambda: optax.adamw(SCHEDULE, weight_decay=0.1),
    "lion": lambda: optax.lion(1e-3),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "adam8bit": lambda: adam8bit(SCHEDULE, weight_decay=0.1, block=16, least=100),
    "labels": lambda: optax.multi_transform(
        {"a": optax.adamw(SCHEDULE), "b": optax.lion(1e-3), "c": optax.set_to_zero()}, LABELS
    ),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=8),
    "steps": lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}


def tree():
    r = np.random.default_rng(0)
    shapes = {"stack": (6, 16, 8), "w": (32, 24), "bias": (7,), "frozen": (20, 16)}
    return {name: jnp.asarray(r.normal(size=s), jnp.float32) for name, s in shapes.items()}


def trained(optimizer, steps=50, **options):
    """Parameters and state. Gradients are compiled apart: fused otherwise, they round otherwise."""
    params = tree()
    state = optimizer.init(params)
    update = jax.jit(optimizer.update, **options)
    gradient = jax.jit(lambda p, x: jax.tree.map(lambda a: 0.3 * a + jnp.sin(x + a), p))
    for x in range(1, steps + 1):
        updates, state = update(gradient(params, jnp.float32(x)), state, params)
        params = jax.jit(optax.apply_updates)(params, updates)
    return params, state


def spaces(state):
    return [jax.typeof(a).memory_space for a in jax.tree.leaves(state)]


def same(a, b, **tolerance):
    a, b = (jax.tree.leaves(jax.tree.map(lambda x: jax.device_put(x, DEVICE), t)) for t in (a, b))
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x.ravel(), y.ravel(), **tolerance)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_the_same(name):
    """After 50 steps, however XLA rewrites them: a / c as a * (1 / c), a * b + c at once."""
    optimizer = paged(OPTIMIZERS[name](), least=256, piece_bytes=1)
    (expected, state), (params, own) = trained(OPTIMIZERS[name]()), trained(optimizer)
    same(params, expected, rtol=0, atol=2e-6)
    assert jax.tree.structure(own) == jax.tree.structure(state)
    assert HOST in spaces(own) and HOST not in spaces(state)


@pytest.mark.parametrize("name", ["adamw", "adam8bit", "labels"])
def test_updates_are_the_same_bit_for_bit(name):
    """After 50 jitted steps, where XLA neither simplifies nor fuses, and so rewrites nothing."""
    exact = {"compiler_options": {"xla_disable_hlo_passes": "algsimp,fusion"}}
    optimizer = paged(OPTIMIZERS[name](), least=256, piece_bytes=1)
    expected, found = (trained(o, **exact) for o in (OPTIMIZERS[name](), optimizer))
    same(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("donated", [(), (1,), (2,), (0, 1), (1, 2)])
def test_any_donation(donated):
    """JAX pairs donated arguments with results by shape: parameters must not land on the host."""
    optimizer = paged(optax.adam(1e-2), least=1)
    step = lambda g, s, p: (optax.apply_updates(p, (u := optimizer.update(g, s, p))[0]), u[1])
    step, params = jax.jit(step, donate_argnums=donated), {"w": jnp.ones((16, 16))}
    state = optimizer.init(params)
    for _ in range(3):
        params, state = step({"w": jnp.full((16, 16), 2.0)}, state, params)
    assert spaces(params) == [DEVICE] and spaces(state) == [DEVICE, HOST, HOST]
    np.testing.assert_allclose(params["w"], 1 - 3e-2, rtol=1e-5)
    assert int(state[0].count) == 3


def test_small_leaves_stay_on_the_device():
    state = paged(optax.adam(1e-3), least=256).init(tree())
    host = {name: s is HOST for name, s in zip(sorted(tree()), spaces(state[0].mu), strict=True)}
    assert host == {"bias": False, "frozen": True, "stack": True, "w": True}
    assert spaces(state[0].count) == [DEVICE]


def test_layers_are_walked():
    """Of the stack only one layer is fetched; of adafactor, which looks across layers, all."""

    def shapes(optimizer):
        params = {"stack": tree()["stack"]}
        optimizer = paged(optimizer, least=256, piece_bytes=1)
        state = optimizer.init(params)
        text = str(jax.make_jaxpr(optimizer.update)(params, state, params))
        return "f32<host>[1,1,16,8]" in text

    assert shapes(optax.adamw(1e-3)) and not shapes(optax.adafactor(1e-3))


def test_stand_ins():
    """Latent weights, their scales, and frozen ones without state."""
    params = jq.latent({"a": jnp.eye(32), "b": jnp.ones((32, 32))}, jq.lsq(4, 16))
    inner = jq.training.optimizer(params, weight=optax.adamw(1e-3))
    optimizer = paged(inner, least=512)
    updates, state = optimizer.update(params, optimizer.init(params), params)
    same(updates, inner.update(params, inner.init(params), params)[0], rtol=1e-6)
    assert HOST in spaces(state)


# Its CPU backend has no host memory: arrays have the type, but a sharded one cannot be moved.
@pytest.mark.skipif(jax.__version_info__ < (0, 10, 1), reason="JAX 0.10.0 cannot, on a CPU")
def test_sharding_is_kept():
    mesh = jax.make_mesh((1,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    state = paged(optax.adam(1e-3), least=1).init({"w": jax.device_put(jnp.eye(8), sharding)})
    assert state[0].mu["w"].sharding.spec[:2] == (None, "x")


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(optax.clip_by_global_norm(0.3), optax.adam(1e-3)),
        optax.apply_if_finite(optax.adam(1e-3), 3),
        optax.add_noise(1e-2, 0.5, jax.random.key(0)),
    ],
    ids=["norm", "finite", "noise"],
)
def test_what_looks_across_leaves_is_refused(optimizer):
    optimizer = paged(optimizer, least=256)
    state = optimizer.init(tree())
    with pytest.raises(ValueError, match="treats every leaf on its own"):
        jax.jit(optimizer.update)(tree(), state, tree())


def test_norms_are_clipped_before():
    clip = optax.clip_by_global_norm(0.3)
    inner = lambda f: optax.chain(clip, f(optax.adamw(1e-2)))
    same(trained(inner(paged), 5)[0], trained(inner(lambda a: a), 5)[0], rtol=0, atol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="least and piece_bytes must be 1 or more"):
        paged(optax.adam(1e-3), least=0)
    plain, optimizer = optax.adam(1e-3), paged(optax.adam(1e-3), least=1)
    with pytest.raises(ValueError, match="call init, or restore"):
        optimizer.update(tree(), plain.init(tree()))
    with pytest.raises(ValueError, match="memory_space of all inputs"):
        jax.jit(plain.update)(tree(), optimizer.init(tree()))


@pytest.mark.parametrize("shape", [(6, 256, 8), (2, 128, 8), (256, 8)], ids=str)
def test_arrays_that_a_tpu_holds_in_another_order(shape):
    """Whose last axis but one is a multiple of 128, as in LoRA's A; they are stored turned."""
    params = {"a": jax.random.normal(jax.random.key(0), shape)}
    grads = {"a": jax.random.normal(jax.random.key(1), shape)}
    plain, kept = optax.adamw(1e-2), paged(optax.adamw(1e-2), least=1, piece_bytes=1)
    states = [o.init(params) for o in (plain, kept)]
    assert states[1][0].mu["a"].shape == (1, *shape[:-2], shape[-1], shape[-2])
    for _ in range(3):
        updates = []
        for i, o in enumerate((plain, kept)):
            u, states[i] = jax.jit(o.update)(grads, states[i], params)
            updates.append(u["a"])
        np.testing.assert_allclose(*updates, rtol=1e-5, atol=1e-8)
