"""NF4 of bitsandbytes: its arrays decode here, and ours there, to the same floats bit for bit."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.formats.normal_float import dynamic_map
from jaxquant.storage.bitsandbytes import STATE, from_bitsandbytes, to_bitsandbytes
from tests.storage.bitsandbytes_goldens import CASES, FILE, weights

ORDER = [
    "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
    "weight.nested_quant_map", STATE,
]  # fmt: skip


def golden(name):
    """The arrays of a case, as the real package made them, and the floats it decodes them to."""
    with np.load(FILE) as held:
        arrays = {
            key.removeprefix(f"{name}/"): held[key] for key in held if key.startswith(f"{name}/")
        }
    return arrays, arrays.pop("decoded")


def state_of(arrays, **changed):
    return json.loads(bytes(arrays[STATE])) | changed


def as_bytes(state):
    return np.frombuffer(json.dumps(state).encode(), np.uint8)


def dequantize(arrays):
    """What `bitsandbytes.functional.dequantize_4bit` computes, in NumPy, as float32."""
    state = state_of(arrays)
    absmax = arrays["weight.absmax"]
    if "nested_blocksize" in state:
        top = np.repeat(arrays["weight.nested_absmax"], state["nested_blocksize"])[: absmax.size]
        absmax = arrays["weight.nested_quant_map"][absmax] * top  # rounded, and then the sum
        absmax = absmax + np.float32(state["nested_offset"])
    packed = arrays["weight"].ravel()
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1, state["blocksize"])
    w = (arrays["weight.quant_map"][codes] * absmax[:, None]).reshape(state["shape"])
    dtype = ml_dtypes.bfloat16 if state["dtype"] == "bfloat16" else np.dtype(state["dtype"])
    return w.astype(dtype).astype(np.float32)


def decoded(w):
    """The floats of one of our weights, in torch's order of axes."""
    return np.asarray(w.dequantize().astype(jnp.float32)).T


def same(a, b):
    """Whether two float32 arrays have the same bits."""
    bits = [np.ascontiguousarray(x).view(np.int32) for x in (a, b)]
    return np.array_equal(*bits)


def quantized(shape, block, double, dtype="float32"):
    w = 0.02 * jax.random.normal(jax.random.key(3), shape)
    return jq.quantize_array(w.astype(dtype), jq.nf4(block, double_quant=double))


# --- theirs, read ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_their_arrays_decode_to_their_floats(name):
    arrays, floats = golden(name)
    w = from_bitsandbytes(arrays)
    assert w.dtype == CASES[name][3] and w.shape == CASES[name][0][::-1]
    assert same(dequantize(arrays), floats)
    assert same(decoded(w), floats)


@pytest.mark.parametrize("name", ["double", "two_nested_blocks", "plain"])
def test_a_product_uses_their_floats(name):
    """Also where XLA compiles the decoding of scales into the program of the product."""
    arrays, floats = golden(name)
    product = jax.jit(jq.quantized(lambda x, w: x @ w))
    y = product(jnp.eye(floats.shape[1]), from_bitsandbytes(arrays))
    assert same(np.asarray(y).T, floats)


@pytest.mark.parametrize("name", CASES)
def test_their_arrays_come_back(name):
    arrays, _ = golden(name)
    back = to_bitsandbytes(from_bitsandbytes(arrays))
    assert list(back) == [key for key in ORDER if key in arrays]
    for key, a in arrays.items():
        assert back[key].dtype == a.dtype and back[key].shape == a.shape, key
        assert back[key].tobytes() == a.tobytes(), key


def test_bits_are_those_of_the_arrays():
    arrays, _ = golden("two_nested_blocks")
    w = from_bitsandbytes(arrays)
    counted = ("weight", "weight.absmax", "weight.nested_absmax")  # and the offset, not the tables
    assert w.nbytes == sum(arrays[key].nbytes for key in counted) + 4
    big = quantized((1024, 1024), 64, True)
    assert round(from_bitsandbytes(to_bitsandbytes(big)).bits_per_weight, 3) == 4.127


