"""The request for training from scratch: everything that determines the result."""

import dataclasses

import jax
import optax
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant.training.schedules import decay_until_half, two_stage
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import LAYER_MATRICES

# (d_model, d_ff, layers, heads): about 1, 4 and 12 million weights in the layers.
SIZES = {"1m": (128, 344, 5, 4), "4m": (224, 608, 6, 7), "12m": (384, 1024, 7, 6)}


@dataclasses.dataclass(frozen=True)
class PretrainingRequest:
    """Everything that determines the result, except the text.

    Attributes:
      size: size of the model, a key of `SIZES`.
      quantized: True trains BitNet, False a floating-point model.
      steps: number of steps.
      learning_rate: peak learning rate. BitNet's second stage uses two thirds of it, as in its
        authors' table.
      weight_decay: weight decay; for BitNet it ends halfway.
      context: number of tokens per row.
      batch_size: number of rows per step.
      vocabulary: number of tokens of the byte-level BPE that is trained on the text.
      warmup: number of warm-up steps, at most half of all.
      seed: seed of the initial parameters and of the order of rows.
      float_share: fraction of the steps, at the beginning, that train in floating point. Switching
        to ternary weights with the optimizer state kept is better than ternary weights throughout
        (Nielsen et al. 2025, arXiv:2502.11895).
      a48: fraction of the steps, at the end, with the activations of BitNet a4.8, whose authors use
        0.05 (arXiv:2411.04965). The optimizer state is kept.
      validate_every: number of steps between validations.
      save_every: number of steps between saved states.
    """

    size: str = "4m"
    quantized: bool = True
    steps: int = 1000
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    context: int = 256
    batch_size: int = 8
    vocabulary: int = 2048
    warmup: int = 50
    seed: int = 0
    float_share: float = 0.0
    a48: float = 0.0
    validate_every: int = 100
    save_every: int = 50

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {self.size!r}")
        for name in ("steps", "context", "batch_size", "validate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.vocabulary < 256 + 1:
            raise ValueError(
                f"vocabulary must be above 256, the number of bytes, got {self.vocabulary}"
            )
        for name in ("float_share", "a48"):
            share = getattr(self, name)
            if not 0 <= share <= 1 or (share and not self.quantized):
                raise ValueError(
                    f"{name} must be a fraction of the steps from 0 to 1, and 0 without "
                    f"quantization, got {share}"
                )
        if self.float_share + self.a48 > 1:
            raise ValueError(
                "float_share and a48 must not add up to more than 1, got "
                f"{self.float_share} and {self.a48}"
            )
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")

    def config(self, vocabulary: int) -> LlamaConfig:
        """Return the architecture, a small version of BitNet b1.58 2B4T.

        Args:
          vocabulary: number of tokens.
        """
        d, ff, layers, heads = SIZES[self.size]
        return LlamaConfig(
            vocabulary, d, ff, layers, heads, heads, d // heads, tie_embeddings=True,
            sub_norms=True, activation="relu2", max_position=max(2048, self.context),
        )  # fmt: skip

    @property
    def ternary_from(self) -> int:
        """The step before which weights become latent; past the end for a floating-point model."""
        if not self.quantized:
            return self.steps + 1
        return min(round(self.float_share * self.steps), self.steps - 1)

    @property
    def a48_from(self) -> int:
        """The step before which activations become those of a4.8; past the end if they never do."""
        if not self.a48:
            return self.steps + 1
        return min(round((1 - self.a48) * self.steps), self.steps - 1)

    @property
    def recipe(self) -> jq.Recipe:
        """The recipe: ternary matrices in the layers, floating-point embedding and norms."""
        return jq.Recipe([(LAYER_MATRICES, jq.bitnet()), ("*", jq.KEEP)])

    def optimizer(self) -> optax.GradientTransformation:
        """Return Adam with gradient clipping, weight decay and a learning rate schedule.

        BitNet has two stages of the learning rate, and its weight decay ends halfway.
        Floating-point training has one stage and a constant decay.
        """
        second = self.learning_rate * (2 / 3 if self.quantized else 1)
        warmup = min(self.warmup, self.steps // 2)
        rate = two_stage(self.learning_rate, second, self.steps, warmup)
        decay = self.weight_decay
        if self.quantized:
            decay = decay_until_half(self.weight_decay, self.steps)
        return optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.scale_by_adam(b1=0.9, b2=0.95),
            optax.add_decayed_weights(decay, mask=_matrices),
            optax.scale_by_learning_rate(rate),
        )


def _matrices(params: PyTree) -> PyTree:
    """Return which leaves decay: latent weights and the embedding, but not the scales of norms."""
    return jax.tree_util.tree_map_with_path(
        lambda path, a: not jax.tree_util.keystr(path).endswith("['scale']"), params
    )
