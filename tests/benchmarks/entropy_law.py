"""The Entropy Law: is a small model better on other text if its training data compress less?

Run: python -m tests.benchmarks.entropy_law (about 15 minutes)
Pool: the paragraphs of CPython's help topics but a quarter of the topics, and near-duplicates of
some of them (one word of ten replaced). From it, subsets of equal numbers of tokens: ZIP's two
modes, random draws from the pool and from its distinct paragraphs, whole topics, and subsets in
which a share of the tokens is distinct and the rest near-duplicates of it. On each, the same Llama
(0.5 million weights) is trained for the same number of steps, and judged by its loss, in nats a
token, on the topics that were kept out; losses are means over two initial values and orders. Prints
Spearman's rank correlation of the negative of that loss with the compression ratio R of the subset
and with the mean loss of the first epoch, with 95 % bootstrap intervals, over all subsets and over
those that were not made redundant on purpose.
"""

import argparse
import functools
import random
import time
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from jaxquant.evaluation import chunk
from jaxquant.selection import compression_ratio, entropy_law, random_draw, zip_select
from jaxquant.tuning.losses import next_token_loss
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import Llama
from jaxquant_models.runs.tokenizer_training import trained_tokenizer
from tests.benchmarks.record import Record, add_option

SHORTEST, VOCABULARY, CONTEXT, BATCH, RATE = 100, 512, 64, 4, 4e-3
RUNS = 2  # of each subset
BASES, COPIES, REPLACED = 60, 12, 0.1  # near-duplicates in the pool
MADE = "redundant"  # beginning of the names of subsets that were made redundant
COLUMNS = ("subset", "items", "R (zlib)", "R (lzma)", "loss, first epoch", "loss, held out")


def paragraphs(names):
    """The distinct paragraphs of some topics, in order, and the topic of each."""
    found = {p: n for n in names for p in topics[n].split("\n\n") if len(p) >= SHORTEST}
    return list(found), list(found.values())


def near_duplicate(text, draw, words):
    """The text with some of its words replaced by words of other texts."""
    parts = text.split(" ")
    for i in draw.sample(range(len(parts)), max(1, round(REPLACED * len(parts)))):
        parts[i] = draw.choice(words)
    return " ".join(parts)


class Pool:
    """Distinct paragraphs and near-duplicates, a tokenizer for them, and text that is kept out."""

    def __init__(self):
        names = sorted(topics)
        kept_out, _ = paragraphs(names[::4])
        self.distinct, self.topics = paragraphs([n for n in names if n not in names[::4]])
        both = [p in set(kept_out) for p in self.distinct]
        self.topics = [t for t, out in zip(self.topics, both, strict=True) if not out]
        self.distinct = [p for p, out in zip(self.distinct, both, strict=True) if not out]
        self.words = " ".join(self.distinct).split()
        draw = random.Random(0)
        bases = draw.sample(self.distinct, BASES)
        copies = [near_duplicate(p, draw, self.words) for p in bases for _ in range(COPIES)]
        self.items = draw.sample(self.distinct + copies, len(self.distinct) + len(copies))
        self.tokenizer = trained_tokenizer("\n".join(self.distinct), VOCABULARY)
        self.held_out = self.rows(kept_out)

    def sizes(self, items):
        """Tokens of each item, with the empty line after it."""
        return [len(self.tokenizer.encode(item + "\n\n")) for item in items]

    def rows(self, items):
        """Token rows [N, CONTEXT] of items one after the other."""
        return chunk(self.tokenizer.encode("".join(item + "\n\n" for item in items)), CONTEXT)

    def up_to(self, items, budget):
        """As many of the items, in order, as a budget of tokens takes."""
        totals = np.cumsum(self.sizes(items))
        return list(items[: int(np.searchsorted(totals, budget, "right"))])

    def drawn(self, items, budget, seed):
        return [items[i] for i in random_draw(self.sizes(items), budget, seed)]

    def redundant(self, share, budget, seed):
        """Distinct paragraphs for a share of the budget; near-duplicates of them for the rest."""
        few, draw = self.drawn(self.distinct, int(share * budget), seed), random.Random(seed)
        copies = [near_duplicate(p, draw, self.words) for p in few for _ in range(int(3 / share))]
        return few + self.drawn(copies, budget - sum(self.sizes(few)), seed)


