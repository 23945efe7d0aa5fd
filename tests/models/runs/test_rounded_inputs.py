"""Models whose activations are rounded: folds, a rotated residual stream, an exact prefix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.core.paths import replace_leaves
from jaxquant_models import load
from jaxquant_models.architectures.invariances import folds, residual
from jaxquant_models.readers.checkpoint import save_model
from jaxquant_models.runs.calibration import calibrate_model
from jaxquant_models.runs.generate import generate
from jaxquant_models.runs.module_loss import ModuleLoss
from jaxquant_models.runs.quantization import quantize_model
from jaxquant_models.runs.recipes import recipe_of
from jaxquant_models.runs.rotation import random_rotation, rotate_model
from tests.support.tiny_llama import BASE, FAMILIES, random_tensors, write_folder

TOKENS = np.random.default_rng(0).integers(0, 256, (4, 24))


def made(folder, hf=BASE):
    return load(write_folder(folder / "m", hf, random_tensors(hf)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return made(tmp_path_factory.mktemp("m"))


@pytest.fixture(scope="module")
def stats(tiny):
    return calibrate_model(tiny, TOKENS, weighting="uniform", sample=32)


def rounded(model, activations):
    """Weights of 8 bits, and inputs as said."""
    params = jq.quantize(model.params, recipe_of(jq.rtn(8, -1)), model.sites())
    return jq.ptq.with_activations(params, activations)


def near(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_fold_and_the_stream_turns_in_every_family(family, tmp_path):
    """Function preserved by smoothing, folded and carried, and by a rotation folded everywhere."""
    model = made(tmp_path, FAMILIES[family])
    want = model.apply_fn(model.params, TOKENS)
    stats = calibrate_model(model, TOKENS, weighting="uniform")
    floats = recipe_of(jq.smoothquant(16, activations=None))
    folded = jq.ptq.fold(model.params, floats, stats, folds(model.config))
    assert near(model.apply_fn(folded.params, TOKENS), want) < 1e-5
    carried = jq.quantize(model.params, floats, stats)
    assert near(jq.quantized(model.apply_fn)(carried, TOKENS), want) < 1e-5
    turned = rotate_model(model, random_rotation(model, jax.random.key(0)))
    assert near(turned.apply_fn(turned.params, TOKENS), want) < 1e-5
    assert not turned.config.tie_embeddings
    for name in ("attn_norm", "mlp_norm"):
        assert jnp.all(turned.params["layers"][name]["scale"] == 1)


def test_a_tied_embedding_is_not_rotated(tmp_path):
    model = made(tmp_path, FAMILIES["llama-tied"])
    with pytest.raises(ValueError, match="untie it first"):
        residual(model.config)


def test_a_prefix_is_exact(tiny):
    """Two bits for what comes after; the first tokens' logits are those of float activations."""
    quantized = rounded(tiny, "int2")
    model = dataclasses.replace(tiny, prefix=3)
    got = jq.quantized(model.apply_fn)(quantized, TOKENS)
    floats = jq.quantized(tiny.apply_fn)(jq.ptq.with_activations(quantized, None), TOKENS)
    without = jq.quantized(tiny.apply_fn)(quantized, TOKENS)
    np.testing.assert_allclose(got[:, :3], floats[:, :3], rtol=1e-4, atol=1e-4)
    assert near(got[:, 3:], floats[:, 3:]) > 1e-2 and near(got[:, 3:], without[:, 3:]) > 1e-2


def test_generation_after_an_exact_prefix(tiny):
    model = dataclasses.replace(tiny, prefix=3)
    prompt = TOKENS[0, :9].tolist()
    fn = jq.quantized(model.apply_cached)
    got = generate(fn, tiny.params, tiny.config, prompt, 6)
    assert got == generate(tiny.apply_cached, tiny.params, tiny.config, prompt, 6)
    params = rounded(tiny, "int8")
    ids = list(prompt)
    for _ in range(6):  # the whole text again for every token
        logits = jq.quantized(model.apply_fn)(params, jnp.array([ids]))
        ids.append(int(logits[0, -1].argmax()))
    assert generate(fn, params, tiny.config, prompt, 6) == ids[9:]


