"""Checkpoints: every format back to the bit; damage and newer versions said in a line."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import checkpoint

from .test_dispatch import draw
from .test_formats import FORMATS

RECIPE = jq.Recipe([("a/w", jq.rtn(bits=3, group_size=16)), ("*", jq.KEEP)])


@pytest.fixture
def saved(tmp_path):
    params = jq.quantize({"a": {"w": draw(48, 32)}, "b": jnp.ones(3)}, RECIPE)
    checkpoint.save(tmp_path / "c", params, recipe=RECIPE, metadata={"name": "x"})
    return tmp_path / "c", params


@pytest.mark.slow
def test_every_format_comes_back_to_the_bit(tmp_path):
    tree = {
        str(i): jq.quantize_array(draw(48, 32), jq.Method("m", jq.rtn().rounder, f))
        for i, f in enumerate(FORMATS)
    }
    tree["plain"] = {
        d: draw(4, 3).astype(d) for d in ("float32", "float16", "bfloat16", "int32", "int8")
    }
    tree["scalar"] = jnp.float32(2)
    checkpoint.save(tmp_path / "c", tree)
    back = checkpoint.load(tmp_path / "c").params
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_it_describes_itself(saved):
    path, params = saved
    back = checkpoint.load(path)
    assert back.recipe == RECIPE
    assert back.metadata == {"name": "x"}
    assert back.params["a"]["w"].format == params["a"]["w"].format
    assert back.params["a"]["w"].method == "rtn"


def test_ternary_codes_take_a_fifth_of_a_byte_on_disk(tmp_path):
    w = jq.quantize_array(draw(100, 32), jq.ternary(group_size=20))
    checkpoint.save(tmp_path / "c", {"w": w})
    kept = json.loads((tmp_path / "c" / checkpoint.DESCRIPTION).read_text())["arrays"]["w:codes"]
    assert kept == {"shape": [20, 32], "dtype": "uint8"}
    back = checkpoint.load(tmp_path / "c").params["w"]
    np.testing.assert_array_equal(back.data["codes"], w.data["codes"])


def test_taken_places_are_refused(saved):
    path, params = saved
    with pytest.raises(ValueError, match="exists and is not empty"):
        checkpoint.save(path, params)
    checkpoint.save(path, params, overwrite=True)
    other = path.parent / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not a jaxquant checkpoint; it will not be overwritten"):
        checkpoint.save(other, params, overwrite=True)
    with pytest.raises(ValueError, match="holds nested dicts"):
        checkpoint.save(path.parent / "n", [jnp.ones(3)])
    assert sorted(p.name for p in path.parent.iterdir()) == ["c", "mine"]


def test_damage_is_named(saved):
    path, _ = saved

    def broken(change):
        copy = path.parent / "broken"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(path, copy)
        change(copy)
        with pytest.raises(ValueError, match=r"damaged|newer|not a jaxquant|version") as caught:
            checkpoint.load(copy)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def edit(**changes):
        def change(copy):
            file = copy / checkpoint.DESCRIPTION
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))

        return change

    assert "reads up to 1" in broken(edit(version=99))
    assert "damaged" in broken(edit(leaves=None, arrays={"a": {"shape": [1], "dtype": "int8"}}))
    for change in ({"recipe": None}, {"metadata": {}}, {"leaves": []}):
        assert "differs from what was saved" in broken(edit(**change))

    def lacking(copy):
        file = copy / checkpoint.DESCRIPTION
        value = json.loads(file.read_text())
        del value["leaves"], value["sha256"]
        file.write_text(json.dumps(value | {"sha256": checkpoint._sha256_of(value)}))

    assert "it lacks leaves" in broken(lacking)
    assert "not a jaxquant" in broken(lambda c: (c / checkpoint.DESCRIPTION).unlink())
    assert "damaged" in broken(lambda c: (c / checkpoint.DESCRIPTION).write_text('{"version'))
    assert "damaged" in broken(lambda c: shutil.rmtree(c / checkpoint.ARRAYS))

    def truncate(copy):
        for f in (copy / checkpoint.ARRAYS).rglob("*"):
            if f.is_file():
                f.write_bytes(f.read_bytes()[: f.stat().st_size // 2])

    assert "differs from what was saved" in broken(truncate)
    manifest = "manifest.ocdbt"
    assert f"{manifest} is missing" in broken(lambda c: (c / "arrays" / manifest).unlink())


def test_folders_made_on_the_way_go_with_a_failed_write(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    (tmp_path / "old").mkdir()
    monkeypatch.setattr(checkpoint.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path / "old" / "new" / "deep" / "c", {"a": jnp.ones(2)})
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    checkpoint.save(tmp_path / "link", {"a": jnp.ones(2)})
    assert (tmp_path / "link").is_symlink()
    assert checkpoint.is_checkpoint(tmp_path / "real")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_a_failed_write_leaves_nothing(saved, monkeypatch):
    path, params = saved

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint.os, "replace", full)
    with pytest.raises(OSError, match="could not write .*No space left"):
        checkpoint.save(path.parent / "d", params)
    assert [p.name for p in path.parent.iterdir()] == ["c"]


def test_a_failed_overwrite_keeps_the_old_one(saved, monkeypatch):
    path, params = saved
    replace = checkpoint.os.replace

    def full(source, target):
        if target == path:
            raise OSError("No space left on device")
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"other": jnp.ones(2)}, overwrite=True)
    assert [p.name for p in path.parent.iterdir()] == ["c"]
    np.testing.assert_array_equal(checkpoint.load(path).params["b"], params["b"])


def test_an_interrupted_write_leaves_nothing(saved, monkeypatch):
    path, params = saved

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_digests", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, params, overwrite=True)
    assert [p.name for p in path.parent.iterdir()] == ["c"]
    monkeypatch.undo()
    assert checkpoint.load(path).recipe == RECIPE


def test_what_cannot_be_stored_is_said_before_writing(tmp_path):
    with pytest.raises(ValueError, match="'a' is empty"):
        checkpoint.save(tmp_path / "c", {"a": jnp.zeros((0, 3))})
    with pytest.raises(ValueError, match="no arrays"):
        checkpoint.save(tmp_path / "c", {})
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="not a writable directory"):
        checkpoint.check_target(tmp_path / "file" / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_others_may_read_it(saved):
    path, _ = saved
    ordinary = path.parent / "ordinary"
    ordinary.mkdir()
    assert path.stat().st_mode == ordinary.stat().st_mode
