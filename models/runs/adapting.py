"""Adapters for a language model: the base they are put on, their training, and their merge."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

import jaxquant as jq
from jaxquant.durable.store import Finished
from jaxquant.ptq.layer_stacks import is_apart
from jaxquant.training.adaptation import check_adapter as check_weight
from jaxquant.training.adaptation import chosen_weights
from jaxquant.training.finetuning import Finetuning
from jaxquant.tuning.trainer import Progress
from jaxquant_models.architectures.llama import LAYER_MATRICES, stacked
from jaxquant_models.readers.model import Model
from jaxquant_models.runs.calibration import calibrate_model
from jaxquant_models.runs.examples import completion_loss
from jaxquant_models.runs.quantization import quantize_model
from jaxquant_models.runs.recipes import recipe_of
from jaxquant_models.runs.sequences import first_tokens

ADAPTERS = ("qlora", "qa-lora", "l4q", "lota", "peqa")
TOKENS = 8192  # of the training text, on which a base is calibrated


def adapter_of(
    method: str, rank: int, alpha: float | None, init: str = "zero"
) -> jq.adapters.Adapter:
    """Return the adapter of a method of the command.

    Args:
      method: one of `ADAPTERS`.
      rank, alpha: as in `jaxquant.adapters.LoRA`; peqa uses neither, lota no alpha.
      init: as in `jaxquant.adapters.LoRA`; only for qlora.
    """
    if method == "qlora":
        return jq.adapters.LoRA(rank, alpha, init=init)  # type: ignore[arg-type]
    if method == "peqa":
        return jq.adapters.PEQA()
    if method == "lota":
        return jq.adapters.LoTA(rank)
    return {"qa-lora": jq.adapters.QALoRA, "l4q": jq.adapters.L4Q}[method](rank, alpha)


def base_method(method: str, bits: int, group_size: int) -> jq.Method:
    """Return the method that quantizes a float model before it gets adapters.

    QLoRA's base is NormalFloat with double quantization, rounded to nearest. The others get a grid
    with offsets, which all but peqa need, and GPTQ chooses the codes.

    Args:
      method: one of `ADAPTERS`.
      bits: number of bits per code.
      group_size: number of inputs that share a scale.
    """
    if method == "qlora":
        return jq.normal_float(bits, group_size, double_quant=True)
    levels = jq.formats.Integer(bits, group_size, symmetric=True)
    return dataclasses.replace(
        jq.gptq(bits, group_size), format=jq.formats.Offset(levels, mse=True)
    )


def check_adapter(
    source: Model, method: jq.Method | None, adapter: jq.adapters.Adapter, only: tuple[str, ...]
) -> None:
    """Raise ValueError if a model cannot get adapters; nothing is computed.

    Args:
      source, method, adapter, only: as in `adapted_model`.
    """
    params = source.params
    if is_apart(params, "layers"):
        params = jax.eval_shape(stacked, params)
    if method is not None:
        nearest = dataclasses.replace(method, rounder=jq.rounding.Nearest())
        pack = lambda p: jq.quantize(p, recipe_of(nearest), source.sites())
        params = jax.eval_shape(pack, params)
    for path, w in chosen_weights(params, only or (LAYER_MATRICES,)).items():
        if isinstance(w, jq.QTensor):
            check_weight(path, w, adapter)


def adapted_model(
    source: Model,
    method: jq.Method | None,
    adapter: jq.adapters.Adapter,
    only: tuple[str, ...],
    sequences: np.ndarray,
    seed: int,
    finished: Finished,
) -> Model:
    """Return a model with adapters, quantized first if it has float weights.

    Args:
      source: the model.
      method: the method that quantizes it; None for a checkpoint, whose weights are packed.
      adapter: the adapter.
      only: patterns of the weights that get one; empty for all of the layers.
      sequences: training sequences, of which the first calibrate.
      seed: seed of the initial values of the adapters.
      finished: results of finished steps.
    """
    floats, stats, packed = None, None, dataclasses.replace(source, params=stacked(source.params))
    needs = adapter.needs_gram or (method is not None and method.needs_gram)
    if needs and method is not None:
        tokens = sequences[:, 0] if sequences.ndim == 3 else sequences
        some = first_tokens(tokens, min(TOKENS, tokens.size))
        stats = calibrate_model(packed, some, finished=finished)
    if method is not None:
        floats = packed.params
        packed = quantize_model(packed, recipe_of(method), stats, finished=finished)
    params = jq.adapt(
        packed.params, adapter, key=jax.random.key(seed), targets=only or (LAYER_MATRICES,),
        floats=floats,
        stats=stats if adapter.needs_gram else None,
    )  # fmt: skip
    return dataclasses.replace(source, params=params)


def train_adapters(
    model: Model,
    sequences: np.ndarray,
    how: Finetuning,
    *,
    teacher: Model | None,
    validation: np.ndarray,
    progress: Callable[[Progress], None],
    finished: Finished,
) -> Model:
    """Return the model with trained adapters.

    Args:
      model: the model, with adapters.
      sequences: training sequences, int [N, t], or those of `example_sequences`.
      how: settings.
      teacher: model whose predictions are matched; None learns the text itself.
      validation: held-out sequences.
      progress: called with a report after each step.
      finished: results of finished steps.
    """
    target = None if teacher is None else stacked(teacher.params)
    tokens = how.batch_size * sequences.shape[-1]
    fn, loss = model.apply_training(tokens), None
    if sequences.ndim == 3:  # tokens, and which of them are predicted
        of_tokens, loss = fn, completion_loss
        fn = lambda params, x: of_tokens(params, x[:, 0])
    params = jq.training.finetune(
        fn, model.params, sequences, how, loss=loss, teacher=target, validation=validation,
        progress=progress, finished=finished,
    )  # fmt: skip
    return dataclasses.replace(model, params=params)
