"""The command `jaxquant train-bitnet`."""

import time
from typing import Any

import click

import jaxquant as jq
from jaxquant import storage
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
@click.option(
    "--text",
    default=DOCSTRINGS,
    show_default=True,
    help="Training text: a FILE, builtin (the half of Python's help topics that jaxquant eval does "
    "not score), or docstrings (the docstrings of the standard library, and all help topics). The "
    "latter include the half that jaxquant eval --text builtin scores, so evaluate a model that is "
    "trained on docstrings on another text.",
)
@click.option(
    "--size",
    type=click.Choice(sorted(SIZES)),
    default=DEFAULT.size,
    show_default=True,
    help="Approximate number of weights in the layers; the embedding is not counted.",
)
@click.option(
    "--float",
    "floats",
    is_flag=True,
    help="Train the same architecture in floating point, without quantizing weights or "
    "activations, as a baseline for the quantized model.",
)
@click.option(
    "--steps",
    type=click.IntRange(2),
    default=DEFAULT.steps,
    show_default=True,
    help="Number of training steps.",
)
@click.option(
    "--learning-rate",
    type=float,
    default=DEFAULT.learning_rate,
    show_default=True,
    help="Peak learning rate.",
)
@click.option(
    "--context",
    type=click.IntRange(4),
    default=DEFAULT.context,
    show_default=True,
    help="Number of tokens per training sequence.",
)
@click.option(
    "--batch",
    "batch_size",
    type=click.IntRange(1),
    default=DEFAULT.batch_size,
    show_default=True,
    help="Number of sequences per training step.",
)
@click.option(
    "--vocabulary",
    type=int,
    default=DEFAULT.vocabulary,
    show_default=True,
    help="Vocabulary size of the tokenizer, which is trained on the text.",
)
@click.option(
    "--float-share",
    type=click.FloatRange(0, 1),
    default=DEFAULT.float_share,
    show_default=True,
    help="Fraction of the steps to train without quantization before quantization is turned on.",
)
@click.option(
    "--a48",
    "a48",
    is_flag=True,
    help="For the last 5% of the steps, switch to the activation formats of BitNet a4.8 (4-bit and "
    "sparse 8-bit).",
)
@click.option(
    "--save-every",
    type=click.IntRange(1),
    default=DEFAULT.save_every,
    show_default=True,
    help="Number of steps between saves of the training state. An interrupted run resumes from the "
    "last save.",
)
@click.option(
    "--seed",
    type=SEED,
    default=0,
    help="Random seed for the initial parameters and the order of the sequences. The default is 0.",
)
@click.option(
    "--metrics",
    default=None,
    metavar="DIR",
    help="Directory to write training metrics to, as JSON lines and as TensorBoard events.",
)
@click.option("--out", required=True, metavar="DIR", help="Directory to write the checkpoint to.")
@click.option(
    "--overwrite", is_flag=True, help="Replace an existing checkpoint in the --out directory."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one line of JSON.")
def train_bitnet(
    text: str, floats: bool, a48: bool, metrics: str | None, out: str, overwrite: bool,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Train BitNet b1.58 from scratch and write a checkpoint.

    The weights are ternary and the activations int8. To resume an interrupted run, repeat the same
    command; the result is the same as that of an uninterrupted run.
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
    layers = (w for path, w in jq.core.path_leaves(model.params) if path.startswith("layers"))
    report = {
        "out": out,
        "held_out": held_out,
        "weights": sum(w.size for w in layers),
        "bits_per_weight": jq.bits_per_weight(model.params),
        "bytes": storage.nbytes(out),
        "seconds": time.monotonic() - start,
    }
    emit(report, as_json)


def _sample(model: Model) -> str:
    """Return a short text that the trained model generates."""
    start = "The "
    prompt = model.tokenizer.encode(start)
    ids = generate(jq.quantized(model.apply_cached), model.params, model.config, prompt, 48)
    return start + model.tokenizer.decode(ids)
