"""Names of tensors in files, and the paths of the parameters that they become."""

import re

LAYER = {
    "attn_q": "attn/q", "attn_k": "attn/k", "attn_v": "attn/v", "attn_output": "attn/o",
    "ffn_gate": "mlp/gate", "ffn_up": "mlp/up", "ffn_down": "mlp/down",
    "self_attn.q_proj": "attn/q", "self_attn.k_proj": "attn/k", "self_attn.v_proj": "attn/v",
    "self_attn.o_proj": "attn/o", "mlp.gate_proj": "mlp/gate", "mlp.up_proj": "mlp/up",
    "mlp.down_proj": "mlp/down",
    # Experts and their routers: of GGUF, of Qwen3-MoE, and of Mixtral.
    "ffn_gate_inp": "mlp/router", "ffn_gate_exps": "mlp/experts/gate",
    "ffn_up_exps": "mlp/experts/up", "ffn_down_exps": "mlp/experts/down",
    "mlp.gate": "mlp/router", "mlp.experts.gate_proj": "mlp/experts/gate",
    "mlp.experts.up_proj": "mlp/experts/up", "mlp.experts.down_proj": "mlp/experts/down",
    "block_sparse_moe.gate": "mlp/router", "block_sparse_moe.experts.w1": "mlp/experts/gate",
    "block_sparse_moe.experts.w3": "mlp/experts/up",
    "block_sparse_moe.experts.w2": "mlp/experts/down",
}  # fmt: skip
OUTER = {
    "token_embd": "embed/embedding", "model.embed_tokens": "embed/embedding",
    "output": "head/kernel", "lm_head": "head/kernel",
}  # fmt: skip
_OF_LAYER = re.compile(r"(?:blk|model\.layers)\.\d+\.(.+)\.weight")
_EXPERT = re.compile(r"\.experts\.\d+\.")  # of a file with a tensor for each expert
_LAYER_PATH = re.compile(r"layers/\d+/(.+)")  # of a checkpoint with unstacked layers


def parameter_path(name: str) -> str | None:
    """Return the path of the stack or matrix that a stored tensor belongs to; None if unknown.

    Args:
      name: name of a tensor in a GGUF or Hugging Face file, or a path in a jaxquant checkpoint.

    >>> parameter_path("blk.3.attn_q.weight"), parameter_path("model.norm.weight")
    ('layers/attn/q/kernel', None)
    """
    if found := _OF_LAYER.fullmatch(name):
        kind = LAYER.get(_EXPERT.sub(".experts.", found[1]))
        return None if kind is None else f"layers/{kind}/kernel"
    if name.removesuffix(".weight") in OUTER and name.endswith(".weight"):
        return OUTER[name.removesuffix(".weight")]
    if found := _LAYER_PATH.fullmatch(name):
        return f"layers/{found[1]}"
    return name if "/" in name else None


def kind_of(path: str) -> str:
    """Return the name of a weight without its layer.

    Args:
      path: path of the parameter.

    >>> kind_of("layers/mlp/down/kernel"), kind_of("embed/embedding")
    ('mlp/down', 'embed/embedding')
    """
    return path.removeprefix("layers/").removesuffix("/kernel")
