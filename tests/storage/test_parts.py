"""Checkpoints whose stacks of layers were written a layer at a time."""

import dataclasses
import os
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import storage
from jaxquant.storage.checkpoint import load, save
from jaxquant.storage.parts import _Filling
from tests.support.arrays import draw

L = 3


@pytest.fixture(scope="module")
def params():
    tree = {
        "layers": {"a": draw(L, 64, 32), "b": draw(L, 64, 32, seed=1), "norm": draw(L, 64)},
        "head": draw(64, 8),
    }
    rotated = dataclasses.replace(jq.rtn(group_size=32), input=jq.transforms.Rotation())
    rules = jq.Recipe([("layers/[ab]", rotated), ("*", jq.KEEP)])
    use = lambda p, x: (x @ p["layers"]["a"], x @ p["layers"]["b"], p["layers"]["norm"], p["head"])
    return jq.quantize(tree, rules, jq.sites(use, tree, jnp.ones((L, 2, 64))))


def cut(tree, i):
    return jax.tree.map(lambda a: a[i : i + 1], tree)


@pytest.fixture
def parts(params, tmp_path):
    """Directories of the layers."""
    places = [tmp_path / f"part{i}" for i in range(L)]
    for i, place in enumerate(places):
        save(place, cut(params["layers"], i))
    return places


@pytest.fixture
def saved(params, parts, tmp_path):
    save(tmp_path / "o", {"head": params["head"]}, parts={"layers": parts})
    return tmp_path / "o"


def test_the_parts_come_back_as_one_stack(params, saved):
    back = load(saved)
    chex.assert_trees_all_equal(back, params)
    assert jax.tree.structure(back) == jax.tree.structure(params)


def test_joining_copies_no_leaf_twice():
    filling = _Filling(np.ones((1, 64, 64), np.float32), 2)
    whole = filling.whole
    for _ in range(2):
        filling.add(np.ones((1, 64, 64), np.float32))
    filling.kind = jax.Array
    assert filling.array().unsafe_buffer_pointer() == whole.ctypes.data


def test_into_containers_like_others(params, saved):
    like = jax.eval_shape(lambda: params)
    chex.assert_trees_all_equal(load(saved, like=like), params)


def test_the_outline_has_the_shapes_and_reads_no_array(params, saved):
    for file in (saved / "arrays").rglob("*"):
        if file.is_file():
            file.unlink()
    outline = storage.outline(saved)
    chex.assert_trees_all_equal_shapes_and_dtypes(outline, params)
    assert jq.bits_per_weight(outline) == jq.bits_per_weight(params)


def test_the_outline_of_other_leaves(tmp_path):
    tree = {"key": jax.random.key(3), "n": 3, "wide": np.ones(2, np.int64), "t": jq.ternary()}
    tree["t"] = jq.quantize_array(draw(64, 8), tree["t"])
    save(tmp_path / "o", tree)
    outline = storage.outline(tmp_path / "o")
    assert outline["n"] == 3 and outline["key"].shape == ()
    assert outline["wide"].dtype == np.int64
    chex.assert_trees_all_equal_shapes_and_dtypes(outline["t"], load(tmp_path / "o")["t"])


def test_bytes_are_not_written_twice(saved, parts):
    file = next(p for p in parts[0].rglob("*") if p.is_file())
    assert os.stat(file).st_nlink == 2


def test_on_a_file_system_without_links(params, parts, tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", unsupported)
    save(tmp_path / "o", {"head": params["head"]}, parts={"layers": parts})
    for part in parts:
        shutil.rmtree(part)
    chex.assert_trees_all_equal(load(tmp_path / "o"), params)


def test_an_old_one_is_replaced(params, saved, parts):
    save(saved, {"head": params["head"]}, parts={"layers": parts[:2]}, overwrite=True)
    assert load(saved)["layers"]["a"].shape == (2, 64, 32)
    assert len(list((saved / "parts" / "layers").iterdir())) == 2


def test_floats_of_two_widths_join_to_the_wider(tmp_path):
    values = jnp.array([[1.0, 1e5]])
    save(tmp_path / "0", {"w": jnp.ones((1, 2), jnp.float16)})
    save(tmp_path / "1", {"w": values})
    save(tmp_path / "o", {"b": jnp.ones(1)}, parts={"s": [tmp_path / "0", tmp_path / "1"]})
    w = load(tmp_path / "o")["s"]["w"]
    assert (w.dtype, w.tolist()) == (jnp.float32, [[1.0, 1.0], [1.0, 1e5]])
    assert storage.outline(tmp_path / "o")["s"]["w"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: shutil.rmtree(p / "1"), "parts/layers/1 is damaged: it is missing"),
        (
            lambda p: shutil.copytree(p / "0", p / "1", dirs_exist_ok=True),
            "parts/layers/1 is damaged: it differs from what was saved",
        ),
        (
            lambda p: next((p / "2" / "arrays").rglob("manifest.ocdbt")).write_bytes(b""),
            "parts/layers/2 is damaged: arrays/manifest.ocdbt differs",
        ),
    ],
)
def test_damage(saved, harm, message):
    harm(saved / "parts" / "layers")
    with pytest.raises(ValueError, match=message):
        load(saved)


def test_bad_parts(params, parts, tmp_path):
    where = tmp_path / "o"
    with pytest.raises(ValueError, match="'layers' is given in the tree and in parts"):
        save(where, params, parts={"layers": parts})
    with pytest.raises(ValueError, match="a tree with parts must be a dict, got list"):
        save(where, [params["head"]], parts={"layers": parts})
    with pytest.raises(ValueError, match="missing is not a jaxquant checkpoint"):
        save(where, {"head": params["head"]}, parts={"layers": [tmp_path / "missing"]})
    save(tmp_path / "other", {"a": jnp.ones((1, 2))})
    save(where, {"b": jnp.ones(2)}, parts={"s": [parts[0], tmp_path / "other"]})
    with pytest.raises(ValueError, match="cannot be joined with the other parts"):
        load(where)
    with pytest.raises(ValueError, match="the entry 's' has no parts"):
        save(where, {"b": jnp.ones(2)}, parts={"s": []}, overwrite=True)


@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (1, 3, 1)])
def test_parts_of_other_shapes_are_not_joined(tmp_path, shape):
    save(tmp_path / "0", {"w": jnp.ones((1, 3))})
    save(tmp_path / "1", {"w": jnp.ones(shape)})
    save(tmp_path / "o", {"b": jnp.ones(1)}, parts={"s": [tmp_path / "0", tmp_path / "1"]})
    for read in (load, storage.outline):
        with pytest.raises(ValueError, match=r"s/1 cannot be joined .* instead of \[1, 3\]"):
            read(tmp_path / "o")


def test_a_users_directory_called_parts_is_not_lost(tmp_path):
    save(tmp_path / "o", {"b": jnp.ones(1)})
    (tmp_path / "o" / "parts").mkdir()
    with pytest.raises(ValueError, match="'parts', which would be lost"):
        save(tmp_path / "o", {"b": jnp.ones(1)}, overwrite=True)
