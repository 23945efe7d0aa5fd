"""Writes a Llama of a real size with random weights: bfloat16 safetensors in shards, as published.

Run: python -m tests.benchmarks.synthetic_model SIZE DIR, where SIZE is 135m, 1.1b or 7b. One shard
holds one layer, and only one shard is in memory at a time. The weights depend on the seed alone.
The tokenizer is byte-level without merges, so that a text has one token per byte.
"""

import argparse
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import Llama
from jaxquant_models.cli.console import bar
from jaxquant_models.readers.huggingface import INDEX, TENSORS
from jaxquant_models.readers.huggingface_config import config_to_hf
from jaxquant_models.readers.weights import param_shapes, tensor_names

# Shapes of SmolLM2-135M, TinyLlama-1.1B and Llama-2-7B.
SIZES = {
    "135m": LlamaConfig(
        vocab_size=49152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64,
        d_ff=1536, max_position=2048, tie_embeddings=True,
    ),
    "1.1b": LlamaConfig(
        vocab_size=32000, d_model=2048, n_layers=22, n_heads=32, n_kv_heads=4, head_dim=64,
        d_ff=5632, max_position=2048, tie_embeddings=False,
    ),
    "7b": LlamaConfig(
        vocab_size=32000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128,
        d_ff=11008, max_position=4096, tie_embeddings=False,
    ),
}  # fmt: skip


def write(size: str, folder: Path, seed: int = 0) -> None:
    """Write the model of a size to a folder; a complete one is kept.

    Args:
      size: a key of `SIZES`.
      folder: created if missing.
      seed: seed of the weights.
    """
    if (folder / INDEX).exists():  # written last
        return
    config = SIZES[size]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    _byte_tokenizer().save(str(folder / "tokenizer.json"))
    llama = Llama(config)
    shapes, names = param_shapes(llama), tensor_names(llama, TENSORS)
    shards = [
        {group[i]: path for path, group in names.items() if path.startswith("layers/")}
        for i in range(config.n_layers)
    ]
    shards.append({group[0]: p for p, group in names.items() if not p.startswith("layers/")})
    where: dict[str, str] = {}
    with bar(f"writing {size}", len(shards)) as step:
        for i, shard in enumerate(shards):
            rng = np.random.default_rng([seed, i])
            file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            save_file({n: _weight(rng, p, shapes[p]) for n, p in shard.items()}, folder / file)
            where |= dict.fromkeys(shard, file)
            step(i + 1)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _weight(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return a tensor as a file holds it: matrices are [out, in], norms 1."""
    shape = shape[1:] if path.startswith("layers/") else shape
    if path.endswith("scale"):
        return np.ones(shape, ml_dtypes.bfloat16)
    shape = shape[::-1] if path.endswith("kernel") else shape
    w = rng.standard_normal(shape, np.float32)
    w *= 0.02
    return w.astype(ml_dtypes.bfloat16)


def _byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.size, arguments.folder, arguments.seed)


if __name__ == "__main__":
    main()
