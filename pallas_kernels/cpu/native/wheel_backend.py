"""Build backend of the wheel: setuptools, plus compiled kernels where a compiler is available.

pyproject.toml names it (PEP 517, an in-tree backend) with this folder on the path. A wheel with
kernels is specific to an architecture, but works with any Python 3. Without a compiler the wheel is
pure Python, the build prints the reason, and kernels are built on first use or not at all. Editable
installs are left to setuptools.
"""

import importlib.util
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tempfile

import compiling  # in this file's folder
from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  the backend's other hooks
    build_editable,
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """Return the build requirements.

    Besides setuptools' own, these are jaxlib, for its FFI headers, and `wheel`, for the platform
    tag.
    """
    found = build_meta.get_requires_for_build_wheel(config_settings)
    return [*found, "jaxlib>=0.10", "wheel"]


def build_wheel(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    """Build the wheel, with the kernels if they compile, and return its file name."""
    shutil.rmtree("build/lib", ignore_errors=True)  # else modules of earlier builds are included
    plain = lambda: build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    made = compiling.FOLDER / f"packaged-{compiling.digest()}.so"
    try:
        with tempfile.TemporaryDirectory() as folder:
            new = pathlib.Path(folder) / made.name
            compiling.compile_to(new, _headers())
            made.write_bytes(new.read_bytes())
    except (OSError, subprocess.SubprocessError) as error:
        print(f"jaxquant: no CPU kernels in this wheel ({compiling.reason(error)})", flush=True)
        return plain()
    try:
        return _named_for_platform(pathlib.Path(wheel_directory) / plain())
    finally:
        made.unlink()


def _headers() -> str:
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("no headers: jaxlib is not installed")
    return str(pathlib.Path(spec.submodule_search_locations[0]) / "include")


def _named_for_platform(wheel: pathlib.Path) -> str:
    """Rename py3-none-any to this platform, also in the wheel's metadata."""
    tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    command = [sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", tag, str(wheel)]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return pathlib.Path(name.strip().splitlines()[-1]).name
