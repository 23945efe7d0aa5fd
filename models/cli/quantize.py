"""The command `jaxquant quantize`."""

import time
from typing import Any, get_args

import click

import jaxquant as jq
from jaxquant import storage
from jaxquant.calibration.statistics import Weighting
from jaxquant_models.cli.console import Bars, emit, line, usage_errors
from jaxquant_models.cli.options import SEED
from jaxquant_models.cli.output import Output
from jaxquant_models.cli.presets import PRESETS
from jaxquant_models.cli.quantize_request import ROTATIONS, request_of
from jaxquant_models.runs.quantization_setup import set_up


@click.command()
@click.argument("model")
@click.option(
    "--method", default=None, help=f"Quantization method: {', '.join(sorted(jq.METHODS))}."
)
@click.option("--bits", type=float, default=None,
              help="Bits per weight; only trellis takes a fraction.")  # fmt: skip
@click.option("--group-size", type=int, default=None,
              help="Input channels that share a scale; -1: all of them.")  # fmt: skip
@click.option("--symmetric/--asymmetric", default=None,
              help="Whether integer codes have no zero point.")  # fmt: skip
@click.option("--activation-bits", type=int, default=None,
              help="Bits per activation, with one scale per token; 16 keeps floats.")  # fmt: skip
@click.option(
    "--exact-prefix",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Number of tokens at the start of a text whose activations stay unrounded.",
)
@click.option("--act-order/--no-act-order", default=None,
              help="Whether error feedback orders input channels by second moment.")  # fmt: skip
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE",
              help="Set another option of the method, in JSON: --set two_sided=true.")  # fmt: skip
@click.option(
    "--target-bits",
    type=float,
    default=None,
    help="Average bits per weight; each kind of matrix gets its own number of bits.",
)
@click.option(
    "--effort",
    type=click.Choice(sorted(PRESETS)),
    default="default",
    show_default=True,
    help="How long to calibrate, search and heal; with --target-bits, also the method.",
)
@click.option(
    "--learn",
    "learn_steps",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Steps of end-to-end training of flatquant's transforms, on the healing text.",
)
@click.option(
    "--heal",
    "heal_steps",
    type=click.IntRange(0),
    default=None,
    help="Steps of training scales, codebooks and norms; default 0, or 200 with --effort best.",
)
@click.option(
    "--heal-batch",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Sequences in one training step.",
)
@click.option(
    "--heal-codes",
    type=click.IntRange(0),
    default=0,
    help="Steps of training the codes of aqlm and vptq after healing (PV-tuning).",
)
@click.option(
    "--heal-text",
    default=None,
    help="Healing text: a FILE, builtin, or generated (written by the model); default: the "
    "calibration text.",
)
@click.option(
    "--rotate-residual", type=click.Choice(ROTATIONS), default=None,
    help="Rotate the residual stream inside the weights, so that its readers need no rotation at "
    "run time: by a random matrix (QuaRot) or a learned one (SpinQuant). Unties the embedding.",
)  # fmt: skip
@click.option(
    "--rotate-steps", type=click.IntRange(1), default=None,
    help="Steps of training a learned rotation; default 100.",
)  # fmt: skip
@click.option("--recipe", "recipe_file", default=None, help="JSON file with the rules of a recipe.")
@click.option("--calibration", default="builtin", show_default=True,
              help="Calibration text: a FILE, or builtin (CPython's help topics).")  # fmt: skip
@click.option("--calibration-tokens", type=int, default=None,
              help="Number of calibration tokens; default 4096, 8192 or 65536 "
              "by --effort.")  # fmt: skip
@click.option("--weighting", type=click.Choice(get_args(Weighting)), default="gradient",
              show_default=True, help="Weight of each token in the second moments.")  # fmt: skip
@click.option("--seed", type=SEED, default=0, help="Seed of methods that draw random numbers.")
@click.option("--out", required=True, metavar="DIR", help="Directory for the checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def quantize(model: str, out: str, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Quantize MODEL and write a checkpoint.

    MODEL is smollm2-135m, a .gguf file, or a Hugging Face folder of the Llama family. A killed run
    continues where it stopped, and ends with the same arrays.
    """
    with usage_errors():
        output = Output(out, overwrite)
        request = request_of(**options)
    output.hold()
    start = time.monotonic()
    job = set_up(request, model, output.begin, Bars())
    result, recipe = job.run()
    output.publish(result, recipe)
    size = jq.size(result.params)
    line(str(size))
    report = {
        "out": out,
        "bits_per_weight": jq.bits_per_weight(result.params),
        "bits_over_all_weights": size.bits_per_weight,
        "bytes": storage.nbytes(out),
        "seconds": time.monotonic() - start,
    }
    emit(report, as_json)
