"""The commands `jaxquant train-bitnet` and `jaxquant finetune`."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import click

import jaxquant as jq
from jaxquant.storage import checkpoint
from jaxquant.training.qat import How
from jaxquant_models.cli.console import SEED, Steps, bar, emit, line, usage
from jaxquant_models.cli.metrics import Metrics
from jaxquant_models.cli.output import Output
from jaxquant_models.cli.request import setting
from jaxquant_models.readers.registry import Model
from jaxquant_models.readers.text import DOCSTRINGS, read_text
from jaxquant_models.runs import finetuning, pipeline, pretraining
from jaxquant_models.runs.finetuning import HOWS, Tuning
from jaxquant_models.runs.generate import generate
from jaxquant_models.runs.pretraining import SIZES, Run

DEFAULT = Run()


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
    with usage():
        output = Output(out, overwrite)
        check_metrics(metrics, output)
        run = Run(quantized=not floats, a48=0.05 * a48, **options)
    output.hold()
    start = time.monotonic()
    data = pretraining.texts(run, read_text(text, calibration=True))
    folder = output.begin(pretraining.fingerprint(run, data), refuse=True)
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
    output.publish(model, run.recipe)
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


@click.command()
@click.argument("model")
@click.option("--method", "way", type=click.Choice(sorted(HOWS)), default="qat", show_default=True,
              help="By derivatives, or forward only, in the memory of inference.")  # fmt: skip
@click.option("--bits", type=int, default=None, help="Of a MODEL of floats; default 4.")
@click.option("--group-size", type=int, default=None, help="Of a MODEL of floats; default 64.")
@click.option("--only", multiple=True, metavar="GLOB",
              help="Weights that train, as '*attn/[qv]/kernel'; others stay packed.")  # fmt: skip
@click.option("--text", default=None, help="To train on: text FILE or builtin.")
@click.option("--generated", type=click.IntRange(0), default=0, show_default=True,
              help="Sequences to train on, too, that the teacher writes.")  # fmt: skip
@click.option("--context", type=click.IntRange(2), default=pipeline.CONTEXT, show_default=True)
@click.option("--steps", type=click.IntRange(0), required=True, help="End to end.")
@click.option("--block-steps", type=click.IntRange(0), default=0, show_default=True,
              help="Before that, of every layer by itself, to be like the teacher's.")  # fmt: skip
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True,
              help="Sequences of a step.")  # fmt: skip
@click.option("--teacher", default=None, metavar="MODEL",
              help="Whose predictions are to be met; default: MODEL if of floats. "
              "none: each token is to be told from those before.")  # fmt: skip
@click.option("--set", "more", multiple=True, metavar="NAME=VALUE",
              help="Any field of jaxquant.QAT or ZeroQAT, end to end, as JSON: "
              "--set learning_rate=1e-4, --set dampening=0.1.")  # fmt: skip
@click.option("--set-blocks", "more_blocks", multiple=True, metavar="NAME=VALUE",
              help="The same, of single layers.")  # fmt: skip
@click.option("--metrics", default=None, metavar="DIR", help="JSONL and TensorBoard's events.")
@click.option("--seed", type=SEED, default=0)
@click.option("--out", required=True)
@click.option("--overwrite", is_flag=True)
@click.option("--json", "as_json", is_flag=True)
def finetune(
    model: str, out: str, overwrite: bool, as_json: bool, teacher: str | None, text: str | None,
    metrics: str | None, **options: Any,
) -> None:  # fmt: skip
    """Train the rounded weights of MODEL, floats or a checkpoint, into the directory --out.

    A killed run goes on where it stopped, to the same bits.
    """
    with usage():
        output = Output(out, overwrite)
        check_metrics(metrics, output)
        packed = checkpoint.is_checkpoint(model)
        tuning = _tuning(packed, metrics is not None, **options)
    output.hold()
    source = pipeline.load_any(model)
    of = _teacher(teacher, source, packed)
    with usage():
        if text is None and not tuning.generated:
            raise ValueError("nothing to train on: give --text FILE, --generated N, or both")
        finetuning.check(tuning, source, of)
    if text is not None:
        tuning = dataclasses.replace(tuning, text=read_text(text, calibration=True))
    start = time.monotonic()
    folder = output.begin(tuning.fingerprint(source, of), refuse=True)
    data = finetuning.sequences(tuning, source, of, folder)
    total = tuning.updates(source.config.n_layers)
    with bar("training", total) as step, Metrics.to(metrics) as written:
        show = Steps(step)

        def tell(done: Any) -> None:
            show(done)
            written.write(done.step, done.measured | {"held_out": done.validation}, done.name)

        result = finetuning.tuned(tuning, source, of, data, folder, tell)
    recipe = checkpoint.stored_recipe(model) if packed else tuning.recipe
    output.publish(result, recipe)
    report = {
        "out": out,
        "bits_per_weight": jq.bits_per_weight(result.params),
        "bytes": checkpoint.nbytes(out),
        "forward_passes": sum(getattr(how, "forward_passes", 0) for how in tuning.stages),
        "seconds": time.monotonic() - start,
    }
    emit(report, as_json)


def check_metrics(metrics: str | None, output: Output) -> None:
    """Raise ValueError if they are to be written where the model is."""
    taken = (Path(output.out).resolve(), output.path)
    if metrics is not None and Path(metrics).resolve() in taken:
        raise ValueError(f"--metrics {metrics} is where the model will be written; give another")


def _tuning(
    packed: bool, watch: bool, *, generated: int, way: str, bits: int | None,
    group_size: int | None, only: tuple[str, ...], context: int, steps: int, block_steps: int,
    batch: int, seed: int, more: tuple[str, ...], more_blocks: tuple[str, ...],
) -> Tuning:  # fmt: skip
    if packed and (bits, group_size) != (None, None):
        raise ValueError(
            "--bits and --group-size are for a model of floats; a checkpoint trains as it is"
        )
    if not steps and not block_steps:
        raise ValueError("nothing to do: give --steps, --block-steps or both")

    def of(how: How, steps: int, more: tuple[str, ...]) -> How | None:
        settings: dict[str, Any] = {"steps": steps, "batch_size": batch, "seed": seed}
        if watch and way == "qat":
            settings["watch"] = True
        settings |= dict(map(setting, more))
        names = {f.name for f in dataclasses.fields(how)}
        if unknown := set(settings) - names:
            raise ValueError(f"unknown settings {sorted(unknown)}; there are {sorted(names)}")
        return dataclasses.replace(how, **settings) if steps else None

    method = None if packed else jq.lsq(bits or 4, group_size or 64)
    whole, blocks = HOWS[way]
    return Tuning(
        of(whole, steps, more), of(blocks, block_steps, more_blocks), method, only, "", generated,
        context, seed,
    )  # fmt: skip


def _teacher(spec: str | None, source: Model, packed: bool) -> Model | None:
    if spec is None:
        return None if packed else source
    return None if spec == "none" else pipeline.load_any(spec)
