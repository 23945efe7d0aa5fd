"""Changes of a Llama's weights that leave its function unchanged.

Channel factors fold into the preceding operation, the residual stream is rotated, and a tied
embedding is untied.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import PyTree

import jaxquant as jq
from jaxquant_models.architectures.config import LlamaConfig


def folds(config: LlamaConfig) -> dict[str, tuple[str, ...]]:
    """Return the weights that produce the inputs of the layers' matrices, for `jaxquant.ptq.fold`.

    Values produce the input of o too, but if they have fewer heads than queries, one of their
    channels becomes several channels of o's input, so that o is left out.

    Args:
      config: the architecture.
    Returns:
      Pattern of matrices -> paths of the weights that produce their inputs.
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
    if config.n_experts:  # each expert scales its inputs in its own way, and a norm has only one
        del found["layers/mlp/[gu]*/kernel"]
        found["layers/mlp/experts/down/kernel"] = ("layers/mlp/experts/up/kernel",)
    else:
        found["layers/mlp/down/kernel"] = ("layers/mlp/up/kernel", "layers/mlp/up/bias")
    if config.n_kv_heads == config.n_heads:
        found["layers/attn/o/kernel"] = ("layers/attn/v/kernel", "layers/attn/v/bias")
    return found


def residual(config: LlamaConfig) -> jq.ptq.Residual:
    """Return what reads and what writes the residual stream, for `jaxquant.ptq.rotate_residual`.

    Args:
      config: the architecture.
    Raises:
      ValueError: embeddings are tied, so that one matrix would need both bases of the stream.
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
    experts = "experts/" * bool(config.n_experts)
    routers = ["layers/mlp/router/kernel"] * bool(config.n_experts)
    return jq.ptq.Residual(
        ["embed/embedding", "layers/attn/o/kernel", f"layers/mlp/{experts}down/kernel", *biases],
        {
            "layers/attn_norm/scale": ["layers/attn/[qkv]/kernel"],
            "layers/mlp_norm/scale": [f"layers/mlp/{experts}[gu]*/kernel", *routers],
            "norm/scale": ["head/kernel"],
        },
    )


def untied(config: LlamaConfig, params: PyTree) -> tuple[LlamaConfig, PyTree]:
    """Return (config, params) with an output matrix of its own if embeddings are tied.

    Args:
      config: the architecture.
      params: inner "params" tree.
    """
    if not config.tie_embeddings:
        return config, params
    head = {"kernel": jnp.transpose(params["embed"]["embedding"])}
    return untied_config(config), {**params, "head": head}


def untied_config(config: LlamaConfig) -> LlamaConfig:
    """Return the architecture with an output matrix of its own.

    Args:
      config: the architecture.
    """
    return dataclasses.replace(config, tie_embeddings=False)
