"""Prepares a quantization job from a request: reads the texts and loads the model."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from pydantic import JsonValue

import jaxquant as jq
from jaxquant.durable.store import Folder
from jaxquant.recipes.serialize import to_json
from jaxquant_models.readers import registry
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.room import check_fits, check_model_fits, float_bytes
from jaxquant_models.readers.source import Source
from jaxquant_models.readers.text import read_text
from jaxquant_models.runs.allocating import AllocatingJob, choices_of
from jaxquant_models.runs.fingerprints import VERSIONS, digest_of_text
from jaxquant_models.runs.generated_text import GENERATED
from jaxquant_models.runs.layerwise import LayerwiseJob
from jaxquant_models.runs.needs import Needs, needs_of
from jaxquant_models.runs.planning import least
from jaxquant_models.runs.quantization import plan_model
from jaxquant_models.runs.quantization_job import QuantizationJob, Sequences
from jaxquant_models.runs.quantization_request import QuantizationRequest
from jaxquant_models.runs.reporting import Reporter
from jaxquant_models.runs.rotation import random_rotation, rotated, untied_source
from jaxquant_models.runs.sequences import (
    MEASURED,
    context_length,
    first_tokens,
    split,
    token_sequences,
)
from jaxquant_models.runs.visits import Visits
from pallas_kernels import viterbi


class Texts(NamedTuple):
    """The contents of the texts.

    Attributes:
      calibration: the calibration text.
      heal: the training text; "" stands for the calibration text, `GENERATED` for text that the
        model generates.
    """

    calibration: str
    heal: str


def set_up(
    request: QuantizationRequest,
    model: str,
    begin: Callable[[Mapping[str, JsonValue]], Folder],
    reporter: Reporter,
) -> QuantizationJob | LayerwiseJob | AllocatingJob:
    """Return the job for a request; it goes layer by layer unless a step needs the whole model.

    Args:
      request: the request.
      model: the spec of the model, as in `readers.registry.open_model`.
      begin: called with the job's fingerprint once all checks have passed; returns the results that
        earlier runs of the job have finished.
      reporter: receives the plan and later the reports of the work.
    Raises:
      ValueError: a text or the model cannot be read, the recipe does not fit the model, the target
        bits cannot be reached, or a text is too short.
    """
    texts = _read_texts(request)
    source = source_for(request, model, reporter.tell)
    plan = plan_of(request, source.outline)
    if request.recipe is not None:
        reporter.tell(str(plan))
    needs = needs_of(request)
    sequences = _cut(request, needs, source.outline, texts)
    if request.whole:
        whole = f"{' and '.join(request.whole)} (the whole model at once)"
        check_model_fits(source.outline, whole)
        reporter.tell(f"{whole}: {float_bytes(source.outline):,} bytes in memory")
        known = None if request.recipe is None else plan
        finished = begin(_fingerprint(request, source, texts))
        return QuantizationJob(request, source.load(), needs, sequences, known, finished, reporter)
    needed = least(source.outline, plan, needs, request.weighting)
    check_fits(needed, "one layer with its statistics", "use a larger machine, or --method rtn")
    rotation = random_rotation(source.outline, request.key) if request.rotation else None
    finished = begin(_fingerprint(request, source, texts))
    if rotation is not None:
        source = rotated(source, rotation)
    training = np.empty((0, 0), np.int32)
    if request.layers_healed and sequences.training is not None:
        training = sequences.training
    visits = Visits(source, needs, request.weighting, sequences.calibration, finished)
    if request.recipe is None:
        judged = sequences.unseen[:MEASURED]
        return AllocatingJob(request, visits, judged, finished, reporter, training)
    return LayerwiseJob(request, visits, plan, request.recipe, finished, reporter, training)


def _read_texts(request: QuantizationRequest) -> Texts:
    own = request.heal_text in ("", GENERATED)
    return Texts(
        read_text(request.calibration, calibration=True),
        request.heal_text if own else read_text(request.heal_text, calibration=True),
    )


def source_for(request: QuantizationRequest, model: str, tell: Callable[[str], None]) -> Source:
    """Open the model as a request quantizes it: untied if its residual stream is to be rotated.

    Args:
      request: the request.
      model: the spec of the model, as in `readers.registry.open_model`.
      tell: called with a line about the bytes that untying adds.
    """
    source = registry.open_model(model).with_prefix(request.exact_prefix)
    if not request.rotation or not source.outline.config.tie_embeddings:
        return source
    source = untied_source(source)
    size = 2 * source.outline.params["head"]["kernel"].size
    tell(
        "note: the model uses one matrix as embedding and as output matrix; the "
        "rotation changes these differently, so they are stored separately, "
        f"which adds {size:,} bytes (float16)"
    )
    return source


def plan_of(request: QuantizationRequest, outline: Model) -> jq.recipes.Plan:
    """Return the resolved recipe; if methods are to be allocated, with those nearest to the target.

    Args:
      request: the request.
      outline: the model, with shapes in place of arrays.
    Raises:
      ValueError: the recipe does not fit the model, or the choices cannot meet the target bits.
    """
    if request.recipe is not None:
        return plan_model(outline, request.recipe)
    choices = choices_of(request, outline)
    choices.check(request.target_bits)
    near = [(entry.path, entry.method) for entry in choices.nearest(request.target_bits)]
    return plan_model(outline, jq.Recipe([*near, ("*", jq.KEEP)]))


def _cut(request: QuantizationRequest, needs: Needs, source: Model, texts: Texts) -> Sequences:
    """Return the sequences that a request needs.

    Raises:
      ValueError: a text is too short to hold a part of it out, or for one batch.
    """
    none, training = np.empty((0, 0), np.int32), request.training
    trains = bool(training) or request.layers_healed
    if not needs.statistics and not trains:
        return Sequences(none, none)
    length = context_length(source)
    if needs.statistics and request.exact_prefix > length - 2:
        raise ValueError(
            f"--exact-prefix {request.exact_prefix} leaves nothing to calibrate on of sequences of "
            f"{length} tokens; give a smaller one"
        )
    cut = lambda text: token_sequences(source, text, length)
    tokens = request.calibration_tokens
    if request.recipe is not None and not trains:
        return Sequences(first_tokens(cut(texts.calibration), tokens), none)
    fit, unseen = split(cut(texts.calibration))
    calibration = first_tokens(fit, tokens)
    if texts.heal == GENERATED:
        return Sequences(calibration, unseen)
    own = split(cut(texts.heal)) if texts.heal else (fit, unseen)
    batch = max((how.batch_size for how in training), default=0)
    if len(own[0]) < batch:
        raise ValueError(
            f"the healing text has {len(own[0])} sequences of {own[0].shape[1]} "
            f"tokens, but one step needs {batch}: give a longer text or a smaller "
            "batch"
        )
    return Sequences(calibration, unseen, *own)


def _fingerprint(
    request: QuantizationRequest, source: Source, texts: Texts
) -> dict[str, JsonValue]:
    """Return the identity of a run: plain values that differ wherever results may differ."""
    training = ("learning", "healing", "recoding", "rotating")
    return {
        **VERSIONS,
        "encoder": viterbi.backend(),
        "weights": source.weights.digest(),
        "prefix": request.exact_prefix,
        "recipe": None if request.recipe is None else request.recipe.to_json(),
        "choices": [to_json(m) for m in request.choices],
        **{name: (how := getattr(request, name)) and dataclasses.asdict(how) for name in training},
        "layers_healed": request.layers_healed,
        "rotate": request.rotation,
        "text": digest_of_text(texts.calibration),
        "heal_text": digest_of_text(texts.heal),
        "tokens": request.calibration_tokens,
        "lossless": request.lossless,
        "weighting": request.weighting,
        "seed": request.seed,
        "target_bits": request.target_bits,
    }
