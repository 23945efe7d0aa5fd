"""Real models to quantize: a Llama in Flax linen, readers, tokenizer, generation."""

from models.generate import generate
from models.llama import Llama, LlamaConfig, blockwise, init_cache
from models.registry import Model, load
from models.tokenizer import Tokenizer

__all__ = [
    "Llama",
    "LlamaConfig",
    "Model",
    "Tokenizer",
    "blockwise",
    "generate",
    "init_cache",
    "load",
]
