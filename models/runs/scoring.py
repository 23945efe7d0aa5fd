"""Logits of a model that does not fit in memory, for `jaxquant.evaluation.evaluate`."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxquant.durable.store import Folder
from jaxquant.evaluation import ByChunk
from jaxquant_models.readers.model import Apply
from jaxquant_models.readers.source import Source
from jaxquant_models.runs.passes import Passes, functions


class Scored(NamedTuple):
    """A model and its parameters, as `evaluate` takes them.

    Attributes:
      logits: function (params, tokens) -> logits.
      params: the parameters, which depend on the chunk.
    """

    logits: Apply
    params: ByChunk


def layer_by_layer(
    source: Source,
    chunks: np.ndarray,
    files: Folder,
    step: Callable[[object], None] = lambda _: None,
) -> Scored:
    """Run all layers on all chunks, with one layer in memory at a time.

    What is left to compute are the logits, from the outputs of the last layer.

    Args:
      source: the model.
      chunks: token ids, int [N, t].
      files: store for hidden states that are too large for memory.
      step: called after each layer.
    """
    passes = Passes(source, chunks, files, layers=2)
    passes.forward(passes.layers, step, keep=False)
    outer = source.outer()
    run = functions(source.outline.config, jnp.dtype(source.outline.dtype))
    of_chunk = lambda i: {"outer": outer, "h": passes.state(passes.layers, i)}
    return Scored(lambda params, _: run.head(params["outer"], params["h"]), ByChunk(of_chunk))
