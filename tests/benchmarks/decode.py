"""Prefill and decode of SmolLM2-135M on this machine: packed weights beside float ones.

Run: make bench. One process, the variants in turn, medians, ratios to float32. "int8": the inputs
of packed matrices as integers, a scale per token.

    python -m tests.benchmarks.decode --coded DIR

adds an entropy-coded checkpoint of the model (`jaxquant quantize smollm2-135m --method
entropy_coded --bits 2 --out DIR`) as `generate` serves it, the time to read it, and whether its
tokens are those of the dequantized model.
"""

import argparse
import itertools
import statistics
import time

import jax
import jax.numpy as jnp

import jaxquant as jq
from jaxquant_models import load
from jaxquant_models.runs.generate import generate
from jaxquant_models.runs.recipes import recipe_of
from jaxquant_models.runs.serving import serving_model
from tests.benchmarks.record import Record, add_option

REPEATS, TOKENS = 5, 32


def seconds(run):
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def variants():
    model = load("smollm2-135m")
    yield "float32", model, model.params
    sites = jq.sites(model.apply_fn, model.params, jnp.ones((1, 8), jnp.int32))
    half = load("smollm2-135m", jnp.bfloat16)
    yield "bfloat16", half, half.params
    for bits in (4, 2):
        recipe = recipe_of(jq.rtn(bits=bits))
        packed = jq.quantize(model.params, recipe, sites)
        yield f"packed {bits}-bit", model, packed
        # A scan copies a layer's words out of the stack before a kernel reads them.
        apart = jq.ptq.unstack(packed, "layers")
        yield f"packed {bits}-bit, layers apart", model, apart
        yield f"packed {bits}-bit, apart, int8", model, jq.ptq.with_activations(apart, "int8")


def coded(directory):
    """Of an entropy-coded checkpoint, ready to serve."""
    model = load(directory)
    start = time.perf_counter()
    params = serving_model(model, print).params
    took = time.perf_counter() - start
    changed = [w for _, w in jq.core.path_leaves(params) if isinstance(w, jq.QTensor)]
    weights = sum(w.size for w in changed)
    print(f"read in {took:.2f} s, {weights / took / 1e6:.0f} million weights a second")
    apart = jq.ptq.unstack(params, "layers")
    yield "entropy-coded, in words", model, params
    yield "entropy-coded, apart", model, apart
    run = lambda p: generate(jq.quantized(model.apply_cached), p, model.config, [1] * 8, TOKENS)
    want = run(jq.dequantize(params))
    same = [run(p) == want for p in (params, apart)]
    print(f"tokens equal to the dequantized model's: {same}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--coded", help="an entropy-coded checkpoint")
    parser.add_argument("--only", default="", help="rows whose name begins with this")
    add_option(parser)
    options = parser.parse_args()
    columns = ("weights", "bits per weight", "prefill of 512", "decode, per token")
    rows = Record(options.json, *columns)
    print("weights                       bits  prefill 512  ratio  decode/token  ratio")
    first = None
    more = coded(options.coded) if options.coded else ()
    for name, model, params in itertools.chain(variants(), more):
        if not name.startswith((options.only, "entropy-coded")):
            continue
        forward = jax.jit(jq.quantized(model.apply_fn))
        cached = jq.quantized(model.apply_cached)
        prompt = jnp.ones((1, 512), jnp.int32)
        prefill = seconds(lambda f=forward, p=params, x=prompt: f(p, x))
        dtype = model.dtype

        def decode(n, c=cached, p=params, m=model, d=dtype):
            return seconds(lambda: generate(c, p, m.config, [1] * 8, n, cache_dtype=d))

        # The difference of two lengths within one bucket leaves out prefill and start-up.
        token = (decode(TOKENS) - decode(4)) / (TOKENS - 4)
        first = first or (prefill, token)
        bits = jq.bits_per_weight(params)
        rows.add(
            name,
            f"{bits:.2f}",
            f"{prefill / first[0]:.2f} ({prefill:.2f} s)",
            f"{token / first[1]:.2f} ({1e3 * token:.1f} ms)",
        )
        print(
            f"{name:27} {bits:6.2f} {prefill:10.3f} s {prefill / first[0]:6.2f} "
            f"{1e3 * token:10.1f} ms {token / first[1]:6.2f}"
        )


if __name__ == "__main__":
    main()
