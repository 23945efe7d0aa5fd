"""Perplexity of SmolLM2-135M by method and calibration weighting.

Run: python tests/benchmarks/perplexity.py [TEXT]   (else CPython's help topics). Scores the first
16 chunks of 512 tokens; calibrates on the last 16.
"""

import sys
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

CHUNKS, CONTEXT = 16, 512


def main():
    model = load("smollm2-135m")
    ids = model.tokenizer.encode(read_text(sys.argv[1] if len(sys.argv) > 1 else BUILTIN))
    scored, calibration = chunk(ids, CONTEXT, CHUNKS), chunk(ids[-CHUNKS * CONTEXT :], CONTEXT)

    def perplexity(params):
        return evaluate(jq.quantized(model.apply_fn), params, scored).perplexity

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
                took = time.monotonic() - start
                print(
                    f"{name:20} {weighting or '':9} {jq.bits_per_weight(params):.3f} bits/weight  "
                    f"perplexity {perplexity(params):7.2f}  {took:4.0f} s",
                    flush=True,
                )
    parts = blockwise(model.config)
    for bits in (4, 3):  # each block calibrated on what the quantized ones before it give
        start = time.monotonic()
        hidden = [parts.embed(model.params, jnp.asarray(s)[None]) for s in calibration]
        layers, _ = jq.ptq.quantize_blocks(
            parts.block, model.params["layers"], hidden,
            jq.Recipe([("*kernel", jq.gptq(bits)), ("*", jq.KEEP)]), weighting="uniform",
        )  # fmt: skip
        params, took = {**model.params, "layers": layers}, time.monotonic() - start
        print(
            f"{'gptq, act-order':20} {'uniform, sequential':9} {jq.bits_per_weight(params):.3f} "
            f"bits/weight  perplexity {perplexity(params):7.2f}  {took:4.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
