"""The command `jaxquant finetune`."""

import dataclasses
import time
from typing import Any

import click

import jaxquant as jq
from jaxquant import storage
from jaxquant.training.finetuning import Finetuning
from jaxquant.training.qat import How
from jaxquant.tuning.trainer import Progress
from jaxquant_models.cli.console import Bars, emit, usage_errors
from jaxquant_models.cli.metrics import Metrics, check_metrics
from jaxquant_models.cli.options import SEED, setting
from jaxquant_models.cli.output import Output
from jaxquant_models.cli.peft_output import PeftOutput
from jaxquant_models.readers import registry
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.text import read_text
from jaxquant_models.runs.adapting import ADAPTERS, adapter_of, base_method
from jaxquant_models.runs.examples import read_examples
from jaxquant_models.runs.finetuning import FinetuningJob, check
from jaxquant_models.runs.finetuning_request import (
    ADAPTING,
    METHODS,
    STARTED_RATE,
    FinetuningRequest,
)
from jaxquant_models.runs.sequences import CONTEXT
from jaxquant_models.schemas.files import TrainingExample


@click.command()
@click.argument("model")
@click.option(
    "--method",
    type=click.Choice([*sorted(METHODS), *ADAPTERS]),
    default="qat",
    show_default=True,
    help="Training method. qat (quantization-aware training) uses backpropagation. zeroqat uses "
    "only forward passes, and needs as little memory as inference. The others train adapters, "
    "which jaxquant merge merges afterwards: qlora (low-rank products beside the packed weights), "
    "qa-lora (low-rank changes of the offsets of groups), l4q (low-rank changes and steps, learned "
    "on the rounded sum), lota (ternary changes of the codes), peqa (scales and offsets). All but "
    "qlora merge exactly.",
)
@click.option(
    "--bits",
    type=int,
    default=None,
    help="Number of bits per weight when MODEL is quantized first: with normal_float (doubly "
    "quantized scales) for qlora, with gptq in a grid with offsets for the other adapters, with "
    "lsq for qat and zeroqat. Not allowed if MODEL is a checkpoint. The default is 4.",
)
@click.option(
    "--group-size",
    type=int,
    default=None,
    help="Number of consecutive input channels that share a scale when MODEL is quantized first. "
    "Not allowed if MODEL is a checkpoint. The default is 64.",
)
@click.option(
    "--rank",
    type=click.IntRange(1),
    default=None,
    help="Rank of the adapters of all methods but peqa. The default is 16, or 8 for qa-lora, "
    "which allows at most as many as there are groups of inputs.",
)
@click.option(
    "--alpha",
    type=float,
    default=None,
    help="The low-rank products of qlora, qa-lora and l4q are multiplied by ALPHA / RANK. Not "
    "allowed with other methods, nor with an --init other than zero. The default is twice the "
    "rank.",
)
@click.option(
    "--init",
    type=click.Choice(["zero", "loftq", "cloq", "pissa"]),
    default=None,
    help="Start of the adapters; only for qlora. zero (the default) leaves the quantized model as "
    "it is; loftq and cloq make up for the error of quantization, cloq by the inputs that the "
    "weights see; pissa moves the principal part of the weights into the adapters. All but zero "
    "need a MODEL with float weights.",
)
@click.option(
    "--optimizer",
    type=click.Choice(["adamw", "adam8bit"]),
    default=None,
    help="Optimizer of the adapters. The state of adam8bit takes a quarter of the memory. Not "
    "allowed with lota, whose steps need no state. The default is adamw.",
)
@click.option(
    "--paged",
    is_flag=True,
    help="Keep the optimizer's state in the memory of the host, for adapter arrays of at least "
    "100,000 numbers. Not allowed with lota.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="GLOB",
    help="Train (or adapt) only the weights whose path, as jaxquant inspect shows it, matches "
    "GLOB, such as '*attn/[qv]/kernel'. The others are quantized but not trained. By default all "
    "weights of the layers are trained. This option may be given several times.",
)
@click.option(
    "--text",
    default=None,
    help="Training text: a FILE, or builtin (the half of Python's help topics that eval does not "
    "score). Required unless --generated or --data is given.",
)
@click.option(
    "--data",
    default=None,
    metavar="FILE",
    help="Training examples for adapters in the place of a text: a JSONL FILE whose lines have "
    '"messages" (each with "role" and "content", written by the chat template of MODEL) or '
    '"prompt" and "completion". Only the messages of the assistant, or the completions, are '
    "predicted. A prompt and its completion are joined as they are, so a space between them must "
    "be in the file; an end-of-sequence token follows. Examples longer than --context are cut, and "
    "left out if the completion begins after that. The last quarter of the examples, at most 8, is "
    "held out to choose the best state, so at least 3 are needed.",
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
    'of the text instead. The default is "none" if MODEL is a checkpoint or adapters are trained; '
    "otherwise it is MODEL itself before quantization.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Set a field of jaxquant.training.QAT (ZeroQAT with --method zeroqat, Finetuning with "
    "adapters) for the end-to-end training; the value is JSON, as in --set learning_rate=1e-4. The "
    "command's defaults, which differ from those of the class, are in the file "
    "models/runs/finetuning_request.py. "
    "This option may be given several times.",
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
    help="Random seed for the order of the sequences, --generated, zeroqat and the initial values "
    "of adapters. The default is 0.",
)
@click.option("--out", required=True, metavar="DIR", help="Directory to write the checkpoint to.")
@click.option(
    "--peft",
    default=None,
    metavar="DIR",
    help="Directory to write the adapters of qlora to as well, as a PEFT folder. The --adapter of "
    "eval and generate puts it on the weights it was trained on and refuses others, so to use it, "
    "quantize MODEL first and finetune that checkpoint.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace an existing checkpoint in the --out directory, and an existing PEFT folder in "
    "the --peft directory.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one line of JSON.")
