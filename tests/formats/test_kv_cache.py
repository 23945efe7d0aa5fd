"""Rounding of keys and values, and where the cache keeps each token, against NumPy loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.formats import kv_cache
from jaxquant.formats.kv_cache import KVFormat
from pallas_kernels.codecs import kv_layout, layout
from pallas_kernels.kv_attention import kv_attention

BITS = (2, 3, 4, 8)
HALF = 2.0**-10  # of a number rounded to float16, at most, twice
B, KV, HEADS, HD = 2, 2, 6, 16
FREQUENCIES = jnp.asarray(20.0 ** (-np.arange(HD // 2) / (HD // 2)), jnp.float32)


def draw(*shape, seed=None):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def form_of(bits, **more):
    return KVFormat(bits, **{"group": layout.unit(bits)[0], "channels": 8} | more)


@pytest.mark.parametrize("bits", BITS)
def test_what_is_on_the_grid_comes_back(bits):
    """Every code, with a scale and an offset that float16 holds."""
    form = KVFormat(bits, group=32, channels=32)
    codes = np.random.default_rng().integers(0, 2**bits, (3, 32, 64))
    codes[:, 0], codes[:, 1] = 0, 2**bits - 1  # both ends in every channel
    keys = jnp.asarray(0.25 * codes - 7, jnp.float32)
    packed = kv_cache.quantize_keys(keys, jnp.ones(32, bool), form)
    assert packed[0].shape == (3, bits, 64)  # 32 codes of b bits are b words
    np.testing.assert_array_equal(kv_layout.decode_keys(*packed, bits), keys)
    values = keys.swapaxes(1, 2)[:, :, :32]
    packed = kv_cache.quantize_values(values, form)
    np.testing.assert_array_equal(kv_layout.decode_values(*packed, bits), values)


@pytest.mark.parametrize("bits", BITS)
def test_errors_are_at_most_half_a_step(bits):
    form = KVFormat(bits)
    x = 3 * draw(2, 64, 64) + 5 * draw(64)
    keys = kv_layout.decode_keys(*kv_cache.quantize_keys(x, jnp.ones(64, bool), form), bits)
    values = kv_layout.decode_values(*kv_cache.quantize_values(x, form), bits)
    by_channel = np.asarray(x).reshape(2, 2, 32, 64)
    by_token = np.asarray(x).reshape(2, 64, 2, 32)
    for known, grouped, axis in ((keys, by_channel, 2), (values, by_token, 3)):
        least, most = grouped.min(axis, keepdims=True), grouped.max(axis, keepdims=True)
        step = (most - least) / (2**bits - 1)
        error = np.abs(np.asarray(known).reshape(grouped.shape) - grouped)
        allowed = step / 2 + HALF * (most - least + np.abs(least) + np.abs(most))
        assert np.all(error <= allowed)
        assert np.any(error > step / 4)


def test_what_is_not_there_enters_no_range():
    form, valid = KVFormat(2), jnp.arange(64) % 32 >= 3
    keys = draw(64, 64)
    spoilt = jnp.where(valid[:, None], keys, 100.0)

    def known(keys, valid):
        return kv_layout.decode_keys(*kv_cache.quantize_keys(keys, valid, form), 2)[valid_rows]

    valid_rows = np.flatnonzero(valid)
    clean = known(keys, valid)
    np.testing.assert_array_equal(clean, known(spoilt, valid))
    errors = [jnp.abs(k - keys[valid_rows]).max() for k in (clean, known(spoilt, valid | True))]
    assert errors[1] > 2 * errors[0]  # the twin
    nothing = kv_cache.quantize_keys(keys, valid & False, form)
    assert jnp.all(jnp.isfinite(kv_layout.decode_keys(*nothing, 2)))


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("tokens", [32, 640])
def test_what_is_not_finite_stays_visible(value, tokens):
    """Its whole range is no number, and all others are as without it."""
    form, there = KVFormat(4), jnp.ones(tokens, bool)
    x = draw(3, tokens, 64)
    keys = jax.jit(lambda x: kv_layout.decode_keys(*kv_cache.quantize_keys(x, there, form), 4))
    values = jax.jit(lambda x: kv_layout.decode_values(*kv_cache.quantize_values(x, form), 4))
    for known, spoilt in ((keys, np.s_[1, :32, 7]), (values, np.s_[1, 5, :32])):
        clean, wrong = (np.array(known(a)) for a in (x, x.at[1, 5, 7].set(value)))
        assert np.isnan(wrong[spoilt]).all()
        wrong[spoilt] = clean[spoilt]
        np.testing.assert_array_equal(wrong, clean)


def test_what_is_not_there_may_be_no_number():
    keys, there = draw(32, 64), jnp.arange(32) != 5
    codes = lambda keys: kv_cache.quantize_keys(keys, there, KVFormat(4))
    jax.tree.map(
        np.testing.assert_array_equal, codes(keys.at[5].set(0)), codes(keys.at[5].set(jnp.nan))
    )


@pytest.mark.parametrize("bits", BITS)
def test_bits_are_bytes(bits):
    form = KVFormat(bits, window=64, sinks=2)
    past = kv_cache.empty(form, (5, 2, 3), 64, 64 + 640, jnp.bfloat16)
    stored = sum(a.nbytes for a in past[4:])
    assert past.slots == 640
    assert stored == 640 * 2 * form.bits_per_value * 5 * 2 * 3 * 64 / 8
    assert stored == 640 * 2 * form.bytes_per_token(layers=5, heads=3, head_dim=64)
    exact = sum(a.nbytes for a in past[:4])
    assert exact == (64 + 32 + 2) * 2 * 2 * 5 * 2 * 3 * 64
    read = (past.key_bits, past.value_bits, past.window, past.sinks, past.group)
    assert read == (bits, bits, 64, 2, 32)


# --- where each token is --------------------------------------------------------------------


def turn(x, angle):
    """x [hd] turned by its angles, float64."""
    a, b = np.split(np.asarray(x, np.float64), 2)
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    )


def on_grid(x, bits):
    """A row of numbers by its least and largest: float16 step, and float16 middle of the codes."""
    step = np.float16((max(x) - min(x)) / (2**bits - 1)).astype(np.float64)
    middle = np.float16(min(x) + 2 ** (bits - 1) * step).astype(np.float64)
    codes = np.clip(np.round((x - middle) / (step or 1.0)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes * step + middle


class Simulation:
    """One head's cache as lists: tokens as they are, and tokens that were rounded."""

    def __init__(self, form):
        self.form, self.exact, self.rounded, self.left = form, {}, {}, 0

    def add(self, position, k, v):
        self.exact[position] = (np.asarray(k, np.float64), np.asarray(v, np.float64))
        if position + 1 - self.left == self.form.window + self.form.group:
            group = range(self.left, self.left + self.form.group)
            self.left += self.form.group
            self.round([p for p in group if p >= self.form.sinks])

    def round(self, positions):
        form = self.form
        if not positions:
            return
        angle = lambda p: p * np.asarray(FREQUENCIES, np.float64) * (form.rope == "pre")
        keys = np.stack([turn(self.exact[p][0], -angle(p)) for p in positions])
        keys = np.stack([on_grid(channel, form.bits) for channel in keys.T]).T
        for p, key in zip(positions, keys, strict=True):
            runs = self.exact.pop(p)[1].reshape(-1, form.channels)
            value = np.concatenate([on_grid(run, form.bits) for run in runs])
            self.rounded[p] = (turn(key, angle(p)), value)

    def seen(self, q, known):
        """Attention of a query to all; what is `known`, its own key and value, as they are."""
        held = {**self.exact, **self.rounded, **known}
        keys, values = (np.stack([kv[i] for kv in held.values()]) for i in (0, 1))
        scores = keys @ np.asarray(q, np.float64) / np.sqrt(len(q))
        weights = np.exp(scores - scores.max())
        return weights @ values / weights.sum()


