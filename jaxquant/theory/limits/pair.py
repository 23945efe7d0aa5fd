"""A model beside its reference: the passes that several limits share, each computed once."""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxquant.durable.states import Remembered
from jaxquant.durable.store import Arrays
from jaxquant.theory.limits.crowding import Margins, head_margins
from jaxquant.theory.limits.effort import Effort
from jaxquant.theory.limits.middle import Planted, gains, planted
from jaxquant.theory.limits.passes import (
    Scores,
    check_finite,
    generated,
    likelihoods,
    looked_inside,
    recalled,
    scored,
)
from jaxquant.theory.limits.subject import Subject

Progress = Callable[[str, float], None]


def check_text(subject: Subject, effort: Effort) -> None:
    """Raise ValueError if a text is too short or does not fit the vocabulary.

    Args:
      subject: the model with its text.
      effort: number of texts and tokens.
    """
    tokens = np.asarray(subject.tokens)
    needed, there = effort.within(subject.context).tokens, len(tokens)
    if there < needed:
        raise ValueError(
            f"the text has {there} tokens, and the limits need {needed} at this effort; pass a "
            "longer text"
        )
    if subject.vocabulary < 2:
        raise ValueError(
            f"the limits need a model that can choose between 2 tokens or more, got a vocabulary "
            f"of {subject.vocabulary}"
        )
    if not 0 <= tokens.min() <= tokens.max() < subject.vocabulary:
        raise ValueError(
            f"token ids must lie in [0, {subject.vocabulary}), got {tokens.min()} to "
            f"{tokens.max()}; encode the text with the model's own tokenizer"
        )