def finetune(
    model: str, out: str, overwrite: bool, as_json: bool, teacher: str | None, text: str | None,
    data: str | None, metrics: str | None, peft: str | None, **options: Any,
) -> None:  # fmt: skip
    """Train the quantized weights of MODEL, or adapters on them, and write a checkpoint.

    MODEL is a checkpoint written by jaxquant, or a model that jaxquant quantize accepts, which is
    quantized first. To resume an interrupted run, repeat the same command; the result is
    the same as that of an uninterrupted run.
    """
    with usage_errors():
        output = Output(out, overwrite)
        check_metrics(metrics, output)
        packed = storage.is_checkpoint(model)
        request = request_of(packed=packed, watch=metrics is not None, **options)
        adapters = PeftOutput(peft, output, options["method"])
        examples = _examples(data, request, text, teacher)
    output.hold()
    learned_from = "none" if teacher is None and request.adapter is not None else teacher
    start = time.monotonic()
    job = _job(request, model, learned_from, text, examples, packed)
    finished = output.begin(job.fingerprint(), refuse=True)
    sequences = job.sequences(finished)
    total = request.steps(job.source.config.n_layers)
    with Bars.stage("training", total) as step, Metrics.to(metrics) as written:

        def progress(done: Progress) -> None:
            step(done)
            measured = {**done.measured, "held_out": done.validation}
            written.write(done.step, measured, done.name)

        result = job.run(sequences, progress, finished)
    written_too = adapters.write(result, model)
    output.publish(result, storage.stored_recipe(model) if packed else request.recipe)
    report = {
        "out": out,
        "bits_per_weight": jq.bits_per_weight(result.params),
        "bytes": storage.nbytes(out),
        "forward_passes": sum(getattr(how, "forward_passes", 0) for how in request.stages),
        "seconds": time.monotonic() - start,
        **written_too,
    }
    emit(report, as_json)


def _examples(
    data: str | None, request: FinetuningRequest, text: str | None, teacher: str | None
) -> tuple[TrainingExample, ...]:
    """Return the examples of `--data`, if it is given and agrees with the other options."""
    if data is None:
        return ()
    if request.adapter is None:
        raise ValueError("--data is for adapters: give --method qlora, for example")
    if text is not None or request.generated:
        raise ValueError("--data takes the place of a text: leave out --text and --generated")
    if teacher not in (None, "none"):
        raise ValueError("--data predicts the completions of the examples: leave out --teacher")
    return tuple(read_examples(data))


def _job(
    request: FinetuningRequest, model: str, teacher: str | None, text: str | None,
    examples: tuple[TrainingExample, ...], packed: bool,
) -> FinetuningJob:  # fmt: skip
    """Return the job on the named models, checked before the text is read."""
    source = registry.load(model)
    learned_from = _teacher(teacher, source, packed)
    with usage_errors():
        if text is None and not request.generated and not examples:
            raise ValueError(
                "nothing to train on: give --text FILE, --generated N or both, or --data FILE"
            )
        check(request, source, learned_from)
    content = "" if text is None else read_text(text, calibration=True)
    return FinetuningJob(request, source, learned_from, content, examples)


