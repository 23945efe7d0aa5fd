"""Quantized key-value caches of SmolLM2-135M: perplexity, bytes, speed of decoding.

Run: python -m tests.benchmarks.kv_cache [TEXT] [--quality] [--only WORD ...]   (else CPython's help
topics). Strict perplexity: on the first 4 chunks of 512 tokens, of which the last 257 predictions
are scored, every token sees all keys and values rounded, its own too, but for sinks and window.
Decoding: with layers apart at 4 bits and int8 activations, where the cache is the most of it, at
two lengths, in turns with a float32 cache: medians. Last, a generation of 4,096 tokens and what its
compiled program takes. With --quality, perplexities and bytes alone.
"""

import argparse
import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp

import jaxquant as jq
from jaxquant.evaluation import evaluate
from jaxquant.formats.kv_cache import KVFormat
from jaxquant_models import init_cache, load
from jaxquant_models.readers.text import BUILTIN, read_text
from jaxquant_models.runs.generate import generate
from jaxquant_models.runs.recipes import recipe_of
from jaxquant_models.runs.sequences import token_sequences
from tests.benchmarks.record import Record, add_option
from tests.support.generation_memory import generation_memory

CHUNKS, CONTEXT = 4, 512
STEPS, REPEATS, LENGTHS, ROOM = 16, 5, (512, 4000), 4096
FORMS = [
    None,
    KVFormat(8),
    KVFormat(4, "post", window=0, sinks=0),
    KVFormat(4, window=0, sinks=0),
    KVFormat(4),
    KVFormat(3, "post"),
    KVFormat(3),
    KVFormat(2, window=0, sinks=0),
    KVFormat(2),
    KVFormat(2, "post", window=128),
    KVFormat(2, window=128),
    KVFormat(2, window=128, sinks=4),
]


def named(form):
    if form is None:
        return "float32"
    return f"{form.bits} bits, {form.rope}, window {form.window}, sinks {form.sinks}"


def sizes(config, form):
    """Bits per value and bytes per token, scales included."""
    shape = (config.n_layers, config.n_kv_heads, config.head_dim)
    if form is None:
        return 32, 4 * 2 * shape[0] * shape[1] * shape[2]
    return form.bits_per_value, form.bytes_per_token(*shape)


def decoding(apply_cached, params, config, form, length):
    """Runs some steps after `length` others (which are zeros: nothing hangs on their values)."""

    @jax.jit
    def run(params, cache):
        def step(_, state):
            logits, cache = apply_cached(params, state[0][None, None], state[1])
            return jnp.argmax(logits[0, 0]).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, STEPS, step, (jnp.int32(1), cache))[0]

    cache, at = init_cache(config, 1, ROOM, kv=form).apart(), {"length": jnp.int32(length)}
    cache = cache._replace(**at) if form is None else dataclasses.replace(cache, **at)
    return lambda: run(params, cache).block_until_ready()


def beside(run, other):
    """Median seconds of a step, and of the ratio to the other's, in turns."""
    run(), other()
    times, ratios = [], []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        between = time.perf_counter()
        other()
        times.append((between - start) / STEPS)
        ratios.append((between - start) / (time.perf_counter() - between))
    return statistics.median(times), statistics.median(ratios)


def speed(model, forms):
    """Prints how long a step takes, and over one with a float32 cache; a long generation."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    sites = jq.sites(model.apply_fn, model.params, tokens)
    packed = jq.quantize(model.params, recipe_of(jq.rtn(bits=4)), sites)
    apart = jq.ptq.with_activations(jq.ptq.unstack(packed, "layers"), "int8")
    cached = jq.quantized(model.apply_cached)
    decode = functools.partial(decoding, cached, apart, model.config)
    floats = {n: decode(None, n) for n in LENGTHS}
    for form in forms:
        for n in LENGTHS:
            seconds, ratio = beside(decode(form, n), floats[n])
            print(f"{named(form):33} {1e3 * seconds:7.1f} ms at {n:,}, {ratio:.2f}", flush=True)
    long_generation(cached, apart, model)


def long_generation(cached, params, model):
    config = dataclasses.replace(model.config, eos_ids=())
    for form in (None, KVFormat(4), KVFormat(2)):
        start = time.perf_counter()
        count = len(generate(cached, params, config, [1] * 8, ROOM, kv=form))
        took = time.perf_counter() - start
        taken = generation_memory(cached, params, config, ROOM, form) / 2**20
        name = f"{form.bits} bits" if form else "float32"
        print(f"{count} tokens, {name}: {took:.0f} s, {taken:.1f} MiB", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", default=BUILTIN)
    parser.add_argument("--quality", action="store_true", help="no times")
    parser.add_argument("--only", nargs="*", default=[""], help="words of names")
    add_option(parser)
    args = parser.parse_args()
    rows = Record(args.json, "cache", "perplexity", "bits per value", "bytes per token")
    model = load("smollm2-135m")
    chunks = token_sequences(model, read_text(args.text), CONTEXT, CHUNKS)
    forms = [form for form in FORMS if any(word in named(form) for word in args.only)]
    for form in forms:
        logits = model.apply_fn if form is None else model.apply_kv(form)
        perplexity = evaluate(logits, model.params, chunks, first=CONTEXT // 2 - 1).perplexity
        bits, per_token = sizes(model.config, form)
        rows.add(named(form), f"{perplexity:.3f}", f"{bits:g}", f"{per_token:,.0f}")
        print(f"{named(form):33} {perplexity:8.4f}, {bits:5.2f} bits a value, "
              f"{per_token:7,.0f} bytes a token", flush=True)  # fmt: skip
    if not args.quality:
        speed(model, forms)


if __name__ == "__main__":
    main()
