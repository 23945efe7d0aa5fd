"""The limits of SmolLM2-135M: of a healthy version at 4 bits, and of broken ones.

Run: python -m tests.benchmarks.limits. `jaxquant.theory.limits.run_suite` with `effort="fast"`
compares every version with the float model. In the first broken version, the scales of one layer
are in another order. The second multiplies all logits by 5, so that its greedy texts
are those of the float model and its sampled texts loop. The program ends with an error if
generation collapses in the healthy version or survives in a broken one.
"""

import argparse
import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant as jq
from jaxquant.theory.limits.suite import run_suite
from jaxquant_models import load
from jaxquant_models.readers.text import read_text
from jaxquant_models.runs.limits import subject_of
from jaxquant_models.runs.recipes import recipe_of
from tests.benchmarks.record import Record, add_option

CHUNKS, TOKENS, HEAT = 8, 512, 5.0
LAYER = 11  # where massive activations arise; other layers survive more easily
SHOWN = (
    "generation survival", "sampled loops", "judged by the reference", "passage recall",
    "first divergence", "free running",
)  # fmt: skip


def healthy(model):
    """The model at 4 bits by GPTQ, calibrated on the half of the text that is not examined."""
    ids = model.tokenizer.encode(read_text("builtin", calibration=True))[: CHUNKS * TOKENS]
    batches = list(jnp.asarray(np.reshape(ids, (CHUNKS, 1, TOKENS))))
    stats = jq.calibrate(model.apply_fn, model.params, batches)
    return jq.quantize(model.params, recipe_of(jq.gptq(bits=4)), stats)


def shuffled(packed):
    """The packed model with the scales of every matrix of a layer in another order."""

    def moved(weight):
        if not isinstance(weight, jq.QTensor):
            return weight
        scales = weight.data["scale"]
        other = jax.random.permutation(jax.random.key(0), scales[LAYER].reshape(-1))
        placed = scales.at[LAYER].set(other.reshape(scales.shape[1:]))
        return dataclasses.replace(weight, data={**weight.data, "scale": placed})

    is_leaf = lambda leaf: isinstance(leaf, jq.QTensor)
    return {**packed, "layers": jax.tree.map(moved, packed["layers"], is_leaf=is_leaf)}


def hot(params):
    """The model with the gain of the last norm, and thus all logits, multiplied."""
    return {**params, "norm": {"scale": HEAT * params["norm"]["scale"]}}


def cell(row):
    number = "" if row.measured is None else f"{row.measured:.3g}"
    return number if row.verdict == "-" else f"{number} {row.verdict}".strip()


def main():
    parser = argparse.ArgumentParser()
    add_option(parser)
    options = parser.parse_args()
    rows = Record(options.json, "version", *SHOWN, "seconds")
    model, text = load("smollm2-135m"), read_text("builtin")
    reference, packed, wrong = subject_of(model, text), healthy(model), []
    versions = {
        "gptq 4 bits": (packed, True),
        "scales of a layer shuffled": (shuffled(packed), False),
        "logits times 5": (hot(model.params), False),
    }
    for name, (params, survives) in versions.items():
        start = time.perf_counter()
        subject = subject_of(dataclasses.replace(model, params=params), text, name=name)
        suite = run_suite(subject, reference, effort="fast")
        seconds = time.perf_counter() - start
        print(f"{name}\n{suite}\n", flush=True)
        rows.add(name, *(cell(suite.row(s)) for s in SHOWN), f"{seconds:.0f}")
        found = suite.row("generation survival").holds
        if found is (not survives) or (found is None and not survives):
            wrong.append(name)
    if wrong:
        raise SystemExit(f"verdicts that are wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
