"""The table of a tree: what it counts is what `size` counts, and equal layers share a row."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxquant as jq
from jaxquant.recipes.summary import Row, summary
from tests.support.saved_trees import TREES, abstract, net

FOUR = jq.Recipe([("*kernel", jq.rtn(bits=4, group_size=16)), ("*", jq.KEEP)])


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(32)(nn.Dense(32)(x))


def linen():
    return Dense().init(jax.random.key(0), jnp.ones((1, 32)))


@pytest.mark.parametrize("make", [
    linen, net, lambda: nnx.state(net()), lambda: nnx.split(net()), TREES["equinox"],
    TREES["equinox, quantized"], TREES["quantized state"], TREES["packed"], TREES["latent"],
    lambda: jq.quantize_array(jnp.ones((64, 32)), jq.rtn()), TREES["dtypes"],
])  # fmt: skip
def test_the_rows_add_up_to_the_size(make):
    tree = make()
    found = summary(tree)
    assert found.size == jq.size(tree)
    assert sum(row.bytes for row in found.rows) == found.size.bytes > 0
    assert sum(row.weights for row in found.rows) == found.size.weights
    assert sum(row.count for row in found.rows) >= len(found.rows)
    assert summary(abstract(tree)) == found


def test_equal_layers_share_a_row():
    state = jq.quantize(nnx.state(net()), FOUR)
    assert summary(state).rows[:2] == (
        Row("layers/*/bias", 2, (32,), "float32", 64, 256),
        Row("layers/*/kernel", 2, (32, 32), "rtn", 2048, 1024 + 2 * (128 + 32)),
    )
    assert [row.path for row in summary(linen()).rows] == [
        "params/Dense_*/bias", "params/Dense_*/kernel"
    ]  # fmt: skip


def test_layers_that_differ_are_told_apart():
    """In the kind of rounding, in the shape, and in more than one number."""
    layers = [{"w": jnp.ones((64, 32 if i == 4 else 16))} for i in range(8)]
    recipe = jq.Recipe([("layers/[156]/w", jq.rtn(bits=2)), ("layers/3/w", jq.KEEP),
                        ("*", jq.rtn(bits=4))])  # fmt: skip
    rows = summary(jq.quantize({"layers": layers}, recipe)).rows
    assert [(row.path, row.count, row.method) for row in rows] == [
        ("layers/0,2,7/w", 3, "rtn"), ("layers/1,5-6/w", 3, "rtn"), ("layers/3/w", 1, "float32"),
        ("layers/4/w", 1, "rtn"),
    ]  # fmt: skip
    experts = {f"block_{i:02}": {"experts": [jnp.ones(4)] * 3, "w1": jnp.ones(2)} for i in (3, 4)}
    names = [row.path for row in summary({"a": experts, "b": {"x_01": jnp.ones(2)}}).rows]
    assert names == ["a/block_*/experts/*", "a/block_*/w1", "b/x_01"]
    one = {"block_03": experts["block_03"]}
    assert [row.path for row in summary(one).rows] == ["block_03/experts/*", "block_03/w1"]


def test_a_name_with_a_star_finds_the_weights_of_its_row():
    """So it may be copied into a recipe."""
    tree = {"layers": [{"w": jnp.ones((64, 32)), "v": jnp.ones((64, 32))}] * 3}
    row = summary(tree).rows[1]
    assert row.path == "layers/*/w"
    packed = jq.quantize(tree, jq.Recipe([(row.path, jq.rtn()), ("*", jq.KEEP)]))
    assert [(row.method, row.count) for row in summary(packed).rows] == [("float32", 3), ("rtn", 3)]


def test_methods_are_named():
    of = lambda tree: [row.method for row in summary(tree).rows]
    assert of({"w": jnp.ones((64, 32), jnp.bfloat16), "n": jnp.ones(2, int)}) == ["bfloat16"]
    assert of({"w": jq.quantize_array(jnp.ones((64, 32)), jq.ternary())}) == ["ternary"]
    assert of(TREES["latent"]()) == ["lsq, latent", "float32"]


def test_the_table_is_aligned_and_ends_in_the_total():
    text = str(summary(jq.quantize(nnx.state(net()), FOUR)))
    first, *rows, rule, total = text.splitlines()
    assert set(rule) == {"-"} and len(rule) == max(map(len, text.splitlines()))
    for line in (*rows, total):
        assert len(line) == len(first)  # numbers end where their title ends
        assert line[first.index("shape") - 1] == " " != line[first.index("shape")]
    assert total.split()[:2] == ["total", "8"] and "91.4% quantized" in total


def test_notebooks_draw_a_table():
    tree = {"<b>": jnp.ones((2, 3)), "scale": jnp.float32(1)}
    page = summary(tree)._repr_html_()
    assert page.startswith("<table>") and page.count("<tr>") == 4
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert ">2x3</td>" in page and ">scalar</td>" in page and ">28</th>" in page


@pytest.mark.parametrize("tree", [
    {}, None, 3, jnp.dot, Dense(), {"step": jnp.zeros((), int)}, eqx.nn.Identity(),
])  # fmt: skip
def test_what_holds_no_weights_is_refused(tree):
    with pytest.raises(ValueError, match="expected a tree with floating-point or .*; pass the par"):
        summary(tree)
