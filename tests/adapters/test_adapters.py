"""The contract of adapters, on every row of the table in `tests.support.adapters`."""

import dataclasses
from functools import lru_cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.adapters.adapted import Adapted
from jaxquant.recipes.serialize import from_json, to_json
from tests.support.adapters import ADAPTERS, EXACT

K, N = 64, 32
every = pytest.mark.parametrize("name", ADAPTERS)
exact = pytest.mark.parametrize("name", sorted(EXACT))


@lru_cache
def floats():
    return {"w": 0.1 * jax.random.normal(jax.random.key(0), (K, N))}


@lru_cache
def rows():
    return jax.random.normal(jax.random.key(1), (5, K))


@lru_cache
def base(name):
    """The packed weight of a row of the table."""
    method = jq.Method("base", jq.rounding.Nearest(), ADAPTERS[name][1])
    return jq.quantize(floats(), method)


@lru_cache
def at_start(name):
    return jq.adapt(base(name), ADAPTERS[name][0], floats=floats())


@lru_cache
def moved(name):
    """The adapted weight after some training: every trained array differs from its start."""
    tree = at_start(name)
    train, rest = eqx.partition(tree, jq.trained(tree))
    keys = iter(jax.random.split(jax.random.key(2), 9))

    if isinstance(ADAPTERS[name][0], jq.adapters.LoTA):
        some = lambda a: jax.random.randint(next(keys), a.shape, -1, 2).astype(a.dtype)
        return eqx.combine(jax.tree.map(some, train), rest)

    def move(a):
        unit = jnp.maximum(jnp.abs(a.astype(jnp.float32)), 0.02)
        return a + (0.3 * unit * jax.random.normal(next(keys), a.shape)).astype(a.dtype)

    return eqx.combine(jax.tree.map(move, train), rest)


def product(tree, x):
    return jq.quantized(lambda p, x: x @ p["w"])(tree, x)


jitted = jax.jit(product)


def test_public_names_are_what_they_say_after_every_module_was_imported():
    """A name that is imported on first access must not be that of its module."""
    found = {name: getattr(jq.adapters, name) for name in jq.adapters.__all__}
    assert all(callable(value) and value.__doc__ for value in found.values())


@every
def test_the_start_is_the_quantized_model(name):
    adapter, _ = ADAPTERS[name]
    if getattr(adapter, "init", "") == "range":
        return  # the paper's start has a grid of its own
    np.testing.assert_allclose(
        jitted(at_start(name), rows()), jitted(base(name), rows()), atol=2e-6
    )


@every
def test_products_are_those_of_the_adapted_matrix(name):
    tree = moved(name)
    dense = tree["w"].dequantize()
    np.testing.assert_allclose(jitted(tree, rows()), rows() @ dense, rtol=2e-5, atol=5e-6)
    assert float(jnp.abs(dense - at_start(name)["w"].dequantize()).max()) > 5e-4


@every
def test_the_transposed_product_is_that_of_the_adapted_matrix(name):
    tree, g = moved(name), jax.random.normal(jax.random.key(3), (4, N))
    back = jax.jit(jq.quantized(lambda p, g: g @ p["w"].T))(tree, g)
    np.testing.assert_allclose(back, g @ tree["w"].dequantize().T, rtol=2e-5, atol=5e-6)


@exact
def test_a_merged_weight_computes_what_was_trained(name):
    tree = moved(name)
    merged = jq.merge(tree)
    np.testing.assert_array_equal(jitted(merged, rows()), jitted(tree, rows()))
    assert not isinstance(merged["w"].format, Adapted)


@exact
def test_an_exact_merge_adds_no_bytes_and_keeps_codes(name):
    adapter, format = ADAPTERS[name]
    merged, before = jq.merge(moved(name))["w"], base(name)["w"]
    assert merged.nbytes == before.nbytes and merged.format == format
    if not isinstance(adapter, jq.adapters.L4Q | jq.adapters.LoTA):
        np.testing.assert_array_equal(merged.data["codes"], before.data["codes"])


@every
def test_gradients_are_those_of_a_small_step(name):
    """Of the definition, in float64 where the rounding is held: see `definition`."""
    tree = moved(name)
    train, rest = eqx.partition(tree, jq.trained(tree))
    weights = np.asarray(jax.random.normal(jax.random.key(4), (5, N)))

    def loss(train, x):
        return jnp.sum(weights * product(eqx.combine(train, rest), x))

    found, dx = jax.jit(jax.grad(loss, argnums=(0, 1)))(train, rows())
    want, want_dx = gradients_of_definition(name, tree["w"], weights)
    np.testing.assert_allclose(dx, want_dx, rtol=1e-4, atol=1e-5)
    assert set(want) == {n for n, a in found["w"].data.items() if a is not None}
    for array, g in want.items():
        scale = np.abs(g).max()
        np.testing.assert_allclose(found["w"].data[array], g, atol=2e-5 * scale, err_msg=array)


