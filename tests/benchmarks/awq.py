"""AWQ beside nearest rounding, LDLQ, both, and rotations, at 2, 3 and 4 bits, on two models.

Run: python -m tests.benchmarks.awq [TEXT] [--models smollm2 minilm] [--only WORD ...]   (else
CPython's help topics). Weights are asymmetric integers in groups of 128, of 64 where 128 does not
divide; bits count every byte that a weight holds.

SmolLM2-135M: perplexity, the first 4 chunks of 512 tokens scored, calibrated on the last 8; AWQ's
scales are judged by attention or MLP. Its float weights are decoded Q4_1, in groups of 32 along an
input, which flatters integers that are not rotated.

MiniLM, a sentence encoder in float32, where nothing is flattered: mean cosine of 256 sentences'
vectors to those of the float model, calibrated on other sentences. It is a plain function to
jaxquant, without inspection: AWQ's scales are judged by the error of products.
"""

import argparse
import dataclasses
import functools
import math
import re
import time
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.evaluate import chunk, evaluate
from jaxquant.paths import matches
from jaxquant.rounding import Clipped
from models import pipeline
from models.bert import FOLDS
from models.encoder import load_encoder
from models.inspection import Inspector
from models.text import BUILTIN, read_text

CONTEXT, SCORED, CALIBRATION, INSPECTED = 512, 4, 8, 4
SENTENCES, OTHERS = 256, 4096
BITS = (2, 3, 4)
ROWS = {
    "nearest": jq.rtn,
    "AWQ": jq.awq,
    "LDLQ": jq.gptq,
    "AWQ + LDLQ": functools.partial(jq.awq, feedback=True),
    "rotation + LDLQ": functools.partial(jq.quarot, activation_bits=16, symmetric=False),
}


def group_size(k):
    """128, or 64 where that does not divide an input's channels."""
    return 128 if k % 128 == 0 else 64


def recipe_of(row, bits, sites):
    """The matrices of every layer by a row of the table, queries and keys not clipped."""
    rules = []
    for path, site in sites.items():
        if not matches(path, pipeline.LAYERS):
            continue
        method = ROWS[row](bits, group_size(math.prod(site.shape[a] for a in site.contracted)))
        if isinstance(method.rounder, Clipped) and matches(path, pipeline.CLIPPED_NOT):
            method = dataclasses.replace(method, rounder=method.rounder.rounder)
        rules.append((path, method))
    return jq.Recipe([*rules, ("*", jq.KEEP)])


def smollm2(text):
    """Float figure, and what quantizes by a recipe and measures."""
    model = pipeline.load_any("smollm2-135m")
    chunks = chunk(model.tokenizer.encode(text), CONTEXT)
    scored, calibration = chunks[:SCORED], chunks[-CALIBRATION:]
    stats = pipeline.calibrate_on(model, calibration, weighting="uniform")
    inspect = Inspector(model, calibration[:INSPECTED])
    logits = jq.quantized(model.apply_fn)
    figure = lambda params: evaluate(logits, params, scored, first=CONTEXT // 2 - 1).perplexity
    quantize = lambda recipe: pipeline.quantized_model(model, recipe, stats, inspect=inspect).params
    return "perplexity", model.params, stats.sites, quantize, figure


def minilm(text):
    """The same."""
    encoder = load_encoder("minilm")
    found = sentences(text)
    tokens = encoder.tokens(found[:SENTENCES])
    batches = unpadded(encoder, found[SENTENCES:][-OTHERS:])
    stats = jq.calibrate(encoder.apply_fn, encoder.params, batches)
    vectors = jax.jit(jq.quantized(encoder.apply_fn))
    want = vectors(encoder.params, tokens)
    figure = lambda params: float(jnp.mean(jnp.sum(vectors(params, tokens) * want, axis=1)))
    quantize = lambda recipe: jq.quantize(*jq.fold(encoder.params, recipe, stats, FOLDS))
    return "mean cosine", encoder.params, stats.sites, quantize, figure


def sentences(text):
    """Those of six words or more, outside headings."""
    text = re.sub(r" @(.)@ ", r"\1", text)  # WikiText-2's "4 @.@ 5"
    parts = [p for p in re.split(r"\n\s*\n", text) if not p.strip().startswith("=")]
    found = [s for p in parts for s in re.split(r'(?<=[a-z0-9 )][.!?])\s+(?=[A-Z"])', p.strip())]
    return [s for s in found if len(s.split()) >= 6]


def unpadded(encoder, found):
    """Batches [b, t] of sentences of equal length, lest padding be taken for input.

    Of few lengths, for each compiles anew.
    """
    rows = defaultdict(list)
    for s in found:
        (ids,) = encoder.tokens([s])
        rows[len(ids)].append(ids)
    return [np.stack(group) for t, group in sorted(rows.items()) if t % 8 == 0 and len(group) >= 8]


MODELS = {"smollm2": smollm2, "minilm": minilm}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", default=BUILTIN)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--only", nargs="*", default=[""], help='words of names, "3 bits AWQ"')
    args = parser.parse_args()
    for name in args.models:
        what, params, sites, quantize, figure = MODELS[name](read_text(args.text))
        print(f"{name}: {what}, {figure(params):.4f} in floats", flush=True)
        for bits in BITS:
            for row in ROWS:
                label = f"{bits} bits {row}"
                if not any(word in label for word in args.only):
                    continue
                start = time.monotonic()
                packed = quantize(recipe_of(row, bits, sites))
                took = time.monotonic() - start
                held = jq.bits_per_weight(packed)
                print(f"{label:24} {held:7.4f} {figure(packed):10.4f} {took:5.0f} s", flush=True)


if __name__ == "__main__":
    main()
