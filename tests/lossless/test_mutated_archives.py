"""Two thousand mutated archives: the same bytes come back, or a ValueError of one line does."""

import os
import random
import resource

import pytest

from jaxquant.lossless.archive_read import extract
from tests.fuzz.mutations import BLIND, of_archive
from tests.support.archives import archive_of, in_small_chunks, numbers

COUNT = 2000
MEMORY = 80 << 20  # bytes: a few planes that claim to be as long as a chunk may be


def peak():
    """Most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("coding", ["rans", "huffman"])
def test_mutated_archives(tmp_path, monkeypatch, coding):
    in_small_chunks(monkeypatch)
    data, sections = numbers()
    archive = archive_of(tmp_path, data, sections, coding=coding)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    rng, same, errors = random.Random(0), 0, []
    before = peak()
    for _ in range(COUNT // 2):
        broken = rng.choice([*BLIND, *[of_archive] * 5])(rng, archive)
        (tmp_path / "a.jqz").write_bytes(broken)
        (tmp_path / "again").unlink(missing_ok=True)
        try:
            extract(tmp_path / "a.jqz", tmp_path / "again", threads=1)
        except ValueError as error:
            errors.append(error)
        else:
            assert (tmp_path / "again").read_bytes() == data
            same += 1
    assert peak() - before < MEMORY
    assert len(errors) > 0.8 * COUNT / 2 and same > 0
    assert {type(error) for error in errors} == {ValueError}
    for text in map(str, errors):
        assert 0 < len(text) < 500 + len(str(tmp_path)) and "\n" not in text
