"""Attention over a packed cache: the kernel against its reference, and that against NumPy.

Budget of the kernel as of `test_attention`, and what angles in double differ from those in float32.
"""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.formats import kv_cache
from jaxquant.formats.kv_cache import KVFormat
from pallas_kernels import cpu, dispatch
from pallas_kernels.codecs import kv_layout
from pallas_kernels.cpu import native
from pallas_kernels.kv_attention import kv_attention, reference
from tests.support.lowering import lowered_text

REASON = native.load()
needs_native = pytest.mark.skipif(
    bool(REASON) or jax.default_backend() != "cpu", reason=f"no native kernels: {REASON}"
)
LAYERS, SIZE = 2, 320
# (b, heads, kv heads, head size), dtype of the cache, format
CASES = [
    ((2, 9, 3, 64), "float32", KVFormat(4)),
    ((1, 4, 4, 128), "float16", KVFormat(2, window=64, sinks=40)),
    ((1, 6, 2, 64), "bfloat16", KVFormat(3, "post", window=0, sinks=0, channels=16)),
    ((1, 5, 1, 48), "float32", KVFormat(8, "post", sinks=4, group=16, channels=16)),
    ((2, 2, 2, 32), "float32", KVFormat(2, window=0, sinks=1, group=96)),
]
# tokens before, new tokens
LENGTHS = [(0, 1), (0, 5), (33, 1), (96, 1), (200, 5), (255, 5), (319, 1)]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def frequencies(hd):
    return jnp.asarray(50.0 ** (-np.arange(hd // 2) / (hd // 2)), jnp.float32)


def draw(case, before, tokens, seed=None):
    """Arguments of `kv_attention`, of the second layer: fresh tokens before, and new ones."""
    (b, heads, kv_heads, hd), dtype, form = case
    rng = np.random.default_rng(seed)
    normal = lambda *s: jnp.asarray(rng.standard_normal(s), "float32")
    k, v = (normal(LAYERS, b, kv_heads, before + tokens, hd).astype(dtype) for _ in "kv")
    past = kv_cache.empty(form, (LAYERS, b, kv_heads), hd, SIZE, jnp.dtype(dtype))
    if before:
        old = (x[..., :before, :] for x in (k, v))
        past = STORE(past, *old, jnp.int32(0), jnp.int32(before), form, frequencies(hd))
    q = 3 * normal(b, tokens, heads, hd)
    radians = frequencies(hd) if form.rope == "pre" else None
    return q, k[1, ..., before:, :], v[1, ..., before:, :], past, 1, jnp.int32(before), radians


STORE = jax.jit(kv_cache.store, static_argnums=5)
REFERENCE = jax.jit(reference)


def written_out(q, k, v, past, layer, start, radians):
    """Every token by itself, in float64: where it is, what it stands for, whether it is seen."""
    f = lambda a: np.asarray(a, np.float64)
    start = int(start)
    b, t, heads, hd = q.shape
    bits, group = (past.key_bits, past.value_bits), past.group
    keys = f(kv_layout.decode_keys(*(a[layer] for a in past[4:7]), bits[0]))
    values = f(kv_layout.decode_values(*(a[layer] for a in past[7:]), bits[1]))
    if radians is not None:
        keys = f(kv_layout.turned(keys, np.arange(past.slots)[:, None] * radians))
    left = max(0, start - past.window) // group * group
    pairs = []
    for at in range(start):
        if at < past.sinks:
            pairs.append((past.sink_k[layer, :, :, at], past.sink_v[layer, :, :, at]))
        elif at < left:
            pairs.append((keys[:, :, at], values[:, :, at]))
        else:
            place = at % past.ring_k.shape[3]
            pairs.append((past.ring_k[layer, :, :, place], past.ring_v[layer, :, :, place]))
    pairs += [(k[:, :, i], v[:, :, i]) for i in range(t)]
    keys, values = (np.stack([f(pair[i]) for pair in pairs], axis=2) for i in (0, 1))
    y = np.empty((b, t, heads, hd))
    for i, j, h in np.ndindex(b, t, heads):
        head, seen = h // (heads // k.shape[1]), start + j + 1
        scores = keys[i, head, :seen] @ f(q[i, j, h]) / np.sqrt(hd)
        weights = np.exp(scores - scores.max())
        y[i, j, h] = weights @ values[i, head, :seen] / weights.sum()
    return y


def error(y, want):
    return np.abs(np.asarray(y, np.float64) - want).max() / np.abs(want).max()


def by_reference(*arguments):
    return REFERENCE(*arrays_of(*arguments))


def arrays_of(q, k, v, past, layer, start, radians):
    radians = jnp.zeros(0) if radians is None else radians
    return q, k, v, jnp.int32(layer), start, radians, *past


@every_case
@pytest.mark.parametrize("before, tokens", LENGTHS[::2])
def test_the_reference_is_attention_written_out(case, before, tokens):
    arguments = draw(case, before, tokens)
    assert error(by_reference(*arguments), written_out(*arguments)) < 1e-4


def test_a_wrong_place_is_seen():
    """The twin: one token more or fewer, or keys that are turned by one position more."""
    q, k, v, past, layer, start, radians = draw(CASES[0], 200, 1)
    want = written_out(q, k, v, past, layer, start, radians)
    for wrong in (start - 1, start - 32):
        assert error(by_reference(q, k, v, past, layer, wrong, radians), want) > 1e-3
    assert error(by_reference(q, k, v, past, 0, start, radians), want) > 1e-3
    assert error(by_reference(q, k, v, past, layer, start, 1.01 * radians), want) > 1e-3


@needs_native
@every_case
def test_the_kernel_is_its_reference(case):
    sets = range(len(native.instruction_sets()))
    kernels = [jax.jit(functools.partial(cpu._kv_attention, most=most)) for most in sets]
    for before, tokens in LENGTHS:
        arguments = draw(case, before, tokens)
        want = np.asarray(by_reference(*arguments))
        for kernel in kernels:
            assert error(kernel(*arrays_of(*arguments)), want) < 3e-5, (before, tokens)


@pytest.mark.parametrize("attend", [kv_attention, by_reference])
def test_what_is_hidden_is_not_read(attend):
    arguments = draw(CASES[0], 100, 1)
    past = arguments[3]
    slots = lambda a, first: a.at[:, :, :, first:].set(jnp.nan)
    spoilt = past._replace(
        key_scale=slots(past.key_scale, 2),  # of 100 tokens 64 are in the codes
        value_scale=past.value_scale.at[..., 64:].set(jnp.nan),
        ring_k=slots(past.ring_k, 36),  # the ring of 64 holds 64 ... 99
        ring_v=slots(past.ring_v, 36),
    )
    again = [spoilt if a is past else a for a in arguments]
    np.testing.assert_array_equal(attend(*again), attend(*arguments))
    assert jnp.isnan(attend(*again[:5], again[5] + 1, again[6])).all()


@pytest.mark.parametrize("attend", [kv_attention, by_reference])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_query_that_is_not_finite_is_nan_and_no_other(attend, value):
    q, *rest = draw(CASES[0], 96, 5)
    clean, wrong = attend(q, *rest), np.array(attend(q.at[1, 2, 4, 7].set(value), *rest))
    assert np.isnan(wrong[1, 2, 4]).all()
    wrong[1, 2, 4] = clean[1, 2, 4]
    np.testing.assert_array_equal(wrong, clean)


@needs_native
def test_large_scores_do_not_overflow():
    q, *rest = draw(CASES[0], 100, 1)
    np.testing.assert_allclose(
        kv_attention(1e4 * q, *rest), by_reference(1e4 * q, *rest), atol=2e-3
    )


@needs_native
def test_calls_from_several_threads_do_not_disturb_each_other():
    arguments = arrays_of(*draw(CASES[0], 319, 1))
    f = jax.jit(cpu._kv_attention)
    want = np.asarray(f(*arguments))
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for y in pool.map(lambda _: np.asarray(f(*arguments)), range(200)):
            np.testing.assert_array_equal(y, want)


def test_what_serves():
    why = lambda case, tokens: dispatch.choose(
        "kv_attention", "cpu", arrays_of(*draw(case, 0, tokens)), {}
    )[1]
    sizes, dtype, _ = CASES[0]
    if not REASON:
        assert why(CASES[0], 8) == ""
        assert "more than 8 queries" in why(CASES[0], 9)
        odd = ((1, 2, 2, 48), dtype, KVFormat(4, channels=16))
        assert "with RoPE, not a multiple of 32" in why(odd, 1)
        assert "scales for 8 channels" in why((sizes, dtype, KVFormat(4, channels=8)), 1)
    call = lambda *a: kv_attention(*a[:3], kv_layout.Past(*a[6:]), *a[3:6])
    text = lowered_text(call, *arrays_of(*draw(CASES[0], 0, 1)), platform="cpu")
    assert ("jaxquant_kv_attention" in text) == (not REASON)


PAST = kv_cache.empty(KVFormat(4), (LAYERS, 2, 3), 64, SIZE, jnp.float32)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": jnp.ones((1, 1, 4))}, "q must have 4 axes"),
        ({"k": jnp.ones((2, 3, 1, 64), jnp.int8)}, "k must have 4 axes, of float32"),
        ({"q": jnp.ones((3, 1, 9, 64))}, "the cache holds 2 sequences and 3 heads of 64 channels"),
        ({"q": jnp.ones((2, 1, 8, 64))}, "the cache holds 2 sequences and 3 heads"),
        (
            {"past": PAST._replace(ring_k=jnp.ones((2, 2, 3, 64, 64), int))},
            "past.ring_k must have 5",
        ),
        ({"v": jnp.ones((2, 3, 2, 64))}, r"k and v must both be \[2, 3, 1, 64\]"),
    ],
)
def test_bad_input_is_named(change, message):
    names = ("q", "k", "v", "past", "layer", "start", "frequencies")
    arguments = dict(zip(names, draw(CASES[0], 0, 1), strict=True))
    with pytest.raises(ValueError, match=message):
        kv_attention(**(arguments | change))
