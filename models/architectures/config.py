"""The architecture of a Llama-like model: its sizes and switches, checked whoever made them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import JsonValue, model_validator

from jaxquant.core.fields import shown
from jaxquant_models.schemas.fields import (
    Epsilon,
    Factor,
    Size,
    Theta,
    TokenId,
    check_heads,
    check_ids,
)
from jaxquant_models.schemas.strict import Schema, checked


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's RoPE scaling; the names are those of Hugging Face's `rope_scaling`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self):
        checked(_ScalingFields, vars(self), "rope_scaling")


# A float divides every frequency (linear); a tuple divides each by its own factor, which is how
# GGUF stores Llama-3 scaling (tensor rope_freqs.weight).
RopeScaling = None | float | tuple[float, ...] | Llama3Scaling


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and switches of a Llama-like decoder. Immutable, hashable, compared by value."""

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
    qk_norm: bool = False  # RMSNorm on each head's q and k (Qwen3)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sub_norms: bool = False  # RMSNorm before o and before down (BitNet b1.58)
    activation: str = "silu"  # of the gate; "relu2" is the square of ReLU (BitNet b1.58)
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
                    f"rope_scaling must be one factor, or {self.head_dim // 2} for the pairs of a "
                    f"head, got {len(scaling)}"
                )

    @property
    def weights(self) -> int:
        """How many there are at least: those of all matrices."""
        inner, keys = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        layer = self.d_model * (2 * inner + 2 * keys + 3 * self.d_ff)
        tables = 1 if self.tie_embeddings else 2
        return self.n_layers * layer + tables * self.vocab_size * self.d_model

    def to_json(self) -> dict[str, JsonValue]:
        """A dict of JSON values; `from_json` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, JsonValue]) -> "LlamaConfig":
        """The inverse of `to_json`, also after a trip through JSON text.

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
    """Fields of `Llama3Scaling`."""

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
    """Fields of `LlamaConfig`, whoever made it; `rope_scaling` apart."""

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
    max_position: Size
    eos_ids: tuple[TokenId, ...]
    bos_id: TokenId | None

    @model_validator(mode="after")
    def _together(self) -> Self:
        check_heads(("n_heads", "n_kv_heads", "head_dim"), self.n_heads, self.n_kv_heads,
                    self.head_dim)  # fmt: skip
        check_ids(self.vocab_size, bos_id=[] if self.bos_id is None else [self.bos_id])
        return self
