"""Real models to quantize: a Llama in Flax linen, readers, tokenizer, generation.

Names are imported when they are first asked for: a command must heed signals before that.
"""

import importlib
import sys
from types import ModuleType

TYPE_CHECKING = False  # as of `typing`, which takes a while to import
if TYPE_CHECKING:
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
_MODULES = {
    "generate": ["generate"],
    "llama": ["Llama", "LlamaConfig", "blockwise", "init_cache"],
    "registry": ["Model", "load"],
    "tokenizer": ["Tokenizer"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


class _Package(ModuleType):
    """A module that looks names up in its own table first, before what is set on it."""

    def __getattribute__(self, name: str) -> object:
        # `generate` is the function, though importing the module of that name sets that here.
        home = _HOME.get(name)
        if home is None:
            return super().__getattribute__(name)
        return getattr(importlib.import_module(f"models.{home}"), name)


sys.modules[__name__].__class__ = _Package
