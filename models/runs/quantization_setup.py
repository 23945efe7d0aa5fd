"""Prepares a quantization job from a request: reads the texts and loads the model."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from pydantic import JsonValue

import jaxquant as jq
from jaxquant.durable.store import Finished
from jaxquant.recipes.serialize import to_json
from jaxquant_models.architectures.llama import LAYER_MATRICES
from jaxquant_models.readers import registry
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.text import read_text
from jaxquant_models.runs.fingerprints import VERSIONS, digest_of_model, digest_of_text
from jaxquant_models.runs.generated_text import GENERATED
from jaxquant_models.runs.quantization import plan_model
from jaxquant_models.runs.quantization_job import Needs, QuantizationJob, Sequences
from jaxquant_models.runs.quantization_request import QuantizationRequest
from jaxquant_models.runs.reporting import Reporter
from jaxquant_models.runs.rotation import untie_model
from jaxquant_models.runs.sequences import context_length, first_tokens, split, token_sequences
from pallas_kernels import viterbi

SAMPLE = 256  # rows of every input kept to fit transforms: the largest, and as many at random


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
    begin: Callable[[Mapping[str, JsonValue]], Finished],
    reporter: Reporter,
) -> QuantizationJob:
    """Return the job for a request. The job holds the only reference to the model.

    Args:
      request: the request.
      model: the spec of the model, as in `readers.registry.load`.
      begin: called with the job's fingerprint once all checks have passed; returns the results that
        earlier runs of the job have finished.
      reporter: receives the plan and later the reports of the work.
    Raises:
      ValueError: a text or the model cannot be read, the recipe does not fit the model, the target
        bits cannot be reached, or a text is too short.
    """
    texts = _read_texts(request)
    source = dataclasses.replace(registry.load(model), prefix=request.exact_prefix)
    if request.rotation:
        source = _untied(source, reporter)
    plan = _plan(request, source, reporter)
    needs = _needs(request)
    sequences = _cut(request, needs, source, texts)
    finished = begin(_fingerprint(request, source, texts))
    return QuantizationJob(request, source, needs, sequences, plan, finished, reporter)


def _read_texts(request: QuantizationRequest) -> Texts:
    own = request.heal_text in ("", GENERATED)
    return Texts(
        read_text(request.calibration, calibration=True),
        request.heal_text if own else read_text(request.heal_text, calibration=True),
    )


def _untied(source: Model, reporter: Reporter) -> Model:
    """Return the model with untied embeddings, reporting the bytes that this adds."""
    if not source.config.tie_embeddings:
        return source
    source = untie_model(source)
    size = 2 * source.params["head"]["kernel"].size
    reporter.tell(
        "note: the model uses one matrix as embedding and as output matrix; the "
        "rotation changes these differently, so they are stored separately, "
        f"which adds {size:,} bytes (float16)"
    )
    return source


def _plan(
    request: QuantizationRequest, source: Model, reporter: Reporter
) -> jq.recipes.Plan | None:
    """Return and report the resolved recipe, or None if methods are to be allocated.

    In the latter case, check that the choices can meet the target bits.
    """
    if request.recipe is None:
        choices = jq.ptq.Choices.of(
            source.params, request.choices, source.sites(), paths=[LAYER_MATRICES],
            healed=request.healing is not None,
        )  # fmt: skip
        choices.check(request.target_bits)
        return None
    plan = plan_model(source, request.recipe)
    reporter.tell(str(plan))
    return plan


def _needs(request: QuantizationRequest) -> Needs:
    rules, allocates = request.rules, request.recipe is None
    methods = [method for _, method in rules]
    gram = allocates or any(m.needs_gram for m in methods)
    sample = any(m.needs_sample for m in methods)
    channels = sample or any(m.needs_channels for m in methods)
    output = tuple(dict.fromkeys(path for path, m in rules if m.needs_output))
    searched = (m for m in methods if getattr(m.input, "searched", False))
    return Needs(
        statistics=bool(gram or channels or output),
        gram=gram,
        channels=channels,
        output=output,
        sample=SAMPLE if sample else 0,
        module_loss=any(m.activations is None for m in searched),
    )


def _cut(request: QuantizationRequest, needs: Needs, source: Model, texts: Texts) -> Sequences:
    """Return the sequences that a request needs.

    Raises:
      ValueError: a text is too short to hold a part of it out, or for one batch.
    """
    none, training = np.empty((0, 0), np.int32), request.training
    if not needs.statistics and not training:
        return Sequences(none, none)
    cut = lambda text: token_sequences(source, text, context_length(source))
    tokens = request.calibration_tokens
    if request.recipe is not None and not training:
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


def _fingerprint(request: QuantizationRequest, source: Model, texts: Texts) -> dict[str, JsonValue]:
    """Return the identity of a run: plain values that differ wherever results may differ."""
    training = ("learning", "healing", "recoding", "rotating")
    return {
        **VERSIONS,
        "encoder": viterbi.backend(),
        "weights": digest_of_model(source),
        "prefix": source.prefix,
        "recipe": None if request.recipe is None else request.recipe.to_json(),
        "choices": [to_json(m) for m in request.choices],
        **{name: (how := getattr(request, name)) and dataclasses.asdict(how) for name in training},
        "rotate": request.rotation,
        "text": digest_of_text(texts.calibration),
        "heal_text": digest_of_text(texts.heal),
        "tokens": request.calibration_tokens,
        "weighting": request.weighting,
        "seed": request.seed,
        "target_bits": request.target_bits,
    }
