"""Prepares a model for inference: entropy-coded weights become words that products can read."""

import dataclasses
from collections.abc import Callable

import jaxquant as jq
from jaxquant_models.readers.model import Model


def serving_model(model: Model, tell: Callable[[str], None]) -> Model:
    """Return the model with the weights that products read, see `jaxquant.formats.transcoded`.

    Args:
      model: the model.
      tell: called with a line about the size of entropy-coded weights, if there are any.
    """
    before, params = dict(jq.core.path_leaves(model.params)), jq.formats.transcoded(model.params)
    pairs = [(before[path], w) for path, w in jq.core.path_leaves(params) if w is not before[path]]
    if pairs:
        disk, memory = (sum(w.nbytes for w in side) / 1e6 for side in zip(*pairs, strict=True))
        words = " and ".join(f"{bits}-bit" for bits in sorted({w.format.bits for _, w in pairs}))
        tell(f"entropy-coded: {disk:.1f} MB on disk, {memory:.1f} MB in memory as {words} words")
    return dataclasses.replace(model, params=params)
