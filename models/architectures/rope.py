"""Rotary position embedding, with the frequency scalings that long-context models use.

Source: Su et al. 2021, arXiv:2104.09864. Pairs are (i, i + head_dim/2), as in Hugging Face
checkpoints, not (2i, 2i + 1) as in the paper; the two differ by a permutation of rows of the q and
k projections.
"""

import jax.numpy as jnp
import numpy as np

from jaxquant_models.architectures.config import Llama3Scaling, LlamaConfig
from pallas_kernels.codecs.kv_layout import turned


def frequencies(config: LlamaConfig) -> np.ndarray:
    """Return RoPE's frequencies in radians per position, float64 [head_dim / 2].

    Args:
      config: the architecture.
    """
    half = config.head_dim // 2
    base = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    scaling = config.rope_scaling
    if scaling is None:
        return base
    if isinstance(scaling, Llama3Scaling):
        return _llama3(base, scaling)
    return base / np.asarray(scaling, np.float64)  # linear: one divisor, or one per pair


def _llama3(base: np.ndarray, s: Llama3Scaling) -> np.ndarray:
    """Divide low frequencies by `factor`, keep high ones, and interpolate in between."""
    turns = s.original_max_position * base / (2 * np.pi)  # within the original context
    ramp = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    kept = np.clip(ramp, 0.0, 1.0)
    return base * (kept + (1 - kept) / s.factor)


def rotation_angles(config: LlamaConfig, positions):
    """Return the angles, float32 [t, head_dim / 2], of positions int [t].

    Args:
      config: the architecture.
      positions: int [t].
    """
    return positions[:, None].astype(jnp.float32) * jnp.asarray(frequencies(config), jnp.float32)


def rotate(x, angles):
    """Rotate each pair of x [b, t, heads, head_dim] by its angle [t, head_dim / 2]; dtype of x.

    Args:
      x: [b, t, heads, head_dim].
      angles: [t, head_dim / 2].
    """
    return turned(x, angles[:, None]).astype(x.dtype)