FORMS = [
    form_of(bits, rope=rope, window=window * layout.unit(bits)[0], sinks=sinks)
    for (bits, rope), (window, sinks) in zip(
        itertools.product(BITS, kv_cache.ROPE),
        itertools.cycle([(0, 0), (2, 1), (1, 3), (0, 37), (1, 0)]),
        strict=False,
    )
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_each_step_sees_what_a_simulation_with_lists_sees(form):
    steps = form.window + 2 * form.group + 7
    k, v = np.asarray(draw(B, KV, steps, HD)), np.asarray(draw(B, KV, steps, HD))
    q = np.asarray(2 * draw(B, steps, HEADS, HD))
    past = kv_cache.empty(form, (1, B, KV), HD, steps, jnp.float32)
    turns = FREQUENCIES if form.rope == "pre" else None

    @jax.jit
    def step(past, q, k, v, at):
        y = kv_attention(q, k, v, past, 0, at, turns)
        return kv_cache.store(past, k[None], v[None], at, at + 1, form, FREQUENCIES), y

    lists = {(b, h): Simulation(form) for b in range(B) for h in range(KV)}
    errors, costs = [], []
    for t in range(steps):
        past, y = step(past, q[:, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], jnp.int32(t))
        for (b, h), one in lists.items():
            own = np.asarray(k[b, h, t], np.float64), np.asarray(v[b, h, t], np.float64)
            every = {i: (k[b, h, i], v[b, h, i]) for i in range(t + 1)}
            for head in range(h * HEADS // KV, (h + 1) * HEADS // KV):
                want = one.seen(q[b, t, head], {t: own})
                errors.append(np.abs(y[b, 0, head] - want).max())
                costs.append(np.abs(one.seen(q[b, t, head], every) - want).max())
            one.add(t, *own)
    # A number halfway between two codes may fall to either; one is seen by all later steps.
    assert np.mean(np.array(errors) > 1e-4) < 0.1
    if form.sinks < form.group:
        assert np.mean(np.array(costs) > 1e-3) > 0.2  # the twin: rounding changes what is seen


@pytest.mark.parametrize(
    "form, cuts",
    list(zip(FORMS[::2], ([75], [40, 35], [1, 31, 1, 32, 10], [1] * 75), strict=True)),
)
def test_tokens_that_come_together_are_kept_as_if_one_by_one(form, cuts):
    k, v = draw(2, B, KV, 80, HD, seed=1), draw(2, B, KV, 80, HD, seed=2)
    store = jax.jit(lambda past, k, v, a, b: kv_cache.store(past, k, v, a, b, form, FREQUENCIES))
    at, past = 0, kv_cache.empty(form, (2, B, KV), HD, 96, jnp.float32)
    padding = [(0, 0)] * 3 + [(0, 5), (0, 0)]
    for count in cuts:  # five tokens of padding behind
        new = (
            jnp.pad(x[..., at : at + count, :], padding, constant_values=jnp.nan) for x in (k, v)
        )
        past = store(past, *new, jnp.int32(at), jnp.int32(at + count))
        at += count
    whole = kv_cache.empty(form, (2, B, KV), HD, 96, jnp.float32)
    whole = store(whole, k[..., :75, :], v[..., :75, :], jnp.int32(0), jnp.int32(75))
    for a, b in zip(past, whole, strict=True):
        np.testing.assert_array_equal(a, b)
    assert jnp.isfinite(past.ring_k).all()


def test_a_rounded_sequence_is_what_the_codes_give_back():
    form = form_of(4, window=0, sinks=3)
    k, v = draw(B, KV, 40, HD), draw(B, KV, 40, HD)
    past = kv_cache.empty(form, (1, B, KV), HD, 40, jnp.float32)
    ends = (jnp.int32(0), jnp.int32(40))
    past = kv_cache.store(past, k[None], v[None], *ends, form, FREQUENCIES)
    keys, values = kv_cache.rounded_keys(k, form, FREQUENCIES), kv_cache.rounded_values(v, form)
    np.testing.assert_array_equal(keys[:, :, :3], k[:, :, :3])
    np.testing.assert_array_equal(values[:, :, :3], v[:, :, :3])
    angles = jnp.arange(40)[:, None] * FREQUENCIES
    stored = kv_layout.turned(kv_layout.decode_keys(*(a[0] for a in past[4:7]), 4), angles)
    np.testing.assert_allclose(keys[:, :, 3:], stored[:, :, 3:], atol=1e-5)
    stored = kv_layout.decode_values(*(a[0] for a in past[7:]), 4)
    np.testing.assert_array_equal(values[:, :, 3:], stored[:, :, 3:])
    short = kv_cache.rounded_keys(k[:, :, :37], form, FREQUENCIES)  # a last group of five
    assert short.shape[2] == 37
    np.testing.assert_array_equal(short[:, :, :32], keys[:, :, :32])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 5}, r"bits must be one of \(2, 3, 4, 8\), got 5"),
        ({"bits": 4.0}, "bits must be int, got 4.0"),
        ({"rope": "during"}, "rope must be one of"),
        ({"group": 0}, "group must be a positive multiple of 8 tokens"),
        ({"group": 20}, "multiple of 8 tokens, which fill whole words at 4 bits, got 20"),
        ({"bits": 3, "group": 16}, "multiple of 32 tokens, which fill whole words at 3 bits"),
        ({"channels": 0}, "channels must be positive"),
        ({"window": -32}, "window must be 0 or a multiple of the group, 32, got -32"),
        ({"window": 48}, "window must be 0 or a multiple of the group, 32, got 48"),
        ({"sinks": -1}, "sinks must not be negative, got -1"),
        ({"sinks": True}, "sinks must be int, got True"),
    ],
)
def test_bad_formats(change, message):
    with pytest.raises(ValueError, match=message):
        KVFormat(**{"bits": 4} | change)


def test_a_format_that_does_not_fit_the_heads():
    with pytest.raises(ValueError, match="channels = 32 must divide the 80 channels of a head"):
        kv_cache.empty(KVFormat(4), (1, 1, 1), 80, 64, jnp.float32)
    assert hash(KVFormat(4)) == hash(KVFormat(bits=4)) and "rope='pre'" in str(KVFormat(4))