def gradients_of_definition(name, w, weights):
    """Gradients by JAX in float64 of the written definition, with rounding as a fixed residual."""
    with jax.enable_x64():
        data = {n: np.asarray(a, np.float64) for n, a in w.data.items() if n in labels_of(w)}
        fixed = {n: np.asarray(a) for n, a in w.data.items() if n not in data}
        x = np.asarray(rows(), np.float64)
        of = partial(definition(name), w, fixed)
        loss = lambda data, x: jnp.sum(weights * (x @ of(data)))
        found, dx = jax.grad(loss, argnums=(0, 1))(data, x)
        return {n: np.asarray(g) for n, g in found.items()}, np.asarray(dx)


def labels_of(w):
    return w.format.adapter.labels(w.format.format)


def definition(name):
    adapter, _ = ADAPTERS[name]
    if isinstance(adapter, jq.adapters.QALoRA):
        return qalora
    if isinstance(adapter, jq.adapters.L4Q):
        return l4q
    if isinstance(adapter, jq.adapters.LoTA):
        return lota
    return peqa if isinstance(adapter, jq.adapters.PEQA) else lora


def frozen(w, fixed):
    plain = dataclasses.replace(w, format=w.format.format, data=fixed)
    return np.asarray(plain.stored(), np.float64)


def lora(w, fixed, data):
    """W + s A B; with DoRA, its columns scaled to the trained norms, which are held."""
    adapter = w.format.adapter
    base = {n: a for n, a in fixed.items() if n != "norm"}
    whole = frozen(w, base) + adapter.scaling * (data["lora_a"] @ data["lora_b"])
    if not adapter.dora:
        return whole
    return data["magnitude"] * whole / jax.lax.stop_gradient(jnp.linalg.norm(whole, axis=0))


def held(x, dtype):
    """x as stored in a dtype, what the cast changed held as a constant."""
    still = jax.lax.stop_gradient(x)
    return x + (still.astype(jnp.float32).astype(dtype).astype(x.dtype) - still)


def qalora(w, fixed, data):
    adapter, format = w.format.adapter, w.format.format
    rows = format.rows_per_group(K)
    pool = rows if adapter.pooling == "mean" else 1
    offset = np.asarray(fixed["offset"], np.float64)
    offset = offset + adapter.scaling / pool * (data["lora_a"] @ data["lora_b"])
    levels = {n: a for n, a in fixed.items() if n != "offset"}
    plain = dataclasses.replace(w, format=format.format, data=levels)
    return np.asarray(plain.stored(), np.float64) + jnp.repeat(held(offset, format.dtype), rows, 0)


def l4q(w, fixed, data):
    """s R(clip((W + s A B - b) / s)) + b, with what R changed held as a constant."""
    adapter, format = w.format.adapter, w.format.format
    low, high = format.format.ends
    rows = format.rows_per_group(K)
    stored = lambda a, dtype: jnp.repeat(held(a, dtype), rows, 0)
    scale = stored(data["scale"], format.format.scale_dtype)
    offset = stored(data["offset"], format.dtype)
    whole = np.asarray(fixed["codes"], np.float64)
    whole = whole + adapter.scaling * (data["lora_a"] @ data["lora_b"])
    v = (whole - offset) / scale
    inside = (v >= low) & (v <= high)
    clipped = jnp.where(inside, v, jnp.clip(jax.lax.stop_gradient(v), low, high))
    still = jax.lax.stop_gradient(clipped)
    return scale * (clipped + jnp.round(still) - still) + offset


def lota(w, fixed, data):
    """scale (q + M) + offset + scale mean(D - w M) / w, with M held but for a unit slope in D."""
    adapter, format = w.format.adapter, w.format.format
    rows = format.rows_per_group(K)
    unit = {"codes": fixed["codes"], "scale": np.ones(fixed["scale"].shape, np.float32)}
    codes = np.asarray(dataclasses.replace(w, format=format.format, data=unit).stored())
    change = data["lora_a"] @ data["lora_b"]
    low, high = format.format.limits
    level = adapter.threshold * adapter.rank
    moves = jnp.where((change > level) & (codes < high), 1, 0)
    moves = moves - jnp.where((change < -level) & (codes > low), 1, 0)
    scale = np.asarray(fixed["scale"], np.float64)
    left = (change - level * moves).reshape(-1, rows, N).mean(1)
    part = left / (level if adapter.divided else 1)
    offset = held(np.asarray(fixed["offset"], np.float64) + scale * part, format.dtype)
    straight = change - jax.lax.stop_gradient(change)
    wide = lambda a: jnp.repeat(a, rows, 0)
    return wide(jnp.asarray(scale)) * (codes + moves + straight) + wide(offset)


