"""Tiny random models in Hugging Face form, and a float64 NumPy forward pass to judge the others.

Nothing here is shared with `models`: names, shapes and arithmetic are written out again.
"""

import json

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

VOCAB, D, FF, LAYERS, HEADS, KV, HD = 261, 24, 40, 3, 4, 2, 8
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BASE = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": HD,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 50.0,
    "max_position_embeddings": 256,
    "eos_token_id": 257,
    "bos_token_id": 256,
}
FAMILIES = {
    "llama": BASE,
    "llama-tied": BASE | {"tie_word_embeddings": True},
    "llama-linear": BASE | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama-llama3": BASE | {"rope_scaling": LLAMA3},
    "llama-biases": BASE | {"attention_bias": True, "mlp_bias": True},
    "mistral": BASE | {"model_type": "mistral", "sliding_window": None},
    "qwen2": BASE
    | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 8}
    | {"tie_word_embeddings": True},
    "qwen3": BASE | {"model_type": "qwen3", "attention_bias": False},
    "qwen3_moe": BASE
    | {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 16, "norm_topk_prob": True},
    "mixtral": BASE
    | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    | {"sliding_window": None},
}


def random_tensors(hf, seed=0):
    """Every tensor of the family, float32, by its Hugging Face name."""
    rng = np.random.default_rng(seed)
    d, ff = hf["hidden_size"], hf["intermediate_size"]
    qwen2, qwen3 = hf["model_type"] == "qwen2", hf["model_type"] in ("qwen3", "qwen3_moe")
    router, gate, up, down, experts, wide = expert_names(hf)
    matrix = lambda out, into: rng.normal(0, into**-0.5, (out, into)).astype(np.float32)
    scale = lambda n: rng.uniform(0.5, 1.5, n).astype(np.float32)
    tensors = {"model.embed_tokens.weight": matrix(VOCAB, d), "model.norm.weight": scale(d)}
    if not hf.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = matrix(VOCAB, d)
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}{name}.weight"] = scale(d)
        shapes = {"q": (HEADS * HD, d), "k": (KV * HD, d), "v": (KV * HD, d), "o": (d, HEADS * HD)}
        for p, shape in shapes.items():
            tensors[f"{at}self_attn.{p}_proj.weight"] = matrix(*shape)
            if hf.get("attention_bias") or (qwen2 and p != "o"):
                tensors[f"{at}self_attn.{p}_proj.bias"] = scale(shape[0])
            if qwen3 and p in "qk":
                tensors[f"{at}self_attn.{p}_norm.weight"] = scale(HD)
        if experts:
            tensors[f"{at}{router}.weight"] = matrix(experts, d)
        for e in range(experts):
            for name, shape in ((gate, (wide, d)), (up, (wide, d)), (down, (d, wide))):
                tensors[f"{at}{name.format(e)}.weight"] = matrix(*shape)
        dense = {} if experts else {"gate": (ff, d), "up": (ff, d), "down": (d, ff)}
        for p, shape in dense.items():
            tensors[f"{at}mlp.{p}_proj.weight"] = matrix(*shape)
            if hf.get("mlp_bias"):
                tensors[f"{at}mlp.{p}_proj.bias"] = scale(shape[0])
    return tensors


def expert_names(hf):
    """Names of router, gate, up and down, number of experts (0 for a dense model) and width."""
    if hf["model_type"] == "mixtral":
        at, wide = "block_sparse_moe", hf["intermediate_size"]
        names = [f"{at}.gate", *(f"{at}.experts.{{}}.{w}" for w in ("w1", "w3", "w2"))]
    else:
        wide, own = hf.get("moe_intermediate_size"), ("gate_proj", "up_proj", "down_proj")
        names = ["mlp.gate", *(f"mlp.experts.{{}}.{w}" for w in own)]
    return *names, hf.get("num_experts") or hf.get("num_local_experts") or 0, wide


