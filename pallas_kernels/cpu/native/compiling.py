"""Compilation of the C++ sources to one shared object, independent of JAX and of this package.

It is used both by the package on first use and by the build of the wheel (`wheel_backend`).
"""

import concurrent.futures
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess

FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC")
FOLDER = pathlib.Path(__file__).parent


def compiler() -> list[str]:
    """Return the command of the C++ compiler: CXX, or c++."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def digest(*more: str) -> str:
    """Return a hash of what an object depends on: sources, flags, architecture, and `more`.

    Args:
      *more: further strings on which the object depends.

    >>> len(digest()), digest() == digest("other")
    (16, False)
    """
    found = hashlib.sha256()
    for source in sorted([*FOLDER.glob("*.cc"), *FOLDER.glob("*.h")]):
        found.update(source.read_bytes())
    found.update(repr((FLAGS, *more, platform.system(), platform.machine())).encode())
    return found.hexdigest()[:16]


def compile_to(made: pathlib.Path, include: str) -> None:
    """Build the shared object, compiling the sources in parallel on all cores.

    Object files are written beside it.

    Args:
      made: path of the shared object.
      include: folder of JAX's headers.
    Raises:
      OSError, subprocess.SubprocessError: there is no compiler, or it failed.
    """
    command = compiler()
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"no C++ compiler: {command[0]!r} is not on the path; set CXX")
    objects = {made.with_name(f"{source.stem}.o"): source for source in FOLDER.glob("*.cc")}

    def one(item: tuple[pathlib.Path, pathlib.Path]) -> None:
        to, source = map(str, item)
        _run([*command, *FLAGS, "-w", "-isystem", include, "-c", source, "-o", to])

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, objects.items()))
    _run([*command, "-shared", *map(str, objects), "-o", str(made)])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)


def reason(error: Exception) -> str:
    """Return a one-line description of an error; of a compiler's output, the first error.

    Args:
      error: the error.
    """
    output = getattr(error, "stderr", None)
    if isinstance(error, subprocess.CalledProcessError) and not output:
        return f"{error.cmd[0]!r} failed with status {error.returncode} and said nothing"
    lines = str(output or error).splitlines()
    return next((line for line in lines if "error" in line), (lines or [repr(error)])[0]).strip()
