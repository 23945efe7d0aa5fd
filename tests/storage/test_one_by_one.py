"""Leaves of a checkpoint read one by one are those of the whole; damage and bad paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.storage.checkpoint import save
from jaxquant.storage.one_by_one import stored_leaves


def test_leaves_are_those_of_the_whole(tmp_path):
    packed = jq.quantize_array(jnp.eye(64), jq.rtn(bits=4))
    tree = {
        "a:b": {"w": packed, "": jnp.ones((3, 2), jnp.bfloat16)}, "a": np.arange(3.0),
        "f8": jnp.ones(5, jnp.float8_e4m3fn), "i4": jnp.ones(5, jnp.int4),
        "none": jnp.zeros((0, 3)), "key": jax.random.key(0), "step": 3,
    }  # fmt: skip
    save(tmp_path / "c", tree)
    found = {leaf.path: leaf.read() for leaf in stored_leaves(tmp_path / "c")}
    assert set(found) == {"a:b/w", "a:b/", "a", "f8", "i4", "none"}
    back = dict(jq.core.path_leaves(jq.load(tmp_path / "c")))
    for path, leaf in found.items():
        mine, whole = jax.tree.leaves(leaf), jax.tree.leaves(back[path])
        for a, b in zip(mine, whole, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert found["a:b/w"].format == packed.format


def test_parts_are_leaves_of_their_own(tmp_path):
    parts = [tmp_path / "0", tmp_path / "1"]
    for i, part in enumerate(parts):
        save(part, {"w": jnp.full((1, 4), i)})
    save(tmp_path / "c", {"n": jnp.ones(2)}, parts={"layers": parts})
    found = {leaf.path: leaf.read() for leaf in stored_leaves(tmp_path / "c")}
    assert list(found) == ["n", "layers/0/w", "layers/1/w"]
    assert found["layers/1/w"].tolist() == [[1] * 4]


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint|not a jaxquant checkpoint|is no"):
        stored_leaves(tmp_path)
    save(tmp_path / "c", {"w": jnp.ones(64)})
    victim = max(
        (tmp_path / "c" / "arrays").rglob("*"), key=lambda f: f.is_file() * f.stat().st_size
    )
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="is damaged: .* differs from what was saved"):
        stored_leaves(tmp_path / "c")
