"""The command `jaxquant merge`."""

import math
import time

import click

import jaxquant as jq
from jaxquant import storage
from jaxquant.training.merging import Merged
from jaxquant_models.cli.console import Bars, emit, line, line_of, usage_errors
from jaxquant_models.cli.output import Output
from jaxquant_models.readers import registry
from jaxquant_models.readers.text import read_text
from jaxquant_models.runs.fingerprints import VERSIONS, digest_of_model, digest_of_text
from jaxquant_models.runs.merging import ROUNDERS, is_exact, loss_of, merge_model
from jaxquant_models.runs.sequences import context_length, token_sequences

CALIBRATION = 16  # sequences


@click.command()
@click.argument("model")
@click.option(
    "--bits",
    type=int,
    default=None,
    help="Number of bits per weight when the sum of adapter and weight is rounded again. The "
    "default is that of the weights. An exact merge keeps the bits of the weights, and another "
    "number is refused.",
)
@click.option(
    "--method",
    type=click.Choice(ROUNDERS),
    default=None,
    help="How the sum of adapter and weight is rounded again: rtn (to nearest, the default) or "
    "gptq (with error feedback, calibrated on --text). Not allowed if the merge is exact.",
)
@click.option(
    "--text",
    default="builtin",
    show_default=True,
    help="Text on which the merged model is compared with the adapted one, and on which gptq "
    "calibrates: a FILE, or builtin (the half of Python's help topics that eval does not score).",
)
@click.option(
    "--chunks",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Number of chunks of the text on which the models are compared.",
)
@click.option("--out", required=True, metavar="DIR", help="Directory to write the checkpoint to.")
@click.option(
    "--overwrite", is_flag=True, help="Replace an existing checkpoint in the --out directory."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as one line of JSON.")
def merge(
    model: str, bits: int | None, method: str | None, text: str, chunks: int, out: str,
    overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Merge the adapters of MODEL into its weights and write a checkpoint.

    MODEL is a checkpoint that jaxquant finetune wrote with adapters. Adapters of qa-lora, l4q, lota
    and peqa merge exactly: the packed weights compute what was trained. Those of qlora do not,
    since the sum is rounded again. The report gives the KL divergence of the merged model's
    predictions from those of the adapted model, in nats per token, and the share of the energy of
    the adapters' outputs that survives. With gptq, that is for inputs like those of the calibration
    text; with rtn, for uncorrelated inputs of unit variance, so do not compare the shares of the
    two.
    """
    with usage_errors():
        output = Output(out, overwrite)
        source = registry.load(model, widen=False)
        exact = is_exact(source)
        if exact and method is not None:
            raise ValueError(
                f"the adapters of {model} merge exactly, so nothing is rounded again: leave out "
                "--method"
            )
    content, start = read_text(text, calibration=True), time.monotonic()
    sequences = token_sequences(source, content, context_length(source))
    scored = sequences[: chunks if method != "gptq" else max(1, len(sequences) // 2)][:chunks]
    calibration = sequences[len(scored) :][-CALIBRATION:]
    if method == "gptq" and not len(calibration):
        raise ValueError(
            f"the text has {len(sequences)} sequences of {sequences.shape[1]} tokens, but gptq "
            "needs at least 2: one to calibrate on, and one to compare the models on"
        )
    output.hold()
    finished = output.begin(
        {
            **VERSIONS, "weights": digest_of_model(source), "bits": bits, "method": method,
            "text": digest_of_text(content),
        },
        refuse=True,
    )  # fmt: skip
    rounder = None if exact else method or "rtn"
    count = sum(isinstance(w, jq.QTensor) for _, w in jq.core.path_leaves(source.params))
    with Bars.stage("merging", count) as step:
        merged, reports = merge_model(
            source, rounder, bits, calibration, progress=step, finished=finished
        )
    line("comparing the merged model with the adapted one")
    lost = loss_of(source, merged, reports, scored)
    output.publish(merged, storage.stored_recipe(model) if bits is None else None)
    report = {
        "out": out,
        "exact": lost.exact,
        "kept": None if math.isnan(lost.kept) else lost.kept,
        "kl": lost.kl,
        "bits_per_weight": jq.bits_per_weight(merged.params),
        "bytes": storage.nbytes(out),
        "seconds": time.monotonic() - start,
    }
    emit(report, as_json)


@line_of.register
def _(done: Merged) -> str:
    how = "exact" if done.exact else f"{done.kept:.1%} of the adapter kept"
    return f"{done.path:36} {done.bits_per_weight:6.3f} bits  {how}"
