"""The folder of a run: bit for bit what was kept, or done again and said; never anything else."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.durable import states
from jaxquant.durable.store import LAYOUT, Folder

RUN = {"seed": 1}
KEPT = {"x": np.arange(6, dtype=np.int16).reshape(2, 3), "y": np.float32(2.5)}


@pytest.fixture
def folder(tmp_path):
    with Folder(tmp_path / "p", RUN) as kept:
        kept["a"] = KEPT
        yield kept


def file_of(folder):
    (file,) = folder.path.glob("*.bin")
    return file


def is_done_again(folder, name="a"):
    """A line says so, and nothing of the file is used."""
    with pytest.warns(UserWarning, match=rf"\.bin is damaged \(.*\); {name} is computed again"):
        assert name not in folder
    assert name not in folder
    assert len(folder) == 0


def test_arrays_come_back_to_the_bit(folder):
    more = {str(d): jnp.arange(3).astype(d) for d in ("bfloat16", "bool", "int4", "float8_e5m2")}
    folder["b"] = {**more, "empty": np.zeros((0, 3)), "a:b/.c": np.ones(1)}
    for name, arrays in (("a", KEPT), ("b", folder["b"])):
        for key, a in arrays.items():
            got = folder[name][key]
            assert (got.dtype, got.shape) == (a.dtype, a.shape)
            assert got.tobytes() == np.asarray(a).tobytes()
    assert sorted(folder) == ["a", "b"]
    del folder["b"]
    with pytest.raises(KeyError):
        folder["b"]
    with pytest.raises(KeyError):
        del folder["b"]


def test_every_flipped_bit_is_found(folder):
    file = file_of(folder)
    right = file.read_bytes()
    for i in range(len(right)):
        wrong = bytearray(right)
        wrong[i] ^= 1 << i % 8
        file.write_bytes(wrong)
        is_done_again(folder)
    file.write_bytes(right)
    np.testing.assert_array_equal(folder["a"]["x"], KEPT["x"])


def test_every_cut_is_found(folder):
    file = file_of(folder)
    right = file.read_bytes()
    for size in range(len(right)):
        file.write_bytes(right[:size])
        is_done_again(folder)
    file.write_bytes(right + b"\0")
    is_done_again(folder)


def test_a_file_under_another_name_is_found(folder):
    folder["b"] = {"x": np.zeros(2)}
    folder._file("b").replace(folder._file("a"))
    is_done_again(folder)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "head",
    [
        "", "null", "[]", "{", "{}", DEEP, '{"name": "a"}', '{"name": "a", "arrays": []}',
        '{"name": 3, "arrays": {}}', '{"name": "a", "arrays": {"x": 3}}',
        '{"name": "a", "arrays": {"x": ["int8", 8]}}',
        '{"name": "a", "arrays": {"x": ["int8", [-8]]}}',
        '{"name": "a", "arrays": {"x": ["int8", [8.0]]}}',
        '{"name": "a", "arrays": {"x": ["int8", ["8"]]}}',
        '{"name": "a", "arrays": {"x": ["int8", [9]]}}',
        '{"name": "a", "arrays": {"x": ["int8", [4611686018427387904, 4]]}}',
        '{"name": "a", "arrays": {"x": ["object", [1]]}}',
        '{"name": "a", "arrays": {"x": ["V0", [1]]}}',
        '{"name": "a", "arrays": {"x": [{}, [1]]}}',
        '{"name": "a", "arrays": {"x": [null, [1]]}}',
    ],
)  # fmt: skip
def test_a_head_of_nonsense_is_found_though_its_digest_is_right(folder, head):
    rest = head.encode() + b"\n" + bytes(8)
    digest = hashlib.sha256(rest).hexdigest().encode()
    file_of(folder).write_bytes(digest + b"\n" + rest)
    is_done_again(folder)


def test_of_another_run_nothing_is_kept_or_all(folder):
    path = folder.path
    folder.close()
    with pytest.raises(
        ValueError, match="holds another run, which differs in seed, steps. It was not"
    ):
        Folder(path, {"seed": 2, "steps": 3}, refuse=True)
    assert "a" in Folder(path, RUN, refuse=True)
    other = Folder(path, {"seed": 2})
    assert (other.replaced, len(other)) == (("seed",), 0)


SPACED = json.dumps({"seed": 1, LAYOUT: 3}, indent=1)


@pytest.mark.parametrize("text", ["", "{", "3", "[]", DEEP, SPACED, "\xff"])
def test_what_run_it_was_is_not_guessed(folder, text):
    path = folder.path
    folder.close()
    (path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"which differs in run\.json, which is damaged"):
        Folder(path, RUN, refuse=True)
    assert len(Folder(path, RUN)) == 0


def test_files_of_others_stay(folder):
    (folder.path / "thesis.txt").write_text("precious")
    (folder.path / "thesis.aside").write_text("precious")
    (folder.path / "mine.bin").write_text("precious")
    names = ["mine.bin", "thesis.aside", "thesis.txt"]
    assert len(folder) == 1
    folder.close()
    with Folder(folder.path, {"seed": 2}) as other:
        other["b"] = {"x": np.ones(1)}
        other.remove()
    found = sorted(p.name for p in folder.path.iterdir() if p.name != "lock")
    assert found == names
    assert len(Folder(folder.path, RUN)) == 0


def test_removed_it_is_gone_at_once(folder):
    folder.remove()
    assert not folder.path.exists()
    assert json.dumps(dict(Folder(folder.path, RUN))) == "{}"


def test_states_with_keys_come_back():
    state = {"key": jax.random.key(3), "a": jnp.ones((2, 0), jnp.bfloat16), "n": 7, "none": None}
    back = states.as_tree(states.as_arrays(state), state)
    assert jax.random.key_data(back["key"]).tolist() == [0, 3] and int(back["n"]) == 7
    assert back["a"].shape == (2, 0) and back["a"].dtype == jnp.bfloat16
    others = [{"key": jax.random.key(4)}, {"n": 8}, {"n": 7.0}]
    marks = {states.mark("", state | other).tobytes() for other in ({}, *others)}
    assert len(marks) == 4


def test_what_another_method_gave_is_not_taken(tmp_path):
    """Nor what other weights gave, though they share a folder."""
    w = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    runs = {
        "rtn": lambda **o: jq.quantize({"w": w}, jq.rtn(2, 8), **o),
        "mse": lambda **o: jq.quantize({"w": w}, jq.rtn(2, 8, mse=True), **o),
        "weights": lambda **o: jq.quantize({"w": 2 * w}, jq.rtn(2, 8), **o),
    }
    with Folder(tmp_path / "p", {}) as kept:
        for name, run in runs.items():
            seen = []
            got, want = run(finished=kept, progress=seen.append)["w"], run()["w"]
            assert seen[0].seconds > 0, name
            for key, a in want.named.items():
                np.testing.assert_array_equal(got.named[key], a)
            again = run(finished=kept, progress=seen.append)["w"]
            assert seen[1].seconds == 0
            np.testing.assert_array_equal(again.data["codes"], want.data["codes"])


def test_a_finished_run_fits_no_transform_again():
    """The searched arrays come from the store, and so does the name that tells them apart."""
    rng, judged = np.random.default_rng(0), []
    params = {n: jnp.asarray(rng.normal(size=(32, 16)), jnp.float32) for n in "ab"}
    fn = lambda p, x: (x @ p["a"], x @ p["b"])
    stats = jq.calibrate(fn, params, [jnp.asarray(rng.normal(size=(8, 32)), jnp.float32)], sample=4)
    inspect = lambda weights, index: judged.append(index)
    run = lambda kept: jq.quantize(params, jq.awq(4, 32), stats, inspect=inspect, finished=kept)
    kept = {}
    first, searched = run(kept), len(judged)
    again = run(kept)
    assert len(judged) == searched > 0
    assert jax.tree.structure(again) == jax.tree.structure(first)
    assert first["a"].shared == first["b"].shared != ""


def test_a_directory_belongs_to_the_run(tmp_path):
    """What is in it counts as work that has started, and goes with another run, or in the end."""
    with Folder(tmp_path / "p", RUN) as kept:
        place = kept.directory("layers")
        assert not kept.started
        (place / "0").mkdir(parents=True)
        assert kept.started and len(kept) == 0
    with Folder(tmp_path / "p", RUN) as kept:
        assert (kept.directory("layers") / "0").is_dir() and kept.replaced == ()
    with Folder(tmp_path / "p", RUN | {"seed": 2}) as other:
        assert other.replaced == ("seed",) and not other.started
        (other.directory("layers") / "1").mkdir(parents=True)
        other.remove()
    assert not (tmp_path / "p").exists()


def test_entries_that_need_not_be_durable_are_checked_all_the_same(folder, monkeypatch):
    def synced(_):
        raise AssertionError("the disk was waited for")

    monkeypatch.setattr("jaxquant.durable.store.os.fsync", synced)
    folder.put("a", KEPT, sync=False)
    np.testing.assert_array_equal(folder["a"]["x"], KEPT["x"])
    file = file_of(folder)
    file.write_bytes(file.read_bytes()[:-1])
    is_done_again(folder)
