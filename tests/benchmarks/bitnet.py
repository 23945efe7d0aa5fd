"""BitNet b1.58 from scratch against the same transformer of floats: same text, batches and seeds.

Run: python -m tests.benchmarks.bitnet [--steps 1200] [--sizes 1m 4m 12m] (about 50 minutes)
Text: this Python's help topics and docstrings. Losses are of rows held out, in nats a token; every
BitNet is packed, and its packed loss printed beside the latent one. "after floats": the first third
of the steps have floats (arXiv:2502.11895). Learning rates: `WAYS`, of a width of 128, over the
width; of the first two about the best of 600 steps at that size.
"""

import argparse
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxquant as jq
from jaxquant.tuning.losses import next_token_loss
from jaxquant_models.readers.text import docstrings
from jaxquant_models.runs import pretraining
from jaxquant_models.runs.generate import generate
from jaxquant_models.runs.pretraining_request import SIZES, PretrainingRequest
from tests.benchmarks.record import Record, add_option


class Way(NamedTuple):
    """How a size is trained; BitNet's own rate is higher, as its authors'."""

    quantized: bool
    float_share: float
    rate: float


WAYS = {"float": Way(False, 0.0, 4e-3), "BitNet": Way(True, 0.0, 8e-3),
        "BitNet after floats": Way(True, 1 / 3, 4e-3)}  # fmt: skip
PROMPT = "Return the"


def trained(name, run, data):
    """(parameters, held-out loss, seconds, share of codes that flip at the end)."""
    start, flips = time.monotonic(), []

    def tell(done):
        flips.append(done.flips)
        if done.validation is not None:
            print(f"{name} step {done.step} loss {done.loss:.4f} held out {done.validation:.4f} "
                  f"{time.monotonic() - start:.0f} s", flush=True)  # fmt: skip

    params, loss = pretraining.train(run, data, progress=tell)
    return params, loss, time.monotonic() - start, float(np.mean(flips[-20:]))


def packed(run, data, params):
    """(the packed model's loss on the rows held out, its weights, its bits, text it writes)."""
    model = pretraining.packed_model(run, params, data)
    layers = [w for path, w in jq.core.path_leaves(model.params) if path.startswith("layers")]
    judge = jax.jit(jq.quantized(lambda p, t: next_token_loss(model.apply_fn(p, t), t)))
    loss = np.mean([judge(model.params, jnp.asarray(r)[None]) for r in data.held_out])
    ids = data.tokenizer.encode(PROMPT)
    new = generate(jq.quantized(model.apply_cached), model.params, model.config, ids, 60)
    matrices = sum(w.size for w in layers if w.ndim == 3)
    bits = jq.bits_per_weight(model.params) if run.quantized else 32
    return loss, matrices, bits, PROMPT + data.tokenizer.decode(new)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    add_option(parser)
    options = parser.parse_args()
    columns = ("weights", "way", "held out", "gap", "packed", "bits", "flips/step", "s")
    table, rows = Table(*columns), Record(options.json, *columns)
    of = lambda size, way: PretrainingRequest(
        size, way.quantized, options.steps, way.rate * 128 / SIZES[size][0], context=128,
        batch_size=4, vocabulary=1024, float_share=way.float_share, validate_every=200,
    )  # fmt: skip
    first = of(options.sizes[0], WAYS["float"])
    data = pretraining.training_data(first, docstrings())  # the same for all
    for size in options.sizes:
        floats = None
        for name in options.ways:
            run = of(size, WAYS[name])
            params, loss, seconds, flips = trained(f"{size} {name}", run, data)
            floats = loss if name == "float" else floats
            served, weights, bits, written = packed(run, data, params)
            print(f"{size} {name}: {written!r}", flush=True)
            row = (
                f"{weights:,}", name, f"{loss:.4f}",
                "" if floats is None else f"{loss - floats:.4f}", f"{served:.4f}", f"{bits:.2f}",
                f"{flips:.3%}", f"{seconds:.0f}",
            )  # fmt: skip
            table.add_row(*row)
            rows.add(*row)
    Console(width=110).print(table)
    print(f"{options.steps} steps of {run.batch_size} rows of {run.context} tokens; "
          f"{len(data.training)} rows to train on")  # fmt: skip


if __name__ == "__main__":
    main()
