"""The architecture of a Llama-like model: validated sizes and options."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import JsonValue, model_validator

from jaxquant.core.fields import shown
from jaxquant_models.schemas.fields import (
    Count,
    Epsilon,
    Factor,
    Size,
    Theta,
    TokenId,
    check_experts,
    check_heads,
    check_ids,
)
from jaxquant_models.schemas.strict import Schema, checked


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's RoPE scaling; the names are those of Hugging Face's `rope_scaling`.

    Attributes:
      factor: divisor of the low frequencies.
      low_freq_factor: pairs with fewer turns than this within the original context are divided
        fully.
      high_freq_factor: pairs with more turns than this are unchanged.
      original_max_position: length of the context that the model was first trained on.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self):
        checked(_ScalingFields, vars(self), "rope_scaling")


# A float divides every frequency (linear scaling); a tuple has one divisor per frequency, the form
# in which GGUF stores Llama 3 scaling (tensor rope_freqs.weight).
RopeScaling = None | float | tuple[float, ...] | Llama3Scaling


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and options of a Llama-like decoder. Immutable, hashable, compared by value.

    Attributes:
      vocab_size: rows of the embedding.
      d_model: width of the residual stream.
      d_ff: hidden width of the MLP.
      n_layers: number of layers.
      n_heads: number of query heads.
      n_kv_heads: number of key-value heads, a divisor of n_heads.
      head_dim: channels per head, an even number.
      norm_eps: epsilon of the RMSNorms.
      rope_theta: base of RoPE's frequencies.
      rope_scaling: scaling of RoPE's frequencies, see `RopeScaling`; None for none.
      tie_embeddings: whether the embedding is the output matrix too.
      qk_norm: whether each head's q and k pass an RMSNorm (Qwen3).
      qkv_bias, o_bias, mlp_bias: whether these matrices have biases.
      sub_norms: whether the inputs of o and down pass an RMSNorm (BitNet b1.58).
      activation: activation of the gate, "silu", or "relu2", the square of ReLU (BitNet b1.58).
      n_experts: number of experts of every layer, which then has them in place of the MLP; 0 for
        none.
      experts_per_token: number of experts that a token is sent to.
      expert_d_ff: hidden width of an expert.
      norm_topk_prob: whether the router's weights of these experts are divided by their sum. It is
        so in Mixtral, and a setting in Qwen3-MoE.
      max_position: maximum number of positions.
      eos_ids: ids of the stop tokens.
      bos_id: id of the token that begins a text, or None.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = None
    tie_embeddings: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sub_norms: bool = False
    activation: str = "silu"
    n_experts: int = 0
    experts_per_token: int = 0
    expert_d_ff: int = 0
    norm_topk_prob: bool = True
    max_position: int = 2048
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    def __post_init__(self):
        checked(_ConfigFields, vars(self), "LlamaConfig")
        scaling = self.rope_scaling
        numbers = scaling if isinstance(scaling, tuple) else (scaling,)
        if scaling is not None and not isinstance(scaling, Llama3Scaling):
            plain = (isinstance(n, int | float) and not isinstance(n, bool) for n in numbers)
            if not (all(plain) and all(0 < n < math.inf for n in numbers)):
                raise ValueError(f"rope_scaling must be positive numbers, got {shown(scaling)}")
            if isinstance(scaling, tuple) and len(scaling) != self.head_dim // 2:
                raise ValueError(
                    f"rope_scaling must be one factor, or {self.head_dim // 2} factors, one "
                    f"for each pair of channels of a head, got {len(scaling)}"
                )

    @property
    def weights(self) -> int:
        """A lower bound of the number of weights: those of all matrices."""
        inner, keys = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        layer = self.d_model * (2 * inner + 2 * keys + self.n_experts + 3 * self._hidden)
        tables = 1 if self.tie_embeddings else 2
        return self.n_layers * layer + tables * self.vocab_size * self.d_model

    @property
    def _hidden(self) -> int:
        """Hidden channels of a layer: those of its MLP, or of all of its experts."""
        return self.n_experts * self.expert_d_ff if self.n_experts else self.d_ff

    @property
    def active_d_ff(self) -> int:
        """Hidden channels that one token passes: those of the MLP, or of its experts."""
        return self.experts_per_token * self.expert_d_ff if self.n_experts else self.d_ff

    def to_json(self) -> dict[str, JsonValue]:
        """Return the configuration as a dict of JSON values; `from_json` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, JsonValue]) -> "LlamaConfig":
        """Return the configuration that `to_json` serialized.

        Args:
          data: the dict of JSON values, also after a round trip through JSON text.
        Raises:
          ValueError: a key is unknown or missing, or a value is out of range.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"not a LlamaConfig in JSON form: {shown(data)}")
        data = dict(data)
        for name in ("rope_scaling", "eos_ids"):
            if isinstance(data.get(name), list):
                data[name] = tuple(data[name])
        try:
            if isinstance(scaling := data.get("rope_scaling"), Mapping):
                data["rope_scaling"] = Llama3Scaling(**scaling)
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"not a LlamaConfig in JSON form: {error}") from None


class _ScalingFields(Schema):
    """Schema of the fields of `Llama3Scaling`."""

    factor: Factor
    low_freq_factor: Factor
    high_freq_factor: Factor
    original_max_position: Size

    @model_validator(mode="after")
    def _apart(self) -> Self:
        low, high = self.low_freq_factor, self.high_freq_factor
        if not low < high:
            raise ValueError(
                f"low_freq_factor must be below high_freq_factor, got {low} and {high}"
            )
        return self


class _ConfigFields(Schema):
    """Schema of the fields of `LlamaConfig` except `rope_scaling`."""

    vocab_size: Size
    d_model: Size
    d_ff: Size
    n_layers: Size
    n_heads: Size
    n_kv_heads: Size
    head_dim: Size
    norm_eps: Epsilon
    rope_theta: Theta
    tie_embeddings: bool
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    sub_norms: bool
    activation: Literal["silu", "relu2"]
    n_experts: Count
    experts_per_token: Count
    expert_d_ff: Count
    norm_topk_prob: bool
    max_position: Size
    eos_ids: tuple[TokenId, ...]
    bos_id: TokenId | None

    @model_validator(mode="after")
    def _together(self) -> Self:
        check_heads(("n_heads", "n_kv_heads", "head_dim"), self.n_heads, self.n_kv_heads,
                    self.head_dim)  # fmt: skip
        sizes = self.n_experts, self.experts_per_token, self.expert_d_ff
        check_experts(("n_experts", "experts_per_token", "expert_d_ff"), *sizes)
        if self.n_experts and (self.mlp_bias or self.sub_norms):
            raise ValueError("mlp_bias and sub_norms must be False: experts have neither")
        check_ids(self.vocab_size, bos_id=[] if self.bos_id is None else [self.bos_id])
        return self
