"""Archives: the same bytes back, damage named, memory bounded, and killed runs continued."""

import hashlib
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest

from jaxquant.lossless import Record, Section, archive_format, plane_coding
from jaxquant.lossless.archive_format import CHUNK_HEAD, HEAD, TRAILER
from jaxquant.lossless.archive_read import extract, read_head
from jaxquant.lossless.archive_write import write_archive
from tests.support.archives import archive_of, chunk_spans, in_small_chunks, numbers


@pytest.fixture
def small(tmp_path, monkeypatch):
    """(bytes of a file, its sections, its archive in small chunks)."""
    in_small_chunks(monkeypatch)
    data, sections = numbers()
    return data, sections, archive_of(tmp_path, data, sections)


def restored(folder, archive, **options):
    (folder / "a.jqz").write_bytes(archive)
    extract(folder / "a.jqz", folder / "again", **options)
    return (folder / "again").read_bytes()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("coding", ["rans", "huffman"])
def test_the_same_bytes(tmp_path, monkeypatch, coding, threads):
    in_small_chunks(monkeypatch)
    data, sections = numbers()
    archive = archive_of(tmp_path, data, sections, coding=coding)
    seen = []
    tell = lambda done, total, name: seen.append((done, total, name))
    assert restored(tmp_path, archive, threads=threads, progress=tell) == data
    head = read_head(tmp_path / "a.jqz")
    assert head.sections == tuple(sections) and head.nbytes == len(data)
    assert head.sha256 == hashlib.sha256(data).digest()
    assert len(archive) < 0.8 * len(data)
    assert len(seen) == len(chunk_spans(archive, sections))
    assert seen[-1] == (len(data), len(data), "noise")


def test_what_is_reported_is_all_there_is(tmp_path, monkeypatch):
    in_small_chunks(monkeypatch)
    data, sections = numbers()
    (tmp_path / "f").write_bytes(data)
    done = write_archive(tmp_path / "f", tmp_path / "f.jqz", sections=sections)
    head = len(archive_format.pack_head(sections))
    assert head + sum(done.coded) + TRAILER.size == done.archive
    assert done.archive == (tmp_path / "f.jqz").stat().st_size
    assert [s.numbers for s in done.sections] == [0, 700, 700, 0, 70 * 32, 2000, 0]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 2048, 2049])
@pytest.mark.parametrize("layout", ["", "f4"])
def test_any_size(tmp_path, monkeypatch, size, layout):
    in_small_chunks(monkeypatch)
    data = np.random.default_rng(size).bytes(size)
    sections = [Section("x", size, "F32", Record(layout))]
    assert restored(tmp_path, archive_of(tmp_path, data, sections)) == data
    assert restored(tmp_path, archive_of(tmp_path, data, None)) == data


def test_threads_do_not_change_an_archive(tmp_path, monkeypatch):
    in_small_chunks(monkeypatch)
    data, sections = numbers()
    one = archive_of(tmp_path, data, sections)
    write_archive(tmp_path / "source", tmp_path / "b", sections=sections, threads=4)
    assert (tmp_path / "b").read_bytes() == one


