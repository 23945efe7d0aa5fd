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
@click.option(
    "--bits",
    type=float,
    default=None,
    help="Number of bits per weight. trellis and entropy_coded also take a fraction, such as "
    "2.5; the other methods take a whole number.",
)
@click.option(
    "--group-size",
    type=int,
    default=None,
    help="Number of input channels that share a scale. With -1, all of them share one.",
)
@click.option(
    "--symmetric/--asymmetric",
    default=None,
    help="Whether integer codes do without a zero point (symmetric) or have one for each "
    "group (asymmetric).",
)
@click.option(
    "--activations",
    default=None,
    metavar="FORM",
    help="How to round activations: float (not at all), float8, int8, int4, int8,static (one scale "
    "for all tokens), int4,asymmetric,clip=0.9 and so on. The default depends on the method.",
)
@click.option(
    "--exact-prefix",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Number of tokens at the beginning of a text whose activations are not rounded.",
)
@click.option(
    "--act-order/--no-act-order",
    default=None,
    help="Whether error feedback (GPTQ) processes the input channels in the order of their "
    "second moments, largest first.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Set any other option of the method; the value is JSON, as in --set two_sided=true. "
    "This option may be given several times.",
)
@click.option(
    "--target-bits",
    type=float,
    default=None,
    help="Average number of bits per weight. The command measures each kind of matrix and gives it "
    "its own number of bits.",
)
@click.option(
    "--effort",
    type=click.Choice(sorted(PRESETS)),
    default="default",
    show_default=True,
    help="How much time to spend on calibration, search and healing. With --target-bits, it also "
    "selects the method, unless --method is given.",
)
@click.option(
    "--learn",
    "learn_steps",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Number of steps that train the transforms of flatquant end to end, on the healing text.",
)
@click.option(
    "--heal",
    "heal_steps",
    type=click.IntRange(0),
    default=None,
    help="Number of training steps after rounding. They adjust scales, codebooks and norms so that "
    "the model predicts what the original predicts. The default is 0, or 200 with --effort best.",
)
@click.option(
    "--heal-batch",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Number of sequences in one training step.",
)
@click.option(
    "--heal-codes",
    type=click.IntRange(0),
    default=0,
    help="Number of steps that train the codes of aqlm and vptq after healing (PV-tuning).",
)
@click.option(
    "--heal-text",
    default=None,
    help="Text for healing: a FILE; builtin; or generated, which is text that the model writes. "
    "The default is the calibration text.",
)
@click.option(
    "--rotate-residual",
    type=click.Choice(ROTATIONS),
    default=None,
    help="Multiply the weights by a rotation of the residual stream, which spreads outliers and "
    "costs nothing at run time. The rotation is random (QuaRot) or learned (SpinQuant). If the "
    "model uses one matrix as embedding and as output matrix, they become two.",
)
@click.option(
    "--rotate-steps",
    type=click.IntRange(1),
    default=None,
    help="Number of steps that train a learned rotation. The default is 100.",
)
@click.option(
    "--recipe",
    "recipe_file",
    default=None,
    metavar="FILE",
    help="JSON file with a recipe: which method quantizes which weights. It replaces "
    "--method and the options of the method.",
)
@click.option(
    "--calibration",
    default="builtin",
    show_default=True,
    help="Text for calibration: a FILE, or builtin, which is the text of Python's help topics.",
)
@click.option(
    "--calibration-tokens",
    type=int,
    default=None,
    help="Number of tokens of that text to use. The default depends on --effort: 4096 (fast), "
    "8192 (default) or 65536 (best).",
)
@click.option(
    "--weighting",
    type=click.Choice(get_args(Weighting)),
    default="gradient",
    show_default=True,
    help="How much each token counts in the second moments of the inputs: all the same "
    "(uniform), by the gradient of the loss, or by the energy of its output.",
)
@click.option("--seed", type=SEED, default=0, help="Seed of the methods that draw random numbers.")
@click.option("--out", required=True, metavar="DIR", help="Directory to write the checkpoint to.")
@click.option("--overwrite", is_flag=True, help="Replace the checkpoint that is in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one line of JSON.")
def quantize(model: str, out: str, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Quantize MODEL and write a checkpoint.

    MODEL is smollm2-135m, a .gguf file, or a Hugging Face folder of the Llama family. If a run is
    stopped, the same command continues it, and the result is the same.
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
