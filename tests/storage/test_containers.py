"""Containers of saved trees: NNX states, integer keys, random keys, and what `like` gives back."""

import json

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jaxquant as jq
from jaxquant.storage import checkpoint

RECIPE = jq.Recipe([("layers/*/kernel", jq.rtn(bits=4, group_size=16)), ("*", jq.KEEP)])


class Net(nnx.Module):
    """Of everything that a state may hold: lists, statistics, counters, random keys."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(32, 32, rngs=rngs) for _ in range(3)])
        self.norm = nnx.BatchNorm(32, use_running_average=True, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.norm(x)


def make():
    return Net(nnx.Rngs(0))


@pytest.fixture
def quantized(tmp_path):
    """(graph, quantized state, where it is saved)."""
    graph, state = nnx.split(make())
    state = jq.quantize(state, RECIPE)
    checkpoint.save(tmp_path / "c", state, recipe=RECIPE)
    return graph, state, tmp_path / "c"


@pytest.mark.parametrize("model", [make, lambda: nnx.eval_shape(make)], ids=["arrays", "abstract"])
def test_a_state_comes_back(model, quantized):
    graph, state, path = quantized
    back = checkpoint.load(path, like=nnx.state(model())).params
    chex.assert_trees_all_equal_structs(back, state)  # keys, Variables, QTensors
    numbers = lambda tree: jax.tree.leaves(nnx.filter_state(tree, (nnx.Param, nnx.BatchStat)))
    chex.assert_trees_all_equal(numbers(back), numbers(state))
    assert type(back["norm"]["mean"]) is nnx.BatchStat
    assert isinstance(back["layers"][2]["kernel"].get_value(), jq.QTensor)

    x = jax.random.normal(jax.random.key(1), (5, 32))
    serve = jax.jit(jq.quantized(lambda state, x: nnx.merge(graph, state)(x)))
    chex.assert_trees_all_equal(serve(back, x), serve(state, x))


def test_a_model_is_updated_in_place(tmp_path):
    saved, other = make(), Net(nnx.Rngs(7))
    checkpoint.save(tmp_path / "c", nnx.state(saved))
    nnx.update(other, checkpoint.load(tmp_path / "c", like=nnx.state(other)).params)
    x = jax.random.normal(jax.random.key(1), (5, 32))
    chex.assert_trees_all_equal(other(x), saved(x))
    assert other.drop.rngs.key.get_value() == saved.drop.rngs.key.get_value()


def test_without_like_a_state_is_nested_dicts(quantized):
    _, state, path = quantized
    params = checkpoint.load(path).params
    chex.assert_trees_all_equal_structs(params, nnx.to_pure_dict(state))
    assert list(params["layers"]) == [0, 1, 2]
    described = json.loads((path / checkpoint.DESCRIPTION).read_text())
    assert {"layers/0/kernel:codes", "layers/2/bias", "norm/mean"} <= set(described["arrays"])


def test_dicts_of_names_are_written_as_before(tmp_path):
    checkpoint.save(tmp_path / "c", {"0": {"a": jnp.ones(2)}})
    described = json.loads((tmp_path / "c" / checkpoint.DESCRIPTION).read_text())
    assert "integer_keys" not in described and described["leaves"] == [{"path": "0/a"}]
    assert list(checkpoint.load(tmp_path / "c").params) == ["0"]


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_random_keys_come_back(impl, tmp_path):
    keys = jax.random.split(jax.random.key(3, impl=impl), 4)
    checkpoint.save(tmp_path / "c", {"keys": keys, "one": keys[0]})
    back = checkpoint.load(tmp_path / "c").params
    assert back["keys"].dtype == keys.dtype and (back["keys"] == keys).all()
    assert back["one"] == keys[0]


def test_like_gives_any_container(tmp_path):
    """Sequences, frozen dicts, boxes with names of axes; the leaves may be abstract."""
    values = {"0": {"w": jnp.arange(3.0)}, "1": {"w": jnp.ones(2)}}
    checkpoint.save(tmp_path / "c", values)
    of = lambda n: nn.Partitioned(jax.ShapeDtypeStruct((n,), jnp.float32), names=("x",))
    like = [nn.FrozenDict({"w": of(3)}), {"w": of(2)}]
    back = checkpoint.load(tmp_path / "c", like=like).params
    chex.assert_trees_all_equal_structs(back, like)
    chex.assert_trees_all_equal(jax.tree.leaves(back), jax.tree.leaves(values))
    checkpoint.save(tmp_path / "d", dict(enumerate(back)))
    chex.assert_trees_all_equal(
        checkpoint.load(tmp_path / "d").params, {0: values["0"], 1: values["1"]}
    )


def test_like_must_be_the_tree_that_was_saved(tmp_path):
    checkpoint.save(tmp_path / "c", {"a": jnp.ones((2, 3)), "b": jnp.ones(2)})
    load = lambda like: checkpoint.load(tmp_path / "c", like=like)
    with pytest.raises(ValueError, match="the checkpoint lacks 2 of them, 'c' first"):
        load({"a": jnp.ones((2, 3)), "b": jnp.ones(2), "c": jnp.ones(1), "d": jnp.ones(1)})
    with pytest.raises(ValueError, match="`like` lacks 1 of them, 'b' first"):
        load({"a": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match=r"'a' has shape \(3, 2\) in `like`, .* shape \(2, 3\)"):
        load({"a": jnp.ones((3, 2)), "b": jnp.ones(2)})


@pytest.mark.parametrize(("tree", "message"), [
    ({"a": {0: 1.0, "b": 1.0}}, "all integers or all strings, got .* at 'a'"),
    ({True: np.ones(2)}, "must be integers, or strings"),
    ({"a": {(0, 1): np.ones(2)}}, "must be integers, or strings"),
    ({"a": nnx.List([])}, "got List at 'a'"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_other_trees_are_refused(tree, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path / "c", tree)
    with pytest.raises(ValueError, match=r"got Net; convert it first \(nnx.state\(module\)"):
        checkpoint.save(tmp_path / "c", make())


names = st.text("ab%:.0é", max_size=3)
trees = st.recursive(
    st.integers(0, 100).map(lambda i: np.full(2, i, np.int32)),
    lambda inner: (
        st.dictionaries(names, inner, max_size=3)
        | st.dictionaries(st.integers(-3, 30), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(names, trees, min_size=1, max_size=3).filter(jax.tree.leaves))
def test_any_nested_mapping_comes_back(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("any") / "c"
    checkpoint.save(path, tree)
    chex.assert_trees_all_equal(checkpoint.load(path).params, tree)
