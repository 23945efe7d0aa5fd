"""Parameter trees held without loss, and recipes that leave some layers exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.storage.one_by_one import stored_leaves
from pallas_kernels.cpu import native
from tests.support.arrays import draw

FORMS = ("planes", "huffman")
both_forms = pytest.mark.parametrize("form", FORMS)


def bits(a):
    a = np.asarray(a)
    return a.view(f"u{a.dtype.itemsize}")


@pytest.fixture(scope="module")
def tree():
    every = jnp.arange(1 << 16, dtype=jnp.uint16)
    of = lambda dtype: jax.lax.bitcast_convert_type(jnp.resize(every, (512, 512)), dtype)
    w = draw(256, 96) / 50
    return {
        "stack": (draw(2, 256, 40) / 50).astype(jnp.bfloat16),
        "wide": w,
        "half": w.astype(jnp.float16),
        "e4m3": (8 * w).astype(jnp.float8_e4m3fn),
        "e5m2": w.astype(jnp.float8_e5m2),
        "odd": {"bfloat16": of(jnp.bfloat16), "float16": of(jnp.float16)},
        "nan": jnp.full((512, 64), jnp.nan, jnp.bfloat16),
        "b": jnp.ones(40),
        "none": jnp.zeros((0, 8), jnp.bfloat16),
        "n": jnp.arange(8).reshape(2, 4),
    }


@pytest.fixture(scope="module", params=FORMS)
def coded(request, tree):
    return jq.lossless.encode(tree, request.param)


def packed(tree):
    return [w for _, w in jq.core.path_leaves(tree) if isinstance(w, jq.QTensor)]


def test_every_bit_comes_back(tree, coded):
    back = jq.lossless.decode(coded)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert got.dtype == want.dtype and (bits(got) == bits(want)).all()


def test_it_is_smaller_and_takes_only_what_it_gains_from(tree, coded):
    assert len(packed(coded)) >= 5
    for w in packed(coded):
        assert w.nbytes < w.size * jnp.dtype(w.dtype).itemsize
    assert coded["none"] is tree["none"] and coded["b"] is tree["b"] and coded["n"] is tree["n"]


def test_one_form_turns_into_the_other(tree, coded):
    planes = isinstance(coded["stack"].format, jq.formats.FloatPlanes)
    other = jq.lossless.encode(coded, "huffman" if planes else "planes", bits=4)
    assert type(other["stack"].format) is not type(coded["stack"].format)
    for got, want in zip(
        jax.tree.leaves(jq.lossless.decode(other)), jax.tree.leaves(tree), strict=True
    ):
        assert (bits(got) == bits(want)).all()


def test_products_and_look_ups_decode_inside_jit(tree, coded):
    x, ids = draw(3, 256, seed=1).astype(jnp.bfloat16), jnp.array([3, 39, 0])

    def fn(p, x):
        w = p["stack"][1]
        return x @ w, (x @ w) @ w.T, w.T[ids]

    got, want = jax.jit(jq.quantized(fn))(coded, x), fn(tree, x)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), rtol=0.02, atol=2e-3
        )
    np.testing.assert_array_equal(bits(got[2]), bits(want[2]))


@both_forms
def test_a_recipe_with_exact_and_rounded_layers(tree, form):
    recipe = jq.Recipe(
        [("stack", jq.lossless.method(form)), ("wide", jq.rtn(bits=2)), ("*", jq.KEEP)]
    )
    assert jq.Recipe.from_json(recipe.to_json()) == recipe
    some = {"stack": tree["stack"], "wide": tree["wide"], "b": tree["b"]}
    sites = jq.sites(lambda p, x: (x @ p["stack"][0]) @ p["wide"][:40], some, jnp.ones((1, 256)))
    q = jq.quantize(some, recipe, sites)
    assert (bits(q["stack"].dequantize()) == bits(tree["stack"])).all()
    assert q["wide"].bits_per_weight < 3
    shapes = jax.eval_shape(lambda p: jq.quantize(p, recipe, sites), some)["stack"]
    assert jax.tree.structure(shapes).num_leaves == jax.tree.structure(q["stack"]).num_leaves


def test_non_finite_weights_are_kept_as_they_are(tree):
    q = jq.quantize_array(tree["odd"]["bfloat16"], jq.lossless.method())
    assert (bits(q.dequantize()) == bits(tree["odd"]["bfloat16"])).all()


@pytest.mark.skipif(bool(native.load()), reason="the reference decodes tiles of 4 M weights")
def test_a_product_keeps_no_float_copy():
    """The program's temporaries are smaller than the packed weight; the twin decodes all of it."""
    w = (draw(2048, 4096) / 50).astype(jnp.bfloat16)
    q = jq.lossless.encode({"w": w})["w"]
    x = jnp.ones((1, 2048), jnp.bfloat16)
    temporaries = lambda fn: jax.jit(fn).lower(q, x).compile().memory_analysis().temp_size_in_bytes
    with_tiles = temporaries(jq.quantized(lambda w, x: x @ w))
    assert with_tiles < q.nbytes < temporaries(lambda q, x: x @ q.dequantize())


