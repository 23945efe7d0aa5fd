"""A small file of several tensors, its sections, and archives of it in small chunks."""

import numpy as np

from jaxquant.lossless import Record, Section, archive_format
from jaxquant.lossless.archive_write import write_archive

SMALL = 2048  # bytes of a chunk


def numbers():
    """(bytes of a file, its sections): text, floats, blocks, an empty tensor, an odd rest."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=700).astype(np.float32)
    bf16 = (normal.view(np.uint32) >> 16).astype(np.uint16)
    blocks = rng.integers(0, 256, (70, 20), np.uint8)
    blocks[:, 1] = 42
    parts = [
        ("header", "", Record(), b'{"name": "value", "other": [1, 2, 3]}' * 40),
        ("a", "F32", Record("f4"), normal.tobytes()),
        ("b", "BF16", Record("f2"), bf16.tobytes() + b"\7"),
        ("nothing", "F32", Record("f4"), b""),
        ("q", "Q4_1", Record("2u2 16u1", 32), blocks.tobytes()),
        ("zeros", "F16", Record("u2"), bytes(4000)),
        ("noise", "", Record(), rng.bytes(1500)),
    ]
    sections = [Section(name, len(data), dtype, record) for name, dtype, record, data in parts]
    return b"".join(data for *_, data in parts), sections


def in_small_chunks(monkeypatch):
    monkeypatch.setattr(archive_format, "CHUNK", SMALL)


def archive_of(folder, data, sections, **options):
    """The archive of a file in a folder, as bytes."""
    (folder / "source").write_bytes(data)
    write_archive(folder / "source", folder / "whole.jqz", sections=sections, threads=1, **options)
    return (folder / "whole.jqz").read_bytes()


def chunk_spans(archive, sections):
    """(section, first byte, byte after the last) of every chunk of an archive."""
    _, _, _, _, coded, _ = archive_format.HEAD.unpack_from(archive)
    found, at = [], archive_format.HEAD.size + coded
    for number, section in enumerate(sections):
        left = section.nbytes
        while left:
            nbytes, size, _ = archive_format.CHUNK_HEAD.unpack_from(archive, at)
            found.append((number, at, at + archive_format.CHUNK_HEAD.size + size))
            left, at = left - nbytes, found[-1][2]
    return found
