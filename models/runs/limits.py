"""A language model of this library as `theory.limits.suite.run_suite` examines it."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

import jaxquant as jq
from jaxquant.core.tree import tree_bytes
from jaxquant.theory.limits.divergence import TIE
from jaxquant.theory.limits.subject import Functions, Inside, Reduce, Sentences, Subject
from jaxquant_models.architectures.cache import AnyCache, init_cache
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.hidden_states import attention_scores
from jaxquant_models.architectures.llama import LAYER_MATRICES, stacked
from jaxquant_models.architectures.rope import frequencies, rotation_angles
from jaxquant_models.readers.encoder import Encoder, load_encoder
from jaxquant_models.readers.model import Model

VARIANTS = (4, 3, 2)  # bits of the quantized versions that are made
GROUP = 64  # weights that share a scale in them
QUERY_WORDS, DOCUMENT_WORDS = 24, 48  # of a passage: its beginning, and what follows
BATCH = 16  # sentences encoded at a time
INT8_STEP = 2.0**-7  # of activations that are rounded to int8, relative to the largest
ROUNDINGS = 64  # relative roundings that may add up in a logit


@dataclasses.dataclass(frozen=True, eq=False)
class Examined:
    """A model, its text, and how to quantize it: a `jaxquant.theory.limits.subject.Subject`.

    Attributes:
      model: the model.
      text: the text.
      tokens: the text's token ids.
      functions: the pure functions of the architecture.
      name: name in reports.
    """

    model: Model
    text: str
    tokens: Int[np.ndarray, " n"]
    functions: Functions
    name: str

    @property
    def vocabulary(self) -> int:
        """Number of tokens in the vocabulary."""
        return self.model.config.vocab_size

    @property
    def context(self) -> int:
        """Largest number of positions."""
        return self.model.config.max_position

    @property
    def end(self) -> tuple[int, ...]:
        """Ids of the stop tokens."""
        return self.model.config.eos_ids

    @property
    def stored(self) -> PyTree:
        """The parameters as they are stored."""
        return self.model.params

    @property
    def stored_bits(self) -> float:
        """Number of bits of all parameters."""
        return 8.0 * tree_bytes(self.model.params)

    @property
    def frequencies(self) -> Float[np.ndarray, " pairs"]:
        """Radians per position of the rotary position embedding."""
        return frequencies(self.model.config)

    def angles(self, count: int) -> Float[np.ndarray, "t pairs"]:
        """Return the angles of the first positions as the model computes them, in float32.

        Args:
          count: number of positions.
        """
        return np.asarray(rotation_angles(self.model.config, jnp.arange(count)))

    def params(self) -> PyTree:
        """Return dequantized stacked parameters; packed ones if the model rounds activations."""
        if _rounds_activations(self.model.params):
            return self.model.params
        return stacked(jq.dequantize(self.model.params))

    def variants(self) -> Mapping[str, Callable[[], Subject]]:
        """Return versions of the dequantized model rounded to nearest, by name."""
        of = lambda bits: lambda: self._rounded(bits)
        return {self._named(bits): of(bits) for bits in VARIANTS}

    def _named(self, bits: int) -> str:
        return f"{self.name} rounded to {bits} bits"

    def _rounded(self, bits: int) -> Subject:
        dense = stacked(jq.dequantize(self.model.params))
        c = self.model.config
        fits = all(n % GROUP == 0 for n in (c.d_model, c.d_ff, c.n_heads * c.head_dim))
        method = jq.rtn(bits, GROUP if fits else "channel")
        recipe = jq.Recipe([(LAYER_MATRICES, method), ("*", jq.KEEP)])
        sites = dataclasses.replace(self.model, params=dense, prefix=0).sites()
        packed = jq.quantize(dense, recipe, sites)
        model = dataclasses.replace(self.model, params=packed, prefix=0)
        functions = _functions(c, jnp.dtype(model.dtype), 0, False)
        return Examined(model, self.text, self.tokens, functions, self._named(bits))

    def sentences(self, count: int) -> Sentences | None:
        """Return vectors of the text's passages by MiniLM; None if it is not installed.

        Args:
          count: number of passages wanted; fewer are returned for a short text.
        """
        try:
            encoder = load_encoder("minilm")
        except (ValueError, ModuleNotFoundError):
            return None
        words = re.findall(r"\S+", self.text)
        size = QUERY_WORDS + DOCUMENT_WORDS
        starts = range(0, min(len(words) - size + 1, count * size), size)
        cut = lambda start, n: " ".join(words[start : start + n])
        queries = [cut(s, QUERY_WORDS) for s in starts]
        documents = [cut(s + QUERY_WORDS, DOCUMENT_WORDS) for s in starts]
        if len(queries) < 2:
            return None
        return Sentences(_encoded(encoder, queries), _encoded(encoder, documents))


def subject_of(model: Model, text: str, *, name: str | None = None) -> Subject:
    """Return a model as `run_suite` examines it.

    Weights are dequantized, so that one compiled program serves a float model and its quantized
    versions. A model that rounds activations runs as it is, packed.

    Args:
      model: the model, quantized or not.
      text: text in the language of the model, on which it is examined; `run_suite` says how many
        tokens it needs.
      name: its name in reports. Default: the model's.
    Raises:
      ValueError: the text is empty, or the model has no tokenizer.
    """
    if getattr(model, "tokenizer", None) is None:
        raise ValueError(
            f"{model.name} has no tokenizer, which is needed to read the text; put its "
            "tokenizer.json beside the weights"
        )
    if not text.strip():
        raise ValueError("the text is empty; pass some pages of text in the model's language")
    packed = _rounds_activations(model.params)
    prefix = model.prefix if packed else 0
    functions = _functions(model.config, jnp.dtype(model.dtype), prefix, packed)
    tokens = np.asarray(model.tokenizer.encode(text), np.int32)
    return Examined(model, text, tokens, functions, name or model.name)


def _rounds_activations(params: PyTree) -> bool:
    weights = [w for _, w in jq.core.path_leaves(params)]
    return any(getattr(w, "activations", None) is not None for w in weights)


@functools.cache
def _functions(config: LlamaConfig, dtype: np.dtype, prefix: int, packed: bool) -> Functions:
    """Return one set of functions per architecture, since jit keeps a program for each object."""
    model = Model("", config, None, None, dtype, prefix)  # type: ignore[arg-type]
    run = jq.quantized if packed else lambda fn: fn

    def inside(params: PyTree, tokens: jax.Array, reduce: Reduce) -> Inside:
        return Inside(*run(attention_scores(config, dtype, reduce))(params, tokens))

    def empty(batch: int, size: int) -> AnyCache:
        return init_cache(config, batch, size, dtype)

    step = max(float(jnp.finfo(dtype).eps), INT8_STEP if packed else 0.0)
    tie = max(TIE, ROUNDINGS * step)
    return Functions(run(model.apply_fn), run(model.apply_cached), empty, inside, tie)


def _encoded(encoder: Encoder, sentences: list[str]) -> Float[np.ndarray, "n d"]:
    ids = encoder.tokens(sentences)
    padding = -len(ids) % BATCH
    ids = np.pad(ids, [(0, padding), (0, 0)], mode="edge")
    encode = jax.jit(encoder.apply_fn)
    rows = [np.asarray(encode(encoder.params, b)) for b in ids.reshape(-1, BATCH, ids.shape[1])]
    return np.concatenate(rows)[: len(sentences)]
