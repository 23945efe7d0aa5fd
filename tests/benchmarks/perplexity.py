"""Perplexity of SmolLM2-135M by method and calibration weighting.

Run: python tests/benchmarks/perplexity.py TEXT   (16 chunks of 512; calibrates on the last 16)
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from models import registry
from models.llama import Llama

CHUNKS, CONTEXT = 16, 512


def main():
    model = registry.load("smollm2-135m")
    ids = np.array(model.tokenizer.encode(Path(sys.argv[1]).read_text(encoding="utf-8")))
    size = CHUNKS * CONTEXT
    scored, calibration = (a.reshape(CHUNKS, 1, CONTEXT) for a in (ids[:size], ids[-size:]))

    @jax.jit
    def nll(params, x):
        logits = jq.quantized(model.apply_fn)(params, x)[0, CONTEXT // 2 : -1]
        target = x[0, CONTEXT // 2 + 1 :, None]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), target, -1))

    def perplexity(params):
        return float(np.exp(np.mean([nll(params, jnp.asarray(c)) for c in scored])))

    llama = Llama(model.config, remat=True)

    def forward(params, x):
        return llama.apply({"params": params}, x)

    def loss(logits, x):
        score = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), x[:, 1:, None], -1)
        return -jnp.mean(score)

    print(f"{len(ids):,} tokens; unquantized {perplexity(model.params):.2f}", flush=True)
    for weighting in (None, "uniform", "gradient"):
        start = time.monotonic()
        stats = None
        if weighting:
            batches = (jnp.asarray(c) for c in calibration)
            stats = jq.calibrate(forward, model.params, batches, loss=loss, weighting=weighting)
            print(f"calibration, {weighting}: {time.monotonic() - start:.0f} s", flush=True)
        for bits in (4, 3):
            methods = [jq.gptq(bits), jq.gptq(bits, act_order=False)] if stats else [jq.rtn(bits)]
            for method in methods:
                recipe = jq.Recipe([("layers/*kernel", method), ("*", jq.KEEP)])
                start = time.monotonic()
                params = jq.quantize(model.params, recipe, stats)
                took = time.monotonic() - start
                order = {True: "act-order", False: "natural"}.get(
                    getattr(method.rounder, "act_order", None), ""
                )
                print(
                    f"{method.name:5} {bits} bits {weighting or '':9} {order:9} "
                    f"{jq.bits_per_weight(params):.3f} bits/weight  "
                    f"perplexity {perplexity(params):7.2f}  {took:4.0f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
