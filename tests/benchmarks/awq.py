"""AWQ beside nearest rounding, LDLQ, both, and rotations, at 2, 3 and 4 bits, on two models.

Run: python -m tests.benchmarks.awq [TEXT] [--models smollm2 minilm] [--only WORD ...]   (else
CPython's help topics). Weights are asymmetric integers in groups of 128, of 64 where 128 does not
divide; bits count every byte that a weight holds.

SmolLM2-135M: perplexity, the first 4 chunks of 512 tokens scored, calibrated on the last 8. AWQ's
scales are judged by attention or MLP, and its statistics weigh tokens alike, as in the paper; those
of feedback weigh them by loss gradients, our default, and are damped by 0.1, for so few tokens. The
float weights are decoded Q4_1 (groups of 32 along an input), so integers that are not rotated look
better.

MiniLM, a sentence encoder in float32, where this is not so: mean cosine of 256 sentences'
vectors to those of the float model, calibrated on other sentences. It is a plain function to
jaxquant, without inspection: AWQ's scales are judged by the error of products.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.core.paths import matches
from jaxquant.evaluation import chunk, evaluate
from jaxquant.rounding import Clipped
from jaxquant_models import load
from jaxquant_models.architectures.bert import FOLDS
from jaxquant_models.architectures.invariances import folds
from jaxquant_models.architectures.llama import LAYER_MATRICES, QUERIES_AND_KEYS
from jaxquant_models.readers.encoder import load_encoder
from jaxquant_models.readers.text import BUILTIN, read_text
from jaxquant_models.runs.calibration import calibrate_model
from jaxquant_models.runs.module_loss import ModuleLoss
from tests.benchmarks.record import Record, add_option

CONTEXT, SCORED, CALIBRATION, INSPECTED = 512, 4, 8, 4
SENTENCES, BATCH, OTHERS = 256, 64, 4096
BITS = (2, 3, 4)
ROWS = {
    "nearest": jq.rtn,
    "nearest, 96": jq.rtn,  # in smaller groups, for more bits than AWQ's factors take
    "AWQ": jq.awq,
    "LDLQ": jq.gptq,
    "AWQ + LDLQ": functools.partial(jq.awq, feedback=True),
    "rotation + LDLQ": functools.partial(jq.quarot, activations=None, symmetric=False),
}


def group_size(row, k):
    """128, or 64 where that does not divide an input's channels; or as the row says."""
    return int(row[-2:]) if row[-1].isdigit() else 128 if k % 128 == 0 else 64


def recipe_of(row, bits, sites, damping=0.01):
    """The matrices of every layer by a row of the table, queries and keys not clipped."""
    rules, options = [], {"damping": damping} if "LDLQ" in row else {}
    for path, site in sites.items():
        if not matches(path, LAYER_MATRICES):
            continue
        k = math.prod(site.shape[a] for a in site.contracted)
        method = ROWS[row](bits, group_size(row, k), **options)
        if isinstance(method.rounder, Clipped) and matches(path, QUERIES_AND_KEYS):
            method = dataclasses.replace(method, rounder=method.rounder.rounder)
        rules.append((path, method))
    return jq.Recipe([*rules, ("*", jq.KEEP)])


class Subject(NamedTuple):
    """A model to quantize, and the figure it is judged by.

    Attributes:
      stats: what is known of its inputs.
      fold: AWQ's factors, by a recipe.
      fed: what feedback is to know of the inputs of these params; None: the same.
      damping: of feedback.
    """

    what: str
    params: Any
    stats: jq.Stats
    fold: Callable[[jq.Recipe], Any]
    figure: Callable[[Any], float]
    fed: Callable[[Any], jq.Stats] | None = None
    damping: float = 0.01


