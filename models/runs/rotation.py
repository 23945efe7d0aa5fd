"""`--rotate-residual`: a model's residual stream turned before it is quantized."""

from collections.abc import Callable
from typing import Any

import click
import jax

from jaxquant.durable.store import Folder
from jaxquant_models.readers.registry import Model
from jaxquant_models.runs import pipeline
from jaxquant_models.runs.job import CALIBRATION, Data, Job, calibrated

KINDS = ("random", "learned")


def options(command: Callable) -> Callable:
    """Adds the options that say whether, and how."""
    command = click.option(
        "--rotate-steps", type=click.IntRange(1), default=None,
        help="Steps of learning a rotation; default 100.",
    )(command)  # fmt: skip
    return click.option(
        "--rotate-residual", "rotate", type=click.Choice(KINDS), default=None,
        help="Turn the residual stream, offline: what reads it needs no rotation online (QuaRot); "
        "learned: for activations as they will be rounded (SpinQuant). Unties a tied embedding.",
    )(command)  # fmt: skip


def untied(source: Model, tell: Callable[[str], None]) -> Model:
    """With a head apart; what that costs is told."""
    if not source.config.tie_embeddings:
        return source
    source = pipeline.untied_model(source)
    size = 2 * source.params["head"]["kernel"].size
    tell(
        f"note: the embedding is the output matrix too; the two turn apart with the residual "
        f"stream, so it is untied, which adds {size:,} bytes (float16)"
    )
    return source


def rotated(
    job: Job, source: Model, data: Data, folder: Folder, progress: Callable[[Any], None]
) -> Model:
    """The same function, a head apart, its residual stream turned; learning goes on from `folder`.

    Learned on what is healed on, but on the calibration's text where the model has yet to write
    that.
    """
    key = jax.random.key(job.seed)
    start = pipeline.random_rotation(source, key)
    if job.rotating is None or job.recipe is None:
        return pipeline.turned(source, start)
    training, held_out = data.training, data.held_out
    if training is None or held_out is None:
        training, held_out = data.calibration, data.unseen
    stats = None
    if any(m.needs_channels or m.needs_sample for _, m in job.rules):
        turned, name = pipeline.turned(source, start), f"{CALIBRATION} before rotating"
        stats = calibrated(job, turned, data.calibration, folder, lambda _: None, name)
    rotation = pipeline.learned_rotation(
        source, job.recipe, training, job.rotating, start=start, stats=stats, key=key,
        validation=held_out, progress=progress, finished=folder,
    )  # fmt: skip
    return pipeline.turned(source, rotation)
