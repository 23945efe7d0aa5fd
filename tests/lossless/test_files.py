"""Files compressed and restored in one step, and continued after a kill."""

import os
import resource

import numpy as np
import pytest

from jaxquant import lossless
from jaxquant.lossless import files
from tests.support.archives import in_small_chunks, numbers
from tests.support.stopped import KilledError


@pytest.fixture
def source(tmp_path, monkeypatch):
    in_small_chunks(monkeypatch)
    (tmp_path / "w.bin").write_bytes(numbers()[0])
    return tmp_path / "w.bin"


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def killing(after):
    """A progress that ends the run after so many chunks."""

    def tell(done, total, name):
        nonlocal after
        after -= 1
        if after < 0:
            raise KilledError

    return tell


def test_there_and_back(source):
    folder, sections = source.parent, numbers()[1]
    done = lossless.compress_file(source, folder / "w.jqz", sections=sections)
    assert done.nbytes == source.stat().st_size and done.kept == 0
    head = lossless.decompress_file(folder / "w.jqz", folder / "again")
    assert (folder / "again").read_bytes() == source.read_bytes()
    assert head.sha256.hex() == done.sha256
    assert names(folder) == ["again", "w.bin", "w.jqz"]


def test_a_killed_run_goes_on(source):
    folder, sections = source.parent, numbers()[1]
    lossless.compress_file(source, folder / "whole", sections=sections)
    with pytest.raises(KilledError):
        lossless.compress_file(source, folder / "w.jqz", sections=sections, progress=killing(5))
    assert names(folder) == ["w.bin", "w.jqz.partial", "whole"]
    done = lossless.compress_file(source, folder / "w.jqz", sections=sections)
    assert 0 < done.kept < done.nbytes
    assert (folder / "w.jqz").read_bytes() == (folder / "whole").read_bytes()
    with pytest.raises(KilledError):
        lossless.decompress_file(folder / "w.jqz", folder / "again", progress=killing(5))
    assert not (folder / "again").exists()
    lossless.decompress_file(folder / "w.jqz", folder / "again")
    assert (folder / "again").read_bytes() == source.read_bytes()
    assert names(folder) == ["again", "w.bin", "w.jqz", "whole"]


def test_a_part_in_another_coding_is_not_kept(source):
    folder, sections = source.parent, numbers()[1]
    with pytest.raises(KilledError):
        lossless.compress_file(source, folder / "w.jqz", sections=sections, progress=killing(5))
    done = lossless.compress_file(source, folder / "w.jqz", sections=sections, coding="huffman")
    assert done.kept == 0


def test_what_is_refused(source, tmp_path):
    (tmp_path / "there").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    for out, message in (("there", "exists"), ("folder", "is a directory")):
        with pytest.raises(ValueError, match=message):
            lossless.compress_file(source, tmp_path / out)
    with pytest.raises(ValueError, match="is the file that is read"):
        lossless.compress_file(source, source, overwrite=True)
    assert (tmp_path / "there").read_bytes() == b"mine"
    with pytest.raises(ValueError, match="not an archive"):
        lossless.decompress_file(source, tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        lossless.compress_file(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ValueError, match="threads must be 1 or more"):
        lossless.compress_file(source, tmp_path / "out", threads=0)
    lossless.compress_file(source, tmp_path / "there", overwrite=True)
    lossless.decompress_file(tmp_path / "there", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == source.read_bytes()


def test_a_damaged_archive_leaves_no_output(source, tmp_path):
    lossless.compress_file(source, tmp_path / "w.jqz")
    data = bytearray((tmp_path / "w.jqz").read_bytes())
    data[-1] ^= 1
    (tmp_path / "w.jqz").write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        lossless.decompress_file(tmp_path / "w.jqz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk(tmp_path):
    """The error names the file; with room again, the same call goes on."""
    (tmp_path / "w").write_bytes(np.random.default_rng(0).bytes(9 << 20))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, hard))
        with pytest.raises(
            OSError, match=r"could not complete .*w\.jqz\.partial.*: File too large"
        ):
            lossless.compress_file(tmp_path / "w", tmp_path / "w.jqz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert lossless.compress_file(tmp_path / "w", tmp_path / "w.jqz").kept == 1 << 22


def test_room_is_checked_before_a_byte_is_written(source, tmp_path, monkeypatch):
    lossless.compress_file(source, tmp_path / "w.jqz")
    usage = files.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"needs \d+ more bytes, but 1000 are free"):
        lossless.decompress_file(tmp_path / "w.jqz", tmp_path / "out")
    assert not os.path.exists(tmp_path / "out")
