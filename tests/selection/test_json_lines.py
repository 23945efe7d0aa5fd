"""Pools in JSON Lines files: read lazily, every line checked, errors with line numbers."""

import pytest

from jaxquant.selection.json_lines import JsonLines
from jaxquant.selection.zip_selection import zip_select
from tests.support.text_pools import pool_of_texts


@pytest.fixture
def opened(tmp_path):
    def of(data):
        (tmp_path / "pool.jsonl").write_bytes(data)
        return JsonLines(tmp_path / "pool.jsonl")

    return of


def test_lines_are_items(opened):
    with opened(b'\xef\xbb\xbf{"a": "\xc3\xa9"}\r\n\n  \n[1, 2]\n"no line end"') as lines:
        assert list(lines) == lines[:] == [{"a": "é"}, [1, 2], "no line end"]
        assert [lines.number(i) for i in range(3)] == [1, 4, 5]
        assert lines.line(0) == b'{"a": "\xc3\xa9"}' and lines[-1] == "no line end"
        with pytest.raises(IndexError):
            lines[3]


def test_a_file_is_a_pool(opened):
    texts, _ = pool_of_texts(each=20)
    with opened("\n".join(f'"{t}"' for t in texts).encode()) as lines:
        for options in ({"faithful": True}, {"serialize": "text"}):
            options |= {"k1": 20, "k2": 10, "k3": 5}
            found = zip_select(lines, 15 if "faithful" in options else 3000, **options)
            inside = zip_select(texts, 15 if "faithful" in options else 3000, **options)
            assert found.indices.tolist() == inside.indices.tolist()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no items: expected one JSON value per line"),
        (b"\n \n", "holds no items"),
        (b'{"a": 1}\n\n{"a": 1\n', "line 3 is not JSON"),
        (b"{}\n{'a': 1}\n", "line 2 is not JSON"),
        (b'"a"\n"\xff"\n', "line 2 is not UTF-8 text: byte 1 is invalid"),
        (b"[" * 100_000 + b"\n", "line 1 cannot be read: it is nested too deeply"),
    ],
)
def test_bad_files(opened, data, message):
    with pytest.raises(ValueError, match=message):
        opened(data)


def test_what_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ValueError, match="cannot read"):
            JsonLines(path)
