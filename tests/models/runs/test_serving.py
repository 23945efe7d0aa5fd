"""Entropy-coded models served: read once into words, with the tokens of the dequantized model."""

import dataclasses
import json
import re

import pytest

import jaxquant as jq
from jaxquant.rounding import Nearest
from jaxquant_models import load
from jaxquant_models.readers.checkpoint import save_model
from jaxquant_models.runs.generate import generate
from jaxquant_models.runs.recipes import recipe_of
from jaxquant_models.runs.serving import serving_model
from tests.support.tiny_llama import BASE, byte_tokenizer_json, random_tensors, write_folder

METHOD = jq.Method(
    "entropy_coded", Nearest(), jq.formats.EntropyCoded(6, states=4, chain=16, lanes=2)
)
WORDS = "(4-bit|8-bit|4-bit and 8-bit) words"
SAID = rf"entropy-coded: \d+\.\d MB on disk, \d+\.\d MB in memory as {WORDS}"
PROMPT = "the quick"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint."""
    float_model = tmp_path_factory.mktemp("serving") / "model"
    write_folder(float_model, BASE | {"max_position_embeddings": 1024}, random_tensors(BASE))
    (float_model / "tokenizer.json").write_text(byte_tokenizer_json())
    model = load(float_model)
    recipe = recipe_of(METHOD)
    params = jq.quantize(model.params, recipe, model.sites())
    save_model(float_model.parent / "coded", dataclasses.replace(model, params=params), recipe)
    return float_model.parent / "coded"


def ids_of(model):
    return model.bos_ids + model.tokenizer.encode(PROMPT)


def test_tokens_are_those_of_the_dequantized_model(folder):
    model = load(folder)
    said = []
    params = serving_model(model, said.append).params
    assert len(said) == 1 and re.fullmatch(SAID, said[0])
    run = lambda fn, params: generate(fn, params, model.config, ids_of(model), 16)
    want = run(model.apply_cached, jq.dequantize(model.params))
    served = jq.quantized(model.apply_cached)
    assert len(want) > 4
    assert run(served, params) == want
    assert run(served, jq.ptq.unstack(params, "layers")) == want
    again = serving_model(dataclasses.replace(model, params=params), said.append).params
    assert again == params and len(said) == 1  # done already


def test_generate_serves_it_and_says_so(folder, run):
    status, out, err = run("generate", folder, "--prompt", PROMPT, "--max-tokens", 8, "--json")
    assert status == 0 and re.search(f"^{SAID}$", err, re.MULTILINE)
    model = load(folder)
    params = jq.dequantize(model.params)
    want = generate(model.apply_cached, params, model.config, ids_of(model), 8)
    assert json.loads(out)["text"] == model.tokenizer.decode(want)


def test_eval_reports_what_is_stored(folder, run, tmp_path):
    (tmp_path / "t").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    arguments = ("--text", tmp_path / "t", "--ctx", 64, "--chunks", 2, "--json")
    status, out, err = run("eval", folder, *arguments)
    report = json.loads(out)
    stored = load(folder, widen=False).params
    assert status == 0 and re.search(f"^{SAID}$", err, re.MULTILINE)
    assert report["bits_per_weight"] == jq.bits_per_weight(stored)
    assert report["bytes"] == sum(w.nbytes for _, w in jq.core.path_leaves(stored))


def test_inspect_shows_the_streams(folder, run):
    status, out, err = run("inspect", folder, "--json")
    formats = {row["path"]: row["format"] for row in json.loads(out)["tensors"]}
    assert status == 0 and "entropy-coded" not in err
    assert formats["layers/mlp/up/kernel"].startswith("EntropyCoded")
