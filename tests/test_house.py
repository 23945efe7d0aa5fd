"""Rules of the house that a program can check."""

import ast
import importlib.metadata
import re
from importlib import import_module
from pathlib import Path

import pytest

import jaxquant as jq
from tests.support.public import NAMES

ROOT = Path(__file__).parents[1]
FILES = [
    f for d in ("jaxquant", "pallas_kernels", "models") for f in sorted((ROOT / d).rglob("*.py"))
]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_file(file):
    text = file.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 400, "split it where a name exists"
    assert file.name != "utils.py", "name it by what it is about"
    assert ast.get_docstring(tree), "say at the top what the file is for"
    asserts = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Assert)]
    assert not asserts, f"raise ValueError instead of assert, lines {asserts}"
    inner = [
        n.lineno
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef)
        for n in ast.walk(f)
        if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    assert not inner, f"import at the top, lines {inner}"


TESTS = sorted((ROOT / "tests").rglob("*.py"))


def test_tests_import_no_test_module():
    """What several tests share lies in tests/support."""
    found = re.compile(r"^from tests\S* import test_|^from tests\S*\.test_\w+ import", re.M)
    wrong = [str(f.relative_to(ROOT)) for f in TESTS if found.search(f.read_text())]
    assert not wrong, wrong


def test_tests_lie_where_the_source_does():
    """Beside them only what no folder of the source is about: compilers, devices, pages, speed."""
    folders = {f.parent.relative_to(ROOT / "tests") for f in TESTS}
    source = {f.parent.relative_to(ROOT) for f in FILES}
    source |= {f.relative_to("jaxquant") for f in source if f.parts[0] == "jaxquant"}
    # A folder pallas_kernels in tests would be imported instead of the package, from there.
    source |= {
        "kernels" / f.relative_to("pallas_kernels") for f in source if "pallas_kernels" in f.parts
    }
    source |= {
        Path(d)
        for d in ("aot", "benchmarks", "device", "documents", "first_hours", "fuzz", "support")
    }
    assert folders <= source, sorted(map(str, folders - source))


def module_name(file):
    parts = file.relative_to(ROOT).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return re.sub("^models", "jaxquant_models", name)


MODULES = [module_name(f) for f in FILES]
POINTER = re.compile(r"`((?:[a-z_]\w*\.)+\w+)[`(]")
# Whose names are not ours to check; `config.n_layers` and the like speak of a value.
FOREIGN = {"jax", "jnp", "lax", "nn", "np", "eqx", "equinox", "optax", "quax", "pltpu", "gguf"}
FOREIGN |= {"nnx", "config", "form", "tokenizer", "jq", "tests"}


def points_to_something(name):
    """Whether a name of a docstring is a module of ours, or something in one."""
    known = [m for m in MODULES if f".{m}".endswith(f".{name}")]
    home, _, attribute = name.rpartition(".")
    inside = [m for m in MODULES if f".{m}".endswith(f".{home}")]
    return bool(known) or any(hasattr(import_module(m), attribute) for m in inside)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_what_docstrings_point_to_is_there(file):
    named = {n for n in POINTER.findall(file.read_text()) if n.split(".")[0] not in FOREIGN}
    files = {n for n in named if (ROOT / n).suffix in (".json", ".py", ".toml")}
    wrong = sorted(n for n in named - files if not points_to_something(n))
    assert not wrong, f"moved or renamed: {wrong}"


def test_a_docstring_that_points_to_nothing_is_seen():
    assert points_to_something("durable.store.Folder") and points_to_something("jaxquant.quantize")
    assert not points_to_something("resume.Folder") and not points_to_something("thaw.unit")


def test_public_names_are_documented():
    for name, value in NAMES.items():
        assert value.__doc__ or name in ("KEEP", "METHODS"), name


def test_versions_agree():
    newest = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1].split()[0]
    assert newest == jq.__version__ == importlib.metadata.version("jaxquant")
