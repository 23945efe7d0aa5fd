"""C++ kernels for the CPU, built on first use by the system's compiler; optional.

The shared object lies in the user's cache folder ($XDG_CACHE_HOME or ~/.cache, then jaxquant),
named by a hash of all that it is built from. It picks its instruction set when it runs, so one
file serves every machine of an architecture. Without a compiler, or with JAXQUANT_NATIVE=0 in the
environment, there are no native kernels, and `load` says why.
"""

import concurrent.futures
import ctypes
import functools
import hashlib
import itertools
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading

import jax
import jaxlib

FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC")
FOLDER = pathlib.Path(__file__).parent
TARGETS = (
    "jaxquant_viterbi",
    "jaxquant_packed",
    "jaxquant_e8p",
    "jaxquant_trellis",
    "jaxquant_additive",
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
    name = _library().jaxquant_instruction_set
    name.restype = ctypes.c_char_p
    found = iter(lambda count=itertools.count(): name(next(count)), None)
    return tuple(text.decode() for text in found)


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(shared_object()))


@functools.cache
def _load() -> str:
    try:
        library = _library()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return _reason(error)
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
    compiler = _compiler()
    path = _cache() / f"native-{_digest(compiler)}.so"
    if not path.exists():
        _build(compiler, path)
    return path


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def _cache() -> pathlib.Path:
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "jaxquant"


def _digest(compiler: list[str]) -> str:
    """Of what the object depends on: sources, flags, compiler, JAX's headers, machine."""
    digest = hashlib.sha256()
    for source in sorted([*FOLDER.glob("*.cc"), *FOLDER.glob("*.h")]):
        digest.update(source.read_bytes())
    digest.update(repr((FLAGS, compiler, jaxlib.__version__, platform.machine())).encode())
    return digest.hexdigest()[:16]


def _build(compiler: list[str], path: pathlib.Path) -> None:
    """Compile to a file of this process's own, then rename: others see all of it or nothing."""
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"no C++ compiler: {compiler[0]!r} is not on the path; set CXX")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = pathlib.Path(folder) / path.name
        compile_to(compiler, made)
        os.replace(made, path)


def compile_to(compiler: list[str], made: pathlib.Path) -> None:
    """The shared object `made`, source by source on all cores; objects lie beside it."""
    objects = {made.with_name(f"{source.stem}.o"): source for source in FOLDER.glob("*.cc")}

    def one(item: tuple[pathlib.Path, pathlib.Path]) -> None:
        to, source = map(str, item)
        _run([*compiler, *FLAGS, "-w", "-isystem", jax.ffi.include_dir(), "-c", source, "-o", to])

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, objects.items()))
    _run([*compiler, "-shared", *map(str, objects), "-o", str(made)])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)


def _reason(error: Exception) -> str:
    """One line; of a compiler's complaints the first error."""
    lines = str(getattr(error, "stderr", None) or error).splitlines()
    return next((line for line in lines if "error" in line), (lines or [repr(error)])[0]).strip()
