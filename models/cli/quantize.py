"""The command `jaxquant quantize`."""

import dataclasses
import time
from typing import Any, get_args

import click

import jaxquant as jq
from jaxquant.calibration.statistics import Weighting
from jaxquant.core.paths import matches
from jaxquant.durable.store import Folder
from jaxquant.storage import checkpoint
from jaxquant.tuning.heal import BLOCKS
from jaxquant_models.cli.console import SEED, Rows, Steps, bar, emit, line, usage
from jaxquant_models.cli.output import Output
from jaxquant_models.cli.request import job_of, with_texts
from jaxquant_models.runs import job, pipeline, rotation
from jaxquant_models.runs.effort import EFFORTS


@click.command()
@click.argument("model")
@click.option("--method", default=None, help=f"One of {', '.join(sorted(jq.METHODS))}.")
@click.option("--bits", type=float, default=None, help="Whole, but for an average: trellis.")
@click.option("--group-size", type=int, default=None, help="-1: one scale per output.")
@click.option("--symmetric/--asymmetric", default=None)
@click.option("--activation-bits", type=int, default=None, help="Of inputs, per token; 16: floats.")
@click.option(
    "--exact-prefix",
    "prefix",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="First tokens of a text whose activations are not rounded: sinks.",
)
@click.option("--act-order/--no-act-order", default=None)
@click.option("--set", "more", multiple=True, metavar="NAME=VALUE",
              help="Any other option of the method, as JSON: --set two_sided=true.")  # fmt: skip
@click.option(
    "--target-bits",
    type=float,
    default=None,
    help="Average over all matrices: shares bits out between kinds of weights.",
)
@click.option(
    "--effort",
    type=click.Choice(sorted(EFFORTS)),
    default="default",
    show_default=True,
    help="Sets calibration, searches, healing and, for --target-bits, the method.",
)
@click.option(
    "--learn",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Steps of training the transforms of flatquant, end to end, on the text to heal on.",
)
@click.option(
    "--heal",
    "steps",
    type=click.IntRange(0),
    default=None,
    help="Steps of training afterwards; default 0, or 200 with --effort best.",
)
@click.option(
    "--heal-batch",
    "batch",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Sequences of a step of training.",
)
@click.option(
    "--heal-codes",
    "recode",
    type=click.IntRange(0),
    default=0,
    help="Steps of training the codes of aqlm and vptq after that (PV-tuning).",
)
@click.option(
    "--heal-text",
    default=None,
    help="Text FILE, builtin or generated (by the model); default: that of calibration.",
)
@rotation.options
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
def quantize(
    model: str, out: str, overwrite: bool, as_json: bool, prefix: int, **options: Any
) -> None:
    """Quantize MODEL into the directory --out."""
    with usage():
        output = Output(out, overwrite)
        work = job_of(**options)
    output.hold()
    start = time.monotonic()
    work = with_texts(work)
    source = dataclasses.replace(pipeline.load_any(model), prefix=prefix)
    if work.rotate:
        source = rotation.untied(source, line)
    if work.recipe is not None:
        click.echo(str(pipeline.plan(source, work.recipe)), err=True)
    else:
        pipeline.choices(source, work.choices, work.healing is not None).check(work.target_bits)
    data = job.data(work, source)
    folder = output.begin(work.fingerprint(source))
    if work.rotate:
        with bar("rotating", work.rotating.steps if work.rotating else 0) as step:
            source = rotation.rotated(work, source, data, folder, Steps(step))
    stats = None
    if work.needs_statistics:
        with bar("calibrating", len(data.calibration)) as step:
            stats = job.calibrated(work, source, data.calibration, folder, step)
    recipe = work.recipe
    if recipe is None:
        recipe = _allocated(work, source, data, stats, folder)
    transforms = None
    if work.learning is not None:
        with bar("learning", work.learning.steps) as step:
            transforms = job.learned(
                work, work.learning, recipe, source, stats, data, folder, Steps(step)
            )
    with bar("quantizing", pipeline.plan(source, recipe).matrices) as step:
        result = job.quantized(work, recipe, source, stats, data, folder, Rows(step), transforms)
    if work.healing is not None:
        whole = work.healing.steps + (work.recoding.steps if work.recoding else 0)
        total = BLOCKS.steps * source.config.n_layers + whole
        with bar("healing", total) as step:
            result = job.healed(work, work.healing, source, result, data, folder, Steps(step))
    output.publish(result, recipe)
    report = {
        "out": out,
        "bits_per_weight": jq.bits_per_weight(result.params),
        "bits_over_all_weights": jq.size(result.params).bits_per_weight,
        "bytes": checkpoint.nbytes(out),
        "seconds": time.monotonic() - start,
    }
    line(str(jq.size(result.params)))
    emit(report, as_json)


def _allocated(work: job.Job, source: Any, data: job.Data, stats: Any, folder: Folder) -> jq.Recipe:
    kinds = sum(matches(path, pipeline.LAYERS) for path, _ in jq.path_leaves(source.params))
    with bar("allocating", len(work.choices) * kinds) as step:

        def tell(option: jq.Option) -> None:
            step(option)
            line(str(option))

        allocation = job.allocated(work, source, data.unseen, stats, folder, tell)
    click.echo(str(allocation), err=True)
    return allocation.recipe
