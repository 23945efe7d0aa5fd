"""Changes of a Llama's weights that leave its function as it is.

Factors of channels fold into what makes them, the residual stream turns, a tied embedding unties.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant_models.architectures.config import LlamaConfig


def folds(config: LlamaConfig) -> dict[str, tuple[str, ...]]:
    """What makes the inputs of the layers' matrices, as `jaxquant.fold` wants it.

    Values make the input of o too, but with fewer of them than queries one channel of theirs is
    several of o's.
    """
    found: dict[str, tuple[str, ...]] = {
        "layers/attn/[qkv]/kernel": ("layers/attn_norm/scale",),
        "layers/mlp/[gu]*/kernel": ("layers/mlp_norm/scale",),
    }
    if config.sub_norms:
        return found | {
            "layers/attn/o/kernel": ("layers/attn/sub_norm/scale",),
            "layers/mlp/down/kernel": ("layers/mlp/sub_norm/scale",),
        }
    found["layers/mlp/down/kernel"] = ("layers/mlp/up/kernel", "layers/mlp/up/bias")
    if config.n_kv_heads == config.n_heads:
        found["layers/attn/o/kernel"] = ("layers/attn/v/kernel", "layers/attn/v/bias")
    return found


def residual(config: LlamaConfig) -> jq.Residual:
    """What reads and what writes the residual stream, for `jaxquant.rotate_residual`.

    Raises:
      ValueError: one embedding serves both ends, in which the stream has two bases.
    """
    if config.tie_embeddings:
        raise ValueError(
            "a tied embedding cannot be rotated: untie it first (architectures.invariances.untied)"
        )
    biases = [
        f"layers/{name}/bias"
        for name, there in (("attn/o", config.o_bias), ("mlp/down", config.mlp_bias))
        if there
    ]
    return jq.Residual(
        ["embed/embedding", "layers/attn/o/kernel", "layers/mlp/down/kernel", *biases],
        {
            "layers/attn_norm/scale": ["layers/attn/[qkv]/kernel"],
            "layers/mlp_norm/scale": ["layers/mlp/[gu]*/kernel"],
            "norm/scale": ["head/kernel"],
        },
    )


def untied(config: LlamaConfig, params: PyTree) -> tuple[LlamaConfig, PyTree]:
    """(config, params) with a head of its own, if the embedding serves as one."""
    if not config.tie_embeddings:
        return config, params
    head = {"kernel": jnp.transpose(params["embed"]["embedding"])}
    return dataclasses.replace(config, tie_embeddings=False), {**params, "head": head}
