"""What adapters learn and what a merge leaves of it: SmolLM2-135M on CPython's help topics.

Run: python -m tests.benchmarks.adapters [TEXT] [--bits 4 3 2] [--steps 60] [--json FILE]
Trains on four fifths of the topics, one sequence of 512 tokens per step, and scores chunks of 512
tokens of the others, of which the model has seen none, and of TEXT (WikiText-2's test split) for
what is forgotten. All methods start from one base: GPTQ codes with a scale and an offset per 64
inputs, calibrated on the end of TEXT (else on the topics). "again" rounds the sum of LoRA and base
anew, to nearest or by GPTQ's feedback. The run resumes: finished rows are kept in build/adapters.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from pydoc_data.topics import topics

import equinox as eqx
import jax

import jaxquant as jq
from jaxquant.durable.store import Folder
from jaxquant.evaluation import evaluate
from jaxquant_models import load
from jaxquant_models.readers.text import read_text
from jaxquant_models.runs.calibration import calibrate_model
from jaxquant_models.runs.quantization import quantize_model
from jaxquant_models.runs.recipes import recipe_of
from jaxquant_models.runs.sequences import token_sequences
from tests.benchmarks.record import Record, add_option

CONTEXT, SCORED, CALIBRATION, GROUP = 512, 16, 16, 64
COLUMNS = ("bits", "method", "trained", "topics before", "adapted", "merged", "again",
           "again, GPTQ", "other text before", "after", "bits merged", "s")  # fmt: skip
HOW = jq.training.Finetuning(validate_every=1000, clip=1.0)
# Ranks such that A and B of all methods have about as many numbers. The rates are first tries: A
# and B that start from the error of rounding are larger, and learn at half the rate.
METHODS = {
    "qlora": (jq.adapters.LoRA(4), {"learning_rate": 2e-3}),
    "qlora, loftq": (jq.adapters.LoRA(4, init="loftq"), {"learning_rate": 1e-3}),
    "qlora, cloq": (jq.adapters.LoRA(4, init="cloq"), {"learning_rate": 1e-3}),
    "qa-lora": (jq.adapters.QALoRA(8, pooling="sum"), {"learning_rate": 1e-3}),
    "l4q": (jq.adapters.L4Q(4), {"learning_rate": 2e-3, "scale_rate": 2e-3}),
    "peqa": (jq.adapters.PEQA("scale"), {"scale_rate": 4e-3}),
    "lota": (jq.adapters.LoTA(4), {}),
}


def method_of(bits: int) -> jq.Method:
    """GPTQ in a grid with offsets."""
    like = jq.gptq(bits, GROUP, damping=0.1)
    levels = jq.formats.Integer(bits, GROUP, symmetric=True)
    return dataclasses.replace(like, format=jq.formats.Offset(levels, mse=True))


def split_topics() -> tuple[str, str]:
    """Return four fifths of the topics, and every fifth."""
    names = sorted(topics)
    parts = [n for i, n in enumerate(names) if i % 5], names[::5]
    training, held_out = ("\n".join(topics[n] for n in some) for some in parts)
    return training, held_out


class Run:
    """The models, texts and scores of the whole comparison."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model, self.options = load("smollm2-135m"), options
        cut = lambda text, n=None: token_sequences(self.model, text, CONTEXT, n)
        training, held_out = split_topics()
        self.training, self.held_out = cut(training), cut(held_out)[:SCORED]
        other = cut(read_text(options.text)) if options.text else None
        self.other = None if other is None else other[:SCORED]
        some = self.training if other is None else other[-CALIBRATION:]
        file = Path("build/adapters/statistics")
        kept = Folder(file, {"text": options.text or ""})
        self.stats = calibrate_model(self.model, some[:CALIBRATION], finished=kept)

    def scores(self, params) -> tuple[float, float]:
        """Perplexity of the held-out topics and of the other text."""
        of = lambda chunks: evaluate(jq.quantized(self.model.apply_fn), params, chunks).perplexity
        return of(self.held_out), of(self.other) if self.other is not None else float("nan")

    def base(self, bits: int):
        """The rounded parameters, which a killed run need not make again."""
        folder = Path(f"build/adapters/base-{bits}")
        if not jq.storage.is_checkpoint(folder):
            made = quantize_model(self.model, recipe_of(method_of(bits)), self.stats)
            jq.save(folder, made.params)
        return jq.load(folder)

    def row(self, bits: int, name: str, base, before: tuple[float, float]) -> list:
        """Adapt the base, and score what becomes of it."""
        adapter, settings = METHODS[name]
        clock = time.monotonic()
        tree = jq.adapt(
            base, adapter, floats=self.model.params,
            stats=self.stats if adapter.needs_gram else None,
        )  # fmt: skip
        count = sum(a.size for a in jax.tree.leaves(eqx.filter(tree, jq.trained(tree))))
        how = dataclasses.replace(HOW, steps=self.options.steps, **settings)
        show = lambda done: done.step % 10 or print(name, done.step, f"{done.loss:.4f}", flush=True)
        tree = jq.training.finetune(
            self.model.apply_training(), tree, self.training, how, progress=show,
            finished=Folder(f"build/adapters/{bits} {name}", {"how": repr((adapter, how))}),
        )  # fmt: skip
        seconds = time.monotonic() - clock
        adapted, merged = self.scores(tree), jq.merge(tree)
        exact = adapter.exact
        plain = self.scores(merged)
        again = float("nan") if exact else plain[0]
        feedback = float("nan")
        if not exact:
            rounder = jq.rounding.LDLQ(damping=0.1, act_order=True)
            feedback = self.scores(jq.merge(tree, rounder=rounder, stats=self.stats))[0]
        after = [plain[0] if exact else float("nan"), again, feedback]
        stored = jq.bits_per_weight(merged)
        return [bits, name, count, before[0], adapted[0], *after, before[1], adapted[1], stored,
                seconds]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("text", nargs="?")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--steps", type=int, default=60)
    add_option(parser)
    options = parser.parse_args()
    rows, kept = Record(options.json, *COLUMNS), Path("build/adapters")
    kept.mkdir(parents=True, exist_ok=True)
    run = None
    for bits in options.bits:
        base = None
        for name in options.methods:
            file = kept / f"{bits} {name} {options.steps}.json"
            if not file.exists():
                run = run or Run(options)
                if base is None:
                    base = run.base(bits)
                    before = run.scores(base)
                    print(f"{bits} bits, before", *before, flush=True)
                file.write_text(json.dumps(run.row(bits, name, base, before)))
            row = json.loads(file.read_text())
            rows.add(*row)
            print(dict(zip(COLUMNS, row, strict=True)), flush=True)


if __name__ == "__main__":
    main()