def byte_tokenizer_json():
    """256 bytes and five added tokens; no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("<s>", "</s>", "<|a|>", "<|é|>", "<| b |>")
    tokenizer.add_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    return tokenizer.to_str()


def write_folder(folder, hf, tensors):
    """A Hugging Face folder with one safetensors file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf))
    (folder / "tokenizer.json").write_text(byte_tokenizer_json(), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder


def inverse_frequencies(hf):
    """Radians per position, written as in the Transformers documentation, pair by pair."""
    rope = hf.get("rope_scaling") or {}
    out = []
    for i in range(HD // 2):
        f = hf["rope_theta"] ** (-2 * i / HD)
        if rope.get("type") == "linear":
            f = f / rope["factor"]
        if rope.get("rope_type") == "llama3":
            wavelength, trained = 2 * np.pi / f, rope["original_max_position_embeddings"]
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            if wavelength > trained / low:
                f = f / rope["factor"]
            elif wavelength >= trained / high:
                smooth = (trained / wavelength - low) / (high - low)
                f = (1 - smooth) * f / rope["factor"] + smooth * f
        out.append(f)
    return np.array(out)


def forward(hf, tensors, tokens, states=None):
    """Logits float64 [t, V] of one sequence, with a loop over heads and positions.

    To a list `states` is added, for each layer, what it leaves [t, d] and the attention
    [heads, t, t].
    """
    w = {name: value.astype(np.float64) for name, value in tensors.items()}
    eps, t = hf["rms_norm_eps"], len(tokens)
    norm = lambda x, name: x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[name]
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)
    turn = np.exp(1j * np.arange(t)[:, None] * inverse_frequencies(hf))

    def rotated(x):
        z = (x[:, : HD // 2] + 1j * x[:, HD // 2 :]) * turn
        return np.concatenate([z.real, z.imag], axis=1)

    h = w["model.embed_tokens.weight"][tokens]
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        x = norm(h, f"{at}input_layernorm.weight")
        q, k, v = (linear(x, f"{at}self_attn.{p}_proj") for p in "qkv")
        heads, attention = [], np.zeros((HEADS, t, t))
        for n in range(HEADS):
            g = n // (HEADS // KV)
            a, b = q[:, n * HD : (n + 1) * HD], k[:, g * HD : (g + 1) * HD]
            if hf["model_type"] in ("qwen3", "qwen3_moe"):
                a = norm(a, f"{at}self_attn.q_norm.weight")
                b = norm(b, f"{at}self_attn.k_norm.weight")
            scores = rotated(a) @ rotated(b).T / np.sqrt(HD)
            out = np.zeros((t, HD))
            for s in range(t):
                p = np.exp(scores[s, : s + 1] - scores[s, : s + 1].max())
                attention[n, s, : s + 1] = p / p.sum()
                out[s] = p / p.sum() @ v[: s + 1, g * HD : (g + 1) * HD]
            heads.append(out)
        h = h + linear(np.concatenate(heads, axis=1), f"{at}self_attn.o_proj")
        x = norm(h, f"{at}post_attention_layernorm.weight")
        h = h + feed_forward(hf, linear, at, x)
        if states is not None:
            states.append((h, attention))
    h = norm(h, "model.norm.weight")
    return h @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def feed_forward(hf, linear, at, x):
    """What the MLP adds, or the experts, token by token."""

    def mlp(x, gate, up, down):
        z = linear(x, at + gate)
        return linear(z / (1 + np.exp(-z)) * linear(x, at + up), at + down)

    router, *names, experts, _ = expert_names(hf)
    if not experts:
        return mlp(x, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    out = np.zeros_like(x)
    for t, row in enumerate(x):
        scores = np.exp(linear(row, at + router))
        scores /= scores.sum()
        chosen = np.argsort(-scores)[: hf["num_experts_per_tok"]]
        kept = hf["model_type"] == "qwen3_moe" and not hf["norm_topk_prob"]
        total = 1.0 if kept else scores[chosen].sum()
        for e in chosen:
            out[t] += scores[e] / total * mlp(row, *(name.format(e) for name in names))
    return out


def shard(folder, tensors):
    """Write the tensors as two shards with an index."""
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, group in parts.items():
        save_file({name: tensors[name] for name in group}, folder / file)
    index = {"weight_map": {name: file for file, group in parts.items() for name in group}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
