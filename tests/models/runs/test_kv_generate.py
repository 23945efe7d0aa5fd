"""Models with a packed cache: against whole sequences with rounding, and in bytes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.evaluation import evaluate
from jaxquant.formats import kv_cache
from jaxquant.formats.kv_cache import KVFormat
from jaxquant_models import init_cache, load
from jaxquant_models.architectures.cache import FakeQuantizedCache
from jaxquant_models.architectures.llama import Llama, apply
from jaxquant_models.readers.text import read_text
from jaxquant_models.runs.generate import generate
from jaxquant_models.runs.recipes import recipe_of
from jaxquant_models.runs.sequences import token_sequences
from tests.support.generation_memory import generation_memory
from tests.support.tiny_llama import (
    BASE,
    FAMILIES,
    byte_tokenizer_json,
    random_tensors,
    write_folder,
)

TOKENS = jnp.asarray(np.random.default_rng(3).integers(0, 256, (2, 75)))
FORMS = [
    KVFormat(bits, rope, window=window * group, sinks=sinks, group=group, channels=8)
    for (bits, group), rope, (window, sinks) in zip(
        [(4, 8), (2, 16), (3, 32), (8, 8), (4, 16), (2, 32)],
        3 * kv_cache.ROPE,
        [(0, 0), (1, 3), (1, 1), (0, 9), (4, 40), (0, 2)],
        strict=True,
    )
]


def made(family, folder):
    hf = FAMILIES[family]
    return load(write_folder(folder / "m", hf, random_tensors(hf)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return made("qwen3", tmp_path_factory.mktemp("m"))  # which norms its queries and keys


def stepped(model, params, form, cuts, dtype=jnp.float32):
    """Logits of TOKENS in calls of so many tokens each, three of padding behind."""
    step = jax.jit(model.apply_cached)
    cache, at, found = init_cache(model.config, 2, 80, dtype, form), 0, []
    for n in cuts:
        tokens = TOKENS[:, at : at + n]
        if n > 1:
            tokens, cache = jnp.pad(tokens, ((0, 0), (0, 3))), cache.until(jnp.int32(at + n))
        logits, cache = step(params, tokens, cache)
        cache = cache.until(None)
        found.append(logits[:, :n])
        at += n
    assert int(cache.length) == at
    return jnp.concatenate(found, axis=1)


def off(a, b):
    """Share of logits that differ: a number between two codes may fall to either of them."""
    return float(jnp.mean(jnp.abs(a - b) > 2e-3))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_decoding_is_the_whole_sequence_with_rounding(form, tmp_path):
    tiny = made("llama-llama3", tmp_path)  # whose angles are scaled
    rounding = FakeQuantizedCache(form, strict=False)
    want = jax.jit(lambda p, x: apply(Llama(tiny.config), p, x, rounding)[0])(tiny.params, TOKENS)
    got = stepped(tiny, tiny.params, form, [1] * 75)
    assert off(got, want) < 0.1
    exact = jax.jit(tiny.apply_fn)(tiny.params, TOKENS)
    if form.sinks < form.group and form.bits < 8:
        assert off(exact, want) > 0.1  # the twin


def test_a_call_sees_its_own_tokens_as_they_are_and_those_before_rounded(tiny):
    exact = jax.jit(tiny.apply_fn)(tiny.params, TOKENS)
    form = dataclasses.replace(FORMS[1], window=0)
    got = stepped(tiny, tiny.params, form, [40, 35])
    np.testing.assert_allclose(got[:, :40], exact[:, :40], atol=1e-4)  # a prefill
    assert jnp.abs(got[:, 40:] - exact[:, 40:]).max() > 0.1
    all_recent = dataclasses.replace(form, window=80)
    got = stepped(tiny, tiny.params, all_recent, [40, 35])
    np.testing.assert_allclose(got, exact, atol=1e-4)
    eight = KVFormat(8, window=0, group=8, channels=8)
    got = stepped(tiny, tiny.params, eight, [40, 35])
    assert jnp.abs(got - exact).max() < 0.1


@pytest.mark.parametrize("form", [FORMS[1], None])
def test_layers_apart_are_as_a_stack(tiny, form):
    apart, cuts = jq.ptq.unstack(tiny.params, "layers"), [40, *[1] * 35]
    a, b = (stepped(tiny, params, form, cuts) for params in (tiny.params, apart))
    assert off(a, b) < 0.05


def test_a_bfloat16_model(tiny):
    low = dataclasses.replace(
        tiny, dtype=jnp.bfloat16, params=jax.tree.map(lambda a: a.astype(jnp.bfloat16), tiny.params)
    )
    eight = KVFormat(8, window=8, group=8, channels=8)
    got = stepped(low, low.params, eight, [20, *[1] * 55], jnp.bfloat16)
    want = jax.jit(low.apply_fn)(low.params, TOKENS)
    assert got.dtype == jnp.float32
    assert jnp.linalg.norm(got - want) < 0.1 * jnp.linalg.norm(want)


def test_strict_rounds_all_but_sinks_and_window(tiny):
    exact = jax.jit(tiny.apply_fn)(tiny.params, TOKENS)
    run = lambda form, strict: jax.jit(tiny.apply_kv(form, strict))(tiny.params, TOKENS)
    form = KVFormat(4, window=0, sinks=0, group=8, channels=8)
    assert jnp.abs(run(form, True)[:, 0] - exact[:, 0]).max() > 1e-3  # of one token, its own
    np.testing.assert_allclose(run(form, False)[:, 0], exact[:, 0], atol=1e-4)
    kept = dataclasses.replace(form, sinks=1)
    np.testing.assert_allclose(run(kept, True)[:, 0], exact[:, 0], atol=1e-4)
    recent = dataclasses.replace(form, window=8)
    np.testing.assert_allclose(run(recent, True)[:, :8], exact[:, :8], atol=1e-4)
    assert jnp.abs(run(recent, True)[:, 8] - exact[:, 8]).max() > 1e-3
    np.testing.assert_allclose(run(dataclasses.replace(form, window=80), True), exact, atol=1e-4)
    assert tiny.apply_kv(form) is tiny.apply_kv(KVFormat(4, "pre", 0, 0, 8, 8))


PROMPT = np.random.default_rng(2).integers(0, 256, 70).tolist()


@pytest.mark.parametrize("length", [1, 33, 70])
def test_generation_is_the_naive_loop(tiny, length):
    """Without padding, buckets and a compiled loop."""
    form = KVFormat(2, window=0, sinks=0, group=16, channels=8)
    run = lambda form, n: generate(
        tiny.apply_cached, tiny.params, tiny.config, PROMPT[:length], n, kv=form
    )
    step, tokens, naive = jax.jit(tiny.apply_cached), PROMPT[:length], []
    cache = init_cache(tiny.config, 1, 160, kv=form)
    for _ in range(40):
        logits, cache = step(tiny.params, jnp.asarray([tokens]), cache)
        tokens = [int(logits[0, -1].argmax())]
        naive += tokens
    coarse = run(form, 40)
    assert coarse == naive[: len(coarse)]
    assert coarse != run(None, 40)
    assert run(form, 7) == coarse[:7]


@pytest.mark.parametrize("length", [2, 40])
def test_an_exact_prefix_is_a_call_of_its_own(tiny, length):
    """The prompt comes in two calls, the padding in the second, or in both."""
    form = KVFormat(2, window=0, sinks=0, group=16, channels=8)
    run = lambda model: generate(
        model.apply_cached, model.params, model.config, PROMPT[:length], 30, kv=form
    )
    assert run(dataclasses.replace(tiny, prefix=5)) == run(tiny)


def rounded_inputs(model, form):
    with pytest.warns(UserWarning, match="assumed"):  # rightly: stacks of layers
        params = jq.quantize(model.params, recipe_of(jq.rtn(8, -1)))
    return jq.ptq.with_activations(params, form)


def test_generation_with_an_exact_prefix_and_a_packed_cache(tiny):
    """The whole text again for every token; a prompt shorter than a group rounds nothing yet."""
    form = KVFormat(2, "post", window=0, sinks=1, group=16, channels=8)
    params, prompt = rounded_inputs(tiny, "int3"), PROMPT[:9]
    prefixed = dataclasses.replace(tiny, prefix=3)

    def slow(logits):
        ids, step = list(prompt), jax.jit(jq.quantized(logits))
        for _ in range(30):
            padded = jnp.asarray([ids + [0] * (48 - len(ids))])
            ids.append(int(step(params, padded)[0, len(ids) - 1].argmax()))
        return ids[9:]

    got = generate(jq.quantized(prefixed.apply_cached), params, tiny.config, prompt, 30, kv=form)
    assert got == slow(prefixed.apply_kv(form, strict=False))
    assert got != slow(tiny.apply_kv(form, strict=False))  # the twin


def test_an_exact_prefix_with_rounded_keys_and_values(tiny):
    """It decides what of activations, the format what of keys and values is rounded.

    Two programs may round a code at a tie two ways, which moves what later tokens see, a little.
    """
    form = KVFormat(4, window=0, sinks=5, group=8, channels=8)
    prefixed = dataclasses.replace(tiny, prefix=5)
    run = lambda model, params: jax.jit(jq.quantized(model.apply_kv(form)))(params, TOKENS)
    rounded = run(tiny, tiny.params)
    difference = jnp.mean(jnp.abs(run(prefixed, tiny.params) - rounded))
    exact = jax.jit(jq.quantized(tiny.apply_fn))(tiny.params, TOKENS)
    effect = jnp.mean(
        jnp.abs(rounded - exact)
    )  # what a prefix without rounded keys would differ by
    assert difference < 0.02 * effect and effect > 0.02
    params = rounded_inputs(tiny, "int2")
    first = jax.jit(jq.quantized(tiny.apply_fn))(jq.ptq.with_activations(params, None), TOKENS)
    got, without = run(prefixed, params), run(tiny, params)
    np.testing.assert_allclose(got[:, :5], first[:, :5], rtol=1e-4, atol=1e-4)
    assert jnp.abs(got - without)[:, :5].max() > 0.1
    assert jnp.abs(got - without)[:, 5:].max() > 0.1


def test_compiles_once_for_each_bucket(tiny):
    traces = []

    def counted(params, tokens, cache):
        traces.append(tokens.shape)
        return tiny.apply_cached(params, tokens, cache)

    run = lambda kv, *args: generate(counted, tiny.params, tiny.config, *args, kv=kv)
    run(FORMS[0], PROMPT[:3], 4)
    first = len(traces)
    run(dataclasses.replace(FORMS[0]), PROMPT[:32], 32, 0.7, jax.random.key(1))
    run(FORMS[0], PROMPT[:9], 1)
    assert len(traces) == first
    run(FORMS[1], PROMPT[:9], 2)
    assert len(traces) == 2 * first


def test_a_format_that_does_not_fit(tiny):
    message = "channels = 32 must divide the 8 channels of a head"
    with pytest.raises(ValueError, match=message):
        generate(tiny.apply_cached, tiny.params, tiny.config, PROMPT, 4, kv=KVFormat(4))
    with pytest.raises(ValueError, match=message):
        tiny.apply_kv(KVFormat(4))
    cache = init_cache(tiny.config, 1, 32, kv=FORMS[0])
    with pytest.raises(ValueError, match="33 tokens do not fit in a cache of size 32"):
        tiny.apply_cached(tiny.params, jnp.ones((1, 33), jnp.int32), cache)


def temporary(model, params, room, form):
    """Bytes that a generation takes beside the weights."""
    return generation_memory(model.apply_cached, params, model.config, room, form)


def takes_what_the_bits_say(model, params, form, step):
    """Of the compiled program: for each of 4,096 tokens, and beside them what a step needs."""
    c = model.config
    sizes = (c.n_layers, c.n_kv_heads, c.head_dim)
    long = temporary(model, params, 4096, form)
    growth = (long - temporary(model, params, 2048, form)) / 2048
    assert growth < 1.01 * form.bytes_per_token(*sizes) + 8  # and the token itself
    recent = (form.window + form.group + form.sinks) * 8 * sizes[0] * sizes[1] * sizes[2]
    assert long < 4096 * form.bytes_per_token(*sizes) + recent + step


def test_bytes_of_a_generation_are_what_the_bits_say(tiny):
    form = KVFormat(2, window=16, group=16, channels=8)
    for params in (tiny.params, jq.ptq.unstack(tiny.params, "layers")):
        takes_what_the_bits_say(tiny, params, form, 0.35e6)
    assert temporary(tiny, tiny.params, 4096, None) > 4096 * 4 * 2 * 3 * 2 * 8  # the twin: floats


# --- the command ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("cli")
    write_folder(where / "m", BASE | {"max_position_embeddings": 512}, random_tensors(BASE))
    (where / "m" / "tokenizer.json").write_text(byte_tokenizer_json())
    (where / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return where


def test_the_command(folder, run):
    text = ("eval", folder / "m", "--text", folder / "text.txt", "--ctx", 64, "--chunks", 2)
    small = ("--kv-group", 16, "--kv-channels", 8, "--kv-window", 16, "--json")
    plain, strict, loose, fine = (
        json.loads(run(*text, *more)[1])
        for more in (
            ("--json",),
            ("--kv-bits", 2, *small),
            ("--kv-bits", 2, *small, "--no-strict"),
            ("--kv-bits", 8, *small, "--strict", "--kv-keys", "post", "--kv-sinks", 0),
        )
    )
    assert "kv_bits_per_value" not in plain
    assert strict["perplexity"] != loose["perplexity"] != plain["perplexity"]
    assert fine["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-2)
    assert strict["kv_bits_per_value"] == 2 + (32 / 16 + 32 / 8) / 2
    assert strict["kv_bytes_per_token"] == 2 * 3 * 2 * 8 * 5 / 8
    status, out, _ = run("generate", folder / "m", "--prompt", "the", "--kv-bits", 8, *small)
    report = json.loads(out)
    assert status == 0
    assert report["kv_bits_per_value"] == 11
    assert report["tokens"] > 0


@pytest.mark.parametrize(
    "options, status, message",
    [
        ("--kv-bits 5", 2, "bits must be one of (2, 3, 4, 8), got 5"),
        ("--kv-bits x", 2, "is not a valid integer"),
        ("--kv-window 32", 2, "--kv-window needs --kv-bits"),
        ("--kv-keys pre", 2, "--kv-keys needs --kv-bits"),
        ("--kv-bits 4 --kv-keys during", 2, "is not one of"),
        (
            "--kv-bits 4 --kv-window 16",
            2,
            "window must be 0 or a multiple of the group, 32, got 16",
        ),
        ("--kv-bits 4 --kv-sinks -1", 2, "sinks must not be negative"),
        ("--kv-bits 4", 1, "channels = 32 must divide the 8 channels of a head"),
    ],
)
def test_bad_usage_is_one_line(folder, run, options, status, message):
    for command in (("generate", "--prompt", "x"), ("eval", "--text", "builtin", "--ctx", 64)):
        name, *rest = command
        code, out, err = run(name, folder / "m", *rest, *options.split())
        errors = [line for line in err.splitlines() if line.startswith("error:")]
        assert (code, out, len(errors)) == (status, "", 1), err
        assert message in errors[0]
    code, _, err = run("eval", folder / "m", "--text", "builtin", "--strict")
    assert code == 2
    assert "--strict and --no-strict need --kv-bits" in err


# --- the real model -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    return load("smollm2-135m")


@pytest.mark.model
@pytest.mark.slow
def test_perplexity_where_every_token_sees_rounded_keys_and_values(real, monkeypatch):
    """The twin has keys by token. The text is an easy one: floats come to 9.19."""
    chunks = token_sequences(real, read_text("builtin"), 512, 2)
    perplexity = lambda fn: evaluate(fn, real.params, chunks).perplexity
    exact = perplexity(real.apply_fn)
    cost = lambda *form, **more: perplexity(real.apply_kv(KVFormat(*form, **more))) / exact
    assert cost(4, window=0) < 1.02
    assert cost(3) < 24.7 / 24.01
    assert cost(2, window=128) < 25.9 / 24.01
    by_token = lambda keys, form, _: kv_cache.rounded_values(keys, form)
    monkeypatch.setattr(kv_cache, "rounded_keys", by_token)
    assert cost(4, window=0) > 1.05
    assert cost(2, window=128) > 1.2


@pytest.mark.model
@pytest.mark.slow
def test_eight_bits_say_what_floats_say(real):
    ids = real.tokenizer.encode("The history of the steam engine begins with")
    run = lambda kv: generate(real.apply_cached, real.params, real.config, ids, 90, kv=kv)
    exact = run(None)
    assert len(exact) > 40
    assert run(KVFormat(8, window=0)) == exact
    assert run(KVFormat(2, window=0, sinks=0)) != exact


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_bytes_of_a_long_generation_are_what_the_bits_say(real, apart):
    params = jq.ptq.unstack(real.params, "layers") if apart else real.params
    for form in (KVFormat(4), KVFormat(2, "post", window=128)):
        takes_what_the_bits_say(real, params, form, 16e6)
