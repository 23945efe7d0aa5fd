"""C++ kernels for the CPU, packaged or built on first use with the system's compiler; optional.

A wheel built where a compiler was available contains the shared object. Otherwise it is built into
the user's cache folder ($XDG_CACHE_HOME or ~/.cache, then jaxquant), named by a hash of everything
it depends on. It selects its instruction set at run time, so one file serves every machine of an
architecture. Without a compiler, or with JAXQUANT_NATIVE=0 in the environment, there are no native
kernels, and `load` returns the reason. If they could not be built, it also warns, once.
"""

import ctypes
import functools
import itertools
import os
import pathlib
import subprocess
import tempfile
import threading
import warnings

import jax
import jaxlib

from pallas_kernels.cpu.native import compiling

TARGETS = (
    "jaxquant_viterbi",
    "jaxquant_packed",
    "jaxquant_e8p",
    "jaxquant_trellis",
    "jaxquant_additive",
    "jaxquant_dual_scale",
    "jaxquant_float_planes",
    "jaxquant_float_planes_decode",
    "jaxquant_attention",
    "jaxquant_kv_attention",
    "jaxquant_huffman",
)  # names of the handlers, both in the *.cc files and in JAX
_ONE = threading.Lock()


class TurnedOffError(RuntimeError):
    """Raised where the user has turned the native kernels off."""


def load() -> str:
    """Build (if necessary), load and register the kernels, once.

    Returns:
      "" if the kernels are available, otherwise the reason why not.

    >>> isinstance(load(), str)
    True
    """
    with _ONE:
        return _load()


def instruction_sets() -> tuple[str, ...]:
    """Return the instruction sets of `pallas_kernels.cpu` that this machine can run.

    The simplest is first; the result is empty if there are no native kernels.

    >>> load() != "" or instruction_sets()[0] == "baseline"
    True
    """
    if load():
        return ()
    name = ctypes.CDLL(str(shared_object())).jaxquant_instruction_set
    name.restype = ctypes.c_char_p
    found = itertools.takewhile(bool, map(name, itertools.count()))
    return tuple(text.decode() for text in found)


@functools.cache
def _load() -> str:
    try:
        library = ctypes.CDLL(str(shared_object()))
    except TurnedOffError as error:
        return str(error)
    except (OSError, subprocess.SubprocessError) as error:
        reason = compiling.reason(error)
        _warn(reason)
        return reason
    for name in TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return ""


def _warn(reason: str) -> None:
    """Warn that products will be slow, unless programs run on an accelerator by default."""
    if jax.default_backend() == "cpu":
        warnings.warn(
            f"the native CPU kernels could not be built, so products with packed weights run much "
            f"slower ({reason}); install a C++ compiler, or set JAXQUANT_NATIVE=0 to turn both the "
            f"kernels and this warning off",
            stacklevel=2,
        )


def shared_object() -> pathlib.Path:
    """Return the path of the shared object, building it if it does not exist.

    Raises:
      TurnedOffError: native kernels are turned off.
      OSError, subprocess.SubprocessError: there is no compiler or cache folder, or the build
        failed.
    """
    if os.environ.get("JAXQUANT_NATIVE", "1") == "0":
        raise TurnedOffError("turned off by JAXQUANT_NATIVE=0")
    packaged = compiling.FOLDER / f"packaged-{compiling.digest()}.so"
    if packaged.exists():
        return packaged
    path = _cache() / f"native-{_digest()}.so"
    if not path.exists():
        _build(path)
    return path


def _cache() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "jaxquant"


def _digest() -> str:
    return compiling.digest(*compiling.compiler(), jaxlib.__version__)


def _build(path: pathlib.Path) -> None:
    """Compile to a private file, then rename it.

    Other processes thus see all of the file or nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = pathlib.Path(folder) / path.name
        compiling.compile_to(made, jax.ffi.include_dir())
        os.replace(made, path)
