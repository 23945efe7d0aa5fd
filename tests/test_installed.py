"""What users get: the packages of the wheel, what it weighs to import, and all of it outside."""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import jaxquant as jq
from pallas_kernels.cpu.native import compiling

ROOT = Path(__file__).parents[1]
FOLDERS = {"jaxquant": "jaxquant", "models": "jaxquant_models", "pallas_kernels": "pallas_kernels"}
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def package(folder):
    """The name under which a folder of the repository is installed."""
    first, *rest = folder.relative_to(ROOT).parts
    return ".".join([FOLDERS[first], *rest])


def test_every_package_is_listed():
    folders = [file.parent for name in FOLDERS for file in (ROOT / name).rglob("__init__.py")]
    assert sorted(SETUPTOOLS["packages"]) == sorted(map(package, folders))
    assert SETUPTOOLS["package-dir"] == {
        name: folder for folder, name in FOLDERS.items() if name != folder
    }


def test_every_file_is_of_a_package_and_every_data_file_is_listed():
    for file in [file for name in FOLDERS for file in (ROOT / name).rglob("*")]:
        if file.is_dir() or "__pycache__" in file.parts:
            continue
        assert package(file.parent) in SETUPTOOLS["packages"], file
        # A page about a folder is for those who read the repository.
        patterns = ["*.py", "README.md", *SETUPTOOLS["package-data"].get(package(file.parent), [])]
        assert any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns), file


def test_what_trains_and_what_saves_is_not_imported():
    """Optax and Orbax cost most, of what those who only quantize and serve do not use."""
    asked = "import json, sys, jaxquant; print(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(subprocess.check_output([sys.executable, "-c", asked], cwd=ROOT)))
    assert "jaxquant.ptq.quantize" in loaded
    unwanted = "optax", "orbax", "tensorstore", "flax", "grain", "matplotlib", "jaxquant_models"
    assert not loaded.intersection(unwanted)


def test_what_is_imported_later_has_a_name():
    assert set(jq._LATER) < set(jq.__all__) <= set(dir(jq))
    for name in jq.__all__:
        assert getattr(jq, name) is not None
    with pytest.raises(AttributeError, match="module 'jaxquant' has no attribute 'nothing'"):
        _ = jq.nothing


@pytest.mark.parametrize("module", ["gguf", "click"])
def test_the_command_without_its_extra_says_what_to_install(module):
    code = f"import sys; sys.modules[{module!r}] = None; "
    want = f"the package {module!r} is not installed; run: pip install 'jaxquant[models]'"
    command = [sys.executable, "-c", code + "from jaxquant_models.cli.entry import main; main()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {want}\n")
    if module == "gguf":
        command[-1] = code + "import jaxquant_models; jaxquant_models.load"
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stderr.endswith(f"ModuleNotFoundError: {want}\n")


# --- the wheel

OUTSIDE = """
import jax, jax.numpy as jnp, numpy as np
import jaxquant as jq, jaxquant_models
from pallas_kernels.cpu import native

params = {"w": jax.random.normal(jax.random.key(0), (64, 32))}
packed = jq.quantize(params, jq.rtn(bits=4, group_size=32))
x = jax.random.normal(jax.random.key(1), (3, 64))
y = jax.jit(jq.quantized(lambda p, x: x @ p["w"]))(packed, x)
np.testing.assert_allclose(y, x @ jq.dequantize(packed)["w"], rtol=1e-4, atol=1e-4)
jaxquant_models.Llama
print(native.shared_object().name)
"""


def run(*command, env=None, cwd=None, status=0):
    """What it prints; PYTHONPATH, which may lead to the repository, is not handed on."""
    env = {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **(env or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def unoptimized_compiler(folder):
    """The compiler's command, without optimization: a third of the time, and the same file."""
    script = folder / "c++"
    script.write_text(f'#!/bin/sh\nexec {" ".join(compiling.compiler())} "$@" -O0\n')
    script.chmod(0o755)
    return str(script)


def build(folder, uv):
    """The wheel, made from the source distribution, which is made from a copy of the sources."""
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    env = {"CXX": unoptimized_compiler(folder)}
    run(uv, "build", "-q", folder / "source", "-o", folder / "dist", env=env)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_in_a_fresh_venv(tmp_path):
    """One test, for the wheel is built once: half a minute of C++, a few seconds of installing."""
    beside = str(Path(sys.executable).parent)
    uv = shutil.which("uv", path=os.pathsep.join([beside, os.environ["PATH"]]))
    assert uv, "uv is missing; pip install -e '.[test]' installs it"
    wheel = build(tmp_path, uv)
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == set(FOLDERS.values())
    sources = {file.name for file in compiling.FOLDER.glob("*.[ch]*")}
    native = "pallas_kernels/cpu/native"
    page = "jaxquant_models/report/page.html"
    for data in ("jaxquant/py.typed", "pallas_kernels/cost/rates.json", page):
        assert data in names
    assert {f"{native}/{name}" for name in sources} <= set(names)
    (kernels,) = (name for name in names if name.endswith(".so"))
    assert kernels == f"{native}/packaged-{compiling.digest()}.so"
    assert not wheel.name.endswith("-any.whl")

    run(uv, "venv", "-q", "-p", sys.executable, tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    outside = {"cwd": tmp_path / "venv", "env": {"XDG_CACHE_HOME": str(tmp_path / "cache")}}
    run(uv, "pip", "install", "-q", "-p", python, wheel)
    said = run(tmp_path / "venv/bin/jaxquant", "--help", status=1, **outside)
    assert said.endswith("is not installed; run: pip install 'jaxquant[models]'\n")
    assert said.count("\n") == 1
    run(uv, "pip", "install", "-q", "-p", python, f"{wheel}[models]")
    assert "No module named 'models'" in run(python, "-c", "import models", status=1, **outside)
    assert Path(kernels).name in run(python, "-c", OUTSIDE, **outside)
    assert not (tmp_path / "cache/jaxquant").exists()  # nothing was compiled there
    for command in ([tmp_path / "venv/bin/jaxquant"], [python, "-m", "jaxquant_models"]):
        assert "quantize" in run(*command, "--help", **outside)
