"""Directories put in place in one step, killed at any point of that, and what is beside them."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from jaxquant import storage
from jaxquant.durable import publish
from jaxquant.durable.claims import LOCK, OURS, claim
from jaxquant.storage import checkpoint

OLD, NEW = ({"w": np.full((3, 4), value, np.float32)} for value in (1, 2))


@pytest.fixture(params=["exchange", "renames"])
def swap(request, monkeypatch):
    """With the file system's exchange, and without."""
    if request.param == "renames":
        monkeypatch.setattr(publish, "_exchanged", lambda a, b: False)
    return request.param


def value(path):
    return checkpoint.load(path)["w"][0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "swap"),
    [
        ("overwrite", "exchange"),
        pytest.param("overwrite", "renames", marks=pytest.mark.thorough),
        ("fresh", "exchange"),
    ],
)
def test_a_save_killed_before_any_operation(tmp_path, how, swap):
    """`tests.support.killed_saves` also checks what is left, and what the next save leaves."""
    command = [sys.executable, "-m", "tests.support.killed_saves", tmp_path, how, swap, "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["killed"] > 5
    assert set(said["seen"]) == {1 if how == "overwrite" else None, 2}


def test_an_overwrite_leaves_the_new_one_and_nothing_else(tmp_path, swap):
    checkpoint.save(tmp_path / "c", OLD)
    checkpoint.save(tmp_path / "c", NEW, overwrite=True)
    assert value(tmp_path / "c") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def killed(tmp_path, *, target, new, old):
    """What a process leaves that is killed in `publish`, by whether each of the three is there."""
    checkpoint.save(tmp_path / "c", OLD)
    checkpoint.save(tmp_path / "n", NEW)
    left = tmp_path / ".c.saving-0123abcd"
    claim(left).close()
    left.mkdir()
    (left / LOCK).write_bytes(OURS)
    if old:
        shutil.copytree(tmp_path / "c", left / "old")
    if new:
        (tmp_path / "n").rename(left / "new")
    else:
        shutil.rmtree(tmp_path / "n")
    if not target:
        shutil.rmtree(tmp_path / "c")
    return left


@pytest.mark.parametrize("asks", [
    lambda path: checkpoint.load(path),
    lambda path: storage.stored_recipe(path),
    lambda path: storage.is_checkpoint(path) or pytest.fail("it is not there"),
    lambda path: storage.check_target(path, overwrite=True),
])  # fmt: skip
def test_a_checkpoint_on_its_way_out_comes_back(tmp_path, asks):
    killed(tmp_path, target=False, new=True, old=True)
    asks(tmp_path / "c")
    assert value(tmp_path / "c") == 1
    checkpoint.save(tmp_path / "c", NEW, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert value(tmp_path / "c") == 2


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_what_is_left_goes_with_the_next_save(tmp_path, new, old):
    left = killed(tmp_path, target=True, new=new, old=old)
    assert value(tmp_path / "c") == 1
    checkpoint.save(tmp_path / "c", NEW, overwrite=True)
    assert not left.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_what_is_at_work_or_not_ours_stays(tmp_path):
    left = killed(tmp_path, target=True, new=True, old=False)
    for name in (
        ".c.saving-aaaaaaaa",
        ".c.0123abcd",
        ".c.old",
        ".c.saving-12",
        ".d.saving-01234567",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("precious")
    (tmp_path / ".c.saving-bbbbbbbb").symlink_to(tmp_path / ".c.old")
    with claim(left):
        checkpoint.save(tmp_path / "c", NEW, overwrite=True)
        assert (left / "new").exists()
    assert len(list(tmp_path.glob("*/thesis.txt"))) == 6
    checkpoint.save(tmp_path / "c", NEW, overwrite=True)
    assert not left.exists()
    assert len(list(tmp_path.glob("*/thesis.txt"))) == 6


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_was_made_meanwhile_stays(tmp_path, monkeypatch, overwrite):
    """Another process writes there while this one does: that is seen at the last moment."""
    digests = checkpoint.digests

    def meanwhile(folder):
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "thesis.txt").write_text("precious")
        return digests(folder)

    monkeypatch.setattr(checkpoint, "digests", meanwhile)
    message = "not a jaxquant checkpoint" if overwrite else "exists and is not an empty directory"
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path / "c", NEW, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["thesis.txt"]


def test_what_was_made_at_the_very_last_moment_stays(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_text("precious")
    (tmp_path / "f").write_text("precious")
    for name, replace in (("c", False), ("f", False), ("f", True)):
        with publish.aside(tmp_path / name) as new:
            new.mkdir()
            with pytest.raises(FileExistsError):
                publish.publish(new, tmp_path / name, replace=replace)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "f"]
    assert (tmp_path / "c" / "thesis.txt").exists()
