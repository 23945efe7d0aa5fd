"""Containers of saved trees: NNX states, integer keys, random keys, and what `like` gives back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jaxquant as jq
from jaxquant.storage import checkpoint, description
from tests.support.devices import failures_of
from tests.support.saved_trees import TREES, Net, abstract, check_same, floats, net

ROOT = Path(__file__).parents[2]

RECIPE = jq.Recipe([("layers/*/kernel", jq.rtn(bits=4, group_size=16)), ("*", jq.KEEP)])


@pytest.fixture
def quantized(tmp_path):
    """(graph, quantized state, where it is saved)."""
    graph, state = nnx.split(net())
    state = jq.quantize(state, RECIPE)
    checkpoint.save(tmp_path / "c", state, recipe=RECIPE)
    return graph, state, tmp_path / "c"


@pytest.mark.parametrize("model", [net, lambda: nnx.eval_shape(net)], ids=["arrays", "abstract"])
def test_a_state_comes_back(model, quantized):
    graph, state, path = quantized
    back = checkpoint.load(path, like=nnx.state(model()))
    chex.assert_trees_all_equal_structs(back, state)  # keys, Variables, QTensors
    numbers = lambda tree: jax.tree.leaves(nnx.filter_state(tree, (nnx.Param, nnx.BatchStat)))
    chex.assert_trees_all_equal(numbers(back), numbers(state))
    assert type(back["norm"]["mean"]) is nnx.BatchStat
    assert isinstance(back["layers"][1]["kernel"].get_value(), jq.QTensor)

    x = jax.random.normal(jax.random.key(1), (5, 32))
    serve = jax.jit(jq.quantized(lambda state, x: nnx.merge(graph, state)(x)))
    chex.assert_trees_all_equal(serve(back, x), serve(state, x))


def test_a_model_is_updated_in_place(tmp_path):
    saved, other = net(), Net(nnx.Rngs(7))
    checkpoint.save(tmp_path / "c", nnx.state(saved))
    nnx.update(other, checkpoint.load(tmp_path / "c", like=nnx.state(other)))
    x = jax.random.normal(jax.random.key(1), (5, 32))
    chex.assert_trees_all_equal(other(x), saved(x))
    assert other.drop.rngs.key.get_value() == saved.drop.rngs.key.get_value()


def test_without_like_a_state_is_nested_dicts(quantized):
    _, state, path = quantized
    params = checkpoint.load(path)
    chex.assert_trees_all_equal_structs(params, nnx.to_pure_dict(state))
    assert list(params["layers"]) == [0, 1]
    described = json.loads((path / description.FILE).read_text())
    assert {"layers/0/kernel:codes", "layers/1/bias", "norm/mean"} <= set(described["arrays"])


def test_dicts_of_names_are_written_as_before(tmp_path):
    checkpoint.save(tmp_path / "c", {"0": {"a": jnp.ones(2)}})
    described = json.loads((tmp_path / "c" / description.FILE).read_text())
    assert "integer_keys" not in described and described["leaves"] == [{"path": "0/a"}]
    assert list(checkpoint.load(tmp_path / "c")) == ["0"]


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_random_keys_come_back(impl, tmp_path):
    keys = jax.random.split(jax.random.key(3, impl=impl), 4)
    checkpoint.save(tmp_path / "c", {"keys": keys, "one": keys[0]})
    back = checkpoint.load(tmp_path / "c")
    assert back["keys"].dtype == keys.dtype and (back["keys"] == keys).all()
    assert back["one"] == keys[0]


def test_like_gives_any_container(tmp_path):
    """Sequences, frozen dicts, boxes with names of axes; the leaves may be abstract."""
    values = {"0": {"w": jnp.arange(3.0)}, "1": {"w": jnp.ones(2)}}
    checkpoint.save(tmp_path / "c", values)
    of = lambda n: nn.Partitioned(jax.ShapeDtypeStruct((n,), jnp.float32), names=("x",))
    like = [nn.FrozenDict({"w": of(3)}), {"w": of(2)}]
    back = checkpoint.load(tmp_path / "c", like=like)
    chex.assert_trees_all_equal_structs(back, like)
    chex.assert_trees_all_equal(jax.tree.leaves(back), jax.tree.leaves(values))
    checkpoint.save(tmp_path / "d", dict(enumerate(back)))
    chex.assert_trees_all_equal(checkpoint.load(tmp_path / "d"), {0: values["0"], 1: values["1"]})


@pytest.mark.parametrize("name", TREES)
def test_any_tree_comes_back_into_its_like(name, tmp_path):
    tree = TREES[name]()
    checkpoint.save(tmp_path / "c", tree)
    for like in (tree, abstract(tree)):
        check_same(checkpoint.load(tmp_path / "c", like=like), tree)


@pytest.mark.slow
def test_any_tree_comes_back_in_another_process(tmp_path):
    trees = {name: make() for name, make in TREES.items()}
    for name, tree in trees.items():
        checkpoint.save(tmp_path / name, tree)
    subprocess.run(
        [sys.executable, "-m", "tests.support.saved_trees", str(tmp_path)], cwd=ROOT, check=True
    )
    for name, tree in trees.items():
        check_same(checkpoint.load(tmp_path / f"{name} again", like=tree), tree)


@pytest.mark.parametrize("name", ["dicts", "integers", "sequences", "scalars", "slashes", "packed",
                                  "latent", "keys", "dtypes", "nothing of"])  # fmt: skip
def test_plain_containers_need_no_like(name, tmp_path):
    tree = TREES[name]()
    checkpoint.save(tmp_path / "c", tree)
    check_same(checkpoint.load(tmp_path / "c"), tree)


def test_other_containers_are_dicts_of_their_fields_without_like(tmp_path):
    def plain(name):
        checkpoint.save(tmp_path / name, TREES[name]())
        return jax.tree.map(lambda _: "*", checkpoint.load(tmp_path / name))

    layer = {"weight": "*", "bias": "*"}
    assert plain("named tuples") == {"left": "*", "right": {"left": "*", "right": None}}
    assert plain("equinox") == {
        "layers": (layer,) * 3, "activation": None, "final_activation": None
    }  # fmt: skip
    assert plain("linen") == {"params": {"w": "*"}}
    graph, state = plain("split")
    assert graph == {} and state == plain("state") == plain("module")


def test_a_model_with_functions_runs(tmp_path):
    """They are those of `like`, filtered or not."""
    model, x = TREES["equinox"](), jnp.ones(2)
    arrays, rest = eqx.partition(model, eqx.is_array)
    checkpoint.save(tmp_path / "c", model)
    checkpoint.save(tmp_path / "d", arrays)
    for name in "cd":
        like = jax.tree.map(lambda a: 0 * a if eqx.is_array(a) else a, model)
        np.testing.assert_array_equal(checkpoint.load(tmp_path / name, like=like)(x), model(x))
        back = checkpoint.load(tmp_path / name, like=eqx.filter(like, eqx.is_array))
        np.testing.assert_array_equal(eqx.combine(back, rest)(x), model(x))


def test_floats_give_the_place_of_quantized_weights(tmp_path):
    checkpoint.save(tmp_path / "c", TREES["packed"]())
    back = checkpoint.load(tmp_path / "c", like=jax.eval_shape(floats))
    check_same(back, TREES["packed"]())


def test_training_goes_on(tmp_path):
    """A step from what was loaded is the step from what was saved."""
    state = TREES["training"]()

    def loss(params):
        return jnp.sum((jnp.ones((1, 64)) @ params["a"]["w"] + jnp.sum(params["b"])) ** 2)

    def step(state):
        return state.apply_gradients(grads=jax.grad(jq.quantized(loss))(state.params))

    state = step(state)
    checkpoint.save(tmp_path / "c", state)
    check_same(step(checkpoint.load(tmp_path / "c", like=abstract(state))), step(state))


def test_a_state_of_wide_numbers_is_not_cut(tmp_path):
    with jax.enable_x64(True):
        checkpoint.save(tmp_path / "c", {"a": jnp.arange(3.0) / 3, "n": jnp.zeros((0, 2))})
        assert isinstance(checkpoint.load(tmp_path / "c")["a"], jax.Array)
    back = checkpoint.load(tmp_path / "c")
    np.testing.assert_array_equal(back["a"], np.arange(3.0) / 3)
    assert back["a"].dtype == back["n"].dtype == np.float64


ON_DEVICES = """
import sys, jax, jax.numpy as jnp
from jaxquant.storage import checkpoint
import jaxquant as jq
mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
spread = jax.NamedSharding(mesh, jax.P(None, "d"))
tree = {"w": jq.quantize_array(jnp.ones((64, 32)), jq.rtn()), "a": jnp.ones((2, 4)), "step": 3}
wide = jax.tree.map(lambda a: jax.device_put(a, spread) if hasattr(a, "ndim") else a, tree)
checkpoint.save(sys.argv[1], tree)
back = checkpoint.load(sys.argv[1], like=wide)
arrays = lambda tree: [a for a in jax.tree.leaves(tree) if isinstance(a, jax.Array)]
assert all(a.sharding == spread for a in arrays(back)), back
checkpoint.save(sys.argv[1], wide, overwrite=True)
back = checkpoint.load(sys.argv[1])
assert all(len(a.sharding.device_set) == 4 for a in arrays(back)), back
"""


def test_what_was_saved_on_more_devices_comes_back_on_one(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    env = {**os.environ, "XLA_FLAGS": flags.strip()}
    command = [sys.executable, "-c", ON_DEVICES, str(tmp_path / "c")]
    subprocess.run(command, env=env, cwd=ROOT, check=True)
    back = checkpoint.load(tmp_path / "c")
    assert jax.device_count() == 1
    check_same(back, {"w": jq.quantize_array(jnp.ones((64, 32)), jq.rtn()),
                      "a": jnp.ones((2, 4)), "step": 3})  # fmt: skip


UNEVEN = """
import sys, jax, jax.numpy as jnp, jaxquant as jq
from jaxquant.storage import checkpoint
mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
split = lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))
tree = {"w": jq.quantize_array(jnp.ones((64, 30)), jq.rtn()), "a": jnp.ones((6, 4))}
checkpoint.save(sys.argv[1], tree)
checkpoint.check_files = checkpoint._read = lambda *_, **__: sys.exit("arrays were read")
shapes = jax.eval_shape(lambda: tree)
at = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
for like, words in (
    ({**shapes, "a": at(tree["a"], split("d"))},
     ("sharding of 'a'", "(6, 4)", "('d',) over the mesh axes d=4", "(None)")),
    ({**shapes, "w": jax.tree.map(lambda a: at(a, split(None, "d")), tree["w"])},
     ("sharding of 'w:codes'", "divide its shape")),
    ({**shapes, "a": jnp.ones((4, 6))}, ("'a' has shape (4, 6)", "with shape (6, 4)")),
    ({"w": shapes["w"]}, ("`like` lacks 'a'",)),
):
    try:
        checkpoint.load(sys.argv[1], like=like)
    except ValueError as error:
        assert "damaged" not in str(error) and "\\n" not in str(error), error
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(words)
"""


def test_a_mistake_in_like_is_told_before_anything_is_read(tmp_path):
    where = f"import sys; sys.argv[1:] = [{str(tmp_path / 'c')!r}]"
    assert failures_of({"uneven": where + UNEVEN}, devices=4) == {}


@pytest.mark.parametrize("kind", [MemoryError, PermissionError, jax.errors.JaxRuntimeError])
def test_an_error_of_this_machine_is_no_damage(tmp_path, monkeypatch, kind):
    def fails(*_):
        raise kind("RESOURCE_EXHAUSTED: Out of memory")

    checkpoint.save(tmp_path / "c", {"a": jnp.ones(3)})
    monkeypatch.setattr(checkpoint, "_read", fails)
    with pytest.raises(kind, match="^RESOURCE_EXHAUSTED"):
        checkpoint.load(tmp_path / "c")


def test_other_dtypes_in_like_have_no_effect(tmp_path):
    checkpoint.save(tmp_path / "c", {"a": jnp.ones(3)})
    back = checkpoint.load(tmp_path / "c", like={"a": jnp.ones(3, jnp.int8)})
    assert back["a"].dtype == jnp.float32


def test_like_must_be_the_tree_that_was_saved(tmp_path):
    checkpoint.save(tmp_path / "c", {"a": jnp.ones((2, 3)), "b": jnp.ones(2)})
    load = lambda like: checkpoint.load(tmp_path / "c", like=like)
    more = {name: jnp.ones(1) for name in "cdefg"}
    for like, message in (
        ({"a": jnp.ones((2, 3)), "b": jnp.ones(2)} | more,
         "the checkpoint lacks 'c', 'd', 'e' and 2 more: pass the tree that was saved"),
        ({"a": jnp.ones((2, 3))}, "`like` lacks 'b': pass"),
        ({"a": jnp.ones((2, 3)), "b": None}, "`like` lacks 'b': pass"),
        ({"a": jnp.ones((2, 3)), "b": jax.nn.relu}, "`like` lacks 'b': pass"),
        ({"a": jnp.ones((2, 3)), "c": jnp.ones(2)},
         "the checkpoint lacks 'c', and `like` lacks 'b': pass"),
        ({"a": jnp.ones((3, 2)), "b": jnp.ones(2)},
         r"'a' has shape \(3, 2\) in `like`, .* shape \(2, 3\)"),
        ({"a": jnp.ones((2, 3)), "b": {0: jnp.ones(1)}},
         "the checkpoint lacks 'b/0', and `like` lacks 'b'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message) as caught:
            load(like)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("tree", "message"), [
    ({"a": {0: 1.0, "b": 1.0}}, "all integers or all strings, got .* at 'a'"),
    ({True: np.ones(2)}, "must be integers or strings, got True at the top of the tree; rename it"),
    ({"a": {(0, 1): np.ones(2)}}, "must be integers or strings, got .0, 1. at 'a'"),
    ({"a": nnx.List([])}, "the tree holds no leaves"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_other_trees_are_refused(tree, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path / "c", tree)


names = st.text("ab%:.0é", max_size=3)
trees = st.recursive(
    st.integers(0, 100).map(lambda i: np.full(2, i, np.int32)),
    lambda inner: (
        st.dictionaries(names, inner, max_size=3)
        | st.dictionaries(st.integers(-3, 30), inner, max_size=3)
        | st.lists(inner, max_size=3)
        | st.tuples(inner, st.none())
    ),
    max_leaves=6,
)


@given(st.dictionaries(names, trees, min_size=1, max_size=3).filter(jax.tree.leaves))
def test_any_nested_containers_come_back(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("any") / "c"
    checkpoint.save(path, tree)
    chex.assert_trees_all_equal(checkpoint.load(path), tree)
