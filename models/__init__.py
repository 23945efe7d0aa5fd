"""Models to quantize: a Llama in Flax linen, file readers, tokenizer and generation.

Installed as `jaxquant_models`. Names are imported on first use, because a command must install its
signal handlers before the heavy imports run.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxquant_models.readers.packages import missing_package

if TYPE_CHECKING:
    from jaxquant_models.architectures.blocks import blockwise
    from jaxquant_models.architectures.cache import init_cache
    from jaxquant_models.architectures.config import LlamaConfig
    from jaxquant_models.architectures.llama import Llama
    from jaxquant_models.readers.model import Model
    from jaxquant_models.readers.registry import load
    from jaxquant_models.readers.tokenizer import Tokenizer
    from jaxquant_models.runs.generate import generate

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
_HOME = {
    "Llama": "architectures.llama",
    "LlamaConfig": "architectures.config",
    "Model": "readers.model",
    "Tokenizer": "readers.tokenizer",
    "blockwise": "architectures.blocks",
    "generate": "runs.generate",
    "init_cache": "architectures.cache",
    "load": "readers.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if not (message := missing_package(error)):
            raise
        raise ModuleNotFoundError(message, name=error.name) from error
