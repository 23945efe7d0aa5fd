"""Healing: training a quantized language model to match the model it was made from."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.durable.store import Finished
from jaxquant.ptq.layer_stacks import is_apart, layers_of
from jaxquant.tuning.trainer import Progress
from jaxquant_models.architectures.blocks import blockwise
from jaxquant_models.architectures.llama import NORM_SCALES
from jaxquant_models.readers.model import Model

BLOCK_SEQUENCES = 24  # number of sequences on which single blocks are healed


def heal_model(
    source: Model,
    result: Model,
    sequences: np.ndarray,
    held_out: np.ndarray,
    healing: jq.tuning.Healing,
    recoding: jq.tuning.Healing | None = None,
    *,
    progress: Callable[[Progress], None],
    finished: Finished | None = None,
) -> Model:
    """Return the quantized model trained to match the source, block by block and then as a whole.

    Layers may be stacked or unstacked (`jaxquant.ptq.unstack`), and are returned in the same form.

    Args:
      source: the original model.
      result: the quantized model.
      sequences: training token sequences, int [N, length].
      held_out: token sequences for validation, int [M, length].
      healing: settings of the end-to-end training.
      recoding: settings of a final training of the codes of learned codebooks; None skips it.
      progress: called with a report after each step.
      finished: the results of finished steps.
    Raises:
      ValueError: unstacked layers cannot be stacked for training (`jaxquant.tuning.decoded`).
    """
    params = jq.tuning.decoded(result.params)
    apart = is_apart(params, "layers")
    if apart:
        params = _restacked(params)
    # Only one tree is held at a time, since a decoded one is as large as the source.
    params = {**params, "layers": _healed_layers(source, params, sequences, progress, finished)}
    fn = source.apply_training()
    params = jq.heal(
        fn, params, source.params, sequences, healing,
        validation=held_out, also=[NORM_SCALES], progress=progress, finished=finished,
    )  # fmt: skip
    if recoding is not None:
        params = jq.tuning.recode(
            fn, params, source.params, sequences, recoding,
            validation=held_out, progress=progress, finished=finished,
        )  # fmt: skip
    params = jq.ptq.unstack(params, "layers") if apart else params
    return dataclasses.replace(result, params=jq.tuning.rejoined(result.params, params))


def _healed_layers(
    source: Model,
    params: PyTree,
    sequences: np.ndarray,
    progress: Callable[[Progress], None],
    finished: Finished | None,
) -> PyTree:
    """Return the stack of layers, each trained by itself to match the source's layer."""
    parts = blockwise(source.config, source.dtype)
    embed = jq.quantized(parts.embed)
    hidden = [embed(params, jnp.asarray(s)[None])[0] for s in sequences[:BLOCK_SEQUENCES]]
    return jq.tuning.heal_blocks(
        parts.block, params["layers"], source.params["layers"], np.stack(hidden),
        also=[NORM_SCALES], progress=progress, finished=finished,
    )  # fmt: skip


def _restacked(params: PyTree) -> PyTree:
    forms = {jax.tree.structure(layer) for layer in layers_of(params, "layers")}
    if len(forms) > 1:
        raise ValueError(
            "layers that are stored apart are healed as one stack: quantize the same "
            "weights in all of them, with the same transforms, in one format or in "
            "formats with nothing to train"
        )
    return jq.ptq.restack(params, "layers")