def _teacher(spec: str | None, source: Model, packed: bool) -> Model | None:
    if spec is None:
        return None if packed else source
    return None if spec == "none" else registry.load(spec)


def request_of(
    *, packed: bool, watch: bool, generated: int, method: str, bits: int | None,
    group_size: int | None, only: tuple[str, ...], context: int, steps: int, block_steps: int,
    batch: int, seed: int, settings: tuple[str, ...], block_settings: tuple[str, ...],
    **of_adapters: Any,
) -> FinetuningRequest:  # fmt: skip
    """Return the request described by the options.

    Args:
      packed: whether the model is a checkpoint.
      watch: whether to measure everything that training can measure.
      of_adapters: the options that only adapters have.
      The others are the command's options.
    Raises:
      ValueError: options contradict each other or are out of range.
    """
    if packed and (bits, group_size) != (None, None):
        raise ValueError(
            "--bits and --group-size apply only to a MODEL with float weights; a "
            "checkpoint keeps its own"
        )
    if not steps and method in ADAPTERS:
        raise ValueError("adapters are trained end to end: give --steps of at least 1")
    if not steps and not block_steps:
        raise ValueError("nothing to do: give --steps, --block-steps or both")
    common: dict[str, Any] = {"batch_size": batch, "seed": seed}
    if watch and method == "qat":
        common["watch"] = True
    bits, group_size = bits or 4, group_size or 64
    rest: dict[str, Any] = {"only": only, "generated": generated, "context": context, "seed": seed}
    if method in ADAPTERS:
        if block_steps or block_settings:
            raise ValueError(
                "adapters are trained end to end: leave out --block-steps and --set-blocks"
            )
        adapter, chosen = _adapter(method, packed, **of_adapters)
        how = _training(ADAPTING[method], steps, common | chosen, settings)
        first = None if packed else base_method(method, bits, group_size)
        return FinetuningRequest(how, None, first, adapter=adapter, **rest)
    if given := [name for name, value in of_adapters.items() if value]:
        raise ValueError(
            f"--{given[0]} is an option of adapters, which --method {method} does not train: use "
            f"--method {', '.join(ADAPTERS[:-1])} or {ADAPTERS[-1]}, or leave it out"
        )
    end_to_end, blocks = METHODS[method]
    return FinetuningRequest(
        _training(end_to_end, steps, common, settings),
        _training(blocks, block_steps, common, block_settings),
        None if packed else jq.lsq(bits, group_size),
        **rest,
    )


def _adapter(
    method: str, packed: bool, rank: int | None, alpha: float | None, init: str | None,
    optimizer: str | None, paged: bool,
) -> tuple[jq.adapters.Adapter, dict[str, Any]]:  # fmt: skip
    """Return the adapter and the settings of its training that the options describe."""
    if method == "peqa" and (rank, alpha) != (None, None):
        raise ValueError("peqa trains scales, which have no rank: leave out --rank and --alpha")
    if method == "lota" and (alpha is not None or optimizer or paged):
        raise ValueError(
            "lota changes codes by whole steps, without a state: leave out --alpha, --optimizer "
            "and --paged"
        )
    if init is not None and method != "qlora":
        raise ValueError(f"--init is an option of qlora, not of {method}: leave it out")
    if init not in (None, "zero") and packed:
        raise ValueError(f"--init {init} needs a MODEL with float weights, not a checkpoint")
    if init not in (None, "zero") and alpha is not None:
        raise ValueError(f"--init {init} finds its own scaling: leave out --alpha")
    rank = rank or (8 if method == "qa-lora" else 16)
    adapter = adapter_of(method, rank, alpha, init or "zero")
    chosen = {"optimizer": optimizer or "adamw", "paged": paged}
    return adapter, chosen | ({"learning_rate": STARTED_RATE} if init not in (None, "zero") else {})


def _training(
    how: How | Finetuning, steps: int, common: dict[str, Any], settings: tuple[str, ...]
) -> Any:
    """Return the training settings with the user's changes, or None for no steps."""
    fields = {"steps": steps, **common, **dict(map(setting, settings))}
    names = {f.name for f in dataclasses.fields(how)}
    if unknown := set(fields) - names:
        raise ValueError(f"unknown settings {sorted(unknown)}; known: {sorted(names)}")
    return dataclasses.replace(how, **fields) if steps else None
