"""Shardings from logical axes: what is accepted for rules and axes, and what is refused."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

import jaxquant as jq

MESH = AbstractMesh((2, 4), ("data", "model"))
SHAPE = jax.ShapeDtypeStruct((64, 32), jnp.float32)
TREE = {"up": SHAPE, "norm": jax.ShapeDtypeStruct((64,), jnp.float32)}
AXES = {"up": ("embed", "mlp"), "norm": ("embed",)}
RULES = [("mlp", "model"), ("embed", None)]


def specs(axes, rules=RULES, tree=None):
    found = jq.distributed.sharding(TREE if tree is None else tree, MESH, rules, axes)
    return jax.tree.map(lambda s: s.spec, found)


@pytest.mark.parametrize(
    "axes",
    [
        {"up": ["embed", "mlp"], "norm": ["embed"]},
        {"up": P("embed", "mlp"), "norm": P("embed")},
        AXES | {"none": None, "empty": (), "whole": P()},
    ],
)
def test_forms_of_names(axes):
    assert specs(axes) == specs(AXES)


def test_lists_and_tuples_of_leaves():
    """They are containers where the tree has containers."""
    tree = {"pair": (SHAPE, SHAPE), "layers": [TREE, TREE]}
    axes = {"pair": (None, ["embed", "mlp"]), "layers": [AXES, AXES]}
    found = specs(axes, tree=tree)
    assert found["pair"] == (P(), P(None, "model"))
    assert found["layers"] == [specs(AXES)] * 2
    assert specs({"pair": [None, None]}, tree={"pair": tree["pair"]}) == {"pair": (P(), P())}


@pytest.mark.parametrize("rules", [dict(RULES), [["mlp", ["model"]], ("other", "data")]])
def test_forms_of_rules(rules):
    """A list of rules may serve several models, so it may have names that no weight has."""
    assert specs(AXES, rules) == specs(AXES)


@pytest.mark.parametrize(
    ("axes", "match"),
    [
        (AXES | {"upp": ("embed", "mlp")}, r"for paths that are no leaves, \['upp'\]; correct"),
        ({"upp": ("embed", "mlp"), "norm": ("embed",)},
         r"no names for \['up'\] and names for paths that are no leaves, \['upp'\]"),
        (AXES | {"up": "embed"}, r"axes: up: expected a tuple with a name .*, got 'embed'$"),
        (AXES | {"up": (1, "mlp")}, r"axes: up/0: expected a tuple with a name .*, got 1$"),
    ],
)  # fmt: skip
def test_wrong_axes(axes, match):
    with pytest.raises(ValueError, match=match):
        specs(axes)


@pytest.mark.parametrize(
    ("rules", "got"),
    [
        (["ab"], "'ab'"), ([("mlp",)], r"\('mlp',\)"),
        ([("mlp", "model", "data")], r"\('mlp', 'model', 'data'\)"), ([None], "None"),
        ([("mlp", 4)], r"\('mlp', 4\)"), ([(None, "model")], r"\(None, 'model'\)"),
    ],
)  # fmt: skip
def test_rules_that_are_not_pairs(rules, got):
    with pytest.raises(ValueError, match=f"rules: expected pairs .*, got {got}$"):
        specs(AXES, rules)