def test_what_is_refused(tree):
    with pytest.raises(ValueError, match="form must be one of planes, huffman, got 'rans'"):
        jq.lossless.method("rans")
    with pytest.raises(ValueError, match="call it outside of jit"):
        jax.jit(jq.lossless.encode)({"w": tree["half"]})
    with pytest.raises(ValueError, match="w: dtype must be one of bfloat16, .*, got 'float64'"):
        jq.recipes.resolve(
            jq.lossless.method(), {"w": jax.ShapeDtypeStruct((64, 64), np.dtype("float64"))}
        )
    rotated = jq.Method(
        "r", jq.rounding.Nearest(), jq.formats.FloatPlanes(), jq.transforms.Rotation()
    )
    with pytest.raises(ValueError, match="cannot be combined with one; use a method without"):
        jq.quantize_array(draw(64, 64), rotated)
    short = jq.formats.FloatPlanes("bfloat16")
    with pytest.raises(ValueError, match="give the format listed="):
        short.encode(
            jax.lax.bitcast_convert_type(
                jnp.resize(jnp.arange(9999, dtype=jnp.uint16), (99, 101)), jnp.bfloat16
            )
        )


@both_forms
@pytest.mark.parametrize("lossless", [False, True])
def test_checkpoints_hold_the_bits(tree, tmp_path, form, lossless):
    some = {k: tree[k] for k in ("stack", "wide", "odd", "b")}
    coded = jq.lossless.encode(some, form)
    jq.save(tmp_path / "c", coded, lossless=lossless)
    back, known = jq.load(tmp_path / "c"), jq.storage.outline(tmp_path / "c")
    assert jax.tree.structure(back) == jax.tree.structure(coded) == jax.tree.structure(known)
    for got, want in zip(
        jax.tree.leaves(jq.lossless.decode(back)), jax.tree.leaves(some), strict=True
    ):
        assert (bits(got) == bits(want)).all()
    raw = sum(a.nbytes for a in jax.tree.leaves(some))
    assert jq.storage.nbytes(tmp_path / "c") < (0.97 if lossless else 1.0) * raw


@both_forms
def test_payloads_of_nan_survive_in_stacks(form):
    """Slices of floats would quiet them: it is bits that are sliced."""
    u = jnp.resize(jnp.arange(1 << 16, dtype=jnp.uint16)[0x7F00:0x8000], (3, 256, 40))
    w = jax.lax.bitcast_convert_type(u, jnp.bfloat16)
    sites = jq.sites(lambda p, x: x @ p["w"][0], {"w": w}, jnp.ones((1, 256), jnp.bfloat16))
    method = jq.lossless.method(form)
    coded = jq.lossless.encode({"w": w}, form), jq.quantize({"w": w}, method, sites)
    for q in coded:
        assert isinstance(q["w"], jq.QTensor)
        assert (bits(q["w"].dequantize()) == np.asarray(u)).all()


@both_forms
def test_casts_inside_of_a_function(tree, form):
    q = jq.lossless.encode({"w": tree["stack"]}, form)
    for dtype in (jnp.float32, jnp.float16):
        got = jq.quantized(lambda p, dtype=dtype: jnp.abs(p["w"].astype(dtype)))(q)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, jnp.abs(tree["stack"].astype(dtype)))


@both_forms
def test_parts_whose_sizes_differ_are_joined_and_read_one_by_one(tmp_path, form):
    layers = [(draw(1, 256, 40, seed=i) * 2.0**-i).astype(jnp.bfloat16) for i in range(3)]
    layers[1] = layers[1].at[0, :3].set(0)
    parts = [tmp_path / str(i) for i in range(3)]
    for place, w in zip(parts, layers, strict=True):
        jq.save(place, jq.lossless.encode({"w": w}, form))
    whole = tmp_path / "whole"
    jq.save(whole, {"e": jnp.ones(4096)}, parts={"layers": parts}, lossless=True)
    found = jq.load(whole)["layers"]["w"]
    np.testing.assert_array_equal(found.dequantize(), jnp.concatenate(layers))
    assert jax.tree.structure(jq.storage.outline(whole)["layers"]).num_leaves == len(found.data)
    read = {leaf.path: leaf.read() for leaf in stored_leaves(whole)}
    np.testing.assert_array_equal(read["e"], np.ones(4096, np.float32))
    for i, w in enumerate(layers):
        np.testing.assert_array_equal(read[f"layers/{i}/w"].dequantize(), w)


def test_arrays_of_another_byte_order_keep_their_values(tmp_path):
    a = np.arange(999, dtype=">f4")
    np.testing.assert_array_equal(
        jq.lossless.decode_array(jq.lossless.encode_array(a), "float32", a.shape), a
    )


def test_exact_weights_are_not_trained(tree):
    with pytest.raises(ValueError, match="so they cannot be trained in it"):
        jq.latent({"w": tree["wide"]}, jq.lossless.method())


def test_wide_matrices_of_few_rows_stay_as_they_are():
    w = {"w": jnp.ones((2, 5000), jnp.bfloat16)}
    assert jq.lossless.encode(w)["w"] is w["w"]  # a window for every column would take more


@pytest.mark.skipif(bool(native.load()), reason="there is no native code to be run")
def test_native_code_decodes_what_a_user_decodes(tree):
    """Both forms, inside of a user's program."""
    for form, target in (
        ("planes", "jaxquant_float_planes_decode"),
        ("huffman", "jaxquant_huffman"),
    ):
        q = jq.lossless.encode({"w": tree["stack"]}, form)["w"]
        assert target in jax.jit(lambda q: q.dequantize()).lower(q).as_text()
