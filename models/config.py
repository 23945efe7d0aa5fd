"""The architecture of a Llama-like model, and its readers for Hugging Face and GGUF metadata."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ACTIVATIONS = ("silu", "relu2")


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's RoPE scaling; the names are those of Hugging Face's `rope_scaling`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


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
        sizes = ("vocab_size", "d_model", "d_ff", "n_layers", "n_heads", "n_kv_heads", "head_dim")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads must be a multiple of n_kv_heads, got {self.n_heads}, {self.n_kv_heads}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, got {self.activation!r}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (RoPE turns pairs), got {self.head_dim}")

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON values; `from_json` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "LlamaConfig":
        """The inverse of `to_json`, also after a trip through JSON text.

        Raises:
          ValueError: a key is unknown or missing, or a value is out of range.
        """
        data = dict(data)
        scaling = data.get("rope_scaling")
        try:
            if isinstance(scaling, Mapping):
                data["rope_scaling"] = Llama3Scaling(**scaling)
            elif isinstance(scaling, list):
                data["rope_scaling"] = tuple(scaling)
            data["eos_ids"] = tuple(data.get("eos_ids", ()))
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"not a LlamaConfig in JSON form: {error}") from None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "LlamaConfig":
        """Read the contents of a Hugging Face `config.json`.

        Raises:
          ValueError: the family or one of its options is not supported, or a key is missing.
        """
        family = hf.get("model_type")
        _check_hf(hf, family)
        get = functools.partial(_need, hf, "config.json")
        bias = family == "qwen2" or bool(hf.get("attention_bias", False))
        heads = get("num_attention_heads")
        return cls(
            vocab_size=get("vocab_size"),
            d_model=get("hidden_size"),
            d_ff=get("intermediate_size"),
            n_layers=get("num_hidden_layers"),
            n_heads=heads,
            n_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or get("hidden_size") // heads,
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            rope_theta=float(_hf_rope(hf).get("rope_theta", hf.get("rope_theta", 10000.0))),
            rope_scaling=_hf_scaling(_hf_rope(hf)),
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qk_norm=family == "qwen3",
            qkv_bias=bias,
            o_bias=bias and family != "qwen2",
            mlp_bias=bool(hf.get("mlp_bias", False)),
            max_position=hf.get("max_position_embeddings", 2048),
            eos_ids=_ids(hf.get("eos_token_id")),
            bos_id=next(iter(_ids(hf.get("bos_token_id"))), None),
        )

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> "LlamaConfig":
        """Read GGUF metadata (plain values). What only the tensors tell is left at its default:
        `models.gguf_reader` sets tie_embeddings, biases and per-frequency RoPE factors.

        Raises:
          ValueError: the architecture or one of its options is not supported, or a key is missing.
        """
        arch = fields.get("general.architecture")
        _check_gguf(fields, arch)
        opt = _Arch(fields, arch).get
        get = functools.partial(_need, _Arch(fields, arch), "the GGUF metadata")
        heads = get("attention.head_count")
        vocab = opt("vocab_size") or len(
            _need(fields, "the GGUF metadata", "tokenizer.ggml.tokens")
        )
        head_dim = opt("attention.key_length") or get("embedding_length") // heads
        for key in ("attention.value_length", "rope.dimension_count"):
            if opt(key, head_dim) != head_dim:
                raise ValueError(f"{arch}.{key} must equal head_dim {head_dim}, got {opt(key)}")
        linear = opt("rope.scaling.type", "none") == "linear"
        ends = [fields.get(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot")]
        return cls(
            vocab_size=vocab,
            d_model=get("embedding_length"),
            d_ff=get("feed_forward_length"),
            n_layers=get("block_count"),
            n_heads=heads,
            n_kv_heads=opt("attention.head_count_kv", heads),
            head_dim=head_dim,
            norm_eps=get("attention.layer_norm_rms_epsilon"),
            rope_theta=opt("rope.freq_base", 10000.0),
            rope_scaling=float(get("rope.scaling.factor")) if linear else None,
            qk_norm=arch == "qwen3",
            max_position=get("context_length"),
            eos_ids=_ids([i for i in ends if i is not None]),
            bos_id=fields.get("tokenizer.ggml.bos_token_id"),
        )


class _Arch(NamedTuple):
    """GGUF metadata of one architecture, whose keys begin with its name."""

    fields: Mapping[str, Any]
    arch: str

    def get(self, key: str, default: Any = None) -> Any:
        return self.fields.get(f"{self.arch}.{key}", default)


def _need(data: Any, where: str, key: str) -> Any:
    value = data.get(key)
    if value is None:
        raise ValueError(f"{where} lacks {key!r}")
    return value


def _ids(value) -> tuple[int, ...]:
    """Token ids from None, one id or a list; in order, without repeats."""
    if value is None:
        return ()
    return tuple(dict.fromkeys(value if isinstance(value, list) else [value]))


def _hf_rope(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """Transformers 5 writes `rope_parameters`; earlier versions write `rope_scaling` or null."""
    return hf.get("rope_parameters") or hf.get("rope_scaling") or {}


def _hf_scaling(rope: Mapping[str, Any]) -> RopeScaling:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    get = functools.partial(_need, rope, f"rope_scaling of type {kind!r}")
    if kind == "linear":
        return float(get("factor"))
    if kind == "llama3":
        return Llama3Scaling(
            float(get("factor")),
            float(get("low_freq_factor")),
            float(get("high_freq_factor")),
            get("original_max_position_embeddings"),
        )
    raise ValueError(f"rope_scaling type must be default, linear or llama3, got {kind!r}")


def _check_hf(hf: Mapping[str, Any], family) -> None:
    if family not in FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}; got {family!r}")
    if hf.get("quantization_config"):
        raise ValueError("the checkpoint is quantized already; load the original float weights")
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act must be silu, got {hf['hidden_act']!r}")
    if _hf_rope(hf).get("partial_rotary_factor", hf.get("partial_rotary_factor") or 1) != 1:
        raise ValueError("partial_rotary_factor must be 1: all of head_dim is rotated here")
    # Qwen names a window but uses it only on request; Mistral's window is used if it is there.
    used = hf.get("use_sliding_window", False) if family.startswith("qwen") else family == "mistral"
    _check_window(hf.get("sliding_window") if used else None, hf.get("max_position_embeddings", 0))


def _check_gguf(fields: Mapping[str, Any], arch) -> None:
    supported = [f for f in FAMILIES if f != "mistral"]  # GGUF calls Mistral "llama"
    if arch not in supported:
        raise ValueError(f"general.architecture must be one of {supported}; got {arch!r}")
    opt = _Arch(fields, arch).get
    if opt("expert_count"):
        raise ValueError(f"mixture-of-experts models are not supported ({arch}.expert_count)")
    scaling = opt("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ValueError(f"rope.scaling.type must be none or linear, got {scaling!r}")
    _check_window(opt("attention.sliding_window"), opt("context_length", 0))


def _check_window(window: int | None, max_position: int) -> None:
    if window and window < max_position:
        raise ValueError(
            f"sliding-window attention is not supported (window {window} < {max_position} "
            f"positions); lower max_position_embeddings to {window} to use full attention"
        )
