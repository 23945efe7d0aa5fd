"""Rules of the house that a program can check."""

import ast
import importlib.metadata
from pathlib import Path

import pytest

import jaxquant as jq

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


def test_public_names_are_documented():
    for name in jq.__all__:
        assert getattr(jq, name).__doc__ or name in ("KEEP", "METHODS"), name


def test_versions_agree():
    newest = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1].split()[0]
    assert newest == jq.__version__ == importlib.metadata.version("jaxquant")
