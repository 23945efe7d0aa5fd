"""SmolLM2-135M with activations of 4 bits: transforms learned end to end, and healing.

Run: python -m tests.benchmarks.learned [TEXT] [--steps 60] [--only WORD ...]   (half an hour a row)
Scores and calibrates as `activations`; trains on the 128 chunks before those of calibration, and
judges on half of these. Learning changes transforms of inputs alone, not one weight.
"""

import argparse
import dataclasses
import time

import jaxquant as jq
from jaxquant.evaluation import chunk, evaluate
from jaxquant.tuning.learned_transforms import END_TO_END
from jaxquant_models import load
from jaxquant_models.architectures.llama import NORM_SCALES
from jaxquant_models.readers.text import BUILTIN, read_text
from jaxquant_models.runs.calibration import calibrate_model
from jaxquant_models.runs.recipes import recipe_of
from tests.benchmarks.activations import CALIBRATION, CONTEXT, SCORED
from tests.benchmarks.record import Record, add_option

TRAINING = 128


def rows():
    """Name -> method, whether its transforms are learned, and whether it is healed then."""
    flat = jq.flatquant(16, alpha=0.6, feedback=False)
    yield "A4 flatquant 0.6", flat, True, False
    yield "W4A4 flatquant 0.6 LDLQ", jq.flatquant(4, alpha=0.6), True, True
    best = {"symmetric": False, "clip": 0.8, "activations": "int4,asymmetric,clip=0.9"}
    yield "W4A4 smooth 0.6 rotated LDLQ", jq.quarot(4, alpha=0.6, **best), False, True


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", default=BUILTIN)
    parser.add_argument("--steps", type=int, default=END_TO_END.steps)
    parser.add_argument("--only", nargs="*", default=[""], help="words of names")
    add_option(parser)
    args = parser.parse_args()
    found = Record(args.json, "method", "bits per weight", "perplexity", "seconds")
    model = load("smollm2-135m")
    chunks = chunk(model.tokenizer.encode(read_text(args.text)), CONTEXT)
    calibration = chunks[-CALIBRATION:]
    training = chunks[-CALIBRATION - TRAINING : -CALIBRATION]
    held_out = calibration[: CALIBRATION // 2]
    stats = calibrate_model(model, calibration, weighting="uniform")
    fn = model.apply_training()
    how = dataclasses.replace(END_TO_END, steps=args.steps)
    start = time.monotonic()

    def told(name, params):
        logits = jq.quantized(model.apply_fn)
        got = evaluate(logits, params, chunks[:SCORED], first=CONTEXT // 2 - 1).perplexity
        took = time.monotonic() - start
        bits = jq.bits_per_weight(params)
        found.add(name, f"{bits:.3f}", f"{got:.3f}", f"{took:.0f}")
        print(f"{name:44} {bits:6.3f} bits  {got:8.3f}  {took:5.0f} s", flush=True)

    told("unquantized", model.params)
    for name, method, learns, heals in rows():
        if not any(word in name for word in args.only):
            continue
        recipe, options = recipe_of(method), {"validation": held_out}
        params = jq.quantize(model.params, recipe, stats)
        told(name, params)
        if learns:
            transforms = jq.tuning.learn(fn, model.params, recipe, stats, training, how, **options)
            params = jq.quantize(model.params, recipe, stats, transforms=transforms)
            told(f"{name}, learned", params)
        if heals:
            also = [NORM_SCALES]
            healed = jq.heal(fn, params, model.params, training, how, also=also, **options)
            told(f"{name}{', learned' * learns}, healed", healed)


if __name__ == "__main__":
    main()
