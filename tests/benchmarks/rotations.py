"""Perplexity of SmolLM2-135M, its residual stream rotated at random and as learned (SpinQuant).

Run: python -m tests.benchmarks.rotations [TEXT] [--bits B] [--steps N] [--rate R] [--context C]
    [--had | --no-had]   (TEXT: else CPython's help topics).
Activations of 4 bits, asymmetric, clipped at 0.9; weights to nearest, a scale per output. Scores
the first 4 chunks of 512 tokens; learns on chunks [-136:-8], of these the last are held out, with
weights of B bits in the loop (16: floats); reports W16 and W4 with the rotation found. "had": a
Hadamard transform online where the stream is not read, else none at all.
"""

import argparse
import dataclasses
import time

import jax

import jaxquant as jq
from jaxquant.evaluation import chunk, evaluate
from jaxquant.tuning.learned_rotation import ROTATING
from jaxquant_models import load
from jaxquant_models.readers.text import BUILTIN, read_text
from jaxquant_models.runs.quantization import quantize_model
from jaxquant_models.runs.recipes import recipe_of
from jaxquant_models.runs.rotation import (
    learned_rotation,
    random_rotation,
    rotate_model,
    untie_model,
)
from tests.benchmarks.record import Record, add_option

CONTEXT, SCORED, TRAINING = 512, 4, slice(-136, -8)


def recipe(bits, had):
    """Weights of so many bits, for a model whose stream is rotated."""
    clip = 1.0 if bits == 16 else 0.8
    method = jq.quarot(bits, symmetric=False, clip=clip, feedback=False)
    return recipe_of(method if had else dataclasses.replace(method, input=None), True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", nargs="?", default=BUILTIN)
    parser.add_argument("--bits", type=int, default=16, help="of weights in learning")
    parser.add_argument("--steps", type=int, default=ROTATING.steps)
    parser.add_argument("--rate", type=float, default=ROTATING.learning_rate)
    parser.add_argument("--context", type=int, default=CONTEXT, help="of training")
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--had", action=argparse.BooleanOptionalAction, default=True)
    add_option(parser)
    args = parser.parse_args()
    rows = Record(args.json, "perplexity", "A4 alone", "W4A4")
    model = untie_model(load("smollm2-135m"))
    chunks = chunk(model.tokenizer.encode(read_text(args.text)), CONTEXT)

    def perplexity(rotation, bits):
        turned = rotate_model(model, rotation)
        q = quantize_model(turned, recipe(bits, args.had), None)
        logits = jq.quantized(q.apply_fn)
        return evaluate(logits, q.params, chunks[:SCORED], first=CONTEXT // 2 - 1).perplexity

    def report(name, rotation):
        alone, both = (perplexity(rotation, bits) for bits in (16, 4))
        rows.add(name, f"{alone:.2f}", f"{both:.2f}")
        print(f"{name:10} W16A4 {alone:8.3f}  W4A4 {both:8.3f}", flush=True)

    def tell(update):
        if update.step % 5 == 0 or update.validation is not None:
            seen = "" if update.validation is None else f"held out {update.validation:.4f}"
            took = time.monotonic() - start
            print(f"{took:6.0f} s  {update.step:4} {update.loss:.4f} {seen}", flush=True)

    random = random_rotation(model, jax.random.key(0))
    report("random", random)
    sequences, start = chunks[TRAINING, : args.context], time.monotonic()
    healing = dataclasses.replace(ROTATING, steps=args.steps, learning_rate=args.rate)
    learned = learned_rotation(
        model, recipe(args.bits, args.had), sequences[: -args.held_out], healing, start=random,
        validation=sequences[-args.held_out :], progress=tell,
    )  # fmt: skip
    report("learned", learned)


if __name__ == "__main__":
    main()
