"""Merging the adapters of a language model, and measuring what the merge loses."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import jaxquant as jq
from jaxquant.adapters.adapted import is_adapted
from jaxquant.durable.store import Finished
from jaxquant.evaluation import evaluate
from jaxquant.training.merging import Merged
from jaxquant_models.readers.model import Model
from jaxquant_models.runs.calibration import calibrate_model

ROUNDERS = ("rtn", "gptq")


class Loss(NamedTuple):
    """What a merge loses.

    Attributes:
      exact: whether every adapter merged exactly.
      kept: share of the energy of the adapters' outputs that survives, over all matrices; 1 if all
        merged exactly, NaN if the adapters changed nothing. The inputs are those of the calibration
        text with gptq; otherwise they are taken as uncorrelated and of unit variance.
      kl: mean KL divergence of the predictions of the merged model from those of the adapted one,
        in nats per token.
    """

    exact: bool
    kept: float
    kl: float


def is_exact(model: Model) -> bool:
    """Return whether all adapters of a model merge exactly.

    Args:
      model: the model.
    Raises:
      ValueError: it has no adapters.
    """
    adapters = [w.format.adapter for _, w in jq.core.path_leaves(model.params) if is_adapted(w)]
    if not adapters:
        raise ValueError(
            f"{model.name} has no adapters to merge: give a checkpoint that jaxquant finetune "
            "wrote with --method qlora, qa-lora, l4q, lota or peqa"
        )
    return all(adapter.exact for adapter in adapters)


def merge_model(
    model: Model,
    rounder: str | None,
    bits: int | None,
    sequences: np.ndarray,
    *,
    progress: Callable[[Merged], None],
    finished: Finished,
) -> tuple[Model, list[Merged]]:
    """Return the model with merged adapters, and a report on every one.

    Args:
      model: the model.
      rounder: how sums are rounded again, one of `ROUNDERS`; None for exact merges.
      bits: number of bits of sums that are rounded again; None keeps that of the weights.
      sequences: token sequences, on which gptq calibrates.
      progress: called with a report after every matrix.
      finished: results of finished steps.
    """
    reports: list[Merged] = []

    def report(done: Merged) -> None:
        reports.append(done)
        progress(done)

    stats, chosen = None, None
    if rounder == "gptq":
        plain = dataclasses.replace(model, params=jq.dequantize(model.params))
        stats = calibrate_model(plain, sequences, finished=finished)
        chosen = jq.rounding.LDLQ(act_order=True)
    params = jq.merge(model.params, rounder=chosen, bits=bits, stats=stats, progress=report)
    return dataclasses.replace(model, params=params), reports


def loss_of(model: Model, merged: Model, reports: list[Merged], scored: np.ndarray) -> Loss:
    """Measure what a merge lost.

    Args:
      model: the model with adapters.
      merged: the model without.
      reports: the reports of the merge.
      scored: token sequences on which both predict.
    """
    energy = sum(r.energy for r in reports if not r.exact)
    kept = [r.kept * r.energy for r in reports if not r.exact and r.energy]
    exact = all(r.exact for r in reports)
    whole = 1.0 if exact else sum(kept) / energy if energy else float("nan")
    logits = jq.quantized(model.apply_fn)
    result = evaluate(logits, merged.params, scored, against=(logits, model.params))
    return Loss(exact, whole, float(result.kl or 0.0))
