"""Schemas of the external files; `schemas.strict` turns violations into one-line errors."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from jaxquant.core.fields import shown
from jaxquant_models.schemas.fields import (
    MOST,
    Count,
    Epsilon,
    Ids,
    Size,
    Theta,
    TokenId,
    check_experts,
    check_heads,
    check_ids,
    check_window,
)
from jaxquant_models.schemas.strict import Schema, first_repeat


class GenerationConfig(Schema):
    """generation_config.json."""

    eos_token_id: Ids = Field(default_factory=list)


class DFloat11Config(Schema):
    """`dfloat11_config` of a config.json: how the package dfloat11 compressed the weights."""

    threads_per_block: Annotated[
        list[Annotated[int, Field(ge=1, le=1024)]], Field(min_length=1, max_length=1)
    ]
    bytes_per_thread: Literal[8]
    pattern_dict: dict[str, list[str]]


class TokenText(Schema):
    """A special token of a tokenizer_config.json, written as an object."""

    content: str


class NamedTemplate(Schema):
    """One of several chat templates of a tokenizer_config.json."""

    name: str
    template: str


SpecialToken = str | TokenText | None


class TokenizerConfig(Schema):
    """tokenizer_config.json, as far as chat templates need it."""

    chat_template: str | list[NamedTemplate] | None = None
    bos_token: SpecialToken = None
    eos_token: SpecialToken = None
    unk_token: SpecialToken = None
    pad_token: SpecialToken = None

    @property
    def template(self) -> str | None:
        """The chat template; of several, the one named "default"."""
        if isinstance(self.chat_template, list):
            return {t.name: t.template for t in self.chat_template}.get("default")
        return self.chat_template

    @property
    def tokens(self) -> dict[str, str]:
        """The special tokens that are given, by the names under which templates know them."""
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        given = {name: getattr(self, name) for name in names}
        text = lambda token: token.content if isinstance(token, TokenText) else token
        return {name: text(token) for name, token in given.items() if token is not None}


class ChatTemplateFields(Schema):
    """A chat template in a checkpoint."""

    source: str
    tokens: dict[str, str] = Field(default_factory=dict)


class ShardIndex(Schema):
    """model.safetensors.index.json: the file that holds each tensor."""

    weight_map: dict[str, str]

    @model_validator(mode="after")
    def _inside(self) -> Self:
        for shard in set(self.weight_map.values()):
            plain = shard.isprintable() and not set(shard) & set("/\\") and len(shard) <= 255
            if not plain or shard in ("", ".", ".."):
                raise ValueError(
                    f"weight_map must name files in its own folder, got {shown(shard)}"
                )
        return self


class CheckpointMetadata(Schema):
    """Metadata of a checkpoint that holds a language model; `config` and `chat` are parsed
    by `LlamaConfig` and `ChatTemplate`."""

    config: dict[str, Any]
    tokenizer: str
    chat: dict[str, Any] | None = None
    prefix: Annotated[int, Field(ge=0, le=MOST)] = 0


class BertConfigFile(Schema):
    """config.json of an encoder."""

    model_type: Literal["bert"] = "bert"
    hidden_act: Literal["gelu"] = "gelu"
    position_embedding_type: Literal["absolute"] = "absolute"
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    max_position_embeddings: Size
    type_vocab_size: Size
    layer_norm_eps: Epsilon
    pad_token_id: TokenId

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, "
                f"got {self.hidden_size} and {self.num_attention_heads}"
            )
        check_ids(self.vocab_size, pad_token_id=[self.pad_token_id])
        return self


class SentenceConfig(Schema):
    """sentence_bert_config.json."""

    max_seq_length: Annotated[int, Field(ge=3, le=MOST)] | None = None


class GGUFArchitecture(Schema):
    """GGUF metadata of one architecture; keys are prefixed with its name, such as "llama."."""

    embedding_length: Size
    feed_forward_length: Size
    expert_feed_forward_length: Size | None = None
    block_count: Size
    context_length: Size
    heads: Size = Field(alias="attention.head_count")
    kv_heads: Size | None = Field(None, alias="attention.head_count_kv")
    key_length: Size | None = Field(None, alias="attention.key_length")
    value_length: Size | None = Field(None, alias="attention.value_length")
    rotated: Size | None = Field(None, alias="rope.dimension_count")
    norm_eps: Epsilon = Field(alias="attention.layer_norm_rms_epsilon")
    theta: Theta = Field(10000.0, alias="rope.freq_base")
    scaling: Literal["none", "linear"] = Field("linear", alias="rope.scaling.type")
    factor: Annotated[float, Field(ge=0, le=1e9)] | None = Field(None, alias="rope.scaling.factor")
    old_factor: Annotated[float, Field(ge=0, le=1e9)] = Field(0.0, alias="rope.scale_linear")
    vocab_size: Size | None = None
    window: Annotated[int, Field(ge=0)] | None = Field(None, alias="attention.sliding_window")
    experts: Count = Field(0, alias="expert_count")
    experts_per_token: Count = Field(0, alias="expert_used_count")

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.key_length or self.embedding_length // self.heads

    @property
    def expert_d_ff(self) -> int:
        """Hidden width of an expert; 0 without experts."""
        own = self.expert_feed_forward_length or self.feed_forward_length
        return own if self.experts else 0

    @property
    def rope_factor(self) -> float | None:
        """The divisor of every RoPE frequency, or None.

        Scaling is linear unless stated otherwise, as in llama.cpp.
        """
        factor = self.old_factor if self.factor is None else self.factor
        return factor if factor and self.scaling == "linear" else None

    @model_validator(mode="after")
    def _together(self) -> Self:
        names = ("expert_count", "expert_used_count", "expert_feed_forward_length")
        check_experts(names, self.experts, self.experts_per_token, self.expert_d_ff)
        check_window(self.window, self.context_length)
        for name, value in (
            ("attention.value_length", self.value_length),
            ("rope.dimension_count", self.rotated),
        ):
            if value not in (None, self.head_dim):
                raise ValueError(f"{name} must equal head_dim {self.head_dim}, got {value}")
        if self.key_length is None and self.embedding_length % self.heads:
            raise ValueError(
                f"embedding_length must be a multiple of attention.head_count, "
                f"got {self.embedding_length} and {self.heads}"
            )
        names = ("attention.head_count", "attention.head_count_kv", "attention.key_length")
        check_heads(names, self.heads, self.kv_heads or self.heads, self.head_dim)
        return self


class GGUFTokenizer(Schema):
    """GGUF metadata of the tokenizer; keys are prefixed with "tokenizer.ggml."."""

    model: Literal["gpt2", "llama"]
    tokens: Annotated[list[str], Field(min_length=1)]
    merges: list[str] | None = None
    scores: list[float] | None = None
    token_type: list[int] | None = None
    pre: str = "default"
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | None = None
    eot_token_id: TokenId | None = None
    unknown_token_id: TokenId = 0
    add_bos_token: bool | None = None
    add_space_prefix: bool = True

    @model_validator(mode="after")
    def _together(self) -> Self:
        needed = {"gpt2": "merges", "llama": "scores"}[self.model]
        if not getattr(self, needed):
            raise ValueError(f"it lacks tokenizer.ggml.{needed}, which {self.model} needs")
        count = len(self.tokens)
        for name in ("scores", "token_type"):
            values = getattr(self, name)
            if values is not None and len(values) != count:
                raise ValueError(
                    f"tokenizer.ggml.{name} must have one value for each of {count} tokens, "
                    f"got {len(values)}"
                )
        for merge in self.merges or ():
            if " " not in merge:
                raise ValueError(
                    "each of tokenizer.ggml.merges must be two pieces with a space between "
                    f"them, got {shown(merge)}"
                )
        ids = ("bos_token_id", "eos_token_id", "eot_token_id", "unknown_token_id")
        given = {n: getattr(self, n) for n in ids if n in self.model_fields_set}
        check_ids(count, **{f"tokenizer.ggml.{n}": [i] for n, i in given.items() if i is not None})
        return self


class AddedToken(Schema):
    """A token that a tokenizer.json adds to its vocabulary."""

    id: TokenId
    content: Annotated[str, Field(min_length=1)]


class VocabularyModel(Schema):
    """The model of a tokenizer.json whose vocabulary maps tokens to ids."""

    vocab: dict[str, TokenId]

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if len(set(self.vocab.values())) < len(self.vocab):
            twice = first_repeat(self.vocab.values())
            raise ValueError(f"vocab gives the id {twice} to two tokens")
        return self


class UnigramModel(Schema):
    """The model of a Unigram tokenizer.json, which lists tokens and scores in order of ids."""

    vocab: list[Annotated[list[str | float], Field(min_length=2, max_length=2)]]


class TokenizerFile(Schema):
    """tokenizer.json, as far as it is checked here; the library reads the rest."""

    model: dict[str, Any]
    added_tokens: list[AddedToken] = Field(default_factory=list)


class ChatMessage(Schema):
    """A message of a conversation in a file of training examples."""

    role: str = Field(min_length=1)
    content: str


class TrainingExample(Schema):
    """A line of a file of training examples: a conversation, or a prompt with its completion."""

    messages: list[ChatMessage] | None = None
    prompt: str | None = None
    completion: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.messages is None and (self.prompt is None or self.completion is None):
            raise ValueError('it must have "messages", or "prompt" and "completion"')
        if self.messages is not None and (self.prompt, self.completion) != (None, None):
            raise ValueError('it must have either "messages" or "prompt" and "completion"')
        if self.messages is None and not self.completion:
            raise ValueError("completion must not be empty")
        if self.messages is not None and all(m.role != "assistant" for m in self.messages):
            raise ValueError('messages must include one whose role is "assistant"')
        return self
