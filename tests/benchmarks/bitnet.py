"""BitNet b1.58 from scratch against the same transformer of floats: same text, batches and seeds.

Run: python -m tests.benchmarks.bitnet [--steps 1200] (about 35 minutes on 2 cores)
Text: this Python's help topics and docstrings. Losses are of rows held out, in nats a token; every
BitNet is packed, and its packed loss printed beside the latent one. Learning rates: `RATES`, of a
width of 128, over the width; about the best of 600 steps for either at that size.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxquant as jq
from jaxquant.trainer import next_token_loss
from models import pretraining
from models.generate import generate
from models.pretraining import SIZES, Run
from models.text import docstrings

RATES = {True: 8e-3, False: 4e-3}  # BitNet's is higher, as its authors'
PROMPT = "Return the"


def trained(run, text):
    """(run's data, parameters, held-out loss, seconds, share of codes that flip at the end)."""
    data, start, flips = pretraining.texts(run, text), time.monotonic(), []
    name = f"{run.size} {'BitNet' if run.quantized else 'float'}"

    def tell(done):
        flips.append(done.flips)
        if done.validation is not None:
            print(f"{name} step {done.step} loss {done.loss:.4f} held out {done.validation:.4f} "
                  f"{time.monotonic() - start:.0f} s", flush=True)  # fmt: skip

    params, loss = pretraining.train(run, data, progress=tell)
    return data, params, loss, time.monotonic() - start, float(np.mean(flips[-20:]))


def packed(run, data, params):
    """(the packed model's loss on the rows held out, its weights, its bits, text it writes)."""
    model = pretraining.exported(run, params, data)
    layers = [w for _, w in jq.path_leaves(model.params) if isinstance(w, jq.QTensor)]
    judge = jax.jit(jq.quantized(lambda p, t: next_token_loss(model.apply_fn(p, t), t)))
    loss = np.mean([judge(model.params, jnp.asarray(r)[None]) for r in data.held_out])
    ids = data.tokenizer.encode(PROMPT)
    new = generate(jq.quantized(model.apply_cached), model.params, model.config, ids, 60)
    bits = jq.bits_per_weight(model.params)
    return loss, sum(w.size for w in layers), bits, PROMPT + data.tokenizer.decode(new)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES))
    parser.add_argument("--rates", type=float, nargs=2, default=list(RATES.values()))
    options = parser.parse_args()
    table = Table(
        "weights", "float", "BitNet", "gap", "packed", "bits", "flips/step", "s", "s float"
    )
    text = docstrings()
    for size in options.sizes:
        ours, floats = (
            Run(
                size,
                kind,
                options.steps,
                rate * 128 / SIZES[size][0],
                context=128,
                batch_size=4,
                vocabulary=1024,
                validate_every=200,
            )
            for kind, rate in zip(RATES, options.rates, strict=True)
        )
        data, params, loss, seconds, flips = trained(ours, text)
        served, weights, bits, written = packed(ours, data, params)
        print(f"{size}: {written!r}", flush=True)
        _, _, float_loss, float_seconds, _ = trained(floats, text)
        table.add_row(
            f"{weights:,}", f"{float_loss:.4f}", f"{loss:.4f}", f"{loss - float_loss:.4f}",
            f"{served:.4f}", f"{bits:.2f}", f"{flips:.3%}", f"{seconds:.0f}",
            f"{float_seconds:.0f}",
        )  # fmt: skip
    Console(width=100).print(table)
    print(f"{options.steps} steps of {ours.batch_size} rows of {ours.context} tokens; "
          f"{len(data.training)} rows to train on")  # fmt: skip


if __name__ == "__main__":
    main()
