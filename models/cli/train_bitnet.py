"""The command `jaxquant train-bitnet`."""

import time
from typing import Any

import click

import jaxquant as jq
from jaxquant.storage import checkpoint
from jaxquant_models.cli.console import Bars, emit, line, line_of, usage_errors
from jaxquant_models.cli.metrics import Metrics, check_metrics
from jaxquant_models.cli.options import SEED
from jaxquant_models.cli.output import Output
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.text import DOCSTRINGS, read_text
from jaxquant_models.runs import pretraining
from jaxquant_models.runs.generate import generate
from jaxquant_models.runs.pretraining import StepReport
from jaxquant_models.runs.pretraining_request import SIZES, PretrainingRequest

DEFAULT = PretrainingRequest()


@line_of.register
def _(done: StepReport) -> str:
    if done.validation is None:
        return ""
    return (
        f"step {done.step:6}  loss {done.loss:.4f}  held out {done.validation:.4f}  "
        f"gradient {done.gradient:.3f}  codes that changed {done.flips:.4%}"
    )


@click.command("train-bitnet")
@click.option("--text", default=DOCSTRINGS, show_default=True,
              help="Text FILE, builtin, or docstrings: those of Python's own modules.")  # fmt: skip
@click.option("--size", type=click.Choice(sorted(SIZES)), default=DEFAULT.size, show_default=True)
@click.option("--float", "floats", is_flag=True, help="The same transformer, not quantized.")
@click.option("--steps", type=click.IntRange(2), default=DEFAULT.steps, show_default=True)
@click.option("--learning-rate", type=float, default=DEFAULT.learning_rate, show_default=True)
@click.option("--context", type=click.IntRange(4), default=DEFAULT.context, show_default=True)
@click.option(
    "--batch", "batch_size", type=click.IntRange(1), default=DEFAULT.batch_size, show_default=True
)
@click.option("--vocabulary", type=int, default=DEFAULT.vocabulary, show_default=True)
@click.option("--float-share", type=click.FloatRange(0, 1), default=DEFAULT.float_share,
              show_default=True, help="Of the steps, the first ones, with floats.")  # fmt: skip
@click.option("--a48", "a48", is_flag=True,
              help="Activations of BitNet a4.8 in the last twentieth of the steps.")  # fmt: skip
@click.option(
    "--save-every", type=click.IntRange(1), default=DEFAULT.save_every, show_default=True,
    help="Steps between two states to go on from.",
)  # fmt: skip
@click.option("--seed", type=SEED, default=0)
@click.option("--metrics", default=None, metavar="DIR", help="JSONL and TensorBoard's events.")
@click.option("--out", required=True)
@click.option("--overwrite", is_flag=True)
@click.option("--json", "as_json", is_flag=True)
def train_bitnet(
    text: str, floats: bool, a48: bool, metrics: str | None, out: str, overwrite: bool,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Train BitNet b1.58 from scratch on a text, into the directory --out.

    Ternary weights, int8 activations. A killed run goes on where it stopped, to the same bits.
    """
    with usage_errors():
        output = Output(out, overwrite)
        check_metrics(metrics, output)
        request = PretrainingRequest(quantized=not floats, a48=0.05 * a48, **options)
    output.hold()
    start = time.monotonic()
    data = pretraining.training_data(request, read_text(text, calibration=True))
    finished = output.begin(pretraining.fingerprint(request, data), refuse=True)
    with Bars.stage("training", request.steps) as step, Metrics.to(metrics) as written:

        def progress(done: StepReport) -> None:
            step(done)
            written.write(done.step, done._asdict())

        params, held_out = pretraining.train(request, data, progress, finished)
    model = pretraining.packed_model(request, params, data)
    output.publish(model, request.recipe)
    line(_sample(model))
    layers = (w for path, w in jq.path_leaves(model.params) if path.startswith("layers"))
    report = {
        "out": out,
        "held_out": held_out,
        "weights": sum(w.size for w in layers),
        "bits_per_weight": jq.bits_per_weight(model.params),
        "bytes": checkpoint.nbytes(out),
        "seconds": time.monotonic() - start,
    }
    emit(report, as_json)


def _sample(model: Model) -> str:
    """Return a short text that the trained model generates."""
    start = "The "
    prompt = model.tokenizer.encode(start)
    ids = generate(jq.quantized(model.apply_cached), model.params, model.config, prompt, 48)
    return start + model.tokenizer.decode(ids)
