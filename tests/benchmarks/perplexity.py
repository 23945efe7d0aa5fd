"""Perplexity of SmolLM2-135M by method and calibration weighting.

Run: python -m tests.benchmarks.perplexity [TEXT] [--json FILE]   (else CPython's help topics).
Scores the first 16 chunks of 512 tokens; calibrates on the last 16.
"""

import argparse
import time

import jax.numpy as jnp

import jaxquant as jq
from jaxquant.evaluation import chunk, evaluate
from jaxquant_models import load
from jaxquant_models.architectures.blocks import blockwise
from jaxquant_models.readers.text import BUILTIN, read_text
from jaxquant_models.runs.calibration import calibrate_model
from jaxquant_models.runs.quantization import quantize_model
from jaxquant_models.runs.recipes import recipe_of
from tests.benchmarks.record import Record, add_option

CHUNKS, CONTEXT = 16, 512


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", default=BUILTIN)
    add_option(parser)
    args = parser.parse_args()
    rows = Record(args.json, "method", "weighting", "bits per weight", "perplexity", "seconds")
    model = load("smollm2-135m")
    ids = model.tokenizer.encode(read_text(args.text))
    scored, calibration = chunk(ids, CONTEXT, CHUNKS), chunk(ids[-CHUNKS * CONTEXT :], CONTEXT)

    def perplexity(params):
        return evaluate(jq.quantized(model.apply_fn), params, scored).perplexity

    def report(name, weighting, params, took):
        bits, found = jq.bits_per_weight(params), perplexity(params)
        rows.add(name, weighting, f"{bits:.3f}", f"{found:.2f}", f"{took:.0f}")
        print(
            f"{name:20} {weighting:20} {bits:.3f} bits/weight  perplexity {found:7.2f}  "
            f"{took:4.0f} s",
            flush=True,
        )

    print(f"{len(ids):,} tokens; unquantized {perplexity(model.params):.2f}", flush=True)
    for weighting in (None, "uniform", "gradient"):
        start = time.monotonic()
        stats, methods = None, {"nearest": jq.rtn}
        if weighting:
            stats = calibrate_model(model, calibration, weighting=weighting)
            print(f"calibration, {weighting}: {time.monotonic() - start:.0f} s", flush=True)
            natural = lambda bits: jq.gptq(bits, act_order=False)
            methods = {"gptq, act-order": jq.gptq, "gptq, natural order": natural}
        for name, method in methods.items():
            for bits in (4, 3):
                start = time.monotonic()
                recipe = recipe_of(method(bits))
                params = quantize_model(model, recipe, stats).params
                report(name, weighting or "", params, time.monotonic() - start)
    parts = blockwise(model.config)
    for bits in (4, 3):  # each block calibrated on what the quantized ones before it give
        start = time.monotonic()
        hidden = [parts.embed(model.params, jnp.asarray(s)[None]) for s in calibration]
        layers, _ = jq.ptq.quantize_blocks(
            parts.block, model.params["layers"], hidden,
            jq.Recipe([("*kernel", jq.gptq(bits)), ("*", jq.KEEP)]), weighting="uniform",
        )  # fmt: skip
        params, took = {**model.params, "layers": layers}, time.monotonic() - start
        report("gptq, act-order", "uniform, sequential", params, took)


if __name__ == "__main__":
    main()
