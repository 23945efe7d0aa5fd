"""Schema of the config.json of a decoder."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from jaxquant_models.schemas.fields import (
    Count,
    Epsilon,
    Factor,
    Ids,
    Size,
    Switch,
    Theta,
    as_list,
    check_experts,
    check_heads,
    check_ids,
    check_window,
)
from jaxquant_models.schemas.strict import Schema


class Rope(Schema):
    """`rope_scaling` or `rope_parameters` of a config.json."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Theta | None = None
    partial_rotary_factor: float | None = None
    factor: Factor | None = None
    low_freq_factor: Factor | None = None
    high_freq_factor: Factor | None = None
    original_max_position_embeddings: Size | None = None

    @property
    def kind(self) -> str:
        """The kind of frequency scaling: "default", "linear" or "llama3"."""
        return self.rope_type or self.type or "default"

    @model_validator(mode="after")
    def _whole(self) -> Self:
        needed = {
            "default": (),
            "linear": ("factor",),
            "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        }
        if self.kind not in needed:
            raise ValueError(f"rope_type must be default, linear or llama3, got {self.kind!r:.60}")
        for name in needed[self.kind]:
            if getattr(self, name) is None:
                raise ValueError(f"RoPE scaling of type {self.kind!r} lacks {name!r}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.kind == "llama3" and not low < high:
            raise ValueError(
                f"low_freq_factor must be below high_freq_factor, got {low} and {high}"
            )
        if self.partial_rotary_factor not in (None, 1):
            raise ValueError("partial_rotary_factor must be 1: all of head_dim is rotated here")
        return self


class HFConfig(Schema):
    """config.json of a decoder."""

    model_type: Literal["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral"]
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    hidden_act: Literal["silu"] = "silu"
    rms_norm_eps: Epsilon = 1e-6
    rope_theta: Theta | None = 10000.0
    rope_scaling: Rope | None = None
    rope_parameters: Rope | None = None
    partial_rotary_factor: float | None = None
    tie_word_embeddings: Switch = False
    attention_bias: Switch = False
    mlp_bias: Switch = False
    max_position_embeddings: Size = 2048
    use_sliding_window: Switch = False
    sliding_window: Size | None = None
    num_experts: Count = 0
    num_local_experts: Count = 0
    num_experts_per_tok: Count = 0
    moe_intermediate_size: Count = 0
    norm_topk_prob: Switch = False
    decoder_sparse_step: Size = 1
    mlp_only_layers: Annotated[list[int], BeforeValidator(as_list)] = Field(default_factory=list)
    quantization_config: Any = None
    eos_token_id: Ids = Field(default_factory=list)
    bos_token_id: Ids = Field(default_factory=list)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Number of heads, number of key-value heads, and channels per head."""
        heads = self.num_attention_heads
        width = self.head_dim or self.hidden_size // heads
        return heads, self.num_key_value_heads or heads, width

    @property
    def experts(self) -> tuple[int, int, int]:
        """Number of experts, experts per token, and hidden width of an expert; zeros for none."""
        if self.model_type not in ("qwen3_moe", "mixtral"):
            return 0, 0, 0
        own = self.model_type == "qwen3_moe"
        width = self.moe_intermediate_size if own else self.intermediate_size
        count = self.num_local_experts or self.num_experts  # the older name of Qwen
        return count, self.num_experts_per_tok, width

    @property
    def rope(self) -> Rope:
        """The RoPE options in force: `rope_scaling` if both are given, as in Transformers."""
        given = self.rope_scaling, self.rope_parameters
        return next((r for r in given if r is not None and r.model_fields_set), Rope())

    @property
    def theta(self) -> float | None:
        """RoPE's base; a value inside the RoPE options takes precedence over the top-level one."""
        own = "rope_theta" in self.rope.model_fields_set
        return self.rope.rope_theta if own else self.rope_theta

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.quantization_config:
            raise ValueError("the checkpoint is quantized already; load the original float weights")
        if self.partial_rotary_factor not in (None, 1):
            raise ValueError("partial_rotary_factor must be 1: all of head_dim is rotated here")
        if self.theta is None:
            raise ValueError("rope_theta must be a number, got null")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads where head_dim is not "
                f"given, got {self.hidden_size} and {self.num_attention_heads}"
            )
        check_heads(("num_attention_heads", "num_key_value_heads", "head_dim"), *self.sizes)
        # Qwen configurations state a window but use it only on request; Mistral always uses one.
        qwen = self.model_type.startswith("qwen")
        used = self.use_sliding_window if qwen else self.model_type in ("mistral", "mixtral")
        check_window(self.sliding_window if used else None, self.max_position_embeddings)
        check_ids(self.vocab_size, eos_token_id=self.eos_token_id, bos_token_id=self.bos_token_id)
        self._check_experts()
        return self

    def _check_experts(self) -> None:
        count, chosen, width = self.experts
        qwen = self.model_type == "qwen3_moe"
        key = "num_experts" if qwen and not self.num_local_experts else "num_local_experts"
        if self.model_type in ("qwen3_moe", "mixtral") and not count:
            raise ValueError(f"a model of type {self.model_type} must have {key}")
        own = "moe_intermediate_size" if qwen else "intermediate_size"
        check_experts((key, "num_experts_per_tok", own), count, chosen, width)
        if self.model_type == "qwen3_moe" and (
            self.mlp_only_layers or self.decoder_sparse_step > 1
        ):
            raise ValueError(
                "every layer must have experts: mlp_only_layers must be empty and "
                "decoder_sparse_step 1"
            )
