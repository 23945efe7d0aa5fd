"""Scores of quantized versions against the reference, whose logits are computed once."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxquant.durable.store import Folder
from jaxquant.evaluation import ByChunk, Evaluation, evaluate
from jaxquant_models.readers.model import Apply
from jaxquant_models.runs.analysis.kept import Kept
from jaxquant_models.runs.analysis.subjects import Scorable, Subjects


class Scores:
    """Scores on the chunks of the text, each kept.

    Args:
      subjects: the models and the text; there is a reference.
      kept: store of scores.
      finished: store of the reference's logits, of which one chunk is in memory at a time.
    """

    def __init__(self, subjects: Subjects, kept: Kept, finished: Folder) -> None:
        self.subjects, self.kept, self.finished = subjects, kept, finished
        self.first = subjects.chunks.shape[1] // 2  # the first position that is scored

    def of(self, name: str, params: Callable[[], PyTree]) -> Evaluation:
        """Return the scores of dense parameters.

        Args:
          name: name under which they are kept.
          params: function that returns the parameters.
        """
        fn = self.subjects.source.outline.apply_fn
        return self._of(name, lambda: Scorable(fn, params()))

    def own(self) -> Evaluation:
        """Return the scores of MODEL."""
        return self._of("the model itself", lambda: self.subjects.judged)

    def of_reference(self) -> Evaluation:
        """Return the perplexity of the reference."""
        run = lambda: evaluate(self._padded, ByChunk(self._reference), self.subjects.chunks)
        return self._kept("the reference", run)

    def _of(self, name: str, scorable: Callable[[], Scorable]) -> Evaluation:
        def run() -> Evaluation:
            # What `evaluate` is given as parameters are logits, so that one program of the model
            # serves all versions.
            fn, params = scorable()
            program = scored_half(fn, self.first)
            own = ByChunk(lambda i: program(params, self._tokens(i)))
            against = self._padded, ByChunk(self._reference)
            return evaluate(self._padded, own, self.subjects.chunks, against=against)

        return self._kept(name, run)

    def _kept(self, name: str, run: Callable[[], Evaluation]) -> Evaluation:
        return Evaluation(**self.kept.value(f"scores of {name}", lambda: dataclasses.asdict(run())))

    def _padded(self, logits: Array, _: Array) -> Array:
        """Return logits at all positions: zeros where `evaluate` does not look at them."""
        return jnp.pad(logits, ((0, 0), (self.first, 1), (0, 0)))

    def _tokens(self, i: int) -> Array:
        return jnp.asarray(self.subjects.chunks[i])[None]

    def _reference(self, i: int) -> Array:
        """Return the reference's logits [1, t, V] on the scored half of a chunk."""
        name = f"analysis: logits of the reference on chunk {i}"
        try:
            found = self.finished[name]["logits"]
        except KeyError:
            program = scored_half(self.subjects.source.outline.apply_fn, self.first)
            found = np.asarray(program(self.subjects.dense[1], self._tokens(i)))
            self.finished.put(name, {"logits": found}, sync=False)
        return jnp.asarray(found)


@functools.lru_cache(maxsize=4)
def scored_half(fn: Apply, first: int) -> Apply:
    """Return a compiled function (params, tokens) -> logits of the positions that are scored.

    Args:
      fn: function (params, tokens) -> logits, which must not hold weights.
      first: the first of these positions; the last one but one is the last.
    """
    return jax.jit(lambda params, tokens: fn(params, tokens)[:, first:-1])
