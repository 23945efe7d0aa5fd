"""The options that say how a model is quantized, for the commands that need them."""

from collections.abc import Callable
from typing import Any, get_args

import click

import jaxquant as jq
from jaxquant.calibration.statistics import Weighting
from jaxquant_models.cli.options import SEED
from jaxquant_models.cli.presets import PRESETS
from jaxquant_models.cli.quantize_request import ROTATIONS

OPTIONS = (
    click.option(
        "--method",
        default=None,
        help=f"Quantization method: {', '.join(sorted(jq.METHODS))}. Required unless "
        "--target-bits or --recipe is given.",
    ),
    click.option(
        "--bits",
        type=float,
        default=None,
        help="Number of bits per weight or, for aqlm and vptq, per codebook index. It is a whole "
        "number, except that trellis and entropy_coded also take fractions such as 2.5, and "
        "stretched_elastic also takes 1.58. The default depends on the method.",
    ),
    click.option(
        "--group-size",
        type=int,
        default=None,
        help="Number of consecutive input channels that share a scale; -1 for one scale per output "
        "channel. The default depends on the method.",
    ),
    click.option(
        "--symmetric/--asymmetric",
        default=None,
        help="Whether integer weights have no zero point (symmetric) or one per group "
        "(asymmetric). The default depends on the method.",
    ),
    click.option(
        "--activations",
        default=None,
        metavar="FORM",
        help="Format to which the inputs of matmuls with quantized weights are rounded: float "
        "(no rounding), float8, int8/256 (one scale per 256 channels) or int2 to int8 (one "
        "scale per token), for example int4 or int4,asymmetric,clip=0.9, where clip is "
        "the fraction of the range that is kept. A suffix ,static replaces these scales "
        "with a single calibrated one. The default depends on the method.",
    ),
    click.option(
        "--exact-prefix",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Leave the activations of this many tokens at the beginning of each sequence "
        "unrounded.",
    ),
    click.option(
        "--act-order/--no-act-order",
        default=None,
        help="Whether gptq processes input channels in decreasing order of their second moments, "
        "which is the default, or in their original order.",
    ),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="NAME=VALUE",
        help="Set any other keyword argument of the method's Python function, such as "
        "jaxquant.qtip; the value is JSON, as in --set two_sided=true. This option may be "
        "given several times.",
    ),
    click.option(
        "--target-bits",
        type=float,
        default=None,
        help="Upper limit on the average number of bits per weight. The average is over the "
        "matrices of the layers, which are all that is quantized (not the embedding, "
        "output matrix, norms and biases), and includes everything stored for them, such "
        "as scales. Each kind of matrix (such as the q projections of all layers) gets its "
        "own number of bits, depending on how much its quantization changes the "
        "predictions of MODEL. Cannot be combined with --bits, --recipe or "
        "--rotate-residual learned.",
    ),
    click.option(
        "--effort",
        type=click.Choice(sorted(PRESETS)),
        default="default",
        show_default=True,
        help="How much time to spend on calibration, on searches within the method, and on "
        "healing (see --heal). With --target-bits, it also selects the method unless "
        "--method is given: gptq (fast), trellis (default) or entropy_coded (best).",
    ),
    click.option(
        "--learn",
        "learn_steps",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Number of steps to train the transforms of flatquant end to end, on --heal-text.",
    ),
    click.option(
        "--heal",
        "heal_steps",
        type=click.IntRange(0),
        default=None,
        help="Number of end-to-end training steps after rounding, to recover accuracy: scales, "
        "codebooks and norms are trained so that the predictions match those of the "
        "original model. Before that, each layer is briefly trained on its own. The "
        "default is 0, or 200 with --effort best and without --heal-layers.",
    ),
    click.option(
        "--heal-layers",
        is_flag=True,
        help="Train each layer on its own to match that of the original model, and nothing else. "
        "Unlike --heal, of which this is the first part, it needs only one layer in memory.",
    ),
    click.option(
        "--heal-batch",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Number of sequences per training step of --learn, --heal and --heal-codes.",
    ),
    click.option(
        "--heal-codes",
        type=click.IntRange(0),
        default=0,
        help="Number of steps to train the codes of aqlm and vptq (PV-tuning) after healing; "
        "requires --heal. The default is 0.",
    ),
    click.option(
        "--heal-text",
        default=None,
        help="Text for --learn and for healing: a FILE, builtin (see --calibration), or "
        "generated (sampled from MODEL). The default is the calibration text.",
    ),
    click.option(
        "--rotate-residual",
        type=click.Choice(ROTATIONS),
        default=None,
        help="Rotate the residual stream to spread its outliers. The rotation, random (QuaRot) "
        "or learned (SpinQuant), is merged into the weights, so it costs nothing at run "
        "time. Tied input and output embeddings are untied, which makes the model larger.",
    ),
    click.option(
        "--rotate-steps",
        type=click.IntRange(1),
        default=None,
        help="Number of training steps for --rotate-residual learned. The default is 100.",
    ),
    click.option(
        "--recipe",
        "recipe_file",
        default=None,
        metavar="FILE",
        help="JSON file that assigns methods to weights: a list of rules such as "
        '{"pattern": "*attn/*kernel", "method": "gptq", "bits": 3}. The first rule whose pattern '
        "matches the path of an array, as jaxquant inspect shows it, applies. Every array of MODEL "
        "must match a rule, and every rule an array, so most files end with "
        '{"pattern": "*", "method": "keep"}, which leaves all other arrays unquantized. Cannot be '
        "combined with --method, --target-bits, --bits, --group-size, --symmetric, --asymmetric, "
        "--activations, --act-order, --no-act-order or --set.",
    ),
    click.option(
        "--calibration",
        default="builtin",
        show_default=True,
        help="Calibration text: a FILE, or builtin (half of Python's help topics; jaxquant eval "
        "scores the other half).",
    ),
    click.option(
        "--calibration-tokens",
        type=int,
        default=None,
        help="Number of tokens of the calibration text to use, at least 512. The default "
        "depends on --effort: 4096 (fast), 8192 (default) or 65536 (best).",
    ),
    click.option(
        "--weighting",
        type=click.Choice(get_args(Weighting)),
        default="gradient",
        show_default=True,
        help="How much each token counts in the calibration statistics of a weight's inputs: "
        "equally (uniform), by the squared gradient of the loss at the weight's output "
        "(gradient), or by the inverse of the mean square of the token's input (energy), "
        "so that huge inputs do not dominate.",
    ),
    click.option(
        "--seed",
        type=SEED,
        default=0,
        help="Random seed for methods, rotations and generated text. The default is 0.",
    ),
    click.option(
        "--lossless",
        is_flag=True,
        help="Store every array of the checkpoint in fewer bytes, without loss. Unquantized "
        "bfloat16 matrices are then kept in bfloat16 instead of being rounded to float16. The "
        "bytes that `plan` reports do not include this.",
    ),
)


def quantization_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, for `quantize_request.request_of`.

    Args:
      command: the function of the command.
    """
    for option in reversed(OPTIONS):
        command = option(command)
    return command
