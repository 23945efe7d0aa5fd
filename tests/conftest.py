"""An option for the runs on other versions, which need not repeat every case of every test."""

from collections import defaultdict


def pytest_addoption(parser):
    parser.addoption("--one-case", action="store_true", help="only one case of every test")


def pytest_collection_modifyitems(config, items):
    """Of each test another case, so that together they see every format, rounder and method."""
    if not config.getoption("--one-case"):
        return
    cases = defaultdict(list)
    for item in items:
        cases[item.path, getattr(item, "originalname", item.name)].append(item)
    kept = [found[i % len(found)] for i, found in enumerate(cases.values())]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
