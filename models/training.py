"""The commands `jaxquant train-bitnet` and `jaxquant finetune`."""

import time
from pathlib import Path
from typing import Any

import click

import jaxquant as jq
from jaxquant import checkpoint
from models import pipeline, pretraining
from models.console import SEED, bar, emit, line, usage
from models.generate import generate
from models.metrics import Metrics
from models.pretraining import SIZES, Run
from models.text import read_text

DEFAULT = Run()


@click.command("train-bitnet")
@click.option("--text", default="builtin", show_default=True, help="Text FILE or builtin.")
@click.option("--size", type=click.Choice(sorted(SIZES)), default=DEFAULT.size, show_default=True)
@click.option("--float", "floats", is_flag=True, help="The same transformer, not quantized.")
@click.option("--steps", type=click.IntRange(2), default=DEFAULT.steps, show_default=True)
@click.option("--learning-rate", type=float, default=DEFAULT.learning_rate, show_default=True)
@click.option("--context", type=click.IntRange(4), default=DEFAULT.context, show_default=True)
@click.option(
    "--batch", "batch_size", type=click.IntRange(1), default=DEFAULT.batch_size, show_default=True
)
@click.option("--vocabulary", type=int, default=DEFAULT.vocabulary, show_default=True)
@click.option("--seed", type=SEED, default=0)
@click.option("--metrics", default=None, metavar="DIR", help="JSONL and TensorBoard's events.")
@click.option("--out", required=True)
@click.option("--overwrite", is_flag=True)
@click.option("--json", "as_json", is_flag=True)
def train_bitnet(
    text: str, floats: bool, metrics: str | None, out: str, overwrite: bool, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Train BitNet b1.58 from scratch on a text, into the directory --out.

    Ternary weights, int8 activations. A killed run goes on where it stopped, to the same bits.
    """
    with usage():
        checkpoint.check_target(out, overwrite)
        run = Run(quantized=not floats, **options)
    start = time.monotonic()
    data = pretraining.texts(run, read_text(text, calibration=True))
    folder = Path(out).absolute()
    folder = folder.with_name(f"{folder.name}.partial")
    with bar("training", run.steps) as step, Metrics.to(metrics) as written:

        def tell(done: pretraining.Progress) -> None:
            step(done)
            written.write(done.step, done._asdict())
            if done.validation is not None:
                line(
                    f"step {done.step:6}  loss {done.loss:.4f}  held out {done.validation:.4f}  "
                    f"gradient {done.gradient:.3f}  codes that changed {done.flips:.4%}"
                )

        params, held_out = pretraining.train(run, data, folder, tell)
    model = pretraining.exported(run, params, data)
    pipeline.save(out, model, run.recipe, overwrite)
    pretraining.forget(folder)
    prompt = data.tokenizer.encode("The ")
    ids = generate(jq.quantized(model.apply_cached), model.params, model.config, prompt, 48)
    line("The " + data.tokenizer.decode(ids))
    report = {
        "out": out,
        "held_out": held_out,
        "weights": sum(w.size for p, w in jq.path_leaves(model.params) if p.startswith("layers")),
        "bits_per_weight": jq.bits_per_weight(model.params),
        "bytes": checkpoint.nbytes(out),
        "seconds": time.monotonic() - start,
    }
    emit(report, as_json)
