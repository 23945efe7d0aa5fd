"""The command `jaxquant quantize`."""

import time
from typing import Any, get_args

import click

import jaxquant as jq
from jaxquant.calibration.statistics import Weighting
from jaxquant.storage import checkpoint
from jaxquant_models.cli.console import Bars, emit, line, usage_errors
from jaxquant_models.cli.options import SEED
from jaxquant_models.cli.output import Output
from jaxquant_models.cli.presets import PRESETS
from jaxquant_models.cli.quantize_request import ROTATIONS, request_of
from jaxquant_models.runs.quantization_setup import set_up


@click.command()
@click.argument("model")
@click.option("--method", default=None, help=f"One of {', '.join(sorted(jq.METHODS))}.")
@click.option("--bits", type=float, default=None, help="Whole, but for an average: trellis.")
@click.option("--group-size", type=int, default=None, help="-1: one scale per output.")
@click.option("--symmetric/--asymmetric", default=None)
@click.option("--activation-bits", type=int, default=None, help="Of inputs, per token; 16: floats.")
@click.option(
    "--exact-prefix",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="First tokens of a text whose activations are not rounded: sinks.",
)
@click.option("--act-order/--no-act-order", default=None)
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE",
              help="Any other option of the method, as JSON: --set two_sided=true.")  # fmt: skip
@click.option(
    "--target-bits",
    type=float,
    default=None,
    help="Average over all matrices: shares bits out between kinds of weights.",
)
@click.option(
    "--effort",
    type=click.Choice(sorted(PRESETS)),
    default="default",
    show_default=True,
    help="Sets calibration, searches, healing and, for --target-bits, the method.",
)
@click.option(
    "--learn",
    "learn_steps",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Steps of training the transforms of flatquant, end to end, on the text to heal on.",
)
@click.option(
    "--heal",
    "heal_steps",
    type=click.IntRange(0),
    default=None,
    help="Steps of training afterwards; default 0, or 200 with --effort best.",
)
@click.option(
    "--heal-batch",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Sequences of a step of training.",
)
@click.option(
    "--heal-codes",
    type=click.IntRange(0),
    default=0,
    help="Steps of training the codes of aqlm and vptq after that (PV-tuning).",
)
@click.option(
    "--heal-text",
    default=None,
    help="Text FILE, builtin or generated (by the model); default: that of calibration.",
)
@click.option(
    "--rotate-residual", type=click.Choice(ROTATIONS), default=None,
    help="Turn the residual stream, offline: what reads it needs no rotation online (QuaRot); "
    "learned: for activations as they will be rounded (SpinQuant). Unties a tied embedding.",
)  # fmt: skip
@click.option(
    "--rotate-steps", type=click.IntRange(1), default=None,
    help="Steps of learning a rotation; default 100.",
)  # fmt: skip
@click.option("--recipe", "recipe_file", default=None, help="JSON file of rules.")
@click.option("--calibration", default="builtin", show_default=True, help="Text FILE or builtin.")
@click.option(
    "--calibration-tokens", type=int, default=None, help="By --effort: 4096, 8192, 65536."
)
@click.option("--weighting", type=click.Choice(get_args(Weighting)), default="gradient")
@click.option("--seed", type=SEED, default=0, help="Seeds methods that draw at random.")
@click.option("--out", required=True)
@click.option("--overwrite", is_flag=True)
@click.option("--json", "as_json", is_flag=True)
def quantize(model: str, out: str, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Quantize MODEL into the directory --out."""
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
        "bytes": checkpoint.nbytes(out),
        "seconds": time.monotonic() - start,
    }
    emit(report, as_json)
