"""Quantized key-value caches of SmolLM2-135M: perplexity, bytes, speed of decoding.

Run: python -m tests.benchmarks.kv_cache [TEXT]   (else CPython's help topics). Strict perplexity:
on the first 4 chunks of 512 tokens every token sees all keys and values rounded, its own too, but
for sinks and window. Decoding: with layers apart at 4 bits and int8 activations, where the cache
is the most of it, at two lengths, in turns with a float32 cache: medians. Last, a generation of
4,096 tokens and what its compiled program takes.
"""

import dataclasses
import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp

import jaxquant as jq
from jaxquant.evaluate import evaluate
from jaxquant.kv_cache import KVFormat
from models import init_cache, pipeline
from models.generate import _run, generate
from models.text import BUILTIN, read_text

CHUNKS, CONTEXT = 4, 512
STEPS, REPEATS, LENGTHS, ROOM = 16, 5, (512, 4000), 4096
FORMS = [
    None,
    KVFormat(8),
    KVFormat(4, window=0, sinks=0),
    KVFormat(4),
    KVFormat(3, "post"),
    KVFormat(3),
    KVFormat(2),
    KVFormat(2, "post", window=128),
    KVFormat(2, window=128),
    KVFormat(2, window=128, sinks=4),
]


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


def temporary(apply_cached, params, config, form):
    """Bytes that the compiled program of a generation of ROOM tokens takes beside its arguments."""
    scalars = (jnp.int32(8), jnp.int32(ROOM), jnp.float32(0), jax.random.key(0))
    fixed = (apply_cached, config, ROOM, jnp.dtype("float32"))
    lowered = _run.lower(*fixed, params, jnp.ones((1, 32), jnp.int32), *scalars, kv=form)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def main():
    model = pipeline.load_any("smollm2-135m")
    text = read_text(sys.argv[1] if len(sys.argv) > 1 else BUILTIN)
    chunks = pipeline.pieces(model, text, CONTEXT, CHUNKS)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    sites = jq.sites(model.apply_fn, model.params, tokens)
    packed = jq.quantize(model.params, pipeline.recipe_of(jq.rtn(bits=4)), sites)
    apart = jq.with_activations(jq.unstack(packed, "layers"), "int8")
    cached = jq.quantized(model.apply_cached)
    print("bits keys window sinks  perplexity  bits/value  bytes/token  "
          + "  ".join(f"ms at {n:,}, ratio" for n in LENGTHS), flush=True)  # fmt: skip
    decode = functools.partial(decoding, cached, apart, model.config)
    floats = {n: decode(None, n) for n in LENGTHS}
    for form in FORMS:
        logits = model.apply_fn if form is None else model.apply_kv(form)
        perplexity = evaluate(logits, model.params, chunks).perplexity
        name = "float32"
        if form is not None:
            name = f"{form.bits:4} {form.rope:4} {form.window:6} {form.sinks:5}"
        bits, per_token = sizes(model.config, form)
        speeds = [beside(decode(form, n), floats[n]) for n in LENGTHS]
        print(f"{name:22}  {perplexity:10.3f}  {bits:10.2f}  {per_token:11,.0f}  "
              + "  ".join(f"{1e3 * s:8.1f} {r:9.2f}" for s, r in speeds), flush=True)  # fmt: skip
    long_generation(cached, apart, model)


def long_generation(cached, params, model):
    config = dataclasses.replace(model.config, eos_ids=())
    for form in (None, KVFormat(4), KVFormat(2)):
        start = time.perf_counter()
        count = len(generate(cached, params, config, [1] * 8, ROOM, kv=form))
        took = time.perf_counter() - start
        taken = temporary(cached, params, config, form) / 2**20
        name = f"{form.bits} bits" if form else "float32"
        print(f"{count} tokens, {name}: {took:.0f} s, {taken:.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