def smollm2(text):
    model = load("smollm2-135m")
    chunks = chunk(model.tokenizer.encode(text), CONTEXT)
    scored, calibration = chunks[:SCORED], chunks[-CALIBRATION:]
    stats = calibrate_model(model, calibration, weighting="uniform")
    inspect = ModuleLoss.of(model, calibration[:INSPECTED])
    fold = lambda r: jq.ptq.fold(model.params, r, stats, folds(model.config), inspect=inspect)
    ask = functools.partial(evaluate, model.apply_fn, chunks=scored, first=CONTEXT // 2 - 1)
    other = lambda params: dataclasses.replace(model, params=params)
    fed = lambda params: calibrate_model(other(params), calibration)
    figure = lambda params: ask(params).perplexity
    # On 4,096 tokens: the default, 0.01, fits them too well.
    return Subject("perplexity", model.params, stats, fold, figure, fed, damping=0.1)


def minilm(text):
    encoder = load_encoder("minilm")
    found = sentences(text)
    others = unpadded(encoder, found[SENTENCES:][-OTHERS:])
    stats = jq.calibrate(encoder.apply_fn, encoder.params, others)
    fold = lambda recipe: jq.ptq.fold(encoder.params, recipe, stats, FOLDS)
    judged = sorted(found[:SENTENCES], key=len)
    tokens = [encoder.tokens(judged[i : i + BATCH]) for i in range(0, len(judged), BATCH)]
    apply = jax.jit(encoder.apply_fn)
    vectors = lambda params: jnp.concatenate([apply(params, t) for t in tokens])
    want = vectors(encoder.params)
    cosine = lambda params: float(jnp.mean(jnp.sum(vectors(params) * want, axis=1)))
    return Subject("mean cosine", encoder.params, stats, fold, cosine)


def quantized(model, row, bits, found):
    """Packed params. `found`: AWQ's factors folded, by bits: they are searched for once."""
    recipe = recipe_of(row, bits, model.stats.sites, model.damping)
    params, stats = model.params, model.stats
    if row.startswith("AWQ"):
        if bits not in found:
            found[bits] = model.fold(recipe)
        params, folded, stats = found[bits]
        recipe = with_rounders(folded, recipe)
    if "LDLQ" in row and model.fed is not None:
        stats = model.fed(params)
    return jq.quantize(params, recipe, stats)


def with_rounders(recipe, other):
    """A folded recipe with the rounders of another one."""
    rounders = {path: m.rounder for path, m in other.rules if m != jq.KEEP}
    methods = {path: m for path, m in recipe.rules if path in rounders}
    rules = [(p, dataclasses.replace(m, rounder=rounders[p])) for p, m in methods.items()]
    return jq.Recipe([*rules, ("*", jq.KEEP)])


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
    return [np.stack(group) for t, group in sorted(rows.items()) if t % 16 == 0]


MODELS = {"smollm2": smollm2, "minilm": minilm}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", default=BUILTIN)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--only", nargs="*", default=[""], help='parts of names, "3 bits AWQ"')
    add_option(parser)
    args = parser.parse_args()
    rows = Record(args.json, "model", "method", "bits per weight", "figure", "seconds")
    for name in args.models:
        model, found = MODELS[name](read_text(args.text)), {}
        print(f"{name}: {model.what}, {model.figure(model.params):.4f} in floats", flush=True)
        for bits, row in itertools.product(BITS, ROWS):
            label = f"{bits} bits {row}"
            if not any(word in label for word in args.only):
                continue
            start = time.monotonic()
            packed = quantized(model, row, bits, found)
            took, held = time.monotonic() - start, jq.bits_per_weight(packed)
            # Of plain arrays, so that one compiled program serves all rows.
            got = model.figure(jq.dequantize(packed))
            rows.add(f"{name}, {model.what}", label, f"{held:.4f}", f"{got:.4f}", f"{took:.0f}")
            print(f"{label:24} {held:7.4f} {got:10.4f} {took:5.0f} s", flush=True)


if __name__ == "__main__":
    main()