def test_every_flipped_bit_is_seen_and_the_tensor_named(tmp_path, small):
    _, sections, archive = small
    for number, start, end in chunk_spans(archive, sections):
        broken = bytearray(archive)
        broken[(start + CHUNK_HEAD.size + end) // 2] ^= 16
        with pytest.raises(ValueError, match=rf"a\.jqz, section '{sections[number].name}'"):
            restored(tmp_path, broken)


def test_the_digest_of_the_whole_file_is_verified(tmp_path, small):
    _, _, archive = small
    broken = bytearray(archive)
    broken[-1] ^= 1
    with pytest.raises(ValueError, match=r"a\.jqz is damaged.*SHA-256"):
        restored(tmp_path, broken)


@pytest.mark.parametrize("layout", ["f4", "u1"])
def test_chunks_that_change_places_are_seen(tmp_path, monkeypatch, layout):
    """Of one tensor or of two: each is intact by itself."""
    in_small_chunks(monkeypatch)
    data = np.random.default_rng(0).bytes(8192)
    sections = [Section(n, 4096, "x", Record(layout)) for n in "ab"]
    archive = archive_of(tmp_path, data, sections)
    spans = [(start, end) for _, start, end in chunk_spans(archive, sections)]
    for i, j, name in ((0, 1, "a"), (2, 3, "b"), (0, 2, "a"), (1, 3, "a")):
        (a, b), (c, d) = spans[i], spans[j]
        swapped = archive[:a] + archive[c:d] + archive[b:c] + archive[a:b] + archive[d:]
        with pytest.raises(ValueError, match=f"section '{name}'.*checksum is wrong"):
            restored(tmp_path, swapped)


def test_truncated_at_every_byte(tmp_path, small):
    archive = small[2]
    for size in [*range(0, len(archive), 37), len(archive) - 1]:
        with pytest.raises(ValueError, match=r"truncated|damaged|not an archive|claims|wrong"):
            restored(tmp_path, archive[:size])


def test_other_files_and_versions(tmp_path, small):
    archive = small[2]
    with pytest.raises(ValueError, match="not an archive of jaxquant"):
        restored(tmp_path, b"GGUF" + bytes(100))
    newer = archive[:8] + struct.pack("<H", 2) + archive[10:]
    with pytest.raises(ValueError, match="version 2.*install a newer jaxquant"):
        restored(tmp_path, newer)
    with pytest.raises(ValueError, match="already"):
        write_archive(tmp_path / "whole.jqz", tmp_path / "twice")
    with pytest.raises(ValueError, match="follow its last chunk"):
        restored(tmp_path, archive[: -TRAILER.size] + b"more" + archive[-TRAILER.size :])


def hostile(sections, chunks=b"", nbytes=None):
    total = sum(s.nbytes for s in sections) if nbytes is None else nbytes
    return archive_format.pack_head(sections) + chunks + TRAILER.pack(total, bytes(32))


@pytest.mark.parametrize("claimed", [1 << 34, 1 << 50, (1 << 63) - 1])
def test_sizes_that_the_file_does_not_justify(tmp_path, claimed):
    """An archive of 100 bytes is refused before memory is allocated, whatever it claims."""
    sections = [Section("w", claimed, "F32", Record("f4"))]
    plane = plane_coding.CONSTANT.to_bytes(1, "little") + struct.pack("<I", 1) + b"\0"
    tracemalloc.start()
    for size, planes in ((1 << 24, plane * 4), ((1 << 24) + 1, plane * 4), (1 << 31, plane)):
        chunk = CHUNK_HEAD.pack(size, len(planes), 0) + planes
        with pytest.raises(ValueError, match=r"truncated|claims|checksum"):
            restored(tmp_path, hostile(sections, chunk))
    assert tracemalloc.get_traced_memory()[1] < 80 << 20
    tracemalloc.stop()


def test_a_hostile_table(tmp_path, small):
    sections = small[1]

    def with_table(table, size=None):
        size = len(table) if size is None else size
        head = HEAD.pack(archive_format.MAGIC, 1, plane_coding.RAW, size, len(table), 0)[:-4]
        head += struct.pack("<I", zlib.crc32(head + table))
        return head + table + TRAILER.pack(0, bytes(32))

    good = b"".join(map(archive_format._entry, sections[:2]))
    for size in range(1, len(good)):
        with pytest.raises(ValueError, match=r"table of sections|truncated"):
            restored(tmp_path, with_table(good[:size]))
    for table, claimed in ((b"\xff" * 40, None), (good, 1 << 30), (good, 3), (b"", 5)):
        with pytest.raises(ValueError, match="table of sections"):
            restored(tmp_path, with_table(table, claimed))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_killed_compression_goes_on(tmp_path, small, threads):
    """From the last whole chunk, whatever of the archive was written; the result is the same."""
    data, sections, archive = small
    spans = chunk_spans(archive, sections)
    target = tmp_path / "part"
    for size in [0, 5, *(end + more for _, _, end in spans[::3] for more in (-1, 0, 3))]:
        target.write_bytes(archive[:size])
        done = write_archive(tmp_path / "source", target, sections=sections, threads=threads)
        assert target.read_bytes() == archive
        whole = sum(end <= size for _, _, end in spans)
        assert (done.kept > 0) == (whole > 0)
    target.write_bytes(archive)
    assert write_archive(tmp_path / "source", target, sections=sections).kept == len(data)


def test_a_part_of_another_file_is_not_kept(tmp_path, small):
    data, sections, archive = small
    end = chunk_spans(archive, sections)[5][2]
    other = bytearray(data)
    other[len(data) // 3] ^= 1
    want = archive_of(tmp_path, bytes(other), sections)
    (tmp_path / "part").write_bytes(archive[:end])
    write_archive(tmp_path / "source", tmp_path / "part", sections=sections)
    assert (tmp_path / "part").read_bytes() == want
    # Bytes of the part that were damaged since are coded again.
    broken = bytearray(want[:end])
    broken[end - 30] ^= 4
    (tmp_path / "part").write_bytes(broken)
    write_archive(tmp_path / "source", tmp_path / "part", sections=sections)
    assert (tmp_path / "part").read_bytes() == want


def test_a_killed_extraction_goes_on(tmp_path, small):
    data, _, archive = small
    for size in (0, 100, 5000, len(data)):
        broken = bytearray(data[:size] + b"rest" * 2000)
        broken[size // 2] ^= 1
        for begun in (data[:size], broken):
            (tmp_path / "again").write_bytes(begun)
            assert restored(tmp_path, archive) == data


def test_a_source_that_changes(tmp_path):
    (tmp_path / "f").write_bytes(bytes(100))
    for sections in ([Section("x", 99)], [Section("x", 101), Section("y", -1)]):
        with pytest.raises(ValueError, match="section"):
            write_archive(tmp_path / "f", tmp_path / "g", sections=sections)
    with pytest.raises(ValueError, match="coding must be one of rans, huffman"):
        write_archive(tmp_path / "f", tmp_path / "g", coding="zip")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """A tensor of 200 MB, most of it zeros, with two threads; the process starts with NumPy."""
    program = """
import resource, sys
import numpy as np
from jaxquant import lossless
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
values = np.zeros(1 << 20, np.float32)
values[::5] = np.random.default_rng(0).normal(size=len(values[::5]))
with open(sys.argv[1], "wb") as file:
    for _ in range(50):
        file.write(values.tobytes())
size, before = 50 << 22, peak()
parts = [lossless.Section("w", size, "F32", lossless.Record("f4"))]
lossless.compress_file(sys.argv[1], sys.argv[1] + ".jqz", sections=parts, threads=2)
lossless.decompress_file(sys.argv[1] + ".jqz", sys.argv[1] + ".again", threads=2)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "f")], capture_output=True, check=True
    )
    assert int(done.stdout) < 130
    with (tmp_path / "f").open("rb") as a, (tmp_path / "f.again").open("rb") as b:
        assert (
            hashlib.file_digest(a, "sha256").digest() == hashlib.file_digest(b, "sha256").digest()
        )
