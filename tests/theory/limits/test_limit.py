"""Rows and tables of limits: verdicts, numbers that JSON can hold, names that are found."""

import dataclasses
import json

import numpy as np
import pytest

from jaxquant.theory.limits.limit import Limit, Suite

ROW = Limit("floor", "At least a quarter is wrong.", "theorem", 0.3, 0.25, True, note="Of 8.")


@pytest.mark.parametrize(
    ("kind", "holds", "verdict"),
    [
        ("theorem", True, "holds"),
        ("theorem", False, "violated"),
        ("expectation", None, "undecided"),
        ("expectation", False, "violated"),
        ("survival", True, "survives"),
        ("survival", False, "collapsed"),
        ("survival", None, "undecided"),
        ("description", None, "-"),
    ],
)
def test_verdicts(kind, holds, verdict):
    assert dataclasses.replace(ROW, kind=kind, holds=holds).verdict == verdict


def test_numbers_of_numpy_become_json():
    row = dataclasses.replace(ROW, measured=np.float32(0.5), holds=np.bool_(False))
    found = json.loads(json.dumps(Suite((ROW, dataclasses.replace(row, name="other"))).to_json()))
    assert found[1]["measured"] == 0.5 and found[1]["holds"] is False
    assert found[1]["verdict"] == "violated" and found[0]["note"] == "Of 8."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "must have a name"),
        ({"statement": ""}, "must have a statement"),
        ({"kind": "law"}, "kind must be one of theorem"),
        ({"measured": np.nan}, "measured must be finite"),
        ({"bound": np.inf}, "bound must be finite"),
        ({"seconds": -1.0}, "seconds must be finite"),
        ({"kind": "description"}, "has no verdict"),
    ],
)
def test_bad_rows(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ROW, **change)


def test_a_suite_finds_rows_by_name_and_prints_them():
    suite = Suite((ROW, Limit("range", "How far.", "description", None, None, None, 1.25)))
    assert suite.row("range").seconds == 1.25
    lines = str(suite).splitlines()
    assert lines[1].split() == ["floor", "theorem", "0.3", "0.25", "holds", "0.0"]
    assert lines[2].split() == ["range", "description", "-", "-", "-", "1.2"]
    assert lines[3] == "floor: At least a quarter is wrong. Of 8."
    with pytest.raises(ValueError, match="no check is called 'flor'"):
        suite.row("flor")
    with pytest.raises(ValueError, match="occur twice"):
        Suite((ROW, ROW))
