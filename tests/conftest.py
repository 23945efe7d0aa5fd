"""Precision, programs, random examples; and options for runs that need no more than a part."""

import gc
from collections import defaultdict
from pathlib import Path

import hypothesis
import jax
import pytest
from jax._src.interpreters import mlir

from pallas_kernels import dispatch, tiled_product

# Scripts, which `tests/test_first_hours.py` runs; to look for doctests would run them too.
collect_ignore = ["first_hours"]


def pytest_configure(config):
    """References are exact; of float32 factors a GPU's default keeps ten bits."""
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_traceback_in_locations_limit", 0)  # pytest's stacks are deep
    # Every shape is compiled for: few of them, and the same ones in every run.
    hypothesis.settings.register_profile(
        "few", max_examples=10, deadline=None, derandomize=True, database=None
    )
    hypothesis.settings.load_profile("few")


def pytest_addoption(parser):
    parser.addoption("--one-case", action="store_true", help="only one case of every test")
    parser.addoption("--share", default="1/1", help="only every N-th test, from the I-th on: I/N")


def pytest_collection_modifyitems(config, items):
    """Of each test another case, so that together they see every format, rounder and method."""
    kept = list(items)
    if config.getoption("--one-case"):
        cases = defaultdict(list)
        for item in items:
            test = getattr(item, "cls", None) or getattr(item, "originalname", item.name)
            cases[item.path, test].append(item)  # a class is one test
        kept = [found[i % len(found)] for i, found in enumerate(cases.values())]
    first, of = share(config.getoption("--share"))
    kept = kept[first - 1 :: of]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


MAPS = Path("/proc/self/maps")
MOST_MAPS = 30_000  # Linux allows a process 65,530, and the programs of a whole suite take more


@pytest.fixture(scope="module", autouse=True)
def programs():
    """What one module has compiled serves the next ones, as long as there is room."""
    yield
    if not MAPS.exists() or MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        gc.unfreeze()
        jax.clear_caches()
    gc.collect()
    gc.freeze()  # programs consist of many Python objects, which every later collection would visit


@pytest.fixture(scope="module", autouse=True)
def mlir_context():
    """Of the time to lower a small program, half goes into an MLIR context: a module shares one."""
    make = mlir.make_ir_context
    context = make()
    mlir.make_ir_context = lambda: context
    yield
    mlir.make_ir_context = make


@pytest.fixture(autouse=True)
def cheap_programs(request):
    """Most of a fast test's time is compiling, and half of that optimizing; slow tests compute.

    Slow tests of tiny models compile much.
    """
    marked = lambda *names: any(request.node.get_closest_marker(name) for name in names)
    slow = marked("model", "kernels") or (marked("slow") and "tiny" not in request.fixturenames)
    before = jax.config.values["jax_disable_most_optimizations"]
    cheap = before or (not slow and jax.default_backend() == "cpu")
    jax.config.update("jax_disable_most_optimizations", cheap)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def tiles_of(monkeypatch):
    """Sets how many weights the references decode at a time; products are the references' own."""

    traced = dispatch._product, dispatch._cotangents

    def set_tile(weights):
        monkeypatch.setattr(tiled_product, "TILE_WEIGHTS", weights)
        [function.clear_cache() for function in traced]

    with dispatch.using("reference"):
        yield set_tile
    [function.clear_cache() for function in traced]


def share(text):
    """(I, N) of "I/N"."""
    first, _, of = text.partition("/")
    if not (first.isdigit() and of.isdigit() and 1 <= int(first) <= int(of)):
        raise pytest.UsageError(f"--share must be I/N with 1 <= I <= N, got {text!r}")
    return int(first), int(of)
