"""What training recovers of what rounding loses: SmolLM2-135M at 2, 3 and 4 bits in groups of 64.

Run: python -m tests.benchmarks.qat [TEXT] [--bits 2 3 4] [--method qat|zeroqat] [--generated 128]
Scores the first 16 chunks of 512 tokens of TEXT (else the help topics that were not trained on), as
`jaxquant eval` does. Trains on CPython's help topics and on sequences that the float model writes
(kept in build/), to be like it: first every layer by itself, then the whole. Starts: AWQ with error
feedback at 2 bits, GPTQ at 3 and 4; or --start DIR, a checkpoint. "recovered": of the way from the
start's log perplexity to the float model's. Bits count scales and zero points.
"""

import argparse
import dataclasses
import time

import jax
from rich.console import Console
from rich.table import Table

import jaxquant as jq
from jaxquant.durable.store import Folder
from jaxquant.evaluation import evaluate
from jaxquant_models import load
from jaxquant_models.cli.console import line_of
from jaxquant_models.readers.text import BUILTIN, builtin_text, read_text
from jaxquant_models.runs.calibration import calibrate_model
from jaxquant_models.runs.finetuning import FinetuningJob
from jaxquant_models.runs.finetuning_request import METHODS, FinetuningRequest
from jaxquant_models.runs.quantization import quantize_model
from jaxquant_models.runs.recipes import recipe_of
from jaxquant_models.runs.sequences import token_sequences
from tests.benchmarks.record import Record, add_option

CONTEXT, SCORED, CALIBRATION, SAMPLE = 512, 16, 16, 256


def started(model, bits, sequences):
    """A rounded model; damped, for it is calibrated on one domain and judged on another."""
    awq = bits == 2
    method = jq.awq(2, 64, feedback=True, damping=0.1) if awq else jq.gptq(bits, 64, damping=0.1)
    stats = calibrate_model(model, sequences[:CALIBRATION], sample=SAMPLE if awq else 0)
    made = quantize_model(model, recipe_of(method), stats)
    return dataclasses.replace(made, name=method.name)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("text", nargs="?", default=BUILTIN)
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--method", choices=METHODS, default="qat")
    parser.add_argument("--generated", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--block-steps", type=int, default=100)
    parser.add_argument("--start")
    add_option(parser)
    options = parser.parse_args()
    model = load("smollm2-135m")
    scored = token_sequences(model, read_text(options.text), CONTEXT, SCORED)
    # All topics, unless it is they that are scored.
    text = builtin_text()[0] if options.text == BUILTIN else "\n".join(builtin_text())
    score = lambda params: evaluate(jq.quantized(model.apply_fn), params, scored)
    columns = ("bits", "start", "perplexity", "trained", "recovered", "steps", "passes", "s")
    table, rows = Table(*columns), Record(options.json, *columns)
    floats = score(model.params)
    print(f"float {floats.perplexity:.2f}", flush=True)
    sequences = token_sequences(model, text, CONTEXT)
    for bits in options.bits:
        start = load(options.start) if options.start else started(model, bits, sequences)
        before = score(start.params)
        stored = jq.bits_per_weight(start.params)
        print(f"{bits} bits: {stored:.3f}, start {before.perplexity:.2f}", flush=True)
        whole, blocks = METHODS[options.method]
        request = FinetuningRequest(
            dataclasses.replace(whole, steps=options.steps) if options.steps else None,
            dataclasses.replace(blocks, steps=options.block_steps) if options.block_steps else None,
            None, (), options.generated, CONTEXT, 0,
        )  # fmt: skip
        job = FinetuningJob(request, start, model, text)
        kept = Folder(f"build/written-{options.generated}", {"jax": jax.__version__})
        data = job.sequences(kept)
        clock = time.monotonic()
        show = lambda done: print(line_of(done), flush=True) if line_of(done) else None
        result = job.run(data, show, {})
        seconds, after = time.monotonic() - clock, score(result.params)
        logs = [-r.nll for r in (before, after, floats)]
        recovered = (logs[1] - logs[0]) / (logs[2] - logs[0])
        passes = sum(getattr(how, "forward_passes", 0) for how in request.stages)
        row = (
            f"{stored:.3f}", start.name, f"{before.perplexity:.2f}", f"{after.perplexity:.2f}",
            f"{recovered:.0%}", f"{options.block_steps} + {options.steps}", str(passes),
            f"{seconds:.0f}",
        )  # fmt: skip
        table.add_row(*row)
        rows.add(*row)
        print(f"{bits} bits: {after.perplexity:.2f}, {recovered:.1%} of the way", flush=True)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