def subsets(pool, budget, seeds):
    """(name, items) of every subset."""
    as_rows = [{"text": item} for item in pool.items]
    sizes = pool.sizes(pool.items)
    for name, picks in (
        ("ZIP", zip_select(pool.items, budget, sizes=sizes, serialize="text", k1=1000, k2=100,
                           k3=50).indices),
        ("ZIP, faithful", zip_select(as_rows, len(as_rows) // 3, faithful=True, k1=1000, k2=100,
                                     k3=50).indices),
    ):  # fmt: skip
        yield name, pool.up_to([pool.items[i] for i in picks], budget)
    for seed in range(seeds):
        yield "random, of the pool", pool.drawn(pool.items, budget, seed)
        yield "random, of distinct paragraphs", pool.drawn(pool.distinct, budget, seed)
        order = random.Random(seed).sample(sorted(set(pool.topics)), len(set(pool.topics)))
        whole = [
            p for n in order for p, t in zip(pool.distinct, pool.topics, strict=True) if t == n
        ]
        yield "whole topics", pool.up_to(whole, budget)
    for share in (1 / 2, 1 / 4, 1 / 8, 1 / 16):
        for seed in range(2):
            yield f"{MADE}, {share:.3g} distinct", pool.redundant(share, budget, seed)


class Trainer:
    """One model and one schedule for all subsets; the step is compiled once."""

    def __init__(self, epochs, rows, held_out):
        config = LlamaConfig(VOCABULARY, 128, 344, 2, 4, 4, 32, tie_embeddings=True)
        model, self.epochs, self.rows, self.held_out = Llama(config), epochs, rows, held_out
        steps = epochs * (rows // BATCH)
        warm = optax.warmup_cosine_decay_schedule(0.0, RATE, steps // 10, steps, RATE / 10)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(warm, b2=0.95))
        loss = lambda params, x: next_token_loss(model.apply({"params": params}, x), x)
        self.initial = jax.jit(lambda key: model.init(key, jnp.zeros((1, 8), jnp.int32))["params"])
        self.state, self.loss = optimizer.init, jax.jit(loss)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, x):
            value, gradient = jax.value_and_grad(loss)(params, x)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, value

        self.step = step

    def losses(self, rows, seed):
        """(mean loss of the first epoch, loss on the text kept out at the end)."""
        params = self.initial(jax.random.key(seed))
        state, first, draw = self.state(params), [], np.random.default_rng(seed)
        for epoch in range(self.epochs):
            order = draw.permutation(self.rows)
            for at in range(0, self.rows - BATCH + 1, BATCH):
                batch = jnp.asarray(rows[order[at : at + BATCH]])
                params, state, value = self.step(params, state, batch)
                if not epoch:
                    first.append(value)
        judged = [self.loss(params, jnp.asarray(rows)) for rows in self.held_out]
        return float(np.mean(first)), float(np.mean(judged))


def correlations(name, found):
    """A row: Spearman's correlation of the performance with each of the other columns."""
    ratio, long_ratio, first, held_out = np.array(found).T
    cell = lambda c: f"{c.rho:+.2f} ({c.low:+.2f} to {c.high:+.2f})"
    law = entropy_law(ratio, -held_out, first)
    long = entropy_law(long_ratio, -held_out)
    return law, (f"Spearman, {name}", len(found), cell(law.ratio), cell(long.ratio),
                 cell(law.loss), "")  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", type=int, default=24_000, help="tokens of a subset")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=4, help="draws of each random kind")
    parser.add_argument("--subsets", type=int, help="stop after so many")
    add_option(parser)
    options = parser.parse_args()
    table, rows, start = Table(*COLUMNS), Record(options.json, *COLUMNS), time.monotonic()
    pool = Pool()
    print(f"{len(pool.items)} items, {len(pool.distinct)} of them distinct paragraphs with "
          f"{sum(pool.sizes(pool.distinct))} tokens; {pool.held_out.size} tokens kept out",
          flush=True)  # fmt: skip
    # An item or two less in one subset than in another must not change the number of rows.
    count = options.budget // CONTEXT - 4
    count -= count % BATCH
    held_out = np.array_split(pool.held_out, max(1, len(pool.held_out) // BATCH))
    trainer, found = Trainer(options.epochs, count, held_out), {}
    for number, (name, items) in enumerate(subsets(pool, options.budget, options.seeds)):
        if number == options.subsets:
            return
        tokens = pool.rows(random.Random(number).sample(items, len(items)))[:count]
        ratios = [compression_ratio(items, codec, "text") for codec in ("zlib", "lzma")]
        losses = np.mean([trainer.losses(tokens, seed) for seed in range(RUNS)], axis=0)
        values = (*ratios, *map(float, losses))
        found.setdefault(name, []).append(values)
        row = (name, len(items), *values)
        rows.add(*row)
        table.add_row(*(f"{c:.4f}" if isinstance(c, float) else str(c) for c in row))
        print(*row, f"{time.monotonic() - start:.0f} s", flush=True)
    every = [v for values in found.values() for v in values]
    natural = [v for n, values in found.items() if not n.startswith(MADE) for v in values]
    laws = []
    for name, values in (("all subsets", every), (f"without the {MADE}", natural)):
        law, row = correlations(name, values)
        rows.add(*row)
        table.add_row(*map(str, row))
        laws.append(f"{name}: {law}")
    Console(width=150).print(table)
    print("\n".join(laws))


if __name__ == "__main__":
    main()