def peqa(w, fixed, data):
    """The format's own decoding, linear in scales, offsets and codebooks."""
    format = w.format.format
    dtypes = {n: a.dtype for n, a in format.shapes(K, N).items()}
    data = {n: held(a, dtypes[n]) for n, a in data.items()}
    if isinstance(format, jq.formats.Additive):
        return format.decode({**fixed, **data}, K)
    levels = format.format if isinstance(format, jq.formats.Offset) else format
    unit = {**fixed, "scale": np.ones(data["scale"].shape, np.float32)}
    plain = dataclasses.replace(w, format=levels, data=unit)
    rows = levels.rows_per_group(K)
    whole = jnp.repeat(data["scale"], rows, 0) * np.asarray(plain.stored(), np.float64)
    return whole + jnp.repeat(data["offset"], rows, 0) if "offset" in data else whole


@every
def test_no_float_copy_of_the_matrix_outlives_a_product(name):
    """What the backward pass keeps, as JAX saves it: nothing of the matrix's size in floats."""
    adapter, format = ADAPTERS[name]
    if adapter.floating or format == jq.formats.Dense():
        return  # they hold the floats that they train on
    if isinstance(format, jq.formats.Additive):
        pytest.skip("codebooks are trained through the decoded matrix")
    tree = moved(name)
    train, rest = eqx.partition(tree, jq.trained(tree))
    _, pull = jax.vjp(lambda t, x: product(eqx.combine(t, rest), x), train, rows())
    kept = [a for a in jax.tree.leaves(pull) if jnp.issubdtype(a.dtype, jnp.floating)]
    assert all(a.size < K * N for a in kept), [a.shape for a in kept]
    assert kept


def test_a_matrix_that_outlives_a_product_is_seen():
    tree = moved("lora")
    _, pull = jax.vjp(lambda x: x @ tree["w"].dequantize(), rows())
    assert any(a.size == K * N for a in jax.tree.leaves(pull))


@every
def test_adapters_are_saved_and_loaded(name, tmp_path):
    tree = moved(name)
    jq.save(tmp_path / "c", tree)
    again = jq.load(tmp_path / "c")
    assert again["w"].format == tree["w"].format == from_json(to_json(tree["w"].format))
    np.testing.assert_array_equal(jitted(again, rows()), jitted(tree, rows()))


@every
def test_stacked_layers_in_a_scan_that_is_rematerialized(name):
    """Each layer is adapted by itself, and its gradient is that of the layer alone."""
    adapter, format = ADAPTERS[name]
    w = 0.1 * jax.random.normal(jax.random.key(7), (2, K, K))
    method = jq.Method("base", jq.rounding.Nearest(), format)
    sites = jq.sites(lambda p, x: jax.lax.scan(lambda h, w: (h @ w, None), x, p["w"])[0],
                     {"w": w}, rows())  # fmt: skip
    tree = jq.adapt(jq.quantize({"w": w}, method, sites), adapter, floats={"w": w})
    train, rest = eqx.partition(tree, jq.trained(tree))

    def scanned(train, x):
        step = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
        fn = jq.quantized(lambda p, x: jax.lax.scan(step, x, p["w"])[0])
        return jnp.sum(fn(eqx.combine(train, rest), x) ** 2)

    def in_turn(train, x):
        whole = eqx.combine(train, rest)["w"]
        for i in range(2):
            one = jax.tree.map(lambda a, i=i: a[i], whole)
            x = jnp.tanh(jq.quantized(lambda w, x: x @ w)(one, x))
        return jnp.sum(x**2)

    found, want = (jax.jit(jax.grad(fn))(train, rows()) for fn in (scanned, in_turn))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5 * float(jnp.abs(b).max()) + 1e-7)


def test_experts_of_a_batch_of_matrices():
    w = 0.1 * jax.random.normal(jax.random.key(7), (3, K, N))
    x = jax.random.normal(jax.random.key(8), (3, 4, K))
    fn = lambda p, x: jax.vmap(jnp.matmul)(x, p["w"])
    sites = jq.sites(fn, {"w": w}, x)
    for name in ("lora", "qalora", "l4q, half"):
        adapter, format = ADAPTERS[name]
        method = jq.Method("base", jq.rounding.Nearest(), format)
        tree = jq.adapt(jq.quantize({"w": w}, method, sites), adapter, floats={"w": w})
        want = jnp.einsum("ebk,ekn->ebn", x, tree["w"].dequantize())
        np.testing.assert_allclose(jq.quantized(fn)(tree, x), want, rtol=2e-5, atol=5e-6)


