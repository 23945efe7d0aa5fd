"""The contract of every format. A new one enters by one line in FORMATS."""

import dataclasses
from functools import lru_cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import jaxquant as jq
from jaxquant.core.tensor import QTensor, View
from jaxquant.formats.integer import spread
from jaxquant.formats.symbols import symbols
from jaxquant.recipes.serialize import from_json, to_json
from jaxquant.theory.code_entropy import code_entropy
from pallas_kernels.codecs import e8p, layout
from tests.support.arrays import draw
from tests.support.formats import FORMATS, SCALAR
from tests.support.operands import assert_rows_hold

scalar_formats = pytest.mark.parametrize("format", SCALAR, ids=str)
all_formats = pytest.mark.parametrize("format", FORMATS, ids=str)


@lru_cache
def encoding(format):
    """The programs that encode a matrix of 48 rows, and decode it again."""
    traced = not isinstance(format, jq.formats.HuffmanLanes)  # whose code depends on values
    encode = jax.jit(format.encode) if traced else format.encode
    return encode, jax.jit(lambda data: format.dequantize(data, 48))


@lru_cache
def encoded(format):
    """A matrix [48, 32], its data, and the matrix that they decode to."""
    encode, decode = encoding(format)
    w = draw(48, 32)
    data = encode(w)
    return w, data, decode(data)


@lru_cache
def rounding(format):
    """The program that rounds a matrix [48, 20], rounds that again, and packs it."""

    def run(w):
        grid = format.grids(w)
        rows = spread(grid, format.rows_per_group(48), 48)
        codes, value = format.round(w, rows)
        again = format.round(value, rows)
        return codes, value, *again, format.dequantize(format.pack(codes, grid), 48)

    return jax.jit(run)


@scalar_formats
def test_encoding_a_decoded_matrix_changes_nothing(format):
    """On its own grid: rounding a representable value returns it."""
    codes, value, again, same, _ = rounding(format)(draw(48, 20))
    np.testing.assert_array_equal(codes, again)
    np.testing.assert_array_equal(value, same)


@scalar_formats
def test_storage_is_exact(format):
    _, value, _, _, stored = rounding(format)(draw(48, 20))
    np.testing.assert_array_equal(stored, value)


@all_formats
def test_products_and_look_ups_agree_with_the_decoded_matrix(format):
    _, data, w = encoded(format)
    w, x, g, i = np.asarray(w), draw(5, 48, seed=1), draw(5, 32, seed=2), np.array([0, 7, 19])
    assert (w.shape, format.outputs(data)) == ((48, 32), 32)
    products, columns, rows = used(format)(data, x, g, i)
    chex.assert_trees_all_close(products, (x @ w, g @ w.T), atol=1e-4, rtol=0)
    chex.assert_trees_all_close((columns, rows), (w[:, i], w[i]), atol=1e-6, rtol=0)


@lru_cache
def used(format):
    """The program of every use: both products, columns, rows."""

    def run(data, x, g, i):
        products = format.matmul(x, data), format.matmul_transposed(g, data, 48)
        return products, format.columns(data, i, 48), format.rows(data, i, 48)

    return jax.jit(run)


def stores(format, k, n):
    """Whether it stores matrices [k, n]."""
    try:
        format.check_shape(k, n)
    except ValueError:
        return False
    return True


@st.composite
def matrices(choose):
    """(format, weights of a shape that it stores); of the formats that search for seconds none."""
    quick = [
        f
        for f in FORMATS
        if not isinstance(f, jq.formats.Additive | jq.formats.Vector | jq.formats.EntropyCoded)
    ]
    format = choose(st.sampled_from(quick))
    if isinstance(format, jq.formats.HuffmanLanes):
        format = dataclasses.replace(format, words=1024)  # which are enough for 96 x 48
    k = choose(st.sampled_from([k for k in range(8, 97) if stores(format, k, 48)]))
    n = choose(st.sampled_from([n for n in range(1, 49) if stores(format, k, n)]))
    return format, draw(k, n, seed=choose(st.integers(0, 99)))


@given(matrices())
def test_any_matrix_that_it_stores_comes_back(case):
    """Decoded, by look-ups and by products."""
    format, w = case
    x, i = draw(3, len(w), seed=1), jnp.array([0, len(w) - 1])
    encode, _ = encoding(format)

    @jax.jit
    def run(data, x):
        decoded = format.dequantize(data, len(w))
        return decoded, format.rows(data, i, len(w)), format.matmul(x, data)

    decoded, rows, product = run(encode(w), x)
    chex.assert_equal_shape([decoded, w])
    # Dropping the matrix loses 1. Two bits over a whole normal matrix come near: only what passes
    # half of its largest weight is not 0, and .84 to .96 is lost.
    assert np.linalg.norm(decoded - w) < 0.97 * np.linalg.norm(w)
    chex.assert_trees_all_close((rows, product), (decoded[i], x @ decoded), atol=1e-4)