def test_statistics_leave_the_prefix_out(tiny):
    """Those of the tokens after it, as the whole text makes them."""
    model = dataclasses.replace(tiny, prefix=2)
    got = calibrate_model(model, TOKENS, weighting="uniform", sample=200)
    whole = calibrate_model(tiny, TOKENS, weighting="uniform", sample=200)
    for path in ("layers/attn/q/kernel", "layers/mlp/down/kernel"):
        a, b = got.of(path), whole.of(path)
        assert np.all(a.rows == 4 * 22) and np.all(b.rows == 4 * 24)
        assert jnp.all(a.high <= b.high + 1e-5) and jnp.any(a.high < b.high - 1e-3)


def test_inspection_is_of_the_module(tiny, stats):
    """The float weights lose nothing, rounded ones what attention or the MLP loses by them."""
    inspector = ModuleLoss.of(tiny, TOKENS)
    layers = tiny.params["layers"]
    of = lambda module, names, change: {
        f"layers/{module}/{n}/kernel": change(layers[module][n]["kernel"][1]) for n in names
    }
    for module, names in (("attn", "qkv"), ("mlp", ("gate", "up"))):
        assert inspector(of(module, names, lambda w: w), 1) < 1e-10
        scaled = lambda by, m=module, n=names: float(inspector(of(m, n, lambda w: w * by), 1))
        assert 0 < scaled(1.01) < scaled(1.1)
    assert inspector(of("mlp", ["down"], lambda w: w), 1) is None
    recipe = recipe_of(jq.awq(3, 8))
    calls, kept = [], {}
    counted = lambda *a: calls.append(a) or inspector(*a)
    searched, again = (
        quantize_model(tiny, recipe, stats, inspect=judge, finished=kept)
        for judge in (counted, None)  # what is kept is not searched for again
    )
    assert calls
    jax.tree.map(np.testing.assert_array_equal, searched.params, again.params)
    got, want = (f(m.params, TOKENS) for f, m in ((jq.quantized(tiny.apply_fn), searched),
                                                  (tiny.apply_fn, tiny)))  # fmt: skip
    assert near(got, want) < 0.5


@pytest.mark.parametrize(
    "method",
    [jq.smoothquant(), jq.smoothquant(activations="int8,static"), jq.duquant(block=8, steps=4),
     jq.quarot(), jq.awq(4, 8), jq.flatquant(), jq.smoothquant(4), jq.smoothquant(2)],
    ids=lambda m: m.name,
)  # fmt: skip
def test_every_method_is_saved_and_served(method, tiny, stats, tmp_path):
    model = dataclasses.replace(tiny, prefix=1)
    recipe = recipe_of(method)
    made = quantize_model(model, recipe, stats)
    save_model(tmp_path / "q", made, recipe)
    back = load(tmp_path / "q")
    assert back.prefix == 1
    fn = jax.jit(jq.quantized(model.apply_fn))
    half = lambda name: jax.tree.map(
        lambda a: a.astype(jnp.float16).astype(a.dtype), made.params[name]
    )
    want = fn({**made.params, **{name: half(name) for name in ("embed", "head")}}, TOKENS)
    np.testing.assert_array_equal(fn(back.params, TOKENS), want)
    layer = back.params["layers"]["mlp"]["down"]["kernel"]
    assert layer.activations == method.activations


def test_what_is_not_finite_is_not_saved(tiny, tmp_path):
    """Scales of packed weights, say after healing that diverged, and weights that are kept."""
    recipe = recipe_of(jq.rtn(4, 8))
    made = quantize_model(tiny, recipe, None)
    leaves = dict(jq.core.path_leaves(made.params))
    packed = next(path for path, w in leaves.items() if isinstance(w, jq.QTensor))
    kept = next(path for path, w in leaves.items() if not isinstance(w, jq.QTensor))
    for path in (packed, kept):
        nan = lambda a: jnp.full_like(a, jnp.nan) if a.dtype.kind == "f" else a
        bad = replace_leaves(made.params, {path: jax.tree.map(nan, leaves[path])})
        with pytest.raises(ValueError, match=f"{path} holds values that are not finite"):
            save_model(tmp_path / "q", dataclasses.replace(made, params=bad), recipe)
        assert not (tmp_path / "q").exists()
