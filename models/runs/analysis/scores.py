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
        return self._kept("the reference", lambda: evaluate(*self._reference, self.subjects.chunks))

    def _of(self, name: str, scorable: Callable[[], Scorable]) -> Evaluation:
        run = lambda: evaluate(*scorable(), self.subjects.chunks, against=self._reference)
        return self._kept(name, run)

    def _kept(self, name: str, run: Callable[[], Evaluation]) -> Evaluation:
        return Evaluation(**self.kept.value(f"scores of {name}", lambda: dataclasses.asdict(run())))

    @property
    def _reference(self) -> tuple[Apply, ByChunk]:
        """The reference for `evaluate`: its parameters are the logits that are scored."""
        # `evaluate` looks at no logits before the first position, nor at the last one.
        around = ((0, 0), (self.first, 1), (0, 0))
        return lambda logits, _: jnp.pad(logits, around), ByChunk(self._logits)

    @functools.cached_property
    def _run(self) -> Apply:
        fn, first = self.subjects.source.outline.apply_fn, self.first
        return jax.jit(lambda params, tokens: fn(params, tokens)[:, first:-1])

    def _logits(self, i: int) -> Array:
        """Return the reference's logits [1, t, V] on the scored half of a chunk."""
        name = f"analysis: logits of the reference on chunk {i}"
        try:
            found = self.finished[name]["logits"]
        except KeyError:
            tokens = jnp.asarray(self.subjects.chunks[i])[None]
            found = np.asarray(self._run(self.subjects.dense[1], tokens))
            self.finished.put(name, {"logits": found}, sync=False)
        return jnp.asarray(found)
