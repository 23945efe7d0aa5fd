"""C++ kernels for the CPU, packaged, or built on first use by the system's compiler; optional.

A wheel built where a compiler was has the shared object in it. Else it lies in the user's cache
folder ($XDG_CACHE_HOME or ~/.cache, then jaxquant), named by a hash of all that it is built from.
It picks its instruction set when it runs, so one file serves every machine of an architecture.
Without a compiler, or with JAXQUANT_NATIVE=0 in the environment, there are no native kernels, and
`load` says why.
"""

import ctypes
import functools
import itertools
import os
import pathlib
import subprocess
import tempfile
import threading

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
    "jaxquant_attention",
    "jaxquant_kv_attention",
)  # the handlers in the *.cc files, and their names in JAX
_ONE = threading.Lock()


def load() -> str:
    """Build if need be, load and register the kernels, once: "" if they serve, else why not.

    >>> isinstance(load(), str)
    True
    """
    with _ONE:
        return _load()


def instruction_sets() -> tuple[str, ...]:
    """Those that this machine can run, of the products of `pallas_kernels.cpu`, plainest first.

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
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return compiling.reason(error)
    for name in TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return ""


def shared_object() -> pathlib.Path:
    """The file of the kernels, built if it is not there yet.

    Raises:
      RuntimeError: native kernels are turned off.
      OSError, subprocess.SubprocessError: no compiler, no cache folder, or the build failed.
    """
    if os.environ.get("JAXQUANT_NATIVE", "1") == "0":
        raise RuntimeError("turned off by JAXQUANT_NATIVE=0")
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
    """Compile to a file of this process's own, then rename: others see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = pathlib.Path(folder) / path.name
        compiling.compile_to(made, jax.ffi.include_dir())
        os.replace(made, path)