class Pair:
    """A reference, a model, and what both compute on the reference's text.

    Args:
      reference: the reference, usually the float model.
      model: the model that is judged.
      effort: number of texts and tokens.
      key: of the sampling; both models get the same random numbers.
      kept: where results are kept.
      progress: called with the name and the seconds of each pass.
    Raises:
      ValueError: the models differ in their vocabularies.
    """

    def __init__(
        self,
        reference: Subject,
        model: Subject,
        effort: Effort,
        key: Array,
        kept: Remembered,
        progress: Progress,
    ) -> None:
        self.reference, self.model, self.key = reference, model, key
        self.effort = effort.within(min(reference.context, model.context))
        self.tokens = np.asarray(reference.tokens)
        self._kept, self._progress = kept, progress
        self._check()

    def _check(self) -> None:
        a, b = self.reference, self.model
        if a.vocabulary != b.vocabulary:
            raise ValueError(
                f"{a.name} and {b.name} must have one vocabulary, got {a.vocabulary} and "
                f"{b.vocabulary} tokens"
            )

    def check_finite(self) -> None:
        """Raise ValueError if the predictions of one of the models on the text are not finite."""
        check_finite(self.on_text, self.names)

    @functools.cached_property
    def params(self) -> tuple[PyTree, PyTree]:
        """Parameters of the reference and of the model."""
        return self.reference.params(), self.model.params()

    @property
    def names(self) -> tuple[str, str]:
        """Names of the reference and of the model."""
        return self.reference.name, self.model.name

    @functools.cached_property
    def chunks(self) -> Int[np.ndarray, "n t"]:
        """Chunks of the text."""
        e = self.effort
        return self.tokens[: e.chunks * e.chunk].reshape(e.chunks, e.chunk)

    @functools.cached_property
    def on_text(self) -> Scores:
        """Predictions of both models on `chunks`."""
        return self._scores("text", self.chunks)

    @functools.cached_property
    def greedy(self) -> tuple[Int[np.ndarray, "p k"], Int[np.ndarray, "p k"]]:
        """Greedy texts of the reference, and of the model."""
        return self._texts("greedy", False)

    @functools.cached_property
    def sampled(self) -> tuple[Int[np.ndarray, "p k"], Int[np.ndarray, "p k"]]:
        """Texts sampled at temperature 1 with the same random keys, of both."""
        return self._texts("sampled", True)

    @functools.cached_property
    def on_greedy(self) -> Scores:
        """Predictions of both models of the reference's greedy texts."""
        return self._scores_of("greedy text", self.greedy[0])

    @functools.cached_property
    def on_sampled(self) -> Scores:
        """Predictions of both models of the reference's sampled texts."""
        return self._scores_of("reference's sample", self.sampled[0])

    @functools.cached_property
    def judged(self) -> Float[np.ndarray, "p k"]:
        """Negative log-likelihood of the model's sampled texts under the reference."""
        texts = jnp.asarray(np.concatenate([self.prompts, self.sampled[1]], axis=1), jnp.int32)
        run = lambda: likelihoods(self.reference.functions, self.params[0], texts)
        found = self._get("reference on the model's sample", lambda: {"nll": run()})
        return found["nll"][:, self.effort.prompt - 1 :]

    @functools.cached_property
    def planted(self) -> Planted:
        """Contexts with passages."""
        e = self.effort
        middle = e.contexts * e.context
        passages = self.tokens[middle : middle + e.contexts * e.passage]
        shape = e.contexts, -1
        return planted(self.tokens[:middle].reshape(shape), passages.reshape(shape))

    @functools.cached_property
    def gains(self) -> tuple[Float[np.ndarray, "n n"], Float[np.ndarray, "n n"]]:
        """Gains by context and depth of the reference, and of the model."""
        found = self._get("passages", self._recalled)
        of = lambda who: gains(self.planted.at, found[f"{who} present"], found[f"{who} absent"])
        return of("reference"), of("model")

    @functools.cached_property
    def inside(self) -> tuple[tuple[np.ndarray, Margins], tuple[np.ndarray, Margins]]:
        """Last states [t, d] of the beginning of the text and margins of all heads, of both.

        Raises:
          ValueError: a state is not finite.
        """
        return self._inside(0), self._inside(1)

    def _inside(self, who: int) -> tuple[np.ndarray, Margins]:
        subject = (self.reference, self.model)[who]
        ids = jnp.asarray(self.tokens[: self.effort.inside], jnp.int32)

        def compute() -> Arrays:
            states, heads = looked_inside(subject.functions, head_margins, self.params[who], ids)
            return {"states": states, **heads._asdict()}

        found = self._get(f"attention of the {('reference', 'model')[who]}", compute)
        states = found.pop("states")
        if not np.isfinite(states).all():
            raise ValueError(
                f"the hidden states of {subject.name} are not finite on the text: the weights hold "
                "NaN or infinities, or activations overflow"
            )
        return states, Margins(**jax.tree.map(jnp.asarray, found))

    def _recalled(self) -> Arrays:
        p, skip = self.planted, max(1, self.effort.passage // 4)
        out = {}
        for who, subject, params in zip(
            ("reference", "model"), (self.reference, self.model), self.params, strict=True
        ):
            for what, contexts in (("present", p.contexts), ("absent", p.fillers)):
                rows = [
                    recalled(subject.functions, skip, params, jnp.asarray(c), p.passages)
                    for c in contexts
                ]
                out[f"{who} {what}"] = np.stack(rows)
        return out

    @functools.cached_property
    def prompts(self) -> Int[np.ndarray, "p t"]:
        """Prompts, evenly spread over the text."""
        e = self.effort
        starts = np.linspace(0, len(self.tokens) - e.prompt, e.prompts).astype(int)
        return np.stack([self.tokens[s : s + e.prompt] for s in starts])

    def _texts(self, name: str, sample: bool) -> tuple[np.ndarray, np.ndarray]:
        keys = jax.random.split(self.key, self.effort.new)

        def compute() -> Arrays:
            texts = [
                generated(s.functions, self.effort.new, params, self.prompts, keys, sample)
                for s, params in zip((self.reference, self.model), self.params, strict=True)
            ]
            return dict(zip(("reference", "model"), map(np.asarray, texts), strict=True))

        found = self._get(f"{name} generation", compute)
        return np.asarray(found["reference"]), np.asarray(found["model"])

    def _scores_of(self, name: str, texts: Int[np.ndarray, "p k"]) -> Scores:
        """Return predictions of the generated tokens only."""
        found = self._scores(name, np.concatenate([self.prompts, texts], axis=1))
        return Scores(*(a[:, self.effort.prompt - 1 :] for a in found))

    def _scores(self, name: str, tokens: Int[np.ndarray, "b t"]) -> Scores:
        a, b = self.reference.functions, self.model.functions
        compute = lambda: scored(a, b, *self.params, jnp.asarray(tokens, jnp.int32))._asdict()
        found = self._get(f"scores of {name}", compute)
        scores = Scores(**{field: np.asarray(found[field]) for field in Scores._fields})
        check_finite(scores, self.names)
        return scores

    def _get(self, name: str, compute: Callable[[], Arrays]) -> dict[str, np.ndarray]:
        """Return results that are kept under a name, and tell how long it took to compute them."""

        def timed() -> Arrays:
            start = time.perf_counter()
            out = {key: np.asarray(a) for key, a in compute().items()}
            self._progress(name, time.perf_counter() - start)
            return out

        return {key: np.asarray(a) for key, a in self._kept.get(name, timed).items()}
