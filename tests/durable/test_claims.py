"""Directories that are held: by one process, until it ends, and never somebody else's files."""

import os
import subprocess
import sys
import threading

import pytest

from jaxquant.durable import claims
from jaxquant.durable.claims import Taken, claim
from jaxquant.durable.store import Folder

HOLDS = """
import runpy, sys, time
held = runpy.run_path(sys.argv[1])["claim"](sys.argv[2])
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process, at work in tmp_path / "p"."""
    command = [sys.executable, "-c", HOLDS, claims.__file__, str(tmp_path / "p")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_of_two_processes_one_holds_it_until_it_is_gone(holder, tmp_path):
    path = tmp_path / "p"
    for again in (lambda: claim(path), lambda: Folder(path, {"seed": 1})):
        with pytest.raises(
            Taken, match=rf"is in use by process {holder.pid} on .*, since .*: wait"
        ):
            again()
    holder.kill()  # -9: it cannot say goodbye
    holder.wait()
    with Folder(path, {"seed": 1}) as kept:
        kept["a"] = {"x": 1}
    assert len(Folder(path, {"seed": 1})) == 1


def test_within_a_process_parts_of_one_run_share_it(tmp_path):
    with claim(tmp_path / "p") as outer, Folder(tmp_path / "p", {"seed": 1}) as one:
        one["a"] = {"x": 1}
        (tmp_path / "link").symlink_to(tmp_path / "p")
        with Folder(tmp_path / "link", {"seed": 1}) as other:
            assert list(other) == ["a"]
        with pytest.raises(Taken, match="in use by another run of this process"):
            Folder(tmp_path / "p", {"seed": 2})
        with pytest.raises(Taken, match=f"in use by process {os.getpid()}"):
            claim(outer.path, share=False)
    assert len(Folder(tmp_path / "p", {"seed": 2})) == 0


def test_a_directory_with_nothing_in_it_goes(tmp_path):
    with claim(tmp_path / "new" / "deep" / "p"):
        assert (tmp_path / "new" / "deep" / "p").is_dir()
    with Folder(tmp_path / "p", {"seed": 1}):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    with claim(tmp_path / "kept" / "p"):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]


def test_what_a_killed_process_leaves_of_a_removal_is_ours(tmp_path):
    path = tmp_path / "p"
    kept = claim(path)
    lock = (path / claims.LOCK).read_bytes()
    kept.close()
    for left in (None, b"", lock):
        path.mkdir()
        if left is not None:
            (path / claims.LOCK).write_bytes(left)
        claim(path).close()
        assert not path.exists()


@pytest.mark.parametrize("name", ["thesis.txt", "run.json", "0123456789abcdef01234567.bin", "lock"])
def test_files_of_others_are_not_touched(tmp_path, name):
    path = tmp_path / "p"
    path.mkdir()
    (path / name).write_text("precious")
    for work in (lambda: claim(path), lambda: Folder(path, {})):
        with pytest.raises(ValueError, match="did not write the files in it; nothing in it"):
            work()
    assert [(p.name, p.read_text()) for p in path.iterdir()] == [(name, "precious")]


def test_a_file_in_its_place(tmp_path):
    (tmp_path / "p").write_text("precious")
    with pytest.raises(ValueError, match="it is not a directory"):
        claim(tmp_path / "p")
    assert (tmp_path / "p").read_text() == "precious"


def test_one_of_many_threads_holds_it(tmp_path):
    """Made and removed all the time, it is never held twice, and never left."""
    inside, most = [], []

    def work():
        for _ in range(40):
            try:
                with claim(tmp_path / "p", share=False):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except Taken:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert list(tmp_path.iterdir()) == []
