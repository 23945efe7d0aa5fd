"""The names that a user meets: few, each with one home, none in the way of a module."""

import importlib
import pkgutil
import types

import pytest

import jaxquant as jq
from tests.support.public import ROOMS

MODULES = [m.name for m in pkgutil.walk_packages(jq.__path__, "jaxquant.")]


def test_few_names_come_first():
    assert len(jq.__all__) <= 60
    assert jq.__all__ == sorted(jq.__all__, key=lambda n: (not n.isupper(), n.islower(), n))


@pytest.mark.parametrize("name", MODULES)
def test_no_name_shadows_a_module(name):
    module = importlib.import_module(name)
    parent, _, child = name.rpartition(".")
    assert getattr(importlib.import_module(parent), child) is module


def test_a_module_named_like_a_function_is_a_module():
    import jaxquant.ptq.quantize as module

    assert isinstance(module, types.ModuleType) and module.quantize is jq.quantize


def test_every_name_has_one_home():
    homes = {}
    for room in ROOMS:
        assert isinstance(getattr(jq, room), types.ModuleType)
        for name in getattr(jq, room).__all__:
            assert hasattr(getattr(jq, room), name), f"{room}.{name}"
            homes.setdefault(name, []).append(room)
    assert not {n: h for n, h in homes.items() if len(h) > 1}
    assert not set(homes) & set(jq.__all__)
    assert set(ROOMS) <= set(dir(jq))


def test_every_room_is_tested():
    assert set(ROOMS) == {room.__name__.rpartition(".")[2] for room in jq._ROOMS} | set(
        jq._LATER_ROOMS
    )


def test_an_old_name_says_where_it_is():
    with pytest.raises(AttributeError, match=r"'Integer'; it is jaxquant\.formats\.Integer"):
        jq.Integer  # noqa: B018
    with pytest.raises(AttributeError, match=r"it is jaxquant\.tuning\.Healing"):
        jq.Healing  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'$"):
        jq.nothing  # noqa: B018