WRONG = {
    "nibbles swapped": ("weight", lambda a: a << 4 | a >> 4),
    "codes [in, out]": ("weight", lambda a: a.reshape(8, -1).T.reshape(-1, 1)),
    "blocks along outputs": ("weight.absmax", lambda a: a.reshape(8, -1).T.ravel()),
    "another offset": (STATE, lambda a: as_bytes(state_of({STATE: a}, nested_offset=0.1))),
    "one nested block": ("weight.nested_absmax", lambda a: np.full_like(a, a[-1])),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_variants_are_seen(what):
    arrays, floats = golden("two_nested_blocks" if "nested" in what else "double")
    key, change = WRONG[what]
    wrong = from_bitsandbytes(arrays | {key: change(arrays[key])})
    assert not np.allclose(decoded(wrong), floats, atol=1e-3)


# --- ours, written --------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("shape", "block", "dtype"),
    [
        ((64, 1), 64, "float32"),
        ((192, 40), 64, "float32"),
        ((512, 70), 64, "bfloat16"),
        ((64, 9), 32, "float16"),
        ((256, 3), -1, "float32"),
    ],
)
def test_our_arrays_decode_there_to_our_floats(shape, block, dtype, double):
    w = quantized(shape, block, double, dtype)
    arrays = to_bitsandbytes(w)
    assert same(dequantize(arrays), decoded(w))
    back = from_bitsandbytes(arrays)
    assert all(np.array_equal(back.data[name], a) for name, a in w.data.items())
    assert (back.view, back.logical_dtype, back.method) == (w.view, w.logical_dtype, w.method)
    whole = dataclasses.replace(w.format, group_size=shape[0] if block == -1 else block)
    assert back.format == whole


@pytest.mark.parametrize("name", ["plain", "blocks_of_32"])
def test_we_choose_their_codes(name):
    """Without double quantization; of 4 million Gaussian weights, 1 differed, at a tie."""
    arrays, _ = golden(name)
    w = jq.quantize_array(jnp.asarray(weights(name).T), jq.nf4(CASES[name][1]))
    ours = to_bitsandbytes(w)
    assert ours["weight.absmax"].tobytes() == arrays["weight.absmax"].tobytes()
    assert ours["weight"].tobytes() == arrays["weight"].tobytes()


@pytest.mark.parametrize("name", ["double", "two_nested_blocks", "blocks_of_128"])
def test_we_choose_their_codes_of_scales(name):
    """Theirs are looked up on a CPU with less precision: of few scales, ours is the nearer code.

    The codes of weights are not theirs: ours are the nearest to the weights with the scale as it
    is decoded, theirs with the scale before it was quantized.
    """
    arrays, _ = golden(name)
    w = jnp.asarray(weights(name).T)
    ours = to_bitsandbytes(jq.quantize_array(w, jq.nf4(CASES[name][1], double_quant=True)))
    offset = state_of(arrays)["nested_offset"]
    assert state_of(ours)["nested_offset"] == pytest.approx(offset, rel=2**-22)
    top = arrays["weight.nested_absmax"]
    assert np.allclose(ours["weight.nested_absmax"], top, rtol=1e-6)
    mine, theirs = (a["weight.absmax"] for a in (ours, arrays))
    differ = np.flatnonzero(mine != theirs)
    assert len(differ) <= 0.01 * len(mine)
    absmax = np.abs(weights(name)).reshape(-1, CASES[name][1]).max(1)
    wanted = ((absmax - offset) / np.repeat(top, 256)[: len(absmax)])[differ]
    error = lambda codes: np.abs(np.float32(dynamic_map())[codes[differ]] - wanted)
    assert (error(mine) <= error(theirs)).all()
    assert np.mean(ours["weight"] != arrays["weight"]) < 0.02


# --- what cannot be held --------------------------------------------------------------------


def test_a_map_of_another_cpu_is_read():
    """The values of the map then differ in their last bits, and so do the scales."""
    arrays, floats = golden("double")
    key = "weight.nested_quant_map"
    arrays[key] *= np.float32(1 + 2**-22)
    assert np.allclose(decoded(from_bitsandbytes(arrays)), floats, rtol=1e-6)
    arrays[key] = np.where(arrays[key] < -0.99, np.float32(-1), arrays[key])
    with pytest.raises(ValueError, match="is not the table"):
        from_bitsandbytes(arrays)


def test_blocks_far_smaller_than_the_others():
    """Their scales may come out negative; that is harmless only where all weights are zero."""
    arrays, _ = golden("double")
    half = float(arrays["weight.nested_absmax"][0]) / 2
    scales = np.float32(dynamic_map())[arrays["weight.absmax"]]
    assert (scales < -0.5).any()
    w = from_bitsandbytes(arrays)
    low = as_bytes(state_of(arrays, nested_offset=half))
    with pytest.raises(ValueError, match="3 of 16 blocks with a scale of 0 or less"):
        from_bitsandbytes(arrays | {STATE: low})
    with pytest.raises(ValueError, match="3 of 16 blocks with a scale of 0 or less"):
        to_bitsandbytes(dataclasses.replace(w, data=w.data | {"mean": jnp.full((1, 1), half)}))
    blocks = arrays["weight"].reshape(scales.size, -1)
    blocks[scales <= -0.5] = 0x77
    arrays[STATE] = low
    assert np.array_equal(decoded(from_bitsandbytes(arrays)), dequantize(arrays))


