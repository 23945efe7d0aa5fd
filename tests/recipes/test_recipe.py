"""Recipes: first match wins, total, resolved before any compute."""

import json

import jax
import jax.numpy as jnp
import pytest

import jaxquant as jq

PARAMS = {
    "embed": {"embedding": jnp.ones((96, 64))},
    "mlp": {"up": {"kernel": jnp.ones((64, 32))}, "down": {"kernel": jnp.ones((32, 64))}},
    "norm": {"scale": jnp.ones(64)},
}


def chosen(recipe, **kwargs):
    return {e.path: e.method for e in jq.recipes.resolve(recipe, PARAMS, **kwargs).entries}


def test_first_match_wins_and_star_crosses_slashes():
    a, b = jq.rtn(bits=3, group_size=32), jq.rtn(bits=4, group_size=32)
    got = chosen(jq.Recipe([("mlp/*up*", a), ("*kernel", b), ("*", jq.KEEP)]))
    assert got == {
        "embed/embedding": jq.KEEP,
        "mlp/up/kernel": a,
        "mlp/down/kernel": b,
        "norm/scale": jq.KEEP,
    }


def test_one_method_means_what_the_function_contracts():
    def fn(p, ids):
        return jnp.take(p["embed"]["embedding"], ids, 0) @ p["mlp"]["up"]["kernel"]

    method = jq.rtn(group_size=32)
    found = jq.sites(fn, PARAMS, jnp.array([1]))
    with pytest.warns(
        UserWarning, match="embed/embedding .*: the function only looks up their rows"
    ):
        got = chosen(method, found=found)
    assert [p for p, m in got.items() if m == method] == ["mlp/up/kernel"]
    with pytest.warns(
        UserWarning, match="embed/embedding .*: without sites they look like embedding tables"
    ):
        got = chosen(method)
    assert [p for p, m in got.items() if m == method] == ["mlp/down/kernel", "mlp/up/kernel"]


def test_plan_prints_the_bytes_that_quantize_makes():
    recipe = jq.Recipe([("*kernel", jq.rtn(bits=3, group_size=32)), ("*", jq.KEEP)])
    plan = jq.recipes.resolve(recipe, jax.eval_shape(lambda: PARAMS))
    made = jq.quantize(PARAMS, recipe)
    assert plan.bits_per_weight == pytest.approx(jq.bits_per_weight(made))
    assert {e.path: e.bytes for e in plan.entries} == {
        p: w.nbytes for p, w in jq.core.path_leaves(made)
    }
    assert f"{plan.bits_per_weight:.3f} bits per quantized weight" in str(plan)


def test_json_round_trip_and_short_form():
    recipe = jq.Recipe([("*kernel", jq.gptq(bits=3, act_order=False)), ("*", jq.KEEP)])
    assert jq.Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    short = [
        {"pattern": "*kernel", "method": "gptq", "bits": 3, "act_order": False},
        {"pattern": "*", "method": "keep"},
    ]
    assert jq.Recipe.from_json(short) == recipe


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("*kernl", jq.KEEP), ("*", jq.KEEP)], "matches no leaf; nearest: .*kernel"),
        ([("*kernel", jq.KEEP)], "no pattern matches 'embed/embedding'"),
        ([("*", jq.rtn(group_size=32))], "'norm/scale' cannot be quantized"),
        ([("mlp/*", jq.rtn(group_size=64)), ("*", jq.KEEP)], "mlp/down/kernel: group_size 64"),
        ([("*", "gptq")], "expected a method or KEEP"),
    ],
)
def test_recipes_that_do_not_resolve(rules, message):
    with pytest.raises(ValueError, match=message):
        jq.recipes.resolve(jq.Recipe(rules), PARAMS)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "a recipe must be a list"),
        ([{"pattern": "*"}], "a rule must be"),
        ([{"pattern": "*", "method": "magic"}], "unknown method"),
        ([{"pattern": "*", "method": "rtn", "bits": 5}], "bits must be one of"),
        ([{"pattern": "*", "method": "rtn", "bits": 4.0}], "bits must be int, got 4.0"),
        ([{"pattern": "*", "method": "rtn", "symmetric": "no"}], "symmetric must be bool"),
        ([{"pattern": "*", "method": "gptq", "block_size": 1.5}], "block_size must be int"),
        ([{"pattern": "*", "method": ["rtn"]}], "a method must be a name or an object"),
        ([{"pattern": "*", "method": {"type": "Magic"}}], "unknown type 'Magic'"),
        (
            [
                {
                    "pattern": "*",
                    "method": {"type": "Method", "name": "m", "rounder": 3, "format": 4},
                }
            ],
            r"rounder must be a Rounder \(LDLQ\(\), ...\): 3 is not a Rounder",
        ),
    ],
)
def test_bad_recipe_files(value, message):
    with pytest.raises(ValueError, match=message):
        jq.Recipe.from_json(value)