def test_weights_split_over_devices_along_their_outputs():
    """Every array that has an axis of outputs is split along it."""
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((len(jax.devices()),), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    for name in ("lora", "qalora", "l4q, half"):
        tree = moved(name)
        spec = jax.tree.map(lambda a: P(None, "d") if a.shape[-1] == N else P(), tree)
        part = jax.shard_map(product, mesh=mesh, in_specs=(spec, P()), out_specs=P(None, "d"),
                             check_vma=False)  # fmt: skip
        np.testing.assert_allclose(part(tree, rows()), jitted(tree, rows()), rtol=1e-5, atol=1e-6)


ROTATED = jq.Method(
    "rotated", jq.rounding.Nearest(), jq.formats.Integer(2, 16),
    input=jq.transforms.Rotation(), output=jq.transforms.Rotation(),
)  # fmt: skip


def test_weights_with_transforms_are_adapted_behind_them():
    tree = jq.adapt(jq.quantize(floats(), ROTATED),
                    jq.adapters.LoRA(4, init="loftq"), floats=floats())  # fmt: skip
    dense = tree["w"].dequantize()
    np.testing.assert_allclose(jitted(tree, rows()), rows() @ dense, rtol=1e-4, atol=2e-5)
    plain = jq.quantize(floats(), ROTATED)["w"].dequantize()
    far = lambda w: float(jnp.linalg.norm(w - floats()["w"]))
    assert far(dense) < 0.9 * far(plain)


def test_rounded_inputs_reach_the_packed_product_only():
    tree = moved("lora")
    rounding = jq.ptq.with_activations(tree, "int4")
    a, b = tree["w"].data["lora_a"], tree["w"].data["lora_b"]
    path = 2 * (rows() @ a) @ b
    packed = jq.ptq.with_activations(base("lora"), "int4")
    want = jitted(packed, rows()) + path
    np.testing.assert_allclose(jitted(rounding, rows()), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["qalora", "peqa, offsets", "lora"])
@pytest.mark.parametrize("form", ["int8", "int8/256"])
def test_gradients_through_rounded_inputs_are_those_of_the_matrix(name, form):
    """Straight through: the gradient of the rows is that of the product with unrounded rows."""
    tree = jq.ptq.with_activations(moved(name), form)
    g = jax.random.normal(jax.random.key(3), (5, N))
    dx = jax.grad(lambda x: jnp.sum(g * product(tree, x)))(rows())
    np.testing.assert_allclose(dx, g @ tree["w"].dequantize().T, rtol=1e-4, atol=1e-5)


def test_columns_of_zeros_stay_zero_with_dora():
    w = floats()["w"].at[:, 3].set(0)
    tree = jq.adapt(jq.quantize({"w": w}, jq.nf4(16)), jq.adapters.LoRA(4, dora=True))
    y = product(tree, rows())
    assert bool(jnp.isfinite(y).all()) and not y[:, 3].any()


def test_offsets_have_the_dtype_of_the_scales():
    for scale in (1e-6, 1.0, 1e6):
        w = {"w": scale * floats()["w"]}
        q = jq.quantize(w, jq.rtn(4, 16, scale_dtype="float32"))
        with pytest.warns(UserWarning, match="gains offsets"):
            tree = jq.adapt(q, jq.adapters.QALoRA(2))
        np.testing.assert_allclose(tree["w"].dequantize(), q["w"].dequantize(), rtol=1e-5)


def test_latent_weights_train_on_under_an_adapter():
    latent = jq.latent(floats(), jq.lsq(4, 16))
    tree = jq.adapt(latent, jq.adapters.LoRA(4))
    assert jq.labels(tree)["w"].data == {
        "codes": "weight", "scale": "scale", "lora_a": "lora_a", "lora_b": "lora_b"
    }  # fmt: skip
    np.testing.assert_array_equal(jitted(tree, rows()), jitted(latent, rows()))
    train, rest = eqx.partition(tree, jq.trained(tree))
    loss = lambda t: jnp.sum(product(eqx.combine(t, rest), rows()) ** 2)
    g = jax.grad(loss)(train)["w"].data
    plain, other = eqx.partition(latent, jq.trained(latent))
    want = jax.grad(lambda t: jnp.sum(product(eqx.combine(t, other), rows()) ** 2))(plain)["w"].data
    np.testing.assert_allclose(g["codes"], want["codes"], rtol=1e-5)
    assert jq.merge(tree)["w"].format == latent["w"].format
