"""Checkpoints: every format back to the bit; damage and newer versions said in a line."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import storage
from jaxquant.storage import checkpoint, description, leaves
from tests.support.arrays import draw
from tests.support.formats import FORMATS

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
    back = checkpoint.load(tmp_path / "c")
    chex.assert_trees_all_equal(back, tree, strict=True)


def test_it_describes_itself(saved):
    path, params = saved
    back = checkpoint.load(path)
    assert storage.stored_recipe(path) == RECIPE
    assert storage.stored_metadata(path) == {"name": "x"}
    assert back["a"]["w"].format == params["a"]["w"].format
    assert back["a"]["w"].method == "rtn"


def test_ternary_codes_take_a_fifth_of_a_byte_on_disk(tmp_path):
    w = jq.quantize_array(draw(100, 32), jq.ternary(group_size=20))
    checkpoint.save(tmp_path / "c", {"w": w})
    kept = json.loads((tmp_path / "c" / description.FILE).read_text())["arrays"]["w:codes"]
    assert kept == {"shape": [20, 32], "dtype": "uint8"}
    back = checkpoint.load(tmp_path / "c")["w"]
    np.testing.assert_array_equal(back.data["codes"], w.data["codes"])


def test_taken_places_are_refused(saved):
    path, params = saved
    with pytest.raises(ValueError, match="exists and is not an empty directory"):
        checkpoint.save(path, params)
    checkpoint.save(path, params, overwrite=True)
    other = path.parent / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not a jaxquant checkpoint; it will not be overwritten"):
        checkpoint.save(other, params, overwrite=True)
    with pytest.raises(
        ValueError, match="'0' is a object; a checkpoint holds arrays, numbers, text"
    ):
        checkpoint.save(path.parent / "n", [object()])
    assert sorted(p.name for p in path.parent.iterdir()) == ["c", "mine"]
    for name in ("thesis.txt", ".hidden", "d", "e"):
        (path / name).write_text("precious")
    with pytest.raises(ValueError, match=r"'\.hidden', 'd', 'e' and 1 more, which would be lost"):
        checkpoint.save(path, params, overwrite=True)
    assert (path / "thesis.txt").read_text() == "precious"


def test_a_folder_with_a_file_of_that_name_is_no_checkpoint(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / description.FILE).write_text("{}")
    with pytest.raises(ValueError, match="not a jaxquant checkpoint; it will not be overwritten"):
        checkpoint.save(tmp_path / "c", {"a": jnp.ones(2)}, overwrite=True)


def test_every_name_comes_back(tmp_path):
    """A leaf may be called what a part of a packed one is; and whatever else a name may be."""
    w = jq.quantize_array(draw(48, 32), jq.rtn(bits=4, group_size=16))
    names = [
        "",
        ".",
        "..",
        "a.b",
        ":",
        "%",
        "%3A",
        "0",
        "A",
        "a",
        "a\n",
        "ü",
        "a" * 300,
        "zarr.json",
    ]
    tree = {
        "w": w, "w:codes": jnp.ones(3), "w%3Acodes": jnp.zeros(4), "w:scales": w,
        "in": {"w": w, "w:codes": w, "": jnp.ones(2)}, "none": {"of": {}},
        **{name: jnp.full(2, i) for i, name in enumerate(names)},
    }  # fmt: skip
    checkpoint.save(tmp_path / "c", tree)
    back = checkpoint.load(tmp_path / "c")
    chex.assert_trees_all_equal(back, tree)


def test_names_of_earlier_versions(tmp_path, monkeypatch):
    """They wrote a path as it is, and one array over the other where two had one name."""
    w = jq.quantize_array(draw(48, 32), jq.rtn(group_size=16))
    tree = {"v:codes": jnp.ones(3), "100%": jnp.ones(2), "w": w}
    monkeypatch.setattr(leaves, "stored_name", lambda path: path)
    checkpoint.save(tmp_path / "c", tree)
    checkpoint.save(tmp_path / "d", {"w": w, "w:codes": w.data["codes"]})
    monkeypatch.undo()
    back = checkpoint.load(tmp_path / "c")
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    np.testing.assert_array_equal(back["v:codes"], tree["v:codes"])
    with pytest.raises(
        ValueError, match="is damaged: two leaves of the tree use the stored array 'w:codes'"
    ):
        checkpoint.load(tmp_path / "d")


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
            file = copy / description.FILE
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))

        return change

    assert "reads up to 4" in broken(edit(version=99))
    assert "damaged" in broken(edit(leaves=None, arrays={"a": {"shape": [1], "dtype": "int8"}}))
    for change in ({"recipe": None}, {"metadata": {}}, {"leaves": []}):
        assert "differs from what was saved" in broken(edit(**change))

    def lacking(copy):
        file = copy / description.FILE
        value = json.loads(file.read_text())
        del value["leaves"], value["sha256"]
        file.write_text(json.dumps(value | {"sha256": description.sha256_of(value)}))

    assert "it lacks leaves" in broken(lacking)
    assert "not a jaxquant" in broken(lambda c: (c / description.FILE).unlink())
    assert "damaged" in broken(lambda c: (c / description.FILE).write_text('{"version'))
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
    assert storage.is_checkpoint(tmp_path / "real")
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
    np.testing.assert_array_equal(checkpoint.load(path)["b"], params["b"])


def test_an_interrupted_write_leaves_nothing(saved, monkeypatch):
    path, params = saved

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "digests", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, params, overwrite=True)
    assert [p.name for p in path.parent.iterdir()] == ["c"]
    monkeypatch.undo()
    assert storage.stored_recipe(path) == RECIPE
    assert jax.tree.structure(checkpoint.load(path)) == jax.tree.structure(params)


def test_what_cannot_be_stored_is_said_before_writing(tmp_path):
    gone = jnp.ones(2) + 1
    gone.delete()
    packed = jq.quantize({"w": draw(48, 32)}, jq.rtn(group_size=16))
    for tree, message in (
        ({}, "holds no leaves"),
        ({"a": None, "b": [jax.nn.relu]}, "holds no leaves"),
        (object(), "'' is a object; a checkpoint holds arrays, numbers, text"),
        ({"a": gone}, "'a' was donated to a jitted function"),
        ({"a": jax.ShapeDtypeStruct((2,), jnp.float32)}, "'a' is a ShapeDtypeStruct"),
        (jax.eval_shape(lambda: packed), "'w:codes' is a ShapeDtypeStruct"),
        ({"a": {"b": np.array(["x"])}}, "'a/b' is an array of <U1"),
        ({"a": np.array(["x"])}, "'a' is an array of <U1"),
        ({"a": np.array([None])}, "'a' is an array of object"),
        ({"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}, "the same path 'a/b'; rename one"),
        ({"\ud800": jnp.ones(2)}, "UTF-8"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.save(tmp_path / "c", tree)
    with pytest.raises(ValueError, match="'a' is traced; save the tree outside jit"):
        jax.jit(lambda a: checkpoint.save(tmp_path / "c", {"a": a}))(jnp.ones(2))
    for metadata in ({"a": object()}, {("a", 1): 2}):
        with pytest.raises(ValueError, match="metadata must be JSON values"):
            checkpoint.save(tmp_path / "c", {"a": jnp.ones(2)}, metadata=metadata)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="not a writable directory"):
        storage.check_target(tmp_path / "file" / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_metadata_comes_back_as_json(tmp_path):
    """Names are text in JSON, which sorts otherwise than numbers."""
    checkpoint.save(tmp_path / "c", {"a": jnp.ones(2)}, metadata={2: (1, 2), 10: "x"})
    assert storage.stored_metadata(tmp_path / "c") == {"2": [1, 2], "10": "x"}


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text", [
    "", "[]", "3", "null", "{}", '"x"', '{"version": "x"}', '{"version": 1e999}', '{"version": []}',
    DEEP, f'{{"version": 1, "a": {DEEP}}}', '{"version": NaN}', "\xff",
])  # fmt: skip
def test_a_description_of_nonsense(saved, text):
    path, _ = saved
    (path / description.FILE).write_text(text, encoding="latin-1")
    for ask in (checkpoint.load, storage.stored_recipe, storage.stored_metadata):
        with pytest.raises(ValueError, match="is damaged"):
            ask(path)


@pytest.mark.parametrize(("field", "value"), [
    ("files", []), ("files", {"a": 3}), ("arrays", []), ("arrays", {"b": 3}), ("arrays", {}),
    ("arrays", {"b": {"shape": [2**62], "dtype": "int8"}}), ("metadata", None), ("leaves", {}),
    ("arrays", {"b": {"shape": "x", "dtype": "int8"}}), ("leaves", [3]), ("leaves", [{}]),
    ("leaves", [{"path": 3}]), ("leaves", [{"path": "b", "parts": 3}]), ("recipe", 3),
    ("leaves", [{"path": "b", "parts": [], "format": {"type": "Zzz"}}]), ("recipe", [3]),
    ("leaves", [{"path": "b"}, {"path": "b/c"}]), ("recipe", [{"pattern": "*", "method": {}}]),
    ("recipe", [{"pattern": "*", "method": {"type": []}}]), ("tree", 99), ("tree", "x"),
    ("tree", {"set": []}), ("tree", {}), ("tree", {"dict": [[1]]}), ("tree", {"list": 3}),
    ("leaves", [{"path": "b", "type": "object", "value": 3}]),
    ("leaves", [{"path": "b", "type": "int"}]), ("leaves", [{"path": "b", "key": "nope"}]),
    ("leaves", [{"path": "b", "key": "rbg"}]),
])  # fmt: skip
def test_a_description_of_wrong_types_though_its_digest_is_right(saved, field, value):
    path, _ = saved
    file = path / description.FILE
    wrong = json.loads(file.read_text()) | {field: value}
    del wrong["sha256"]
    file.write_text(json.dumps(wrong | {"sha256": description.sha256_of(wrong)}))
    with pytest.raises(ValueError, match="is damaged"):
        (storage.stored_recipe if field == "recipe" else checkpoint.load)(path)


def as_version_1(path, **said):
    """Makes a checkpoint what version 1 wrote: paths, and what they do not say, for containers."""
    file = path / description.FILE
    value = json.loads(file.read_text()) | {"version": 1} | said
    del value["sha256"], value["tree"]
    file.write_text(json.dumps(value | {"sha256": description.sha256_of(value)}))


def test_checkpoints_of_version_1(tmp_path):
    w = jq.quantize_array(draw(48, 32), jq.rtn(group_size=16))
    tree = {
        "layers": {0: {"w": w}, 10: {"w": w}, 9: {}},
        "0": {"b": jnp.ones(2)},
        "none": {"of": {}},
    }
    checkpoint.save(tmp_path / "c", tree)
    as_version_1(tmp_path / "c", empty=["layers/9", "none/of"], integer_keys=[["layers"]])
    chex.assert_trees_all_equal(checkpoint.load(tmp_path / "c"), tree, strict=True)
    chex.assert_trees_all_equal(checkpoint.load(tmp_path / "c", like=tree), tree, strict=True)


@pytest.mark.parametrize("said", [
    {"empty": 3}, {"empty": ["b", 3]}, {"integer_keys": 3}, {"integer_keys": [["a"]]},
    {"leaves": [{"path": "b"}, {"path": "b/c"}]},
])  # fmt: skip
def test_a_description_of_version_1_of_wrong_types(saved, said):
    path, _ = saved
    as_version_1(path, **said)
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load(path)


def test_a_leaf_alone(tmp_path):
    w = jq.quantize_array(draw(48, 32), jq.rtn(group_size=16))
    for name, leaf in (("w", w), ("a", jnp.arange(3))):
        checkpoint.save(tmp_path / name, leaf)
        chex.assert_trees_all_equal(checkpoint.load(tmp_path / name), leaf, strict=True)
        chex.assert_trees_all_equal(checkpoint.load(tmp_path / name, like=leaf), leaf, strict=True)


def test_others_may_read_it(saved):
    path, _ = saved
    ordinary = path.parent / "ordinary"
    ordinary.mkdir()
    assert path.stat().st_mode == ordinary.stat().st_mode
