"""The architectures of well-known models, for plans that read no files.

Source: the config.json of each model on huggingface.co (meta-llama/Meta-Llama-3-8B,
Meta-Llama-3-70B and Llama-3.1-405B; Qwen/Qwen3-8B, Qwen3-32B and Qwen3-235B-A22B).

"deepseek-v3-sized" has the widths, experts and heads of deepseek-ai/DeepSeek-V3 and about as many
weights (670 billion), but uses the layers of this project. All its 58 layers have experts, whereas
the first three of the model's 61 layers have none; it has no shared expert; and its attention has 8
key-value heads instead of latent attention, so its cache is 3.4 times as large.
"""

from jaxquant_models.architectures.config import Llama3Scaling, LlamaConfig

_LLAMA_3 = {"vocab_size": 128256, "n_kv_heads": 8, "head_dim": 128, "rope_theta": 5e5}
_QWEN_3 = {
    "vocab_size": 151936, "n_kv_heads": 8, "head_dim": 128, "rope_theta": 1e6, "norm_eps": 1e-6,
    "qk_norm": True, "max_position": 40960,
}  # fmt: skip

ARCHITECTURES: dict[str, LlamaConfig] = {
    "llama-3-8b": LlamaConfig(
        d_model=4096, d_ff=14336, n_layers=32, n_heads=32, max_position=8192, **_LLAMA_3
    ),
    "llama-3-70b": LlamaConfig(
        d_model=8192, d_ff=28672, n_layers=80, n_heads=64, max_position=8192, **_LLAMA_3
    ),
    "llama-3-405b": LlamaConfig(
        d_model=16384, d_ff=53248, n_layers=126, n_heads=128, max_position=131072,
        rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192), **_LLAMA_3,
    ),
    "qwen3-8b": LlamaConfig(d_model=4096, d_ff=12288, n_layers=36, n_heads=32, **_QWEN_3),
    "qwen3-32b": LlamaConfig(d_model=5120, d_ff=25600, n_layers=64, n_heads=64, **_QWEN_3),
    "qwen3-235b-a22b": LlamaConfig(
        d_model=4096, d_ff=12288, n_layers=94, n_heads=64, n_experts=128, experts_per_token=8,
        expert_d_ff=1536, **_QWEN_3 | {"n_kv_heads": 4},
    ),
    "deepseek-v3-sized": LlamaConfig(
        vocab_size=129280, d_model=7168, d_ff=18432, n_layers=58, n_heads=128, n_kv_heads=8,
        head_dim=128, norm_eps=1e-6, n_experts=256, experts_per_token=8, expert_d_ff=2048,
        max_position=163840,
    ),
}  # fmt: skip
