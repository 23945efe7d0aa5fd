"""Healing: training a quantized language model to match the model it was made from."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.calibration.one_block import only
from jaxquant.durable.store import Finished
from jaxquant.ptq.layer_stacks import is_apart, layers_of
from jaxquant.storage.checkpoint import load
from jaxquant.tuning.heal import heal_each
from jaxquant.tuning.trainer import Progress
from jaxquant_models.architectures.blocks import Blockwise, blockwise
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import NORM_SCALES
from jaxquant_models.readers.checkpoint import layer_is_saved, save_layer
from jaxquant_models.readers.model import Model
from jaxquant_models.readers.source import Source
from jaxquant_models.runs.passes import functions

BLOCK_SEQUENCES = 24  # number of sequences on which single blocks are healed


def heal_model(
    source: Model,
    result: Model,
    sequences: np.ndarray,
    held_out: np.ndarray,
    healing: jq.tuning.Healing | None,
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
      healing: settings of the end-to-end training; None skips it.
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
    if healing is not None:
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


def heal_layers(
    source: Source,
    outer: PyTree,
    layers: Sequence[Path],
    sequences: np.ndarray,
    place: Path,
    *,
    progress: Callable[[Progress], None],
    finished: Finished,
    lossless: bool = False,
) -> list[Path]:
    """Train the layers of a quantized model one by one, each to match the source's layer.

    This is how `heal_model` begins, with one layer in memory at a time. A run that was stopped runs
    the layers that it has trained again, without training them.

    Args:
      source: the original model.
      outer: the parameters of the quantized model outside of the layers.
      layers: the directories of its layers, as `readers.checkpoint.save_layer` writes them.
      sequences: training token sequences, int [N, length].
      place: directory for the trained layers.
      progress: called with a report after each step.
      finished: the results of finished steps.
      lossless: as in `readers.checkpoint.save_layer`.
    Returns:
      The directories of the trained layers.
    """
    config, dtype = source.outline.config, jnp.dtype(source.outline.dtype)
    hidden = _embedded(functions(config, dtype), outer, sequences)
    stored = lambda i: load(layers[i])

    def keep(i: int, healed: PyTree) -> None:
        if not layer_is_saved(place / str(i)):
            save_layer(place / str(i), jq.tuning.rejoined(stored(i), healed), lossless)

    heal_each(
        _only_block(config, dtype), len(layers), lambda i: jq.tuning.decoded(stored(i)),
        source.layer, hidden,
        keep=keep, also=[NORM_SCALES], progress=progress, finished=finished,
    )  # fmt: skip
    return [place / str(i) for i in range(len(layers))]


@functools.cache
def _only_block(config: LlamaConfig, dtype: np.dtype) -> Callable[[PyTree, jax.Array], jax.Array]:
    """Return the function of a layer whose parameters are a stack of one."""
    block = functions(config, dtype).block
    return lambda params, h: block(only(params), h)


def _healed_layers(
    source: Model,
    params: PyTree,
    sequences: np.ndarray,
    progress: Callable[[Progress], None],
    finished: Finished | None,
) -> PyTree:
    """Return the stack of layers, each trained by itself to match the source's layer."""
    parts = blockwise(source.config, source.dtype)
    return jq.tuning.heal_blocks(
        parts.block, params["layers"], source.params["layers"], _embedded(parts, params, sequences),
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


def _embedded(run: Blockwise, outer: PyTree, sequences: np.ndarray) -> np.ndarray:
    """Return the hidden states [N, t, d] of the first sequences at the input of the first layer."""
    embed, some = jq.quantized(run.embed), sequences[:BLOCK_SEQUENCES]
    return np.concatenate([embed(outer, jnp.asarray(s)[None]) for s in some])