@all_formats
def test_empty_products_and_look_ups_are_empty(format):
    none = np.zeros(0, np.int32)
    found = used(format)(encoded(format)[1], np.zeros((0, 48)), np.zeros((0, 32)), none)
    assert jax.tree.map(jnp.shape, found) == (((0, 32), (0, 48)), (48, 0), (0, 32))


@pytest.mark.parametrize("format", [*FORMATS, jq.formats.Dense()], ids=str)
def test_a_row_that_is_not_finite_is_nan_and_no_other(format):
    """Of products and of cotangents."""
    data, x, g = encoded(format)[1], draw(5, 48, seed=1), draw(5, 32, seed=2)
    assert_rows_hold(jax.jit(lambda x: format.matmul(x, data)), x)
    assert_rows_hold(jax.jit(lambda x: format.matmul(x, data, "int8")), x)
    assert_rows_hold(jax.jit(lambda g: format.matmul_transposed(g, data, 48)), g)


@all_formats
def test_its_codes_and_their_groups_are_known(format):
    """To `symbols`, which entropies are computed of; a new format is registered there."""
    _, data, value = encoded(format)
    kinds, (rows, columns) = symbols(format, data, 48), format.tile
    for kind in kinds:
        assert kind.codes.shape == kind.groups.shape and np.ptp(kind.codes) < kind.alphabet
    nbytes = sum(a.size * a.dtype.itemsize for a in data.values())
    assert sum(len(kind.codes) * kind.bits for kind in kinds) <= 8 * nbytes
    if {len(kind.codes) for kind in kinds} != {48 * 32 // (rows * columns)}:
        return  # of several kinds, each for some of the weights: a path, an alternation, outliers
    tiles = np.asarray(value).reshape(48 // rows, rows, 32 // columns, columns)
    tiles = np.moveaxis(tiles, 2, 1).reshape(-1, rows * columns)
    known = np.stack([kinds[0].groups, *(kind.codes for kind in kinds)], 1)
    count = lambda *parts: len(np.unique(np.concatenate(parts, 1), axis=0))
    if not isinstance(format, jq.formats.DualScale):  # whose scales are of rows and of columns
        assert count(known, tiles) == count(known)  # a code and its group give the values
        if count(known) < len(known):  # the codes of others do not
            assert count(np.roll(known, 1, 0), tiles) > count(known)


def test_codes_that_repeat_little_are_those_that_decode():
    """Where the test above has too few codes to find out."""
    for format in (f for f in FORMATS if isinstance(f, jq.formats.E8P)):
        _, data, value = encoded(format)
        codes, *residual = (kind.codes.reshape(6, 32) for kind in symbols(format, data, 48))
        decode = jax.jit(e8p.decode, static_argnums=1)
        points = decode(codes | sum(residual) << 16, format.bits)  # [octets, 8, columns]
        np.testing.assert_allclose(data["scale"] * points.reshape(48, 32), value, rtol=1e-6)
    learned = jq.formats.Additive | jq.formats.Vector
    for format in (f for f in FORMATS if isinstance(f, learned)):
        _, data, _ = encoded(format)
        found = np.concatenate([kind.codes for kind in symbols(format, data, 48)])
        want = jax.jit(lambda data, f=format: f.unpack(data, 48)[0])(data).ravel()
        np.testing.assert_array_equal(np.sort(found), np.sort(want))


def test_codes_of_a_path_are_its_bits():
    format = jq.formats.Trellis((2,), L=8)
    _, data, _ = encoded(format)
    [kind] = symbols(format, data, 48)
    bits = (kind.codes.reshape(-1, 1) >> np.arange(1, -1, -1) & 1).astype(np.uint8)
    words = np.packbits(bits).view(">u4").reshape(3, 2, 16)  # blocks of rows, tiles, words
    stored = np.asarray(data["codes"]).view(np.uint32).reshape(3, 16, 2)
    np.testing.assert_array_equal(words, stored.transpose(0, 2, 1))


@all_formats
def test_the_entropy_of_its_codes(format):
    _, data, _ = encoded(format)
    q = QTensor(data, format, View((48,), (32,), (-2, -1)), "float32")
    found = code_entropy(q).total
    assert found.stored == q.bits_per_weight and 0 < found.given_group <= found.entropy + 1e-9
    assert found.entropy <= found.adaptive and found.given_group <= found.adaptive_given_group
    assert found.entropy <= found.codes or isinstance(format, jq.formats.EntropyCoded)
    assert 0 < found.side < found.stored


@all_formats
def test_its_shapes_are_known_beforehand_and_stacks_decode(format):
    w, data, value = encoded(format)
    chex.assert_trees_all_equal_shapes_and_dtypes(data, jax.eval_shape(format.encode, w))
    assert data["codes"].ndim == format.codes_ndim
    two = jax.tree.map(lambda a, b: np.stack([a, b]), data, encoding(format)[0](-w))
    whole = jax.jit(jax.vmap(lambda d: format.dequantize(d, 48)))(two)
    np.testing.assert_allclose(whole[0], value, rtol=1e-6, atol=0)  # compiled differently


@all_formats
def test_weights_of_any_magnitude_have_the_same_codes(format):
    """quantize(c W) is c quantize(W), bit for bit for powers of two; or one clear error."""
    w = draw(48, 32)
    method = jq.Method("test", jq.rtn().rounder, format)
    want = jq.quantize_array(w, method)
    if format.exact:  # whose codes are the bits of the weights
        np.testing.assert_array_equal(want.dequantize(), w)
        return
    error = np.linalg.norm(want.dequantize() - w)
    for c in (2.0**-99, 2.0**5, 2.0**66, 1e-30, 1e30):
        if not format.wide and not 1e-2 < c < 1e2:
            with pytest.raises(ValueError, match=r"^w: weights up to .* outside the range of fl"):
                jq.quantize_array(w * c, method)
            continue
        got = jq.quantize_array(w * c, method)
        if np.frexp(c)[0] == 0.5:
            np.testing.assert_array_equal(got.data["codes"][2:], want.data["codes"][2:])
            np.testing.assert_array_equal(got.dequantize(), c * want.dequantize())
        lost = np.linalg.norm(np.asarray(got.dequantize(), np.float64) / c - w)
        np.testing.assert_allclose(lost, error, rtol=0.05)


@pytest.mark.parametrize(
    "format",
    [
        jq.formats.Integer(3, 16, mse=True, scale_dtype="float32"),
        jq.formats.Ternary(group_size=16, scale_dtype="bfloat16"),
        jq.formats.NVFP4(),
        jq.formats.E8P(3),
        jq.formats.Trellis((3, 0, 1), L=8),
        jq.formats.EntropyCoded(4, states=4, lanes=4),
    ],
    ids=str,
)
def test_so_they_have_by_encoding_alone(format):
    encoded = jax.jit(lambda w: format.dequantize(format.encode(w), 48))
    w = draw(48, 32)
    np.testing.assert_array_equal(encoded(w * 2.0**66), encoded(w) * 2.0**66)
    np.testing.assert_array_equal(encoded(w * 2.0**-99), encoded(w) * 2.0**-99)


SCALED = [
    f for f in FORMATS if getattr(f, "group_size", "tensor") != "tensor" and "MXFP4" not in str(f)
]


@pytest.mark.parametrize("format", [*SCALED, jq.formats.Additive(2, 4, 4)], ids=str)
def test_a_column_far_below_the_others_is_kept_or_told_of(format):
    """Groups are judged one by one: a matrix is not refused for one of them, nor that one lost."""
    w = draw(48, 32).at[:, 7].multiply(1e-8)
    method = jq.Method("test", jq.rtn().rounder, format)
    narrow = (
        not format.wide
        or isinstance(format, jq.formats.NVFP4)
        or getattr(format, "double_quant", 0)
    )
    if narrow:
        with pytest.warns(
            UserWarning, match="^w: .* groups of weights, with weights up to .*e-08, need"
        ):
            got = jq.quantize_array(w, method)
    else:
        got = jq.quantize_array(w, method)
    loss = jnp.sum((got.dequantize() - w) ** 2, 0) / jnp.sum(w**2, 0)
    assert jnp.all(jnp.isfinite(loss)) and float(jnp.max(jnp.delete(loss, 7))) < 0.8
    if not narrow:
        assert loss[7] < 0.8


def test_subnormal_scales_serve_while_they_are_fine_enough():
    """Eight bits take 2**-17; below that the whole matrix is refused, by name."""
    w, method = draw(64, 32), jq.rtn(8, 64, symmetric=True)

    def loss(w):
        error = jq.quantize_array(w, method).dequantize() - w
        return float(jnp.sum(error**2) / jnp.sum(w**2))

    np.testing.assert_allclose(loss(w * 1e-3), loss(w), rtol=0.5)
    with pytest.raises(ValueError, match=r'w: weights up to .* use scale_dtype="bfloat16"'):
        loss(w * 1e-4)
    assert jnp.any(jq.quantize_array(w * 1e-4, jq.rtn(8, scale_dtype="bfloat16")).dequantize() != 0)


@all_formats
def test_json_round_trip(format):
    assert from_json(to_json(format)) == format
    assert hash(from_json(to_json(format))) == hash(format)


@given(
    st.fixed_dictionaries({
        "bits": st.sampled_from((2, 3, 4, 8)),
        "group_size": st.integers(1, 512) | st.sampled_from((-1, "tensor")),
        "scale_dtype": st.sampled_from(("float16", "bfloat16", "float32")),
        "clip": st.floats(0.5, 1.0),
        **{name: st.booleans() for name in ("symmetric", "mse", "pad")},
    })
)  # fmt: skip
def test_json_of_any_integer_format(fields):
    try:
        format = jq.formats.Integer(**fields)
    except ValueError:  # "tensor" and padding, for one
        assume(False)
    assert from_json(to_json(format)) == format


def test_bits_are_the_stated_ones():
    """Asymmetric, group 64, float16 scales: b + (16 + b) / 64 at SmolLM2's shapes."""
    for bits, want in ((4, 4.3125), (3, 3.296875), (2, 2.28125)):
        q = jq.quantize_array(draw(576, 192), jq.rtn(bits=bits, group_size=64))
        assert q.bits_per_weight == want


shapes_of_codes = st.tuples(st.integers(1, 3), st.integers(1, 200), st.integers(1, 6))


@example(2, (2, 1, 5)).via("one code")
@example(3, (2, 96, 5)).via("whole words")
@example(3, (1, 33, 1)).via("one code more")
@given(st.sampled_from(layout.BITS), shapes_of_codes)
def test_packing_round_trip(bits, shape):
    batch, k, n = shape
    codes = np.random.default_rng(k).integers(-(1 << bits - 1), 1 << bits - 1, shape)
    rows = np.array([k - 1, 0, k // 2])

    @jax.jit
    def run(codes):
        packed = layout.pack(codes, bits)
        return packed, layout.unpack(packed, bits, k), layout.unpack_rows(packed[0], bits, rows)

    packed, *unpacked = run(codes)
    chex.assert_shape(packed, (batch, layout.words(k, bits), n))
    chex.assert_trees_all_equal(unpacked, [codes, codes[0][rows]])


@given(shapes_of_codes)
def test_five_ternary_codes_to_a_byte(shape):
    batch, k, n = shape
    codes = np.random.default_rng(k).integers(-1, 2, shape)

    @jax.jit
    def run(codes):
        words = layout.pack(codes, 2)
        stored = layout.pack_base3(words, k)
        return words, stored, layout.unpack_base3(stored, k)

    words, stored, again = run(codes)
    chex.assert_shape(stored, (batch, -(-k // 5), n))
    chex.assert_trees_all_equal(again, words)


@pytest.mark.parametrize("bits", layout.BITS)
def test_packing_is_the_dense_little_endian_bit_stream(bits):
    codes = np.random.default_rng(0).integers(-(1 << bits - 1), 1 << bits - 1, 64)
    stream = sum((int(c) & ((1 << bits) - 1)) << (i * bits) for i, c in enumerate(codes))
    words = np.asarray(layout.pack(jnp.asarray(codes)[:, None], bits))[:, 0].astype("<i4")
    assert int.from_bytes(words.tobytes(), "little") == stream


def test_tiled_matmul_is_the_matmul(tiles_of):
    w = draw(64, 256)
    for f in (jq.formats.Integer(4, 16), jq.formats.Integer(3, "tensor")):
        data = f.encode(w)
        tiles_of(1 << 22)
        want = f.matmul(draw(3, 64), data), f.matmul_transposed(draw(3, 256), data, 64)
        tiles_of(64 * 64)
        got = f.matmul(draw(3, 64), data), f.matmul_transposed(draw(3, 256), data, 64)
        chex.assert_trees_all_close(got, want, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jq.rtn(bits=5), "bits must be one of"),
        (lambda: jq.rtn(group_size=0), "group_size must be positive"),
        (lambda: jq.rtn(group_size=-2), "group_size must be positive"),
        (lambda: jq.rtn(scale_dtype="int8"), "scale_dtype must be one of"),
        (lambda: jq.gptq(damping=0), "damping must be positive"),
        (
            lambda: jq.methods.named_method("magic"),
            "unknown method 'magic'; known: .*gptq.*rtn.*ternary",
        ),
        (lambda: jq.methods.named_method("ternary", bits=3), "unexpected keyword argument 'bits'"),
        (
            lambda: jq.quantize_array(jnp.ones((576, 8)), jq.rtn(group_size=128)),
            "does not divide k = 576",
        ),
        (lambda: jq.quantize_array(jnp.ones(8), jq.rtn()), "expected a matrix"),
        (lambda: jq.quantize_array(jnp.full((64, 8), jnp.nan), jq.rtn()), "not finite"),
        (lambda: jq.quantize_array(jnp.ones((64, 8)), jq.gptq()), "needs gram="),
        (lambda: jq.quantize_array(jnp.ones((64, 8)), jq.gptq(), jnp.ones((3, 3))), "gram must be"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