def test_scales_of_0_are_read_and_infinite_ones_are_not():
    arrays, floats = golden("plain")
    arrays["weight.absmax"][:] = 0
    assert np.array_equal(decoded(from_bitsandbytes(arrays)), 0 * floats)
    arrays["weight.absmax"][1] = np.inf
    with pytest.raises(ValueError, match=r"weight.absmax must be finite"):
        from_bitsandbytes(arrays)


drop = lambda key: lambda a: a.pop(key)
put = lambda key, change: lambda a: a.update({key: change(a[key])})
restate = lambda **changed: lambda a: a.update({STATE: as_bytes(state_of(a, **changed))})

BAD = {
    "fp4": (lambda a: a.update({STATE.replace("nf4", "fp4"): a.pop(STATE)}), "only NF4 can be"),
    "fp4 in json": (restate(quant_type="fp4"), "only NF4 can be read, got 'fp4'"),
    "table of fp4": (put("weight.quant_map", lambda a: a[::-1]), "'weight.quant_map' is not the"),
    "no weight": (drop("weight"), "no array 'weight'; there are"),
    "no state": (drop(STATE), f"no array '{STATE}'"),
    "no absmax": (drop("weight.absmax"), "no array 'weight.absmax'"),
    "no nested absmax": (drop("weight.nested_absmax"), "no array 'weight.nested_absmax'"),
    "no nested map": (drop("weight.nested_quant_map"), "no array 'weight.nested_quant_map'"),
    "not json": (put(STATE, lambda a: a[1:]), "is not the JSON of a quantization state"),
    "no dict": (put(STATE, lambda a: np.frombuffer(b"[1]", np.uint8)), "is not the JSON"),
    "no shape": (restate(shape=None), "must be a matrix \\[out, in\\], got shape None"),
    "four axes": (restate(shape=[8, 128, 1, 1]), "must be a matrix"),
    "another shape": (restate(shape=[9, 128]), "'weight' must have 576 entries, by the shape"),
    "across rows": (restate(shape=[16, 96]), "extend over several rows"),
    "block size": (restate(blocksize=48), "the block size must be one of"),
    "other blocks": (restate(blocksize=128), "'weight.absmax' must have 8 entries"),
    "dtype": (restate(dtype="float64"), "the dtype of the weight must be one of"),
    "nested blocks": (restate(nested_blocksize=64), "must give nested_blocksize 256"),
    "no offset": (restate(nested_offset=None), "finite nested_offset, got 256, 'float32' and None"),
    "offset": (restate(nested_offset=float("nan")), "finite nested_offset"),
    "weight dtype": (put("weight", lambda a: a.view(np.int8)), "'weight' must be uint8, got int8"),
    "absmax dtype": (put("weight.absmax", np.float32), "'weight.absmax' must be uint8, got float"),
    "nested absmax": (put("weight.nested_absmax", lambda a: -a), "finite and not negative"),
    "nested size": (put("weight.nested_absmax", lambda a: a.repeat(2)), "must have 1 entries"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_read(what):
    arrays, _ = golden("double")
    change, message = BAD[what]
    change(arrays)
    with pytest.raises(ValueError, match=message):
        from_bitsandbytes(arrays)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (jq.rtn(bits=4, group_size=64), "the format must be NormalFloat"),
        (jq.normal_float(bits=3, group_size=64), "the format must be NormalFloat"),
        (jq.nf4(scale_dtype="bfloat16"), "with float32 scales"),
        (jq.nf4(group_size=16), "group_size must be one of"),
        (jq.nf4(group_size="tensor"), "group_size must be one of .* got 'tensor'"),
        (jq.nf4(group_size=128, pad=True), "and divide k, got 128 for k = 192"),
        (jq.nf4(group_size=-1), "got -1 for k = 192"),
        (jq.nf4(activations="int8"), "no formats of inputs"),
    ],
)
def test_what_cannot_be_written(method, message):
    w = jq.quantize_array(jax.random.normal(jax.random.key(0), (192, 8)), method)
    with pytest.raises(ValueError, match=message):
        to_bitsandbytes(w)


def test_a_stack_is_written_matrix_by_matrix():
    w = quantized((64, 8), 64, True)
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), w)
    with pytest.raises(ValueError, match="must be one matrix .* pass its matrices"):
        to_bitsandbytes(stack)