def test_feedback_needs_statistics_before_any_compute():
    recipe = jq.Recipe([("*kernel", jq.gptq(group_size=32)), ("*", jq.KEEP)])
    with pytest.raises(ValueError, match="needs statistics"):
        jq.quantize(PARAMS, recipe)


def test_eval_shape_gives_the_shapes_without_computing():
    recipe = jq.Recipe([("*kernel", jq.rtn(bits=3, group_size=32)), ("*", jq.KEEP)])
    shapes = jax.eval_shape(lambda p: jq.quantize(p, recipe), PARAMS)
    made = jq.quantize(PARAMS, recipe)
    assert jax.tree.structure(shapes) == jax.tree.structure(made)
    assert jq.bits_per_weight(shapes) == jq.bits_per_weight(made)


def test_statistics_of_another_tree():
    method = jq.rtn(group_size=32)
    with pytest.raises(
        ValueError, match="belong to another tree: 'embed/embedding' .* unknown there"
    ):
        jq.quantize(PARAMS, method, {})
    fn = lambda p, x: x @ p["w"]
    stats = jq.calibrate(fn, {"w": jnp.ones((64, 8))}, [jnp.ones((5, 64))])
    with pytest.raises(ValueError, match=r"float32\[64, 16\] here, of shape \(64, 8\) there"):
        jq.quantize({"w": jnp.ones((64, 16))}, jq.gptq(group_size=32), stats)


def test_what_is_neither_recipe_nor_method():
    for wrong in ("gptq", jq.KEEP, 4):
        with pytest.raises(ValueError, match="expected a Recipe or a method"):
            jq.quantize(PARAMS, wrong)
    with pytest.raises(ValueError, match="expected a method"):
        jq.quantize_array(jnp.ones((64, 8)), jq.Recipe([("*", jq.rtn())]))
    with pytest.raises(ValueError, match="an empty array"):
        jq.quantize({"w": jnp.ones((64, 0))}, jq.rtn())


def test_leaves_that_are_no_arrays_are_kept():
    made = jq.quantize({"w": jnp.ones((64, 8)), "rate": 0.1, "name": "x"}, jq.rtn())
    assert (made["rate"], made["name"]) == (0.1, "x")


def test_a_weight_that_a_bare_method_would_miss_is_named():
    params = {"a": jnp.ones((32, 32)), "b": jnp.ones((32, 4, 8))}
    fn = lambda p, x: x @ p["a"] @ p["b"].reshape(32, 32)
    found = jq.sites(fn, params, jnp.ones((2, 32)))
    assert found["b"].otherwise and not found["a"].otherwise
    with pytest.warns(UserWarning, match=r"not quantized, .*: b \(50.0%\): .*cannot follow"):
        jq.recipes.resolve(jq.rtn(group_size=32), params, found)


def test_a_path_names_itself():
    params = {"a[0]": jnp.ones((64, 8)), "a0": jnp.ones((64, 8))}
    made = jq.quantize(params, jq.Recipe([("a[0]", jq.rtn()), ("*", jq.KEEP)]))
    assert isinstance(made["a[0]"], jq.QTensor)


@pytest.mark.parametrize("factor", [1e7, 1e-8])
def test_scales_out_of_range(factor):
    w = factor * jax.random.normal(jax.random.key(0), (64, 8))
    with pytest.raises(
        ValueError, match='w: weights up to .* use scale_dtype="bfloat16" or "float32"'
    ):
        jq.quantize({"w": w}, jq.rtn())
    q = jq.quantize({"w": w}, jq.rtn(scale_dtype="float32"))["w"]
    assert float(jnp.linalg.norm(q.dequantize() - w) / jnp.linalg.norm(w)) < 0.15


def test_closed_over_weights_under_eval_shape():
    shapes = jax.eval_shape(lambda: jq.quantize({"w": jnp.ones((64, 8))}, jq.rtn()))
    assert shapes["w"].shape == (64, 8)
