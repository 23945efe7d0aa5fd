"""Perplexity of SmolLM2-135M with activations of 8 and 4 bits, by what is done about outliers.

Run: python -m tests.benchmarks.activations [TEXT] [--only WORD ...] [--weighting NAME] [--carried]
(else CPython's help topics; else uniform, see `jq.calibrate`). Scores the first 4 chunks of 512
tokens, calibrates on the last 8. Factors of inputs are folded into what makes these, as the command
`quantize` does; --carried: they are applied in every product, as `jq.quantize` alone has them.
Weights have a scale per output; bits count every byte that a weight holds. The float weights are
decoded Q4_1 (groups of 32 along an input), so low-bit weights that are not rotated look better.
"""

import argparse
import dataclasses
import time

import jaxquant as jq
from jaxquant.evaluation import chunk, evaluate
from jaxquant_models import load
from jaxquant_models.readers.text import BUILTIN, read_text
from jaxquant_models.runs.calibration import calibrate_model
from jaxquant_models.runs.quantization import quantize_model
from jaxquant_models.runs.recipes import recipe_of
from tests.benchmarks.record import Record, add_option

CONTEXT, SCORED, CALIBRATION, SAMPLE = 512, 4, 8, 256


def methods():
    """Name -> method; "sinks exact": calibrated without the first token, which is kept exact."""
    plain = lambda bits, form, **more: dataclasses.replace(
        jq.smoothquant(bits, **more), input=None, activations=jq.Activations.of(form)
    )
    smooth, rotated = jq.smoothquant, jq.quarot
    yield "W8 A16", plain(8, "float")
    yield "W16 A8", plain(16, "int8")
    yield "W8A8", plain(8, "int8")
    yield "W8A8 asymmetric", plain(8, "int8,asymmetric")
    yield "W8 e4m3", plain(8, "float8")
    for alpha in (0.3, 0.5, 0.7, 0.85, None):
        yield f"W8A8 smooth {alpha or 'searched'}", smooth(alpha=alpha)
    eight = {"activations": "int8", "feedback": False}
    yield "W8A8 rotated", rotated(8, **eight)
    yield "W8A8 smooth 0.5 rotated", rotated(8, **eight, alpha=0.5)
    yield "W8A8 static", plain(8, "int8,static")
    yield "W8A8 static, sinks exact", plain(8, "int8,static")
    for alpha in (0.5, 0.8):
        yield f"W8A8 static smooth {alpha}", smooth(alpha=alpha, activations="int8,static")
        yield (
            f"W8A8 static smooth {alpha}, sinks exact",
            smooth(alpha=alpha, activations="int8,static"),
        )
    turned = smooth(alpha=0.8, activations="int8,static", rotate=True)
    yield "W8A8 static smooth 0.8 rotated, sinks exact", turned
    four = {"activations": "int4", "feedback": False}
    wide = four | {"symmetric": False, "activations": "int4,asymmetric,clip=0.9"}
    yield "A4", plain(16, "int4")
    yield "A4 rotated", rotated(16, **four)
    yield "A4 rotated asym .9", rotated(16, **wide)
    for alpha in (0.5, 0.6):
        yield f"A4 smooth {alpha} rotated asym .9", rotated(16, alpha=alpha, **wide)
    yield "A4 duquant 0.6", jq.duquant(16)
    yield "A4 smooth 0.5 rotated asym .9, sinks exact", rotated(16, alpha=0.5, **wide)
    yield "W4A4", plain(4, "int4")
    yield "W4A4 smooth 0.5", smooth(4, activations="int4")
    best = {"symmetric": False, "clip": 0.8, "activations": "int4,asymmetric,clip=0.9"}
    yield "W4A4 rotated", rotated(4, **four)
    for alpha in (0.5, 0.55, 0.6):
        yield f"W4A4 smooth {alpha} rotated", rotated(4, alpha=alpha, feedback=False, **best)
    yield "W4A4 duquant", jq.duquant()
    yield "W4A4 duquant, a rotation a block", jq.duquant(shared=False)
    yield "W4A4 duquant, by row", jq.duquant(by_row=True)
    for alpha in (0.55, 0.6):
        yield f"W4A4 smooth {alpha} rotated LDLQ", rotated(4, alpha=alpha, **best)
    yield "W4A4 duquant LDLQ", jq.duquant(feedback=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", default=BUILTIN)
    parser.add_argument("--only", nargs="*", default=[""], help="words of names")
    parser.add_argument("--weighting", default="uniform")
    parser.add_argument("--carried", action="store_true", help="factors are not folded")
    add_option(parser)
    args = parser.parse_args()
    rows = Record(args.json, "method", "bits per weight", "perplexity", "seconds")
    model = load("smollm2-135m")
    chunks = chunk(model.tokenizer.encode(read_text(args.text)), CONTEXT)
    scored, calibration = chunks[:SCORED], chunks[-CALIBRATION:]

    def perplexity(model, params):
        logits = jq.quantized(model.apply_fn)
        return evaluate(logits, params, scored, first=CONTEXT // 2 - 1).perplexity

    print(f"unquantized {perplexity(model, model.params):.4f}", flush=True)
    stats = {}
    for name, method in methods():
        if not any(word in name for word in args.only):
            continue
        prefix = int("sinks exact" in name)
        source = dataclasses.replace(model, prefix=prefix)
        if prefix not in stats:
            stats[prefix] = calibrate_model(
                source, calibration, weighting=args.weighting, sample=SAMPLE
            )
        start = time.monotonic()
        recipe, known = recipe_of(method), stats[prefix]
        if args.carried:
            params = jq.quantize(source.params, recipe, known)
        else:
            params = quantize_model(source, recipe, known).params
        took, bits = time.monotonic() - start, jq.bits_per_weight(params)
        got = perplexity(source, params)
        rows.add(name, f"{bits:.3f}", f"{got:.3f}", f"{took:.0f}")
        print(f"{name:42} {bits:6.3f} bits  {got:9.3f}  {took:4.0f} s", flush=True)


if __name__ == "__main__":
    main()
