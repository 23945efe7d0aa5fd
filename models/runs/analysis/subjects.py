"""The models and the text of an analysis: loaded, and checked before any work begins."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from pydantic import JsonValue

import jaxquant as jq
from jaxquant_models.architectures.llama import check_tokens, stacked
from jaxquant_models.readers import registry
from jaxquant_models.readers.model import Apply, Model
from jaxquant_models.readers.room import check_fits, float_bytes
from jaxquant_models.readers.source import Source
from jaxquant_models.readers.text import BUILTIN, read_text
from jaxquant_models.runs.analysis.request import AnalysisRequest
from jaxquant_models.runs.fingerprints import VERSIONS, digest_of_model, digest_of_text
from jaxquant_models.runs.sequences import context_length, token_sequences

COPIES = 3  # of the parameters in memory: the reference, a variant, and what runs on them
COMPARED = 10_000  # characters of the text on which two tokenizers are compared


class Scorable(NamedTuple):
    """A model as `jaxquant.evaluation.evaluate` takes it."""

    logits: Apply
    params: PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Subjects:
    """The models and the text.

    Attributes:
      request: the request.
      model: MODEL, as it is stored.
      against: the reference as it is stored; None without one.
      text, calibration: contents of the two texts.
      chunks: the sequences on which models are compared, int [N, t].
    """

    request: AnalysisRequest
    model: Model
    against: Model | None
    text: str
    calibration: str
    chunks: np.ndarray

    @property
    def packed(self) -> bool:
        """Whether MODEL has quantized weights."""
        return _packed(self.model)

    @property
    def reference(self) -> Model | None:
        """The float model that is quantized for the frontier; None if there is none."""
        if self.against is not None:
            return self.against
        return None if self.packed else self.model

    @property
    def reference_spec(self) -> str:
        """The spec of the reference, for command lines."""
        return self.request.against or self.request.model

    @functools.cached_property
    def source(self) -> Source:
        """The reference, layer by layer."""
        if self.reference is None:
            raise ValueError("there is no float model to quantize")
        return Source.of(dataclasses.replace(self.reference, params=self.dense[1]))

    @functools.cached_property
    def dense(self) -> tuple[PyTree, PyTree | None]:
        """Stacked float32 parameters of MODEL, and of the reference; one tree if they are one."""
        own = dense_params(self.model)
        if self.reference is None:
            return own, None
        return own, own if self.reference is self.model else dense_params(self.reference)

    @property
    def judged(self) -> Scorable:
        """MODEL as it is scored: packed only if it rounds activations."""
        leaves = [w for _, w in jq.core.path_leaves(self.model.params)]
        if any(getattr(w, "activations", None) is not None for w in leaves):
            params = jq.formats.transcoded(self.model.params)
            return Scorable(jq.quantized(self.model.apply_fn), params)
        return Scorable(self.model.apply_fn, self.dense[0])

    def fingerprint(self) -> dict[str, JsonValue]:
        """Return the identity of the run: plain values that differ wherever results may differ."""
        request = dataclasses.asdict(self.request)
        against = None if self.against is None else digest_of_model(self.against)
        return {
            **VERSIONS,
            **request,
            "weights": digest_of_model(self.model),
            "weights of the reference": against,
            "text": digest_of_text(self.text),
            "calibration": digest_of_text(self.calibration),
        }


def load_subjects(request: AnalysisRequest) -> Subjects:
    """Read the text, load the models, and check that they can be analyzed.

    Args:
      request: the request.
    Raises:
      ValueError: the text or a model cannot be read, the text is shorter than one chunk, a model
        has no tokenizer or does not fit in memory, or the models cannot be compared.
    """
    text = read_text(request.text)
    model = _loaded(request.model)
    against = None if request.against is None else _loaded(request.against)
    if against is not None:
        _check_comparable(request, model, against, text)
    length = context_length(model)
    try:
        chunks = token_sequences(model, text, length, request.size.chunks)
    except ValueError as error:
        raise ValueError(f"{error}: give a longer --text") from None
    check_tokens(chunks, model.config.vocab_size)
    needed = COPIES * float_bytes(model)
    check_fits(needed, "an analysis (three copies of the model)", "use a larger machine")
    calibration = read_text(BUILTIN, calibration=True)
    return Subjects(request, model, against, text, calibration, chunks)


def _loaded(spec: str) -> Model:
    try:
        model = registry.load(spec, widen=False)
    except FileNotFoundError as error:
        raise ValueError(f"{spec} is incomplete: {error.filename} is missing") from None
    if getattr(model, "tokenizer", None) is None:
        raise ValueError(
            f"{spec} has no tokenizer, which is needed to read the text; put its tokenizer.json "
            "beside the weights"
        )
    return model


def _check_comparable(request: AnalysisRequest, model: Model, against: Model, text: str) -> None:
    """Raise ValueError unless the models have one architecture and one tokenizer."""
    if _packed(against):
        raise ValueError(
            f"--against {request.against} is quantized; give the float model that MODEL was made of"
        )
    some = text[:COMPARED]
    if model.config.vocab_size != against.config.vocab_size or (
        model.tokenizer.encode(some) != against.tokenizer.encode(some)
    ):
        raise ValueError(
            f"{request.model} and --against {request.against} have different tokenizers or "
            "vocabularies, so their predictions cannot be compared"
        )
    shapes = [_shapes(of) for of in (model, against)]
    if differing := sorted(p for p in shapes[0] | shapes[1] if _differ(p, shapes)):
        first = differing[0]
        a, b = (of.get(first, "missing") for of in shapes)
        raise ValueError(
            f"{request.model} and --against {request.against} have different architectures: "
            f"{first} is {a} in the former and {b} in the latter"
        )


def _differ(path: str, shapes: list[dict[str, tuple[int, ...]]]) -> bool:
    return shapes[0].get(path) != shapes[1].get(path)


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    params = jax.eval_shape(lambda tree: stacked(jq.dequantize(tree)), model.params)
    return {path: tuple(w.shape) for path, w in jq.core.path_leaves(params)}


def _packed(model: Model) -> bool:
    return any(isinstance(w, jq.QTensor) for _, w in jq.core.path_leaves(model.params))


def dense_params(model: Model) -> PyTree:
    """Return the dequantized parameters in the model's dtype, with stacked layers.

    Args:
      model: the model, quantized or not.
    """
    params = stacked(jq.dequantize(model.params))
    return jax.tree.map(lambda w: w.astype(model.dtype), params)
