"""`jaxquant compress` and `decompress`: the same bytes, resumed runs, one line for bad input."""

import hashlib
import json
import os
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.lossless import archive_format
from jaxquant.storage import checkpoint
from jaxquant_models.cli.commands import main
from jaxquant_models.readers import registry
from jaxquant_models.readers.packages import packaged_file
from jaxquant_models.runs import archiving
from tests.support.archives import SMALL
from tests.support.command import fails
from tests.support.stopped import KilledError
from tests.support.tiny_llama import BASE, random_tensors, shard, write_folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A folder of Hugging Face with two files of weights, and a subfolder."""
    folder = tmp_path_factory.mktemp("compress") / "model"
    tensors = random_tensors(BASE)
    shard(write_folder(folder, BASE, tensors), tensors)
    (folder / "empty").write_bytes(b"")
    (folder / "nested" / "none").mkdir(parents=True)
    (folder / "nested" / "notes.txt").write_text("a note, and again a note. " * 99)
    return folder


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def test_a_file(sharded, run, tmp_path):
    file = next(sharded.glob("*.safetensors"))
    status, text, err = run("compress", file, "--out", tmp_path / "a.jqz", "--json")
    assert status == 0 and "error" not in err
    report = json.loads(text)
    assert report["bytes"] == file.stat().st_size
    assert report["archive_bytes"] == (tmp_path / "a.jqz").stat().st_size < report["bytes"]
    assert report["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    floats = [row for row in report["sections"] if row["dtype"] == "F32"]
    assert sum(row["numbers"] for row in floats) > 1000
    assert all(0 < row["bits_per_number"] < 40 for row in floats)
    status, text, _ = run("decompress", tmp_path / "a.jqz", "--out", tmp_path / "b", "--json")
    assert status == 0 and json.loads(text)["sha256"] == report["sha256"]
    assert (tmp_path / "b").read_bytes() == file.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.jqz", "b"]


def test_a_sharded_folder(sharded, run, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxquant_models.cli.compress.MOST_ROWS", 10)
    status, text, _ = run("compress", sharded, "--out", tmp_path / "a", "--coding", "huffman")
    assert status == 0 and "nested/notes.txt" in text and "files: 7" in text
    assert "layers.*" in text and "layers.0" not in text  # many tensors are grouped
    assert set(contents(tmp_path / "a")) == {
        name if data is None else f"{name}.jqz" for name, data in contents(sharded).items()
    }
    assert run("decompress", tmp_path / "a", "--out", tmp_path / "b")[0] == 0
    assert contents(tmp_path / "b") == contents(sharded)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_checkpoint(run, tmp_path):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)
    method = jq.rtn(bits=4)
    params = {"kernel": jq.quantize_array(w, method), "bias": jnp.arange(3.0)}
    checkpoint.save(tmp_path / "c", params, recipe=jq.Recipe([("*", method)]))
    assert run("compress", tmp_path / "c", "--out", tmp_path / "a")[0] == 0
    assert run("decompress", tmp_path / "a", "--out", tmp_path / "b")[0] == 0
    assert contents(tmp_path / "b") == contents(tmp_path / "c")


def stopping(monkeypatch, name, after):
    """Have the progress end a run after so many chunks."""
    work = getattr(archiving, name)

    def stopped(*args):
        left = after

        def tell(done, section):
            nonlocal left
            left -= 1
            if left < 0:
                raise KilledError

        return work(*args[:-1], tell)

    monkeypatch.setattr(archiving, name, stopped)


@pytest.mark.parametrize("after", [0, 5, 30])
def test_a_killed_run_goes_on(sharded, run, tmp_path, monkeypatch, after):
    monkeypatch.setattr(archive_format, "CHUNK", SMALL)
    assert run("compress", sharded, "--out", tmp_path / "whole")[0] == 0
    for command, source, out in (
        ("compress", sharded, tmp_path / "a"),
        ("decompress", tmp_path / "whole", tmp_path / "b"),
    ):
        with monkeypatch.context() as patch:
            stopping(patch, command, after)
            with pytest.raises(KilledError):
                main([command, str(source), "--out", str(out)])
        assert not out.exists()
        status, _, err = run(command, source, "--out", out)
        assert status == 0 and ("continuing from" in err)
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")
    assert contents(tmp_path / "b") == contents(sharded)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "whole"]


def test_what_is_replaced(sharded, run, tmp_path):
    file = next(sharded.glob("*.safetensors"))
    one = ("compress", file, "--out", tmp_path / "a.jqz")
    assert run(*one)[0] == 0
    fails(run(*one), 2, "exists; give --overwrite to replace it")
    assert run(*one, "--overwrite")[0] == 0
    many = ("compress", sharded, "--out", tmp_path / "a")
    assert run(*many)[0] == 0
    fails(run(*many), 2, "exists; give --overwrite to replace it")
    assert run(*many, "--overwrite")[0] == 0
    (tmp_path / "a" / "mine.txt").write_text("mine")
    fails(run(*many, "--overwrite"), 2, "has files that are not archives, and is not touched")
    fails(run("decompress", tmp_path / "a", "--out", tmp_path / "b"), 2, "mine.txt is not an arch")
    (tmp_path / "a" / "mine.txt").unlink()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("mine")
    back = ("decompress", tmp_path / "a", "--out", tmp_path / "b")
    fails(run(*back), 2, "is not touched")
    fails(run(*back, "--overwrite"), 2, "--overwrite replaces a file, never a folder")
    assert contents(tmp_path / "b") == {"mine.txt": b"mine"}


def test_links(sharded, run, tmp_path):
    folder = tmp_path / "m"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.json").write_text('{"a": 1}')
    (folder / "sub" / "b.json").symlink_to("../a.json")
    assert run("compress", folder, "--out", tmp_path / "a")[0] == 0
    assert run("decompress", tmp_path / "a", "--out", tmp_path / "b")[0] == 0
    assert contents(tmp_path / "b") == contents(folder)
    for target, message in (
        (sharded / "config.json", "symbolic link to a file outside of the folder"),
        (tmp_path / "none", "symbolic link to nothing"),
        (folder / "sub", "symbolic link to a folder"),
    ):
        (folder / "link").symlink_to(target)
        fails(run("compress", folder, "--out", tmp_path / "c"), 2, message)
        (folder / "link").unlink()
    os.mkfifo(folder / "pipe")
    fails(run("compress", folder, "--out", tmp_path / "c"), 2, "neither a file nor a folder")
    fails(run("compress", folder / "pipe", "--out", tmp_path / "c"), 2, "neither a file nor")


def test_an_archive_cannot_name_a_path(run, tmp_path):
    """Files of a folder are named by the archives that lie there, never by what is in them."""
    (tmp_path / "a").mkdir()
    (tmp_path / "f").write_bytes(b"text")
    assert run("compress", tmp_path / "f", "--out", tmp_path / "a" / "...jqz")[0] == 0
    fails(run("decompress", tmp_path / "a", "--out", tmp_path / "b"), 2, "has no name")


def test_bad_input(sharded, run, tmp_path):
    (tmp_path / "text").write_text("not an archive")
    assert run("compress", tmp_path / "text", "--out", tmp_path / "a.jqz")[0] == 0
    data = (tmp_path / "a.jqz").read_bytes()
    broken = tmp_path / "broken"
    out = ("--out", tmp_path / "b")
    for command, status, message in (
        (("compress", tmp_path / "none", *out), 2, "there is no file"),
        (("compress", "smollm2", *out), 2, "smollm2-135m"),
        (("compress", tmp_path / "a.jqz", *out), 1, "is an archive of jaxquant already"),
        (("compress", tmp_path / "text", "--out", tmp_path / "text"), 2, "which is read"),
        (("compress", sharded, "--out", sharded / "in"), 2, "must be neither inside"),
        (("compress", tmp_path / "text", *out, "--coding", "zip"), 2, "zip"),
        (("compress", tmp_path / "text", *out, "--threads", 0), 2, "threads"),
        (("decompress", tmp_path / "none", *out), 2, "no archive"),
        (("decompress", tmp_path / "text", *out), 2, "is not an archive of jaxquant"),
    ):
        fails(run(*command), status, message)
    for wrong, status, message in (
        (data[:-5], 2, "truncated"),
        (data[:8] + struct.pack("<H", 9) + data[10:], 2, "install a newer jaxquant"),
        (data[:-1] + bytes([data[-1] ^ 1]), 1, "SHA-256"),
    ):
        broken.write_bytes(wrong)
        fails(run("decompress", broken, *out), status, message)
    assert not (tmp_path / "b").exists()


@pytest.mark.model
def test_smollm2(tmp_path):
    """The wheel's file: the bytes, the bits of its nibbles, and the memory of two processes."""
    source = packaged_file(registry.NAMED["smollm2-135m"])
    program = """
import sys
from pathlib import Path
from jaxquant_models.cli.commands import main
for command in sys.argv[1:]:
    try:
        main(command.split())
    except SystemExit as stop:
        if stop.code:
            raise
status = Path("/proc/self/status").read_text()
print(status.split("VmHWM:")[1].split()[0])
"""
    commands = (f"compress smollm2-135m --out {tmp_path}/a.jqz --json",
                f"decompress {tmp_path}/a.jqz --out {tmp_path}/b --json")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program, *commands], capture_output=True, check=True
    )
    *reports, peak = map(json.loads, done.stdout.splitlines())
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert [report["sha256"] for report in reports] == [digest] * 2
    assert hashlib.sha256((tmp_path / "b").read_bytes()).hexdigest() == digest
    first = reports[0]
    assert first["archive_bytes"] < 0.9 * first["bytes"]
    rows = [row for row in first["sections"] if row["dtype"] == "Q4_1"]
    # A block of 32 numbers has 5 bits each: 4 of its nibbles, 1 of its two scales.
    assert sum(8 * r["coded_bytes"] for r in rows) / sum(r["numbers"] for r in rows) < 4.45
    assert 1024 * peak < 500e6 + max(row["bytes"] for row in first["sections"])


def test_nothing_is_left_of_a_file_that_is_gone(sharded, run, tmp_path):
    """A run that failed at a file, which is then removed, leaves no half of it behind."""
    archives, out = tmp_path / "archives", tmp_path / "out"
    assert run("compress", sharded, "--out", archives)[0] == 0
    damaged = next(archives.glob("*.safetensors.jqz"))
    data = bytearray(damaged.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    damaged.write_bytes(data)
    assert run("decompress", archives, "--out", out)[0] != 0
    damaged.unlink()
    assert run("decompress", archives, "--out", out)[0] == 0
    assert not (out / damaged.name.removesuffix(".jqz")).exists()


def test_names_are_no_markup(run, tmp_path):
    folder = tmp_path / "a[red]"
    folder.mkdir()
    (folder / "x[b].txt").write_text("text " * 99)
    status, text, _ = run("compress", folder, "--out", tmp_path / "out")
    assert status == 0 and "x[b].txt" in text
