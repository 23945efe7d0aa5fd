"""The command `jaxquant finetune`."""

import dataclasses
import time
from typing import Any

import click

import jaxquant as jq
from jaxquant import storage
from jaxquant.training.qat import How
from jaxquant.tuning.trainer import Progress
from jaxquant_models.cli.console import Bars, emit, usage_errors
from jaxquant_models.cli.metrics import Metrics, check_metrics
from jaxquant_models.cli.options import SEED, setting
from jaxquant_models.cli.output import Output
from jaxquant_models.readers import registry
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.text import read_text
from jaxquant_models.runs.finetuning import FinetuningJob, check
from jaxquant_models.runs.finetuning_request import METHODS, FinetuningRequest
from jaxquant_models.runs.sequences import CONTEXT


@click.command()
@click.argument("model")
@click.option(
    "--method",
    type=click.Choice(sorted(METHODS)),
    default="qat",
    show_default=True,
    help="Training method. qat (quantization-aware training) uses backpropagation. zeroqat uses "
    "only forward passes, and needs as little memory as inference.",
)
@click.option(
    "--bits",
    type=int,
    default=None,
    help="Number of bits per weight when MODEL is quantized first, which is done with lsq whatever "
    "--method is. Not allowed if MODEL is a checkpoint. The default is 4.",
)
@click.option(
    "--group-size",
    type=int,
    default=None,
    help="Number of consecutive input channels that share a scale when MODEL is quantized first. "
    "Not allowed if MODEL is a checkpoint. The default is 64.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="GLOB",
    help="Train only the weights whose path, as jaxquant inspect shows it, matches GLOB, such as "
    "'*attn/[qv]/kernel'. The others are quantized but not trained. By default all weights of the "
    "layers are trained. This option may be given several times.",
)
@click.option(
    "--text",
    default=None,
    help="Training text: a FILE, or builtin (the half of Python's help topics that eval does not "
    "score). Required unless --generated is given.",
)
@click.option(
    "--generated",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Number of sequences that the teacher generates as training text, in addition to --text "
    "if that is given. Requires a teacher.",
)
@click.option(
    "--context",
    type=click.IntRange(2),
    default=CONTEXT,
    show_default=True,
    help="Number of tokens per training sequence.",
)
@click.option(
    "--steps",
    type=click.IntRange(0),
    required=True,
    help="Number of steps of end-to-end training. It may be 0 if --block-steps is given.",
)
@click.option(
    "--block-steps",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Number of steps for which each layer is first trained on its own to match the "
    "teacher's layer. Requires a teacher.",
)
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of sequences per training step.",
)
@click.option(
    "--teacher",
    default=None,
    metavar="MODEL",
    help='Model whose predictions MODEL is trained to match, or "none" to predict the next tokens '
    'of the text instead. The default is "none" if MODEL is a checkpoint; otherwise it is MODEL '
    "itself before quantization.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Set a field of jaxquant.training.QAT (or ZeroQAT, with --method zeroqat) for the "
    "end-to-end training; the value is JSON, as in --set learning_rate=1e-4. This option may be "
    "given several times.",
)
@click.option(
    "--set-blocks",
    "block_settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="The same as --set, but for the layer-by-layer training of --block-steps.",
)
@click.option(
    "--metrics",
    default=None,
    metavar="DIR",
    help="Directory to write training metrics to, as JSON lines and as TensorBoard events.",
)
@click.option(
    "--seed",
    type=SEED,
    default=0,
    help="Random seed for the order of the sequences, --generated and zeroqat. The default is 0.",
)
@click.option("--out", required=True, metavar="DIR", help="Directory to write the checkpoint to.")
@click.option(
    "--overwrite", is_flag=True, help="Replace an existing checkpoint in the --out directory."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one line of JSON.")
def finetune(
    model: str, out: str, overwrite: bool, as_json: bool, teacher: str | None, text: str | None,
    metrics: str | None, **options: Any,
) -> None:  # fmt: skip
    """Train the quantized weights of MODEL and write a checkpoint.

    MODEL is a checkpoint written by jaxquant, or a model that jaxquant quantize accepts, which is
    quantized with lsq first. To resume an interrupted run, repeat the same command; the result is
    the same as that of an uninterrupted run.
    """
    with usage_errors():
        output = Output(out, overwrite)
        check_metrics(metrics, output)
        packed = storage.is_checkpoint(model)
        request = request_of(packed=packed, watch=metrics is not None, **options)
    output.hold()
    job, start = _job(request, model, teacher, text, packed), time.monotonic()
    finished = output.begin(job.fingerprint(), refuse=True)
    data = job.sequences(finished)
    total = request.steps(job.source.config.n_layers)
    with Bars.stage("training", total) as step, Metrics.to(metrics) as written:

        def progress(done: Progress) -> None:
            step(done)
            measured = {**done.measured, "held_out": done.validation}
            written.write(done.step, measured, done.name)

        result = job.run(data, progress, finished)
    output.publish(result, storage.stored_recipe(model) if packed else request.recipe)
    report = {
        "out": out,
        "bits_per_weight": jq.bits_per_weight(result.params),
        "bytes": storage.nbytes(out),
        "forward_passes": sum(getattr(how, "forward_passes", 0) for how in request.stages),
        "seconds": time.monotonic() - start,
    }
    emit(report, as_json)


def _job(
    request: FinetuningRequest, model: str, teacher: str | None, text: str | None, packed: bool
) -> FinetuningJob:
    """Return the job on the named models, checked before the text is read."""
    source = registry.load(model)
    learned_from = _teacher(teacher, source, packed)
    with usage_errors():
        if text is None and not request.generated:
            raise ValueError("nothing to train on: give --text FILE, --generated N, or both")
        check(request, source, learned_from)
    content = "" if text is None else read_text(text, calibration=True)
    return FinetuningJob(request, source, learned_from, content)


def _teacher(spec: str | None, source: Model, packed: bool) -> Model | None:
    if spec is None:
        return None if packed else source
    return None if spec == "none" else registry.load(spec)


def request_of(
    *, packed: bool, watch: bool, generated: int, method: str, bits: int | None,
    group_size: int | None, only: tuple[str, ...], context: int, steps: int, block_steps: int,
    batch: int, seed: int, settings: tuple[str, ...], block_settings: tuple[str, ...],
) -> FinetuningRequest:  # fmt: skip
    """Return the request described by the options.

    Args:
      packed: whether the model is a checkpoint.
      watch: whether to measure everything that training can measure.
      The others are the command's options.
    Raises:
      ValueError: options contradict each other or are out of range.
    """
    if packed and (bits, group_size) != (None, None):
        raise ValueError(
            "--bits and --group-size apply only to a MODEL with float weights; a "
            "checkpoint keeps its own"
        )
    if not steps and not block_steps:
        raise ValueError("nothing to do: give --steps, --block-steps or both")
    common: dict[str, Any] = {"batch_size": batch, "seed": seed}
    if watch and method == "qat":
        common["watch"] = True
    end_to_end, blocks = METHODS[method]
    return FinetuningRequest(
        end_to_end=_training(end_to_end, steps, common, settings),
        blocks=_training(blocks, block_steps, common, block_settings),
        method=None if packed else jq.lsq(bits or 4, group_size or 64),
        only=only,
        generated=generated,
        context=context,
        seed=seed,
    )


def _training(
    how: How, steps: int, common: dict[str, Any], settings: tuple[str, ...]
) -> How | None:
    """Return the training settings with the user's changes, or None for no steps."""
    fields = {"steps": steps, **common, **dict(map(setting, settings))}
    names = {f.name for f in dataclasses.fields(how)}
    if unknown := set(fields) - names:
        raise ValueError(f"unknown settings {sorted(unknown)}; known: {sorted(names)}")
    return dataclasses.replace(how, **fields) if steps else None
