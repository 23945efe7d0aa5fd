"""PEFT folders: round trips, a literal forward pass, the real PEFT, transforms, and bad input."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxquant as jq
from jaxquant.rounding import Nearest
from jaxquant_models import load
from jaxquant_models.readers.peft import load_peft, save_peft
from jaxquant_models.readers.peft_files import BASE as DIGEST
from jaxquant_models.readers.peft_files import CONFIG, WEIGHTS, recorded
from jaxquant_models.readers.peft_places import digest_of_base
from tests.models.readers.peft_oracle import CONFIGS, DATA, TOKENS, weights
from tests.support.tiny_llama import BASE, FAMILIES, forward, random_tensors, write_folder

TARGETS = ("layers/*attn/[qv]/kernel", "layers/*mlp/down/kernel")
KERNELS = "layers/*kernel"
T = jq.transforms
NORMAL, INTEGER = jq.formats.NormalFloat(4, 8), jq.formats.Integer(8, 8)
METHODS = {
    "floats": None,
    "nf4": jq.Method("nf4", Nearest(), NORMAL),
    "rotated inputs": jq.Method("in", Nearest(), INTEGER, input=T.Rotation(block=16)),
    "scaled inputs": jq.Method("smooth", Nearest(), INTEGER, input=T.Scaling()),
    "both rotated": jq.Method("both", Nearest(), INTEGER, input=T.Rotation(), output=T.Rotation()),
}
KINDS = {
    "plain": jq.adapters.LoRA(4),
    "alpha": jq.adapters.LoRA(3, alpha=2.5, dropout=0.1, dtype="bfloat16"),
    "rslora": jq.adapters.LoRA(4, alpha=3, rslora=True),
    "dora": jq.adapters.LoRA(2, alpha=4, dora=True),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("peft") / "model", BASE, weights())


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def bases(model):
    """Name of a method -> the model quantized by it."""
    found, rng, sites = {}, np.random.default_rng(0), model.sites()

    def uneven(w):
        """Another weight: factors are 1 until they are trained."""
        if not isinstance(w, jq.QTensor) or "factors" not in w.input_data:
            return w
        ones = w.input_data["factors"]
        factors = jnp.asarray(rng.uniform(0.5, 2, ones.shape), ones.dtype)
        return dataclasses.replace(w, input_data={"factors": factors}, shared="")

    for name, method in METHODS.items():
        recipe = jq.Recipe([*((glob, method) for glob in TARGETS if method), ("*", jq.KEEP)])
        params = jq.quantize(model.params, recipe, sites) if method else model.params
        params = jax.tree.map(uneven, params, is_leaf=lambda w: isinstance(w, jq.QTensor))
        found[name] = dataclasses.replace(model, params=params)
    return found


def drawn(model, lora, targets=TARGETS):
    """The model with an adapter whose values are drawn at random."""
    packed = any(isinstance(w, jq.QTensor) for _, w in jq.core.path_leaves(model.params))
    stats = None if packed else model.sites()
    params = jq.adapt(model.params, lora, targets=targets, stats=stats)
    rng, new = np.random.default_rng(1), {}
    for path, w in jq.core.path_leaves(params):
        if not isinstance(getattr(w, "format", None), jq.adapters.Adapted):
            continue
        b = jnp.asarray(rng.normal(0, 0.2, w.data["lora_b"].shape), w.data["lora_b"].dtype)
        data = {**w.data, "lora_b": b}
        if "magnitude" in w.data:
            factors = rng.uniform(0.7, 1.3, w.data["magnitude"].shape)
            data["magnitude"] = w.data["magnitude"] * jnp.asarray(factors, jnp.float32)
        new[path] = dataclasses.replace(w, data=data)
    return dataclasses.replace(model, params=jq.core.paths.replace_leaves(params, new))


@functools.cache
def compiled(apply_fn):
    return jax.jit(jq.quantized(apply_fn))


def logits(model):
    tokens = jnp.asarray(TOKENS[None], jnp.int32)
    return np.asarray(compiled(model.apply_fn)(model.params, tokens)[0])


def close(a, b, rtol=1e-5):
    np.testing.assert_allclose(a, b, atol=rtol * np.abs(b).max(), rtol=0)


def literal(tensors, folder):
    """Logits of a forward pass in which W + s B A stands in the place of W; by hand, in NumPy."""
    config, adapter = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    root = np.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    tensors = {name: w.astype(np.float64) for name, w in tensors.items()}
    for name in [n for n in adapter if n.endswith("lora_A.weight")]:
        at = name.removesuffix(".lora_A.weight")
        module = at.removeprefix("base_model.model.")
        a, b = (adapter[f"{at}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        w = tensors[f"{module}.weight"] + config["lora_alpha"] / root * b @ a
        if config["use_dora"]:
            length = np.sqrt((w**2).sum(axis=1))
            w = w * (adapter[f"{at}.lora_magnitude_vector"] / length)[:, None]
        tensors[f"{module}.weight"] = w
    return forward(BASE, tensors, TOKENS)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_that_peft_wrote(model, name, tmp_path):
    found = load_peft(DATA / name, model)
    expected = np.load(DATA / f"{name}.npy")
    close(logits(found), expected)
    assert np.abs(logits(model) - expected).max() > 0.1 * np.abs(expected).max()
    save_peft(tmp_path / "o", found, "tiny")
    theirs, ours = load_file(DATA / name / WEIGHTS), load_file(tmp_path / "o" / WEIGHTS)
    assert theirs.keys() == ours.keys()
    assert all(np.array_equal(theirs[key], ours[key]) for key in theirs)
    theirs, ours = (json.loads((at / name).read_text()) for at, name in
                    ((DATA / name, CONFIG), (tmp_path / "o", CONFIG)))  # fmt: skip
    theirs["target_modules"].sort(), ours["target_modules"].sort()
    assert ours.items() <= theirs.items()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["floats", "nf4"])
def test_the_model_computes_what_the_folder_says(bases, folder, method, kind, tmp_path):
    base = bases[method]
    adapted = drawn(base, KINDS[kind])
    save_peft(tmp_path / "o", adapted)
    plain = {f"{m}.weight": w for m, w in decoded(base).items()}
    expected = literal(weights() | plain, tmp_path / "o")
    close(logits(adapted), expected)
    close(logits(load_peft(tmp_path / "o", base)), expected)
    config = json.loads((tmp_path / "o" / CONFIG).read_text())
    config["lora_alpha"] *= 1.1
    (tmp_path / "o" / CONFIG).write_text(json.dumps(config))
    assert np.abs(literal(weights() | plain, tmp_path / "o") - expected).max() > 1e-3


def decoded(model):
    """The matrices that a model computes with, by their modules."""
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
             "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
             "down": "mlp.down_proj"}  # fmt: skip
    found = {}
    for path, w in jq.core.path_leaves(jq.dequantize(model.params)):
        parts = path.split("/")
        if parts[0] == "layers" and parts[-1] == "kernel":
            for i, matrix in enumerate(np.asarray(w)):
                found[f"model.layers.{i}.{names[parts[-2]]}"] = matrix.T
    return found


@pytest.mark.parametrize("kind", ["plain", "dora"])
@pytest.mark.parametrize("method", ["rotated inputs", "scaled inputs", "both rotated"])
def test_transforms(bases, method, kind, tmp_path):
    """Files hold factors in the basis of the model, whatever basis the weights are stored in."""
    base = bases[method]
    weight = base.params["layers"]["attn"]["q"]["kernel"]
    assert weight.input is not None
    if kind == "dora" and weight.output is not None:
        with pytest.raises(ValueError, match=r"layers/attn/q/kernel: DoRA scales the outputs"):
            save_peft(tmp_path / "o", drawn(base, KINDS[kind]))
        with pytest.raises(ValueError, match=r"layers/attn/q/kernel: DoRA scales the outputs"):
            load_peft(DATA / "dora", base)
        return
    adapted = drawn(base, KINDS[kind])
    save_peft(tmp_path / "o", adapted)
    plain = {f"{m}.weight": w for m, w in decoded(base).items()}
    close(logits(adapted), literal(weights() | plain, tmp_path / "o"), 3e-5)
    again = load_peft(tmp_path / "o", base)
    close(logits(again), logits(adapted), 3e-5)
    # As they are, factors in the stored basis would be wrong.
    a = load_file(tmp_path / "o" / WEIGHTS)[
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    ]
    stored = np.asarray(adapted.params["layers"]["attn"]["q"]["kernel"].data["lora_a"][0]).T
    assert a.shape[1] == 24 and (a.shape != stored.shape or np.abs(a - stored).max() > 1e-3)


@pytest.mark.parametrize("method", ["floats", "nf4"])
def test_layers_apart(bases, method, tmp_path):
    stacked = bases[method]
    apart = dataclasses.replace(stacked, params=jq.ptq.unstack(stacked.params, "layers"))
    assert digest_of_base(apart) == digest_of_base(stacked)
    adapted = drawn(stacked, KINDS["dora"])
    save_peft(tmp_path / "a", adapted)
    found = load_peft(tmp_path / "a", apart)
    close(logits(found), logits(adapted))
    save_peft(tmp_path / "b", found)
    a, b = (load_file(tmp_path / name / WEIGHTS) for name in "ab")
    assert a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
    assert (tmp_path / "a" / CONFIG).read_text() == (tmp_path / "b" / CONFIG).read_text()


def test_a_start_that_complements_the_packed_weights_has_scaling_one(model, bases, tmp_path):
    q = bases["nf4"].params
    lora = jq.adapters.LoRA(4, init="loftq")
    params = jq.adapt(q, lora, targets=TARGETS[:1], floats=model.params)
    adapted = dataclasses.replace(model, params=params)
    save_peft(tmp_path / "o", adapted)
    config = json.loads((tmp_path / "o" / CONFIG).read_text())
    assert config["lora_alpha"] == config["r"] == 4 and not config["use_rslora"]
    with pytest.raises(ValueError, match="was made for another base"):  # LoftQ changes the codes
        load_peft(tmp_path / "o", dataclasses.replace(model, params=q))


def test_the_digest_of_the_base(bases, tmp_path):
    base = bases["nf4"]
    adapted = drawn(base, KINDS["plain"])
    save_peft(tmp_path / "o", adapted)
    assert recorded(tmp_path / "o")[DIGEST] == digest_of_base(base) == digest_of_base(adapted)
    rounded = dataclasses.replace(base, params=jq.ptq.with_activations(base.params, "int8"))
    assert digest_of_base(rounded) == digest_of_base(base)
    for name, other in bases.items():
        if name != "nf4":
            with pytest.raises(ValueError, match=r"made for another base than .*: the digest of"):
                load_peft(tmp_path / "o", other)
    assert np.isfinite(logits(load_peft(tmp_path / "o", bases["floats"], any_base=True))).all()
    assert recorded(DATA / "lora").get(DIGEST) is None and recorded(tmp_path / "none") == {}


def test_floats_stored_in_half_precision_have_the_same_digest(model):
    half = jax.tree.map(lambda a: a.astype(jnp.float16), model.params)
    assert digest_of_base(dataclasses.replace(model, params=half)) == digest_of_base(model)
    other = jax.tree.map(lambda a: a * 1.01, model.params)
    assert digest_of_base(dataclasses.replace(model, params=other)) != digest_of_base(model)


@pytest.mark.parametrize("family", ["qwen3", "llama-tied", "llama-biases"])
def test_other_families(family, tmp_path):
    hf = FAMILIES[family]
    model = load(write_folder(tmp_path / "m", hf, random_tensors(hf)))
    adapted = drawn(model, KINDS["dora"], (KERNELS,))
    save_peft(tmp_path / "o", adapted)
    assert len(json.loads((tmp_path / "o" / CONFIG).read_text())["target_modules"]) == 7
    close(logits(load_peft(tmp_path / "o", model)), logits(adapted))


def test_an_unpacked_weight_beside_packed_ones(bases, tmp_path):
    adapted = drawn(bases["nf4"], KINDS["plain"], ("head/kernel", *TARGETS))
    save_peft(tmp_path / "o", adapted)
    close(logits(load_peft(tmp_path / "o", bases["nf4"])), logits(adapted))


def test_bfloat16_and_defaults(model, tmp_path):
    shutil.copytree(DATA / "lora", tmp_path / "o")
    tensors = load_file(tmp_path / "o" / WEIGHTS)
    a = next(iter(tensors.values()))
    rank = 8
    wide = {}
    for name, value in tensors.items():
        axis = 0 if "lora_A" in name else 1
        more = [(0, 0), (0, 0)]
        more[axis] = (0, rank - value.shape[axis])
        wide[name] = np.pad(value, more).astype(ml_dtypes.bfloat16)
    assert a.dtype == np.float32
    save_file(wide, tmp_path / "o" / WEIGHTS)
    (tmp_path / "o" / CONFIG).write_text('{"peft_type": "LORA"}')
    found = load_peft(tmp_path / "o", model)
    lora = found.params["layers"]["attn"]["q"]["kernel"].format.adapter
    assert lora == jq.adapters.LoRA(8, alpha=8.0) and lora.scaling == 1


# --- bad input ------------------------------------------------------------------------------------

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "LOHA"}, "peft_type must be LORA, got 'LOHA'"),
        ({"peft_type": None}, "lacks 'peft_type'"),
        ({"task_type": "SEQ_CLS"}, "task_type must be CAUSAL_LM, got 'SEQ_CLS'"),
        ({"r": "4"}, "r must be a valid integer, got '4'"),
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"r": 5}, r"lora_A.weight must have shape \[5, 24\], as r is 5 .* got \[4, 24\]"),
        ({"lora_alpha": -1}, "lora_alpha must be above 0, got -1"),
        ({"lora_dropout": 1.0}, "lora_dropout must be below 1"),
        ({"bias": "all"}, "bias must be none, got 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out must be false"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is not supported"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"use_dora": True}, "lacks the tensor .*lora_magnitude_vector"),
        ({"use_dora": 1}, "use_dora must be a valid boolean"),
        ({"target_modules": ["q_proj", "c_attn"]}, "'c_attn', which the model does not have; it "),
    ],
)  # fmt: skip
def test_wrong_configurations(model, change, message, tmp_path):
    shutil.copytree(DATA / "lora", tmp_path / "o")
    config = json.loads((tmp_path / "o" / CONFIG).read_text()) | change
    config = {name: value for name, value in config.items() if value is not None}
    (tmp_path / "o" / CONFIG).write_text(json.dumps(config))
    one_line(lambda: load_peft(tmp_path / "o", model), message)


def one_line(call, match):
    with pytest.raises(ValueError, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({f"{Q0}.lora_A.weight": None}, "lacks the tensor .*layers.0.self_attn.q_proj.lora_A"),
        ({f"{Q0}.lora_B.weight": None}, "lacks the tensor .*layers.0.self_attn.q_proj.lora_B"),
        ({f"{Q0}.lora_A.weight": None, f"{Q0}.lora_B.weight": None}, "same modules of all layers"),
        ({f"{Q0}.lora_A.weight": np.ones((4, 23), np.float32)}, r"\[4, 24\], .* got \[4, 23\]"),
        ({f"{Q0}.lora_A.weight": np.ones((4, 24), np.int8)}, "must be floating-point, got int8"),
        ({f"{Q0}.lora_A.weight": np.full((4, 24), np.nan, np.float32)}, "has NaN or infinite"),
        ({f"{Q0}.lora_magnitude_vector": np.ones(32, np.float32)}, "but use_dora is false"),
        ({f"{Q0}.base_layer.weight": np.ones((32, 24), np.float32)}, "which is no LoRA factor"),
        ({"base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight":
          np.ones((4, 24), np.float32)}, "no LoRA factor of a matrix that the model has"),
    ],
)  # fmt: skip
def test_wrong_tensors(model, change, message, tmp_path):
    shutil.copytree(DATA / "lora", tmp_path / "o")
    tensors = load_file(tmp_path / "o" / WEIGHTS) | change
    save_file({n: a for n, a in tensors.items() if a is not None}, tmp_path / "o" / WEIGHTS)
    one_line(lambda: load_peft(tmp_path / "o", model), message)


@pytest.mark.parametrize(
    "file, content, message",
    [
        (CONFIG, None, "is not a PEFT folder: it holds no adapter_config.json"),
        (CONFIG, b"{", "adapter_config.json is not JSON"),
        (CONFIG, b"[]", "must hold a JSON object"),
        (WEIGHTS, None, "adapter_model.safetensors is missing"),
        (WEIGHTS, b"garbage", "not a complete safetensors file"),
        ("adapter_model.bin", b"", "adapter_model.bin is a pickle, which is not read"),
    ],
)
def test_damaged_folders(model, file, content, message, tmp_path):
    shutil.copytree(DATA / "lora", tmp_path / "o")
    if content is None or file.endswith("bin"):
        (tmp_path / "o" / (WEIGHTS if content is not None else file)).unlink()
    if content is not None:
        (tmp_path / "o" / file).write_bytes(content)
    one_line(lambda: load_peft(tmp_path / "o", model), message)
    one_line(lambda: load_peft(tmp_path / "none", model), "is not a PEFT folder")


def test_what_cannot_be_saved(bases, tmp_path):
    base, save = bases["nf4"], lambda model: save_peft(tmp_path / "o", model)
    one_line(lambda: save(base), "has no adapters to save")
    adapted = drawn(base, KINDS["plain"])
    one_line(lambda: load_peft(DATA / "lora", adapted), "has adapters already")
    mixed = drawn(drawn(base, KINDS["plain"], TARGETS[1:]), KINDS["dora"], TARGETS[:1])
    one_line(lambda: save(mixed), "the adapters on layers/attn/.* differ")
    apart = dataclasses.replace(base, params=jq.ptq.unstack(base.params, "layers"))
    few = drawn(apart, KINDS["plain"], ("layers/1/attn/q/kernel",))
    one_line(lambda: save(few), "layers/0/attn/q/kernel has no adapter, but other layers")
    both = dataclasses.replace(base, params=jq.training.together([adapted.params] * 2))
    one_line(lambda: save(both), "got several together")
    params = jq.adapt(base.params, jq.adapters.PEQA(), targets=TARGETS)
    other = dataclasses.replace(base, params=params)
    one_line(lambda: save(other), "expected a weight with LoRA, got one with PEQA")
    broken = jax.tree_util.tree_map_with_path(
        lambda path, a: a * jnp.nan if "lora_b" in jax.tree_util.keystr(path) else a, adapted.params
    )
    wrong = dataclasses.replace(base, params=broken)
    one_line(lambda: save(wrong), "lora_B.weight holds values that are not finite")
    assert not (tmp_path / "o").exists() and not list(tmp_path.iterdir())


def test_where_a_folder_may_be_written(bases, tmp_path):
    one, two = (drawn(bases["nf4"], KINDS[kind]) for kind in ("plain", "dora"))
    target = tmp_path / "deep" / "o"
    save_peft(target, one, run="r")
    assert recorded(target)["jaxquant_run"] == "r" and len(list(target.parent.iterdir())) == 1
    before = (target / WEIGHTS).read_bytes()
    one_line(lambda: save_peft(target, two), "exists and is not an empty directory")
    assert (target / WEIGHTS).read_bytes() == before
    save_peft(target, two, overwrite=True)
    assert json.loads((target / CONFIG).read_text())["use_dora"]
    (target / "notes.txt").write_text("")
    one_line(lambda: save_peft(target, one, overwrite=True), "move the other files")
    (tmp_path / "file").write_text("")
    one_line(lambda: save_peft(tmp_path / "file", one), "exists and is not an empty directory")


# --- the real PEFT --------------------------------------------------------------------------------


@pytest.mark.skipif(not os.environ.get("PEFT_PYTHON"), reason="needs PEFT_PYTHON, see peft_oracle")
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_what_we_write(model, folder, kind, tmp_path):
    adapted = drawn(model, KINDS[kind], ("head/kernel", *TARGETS))
    save_peft(tmp_path / "o", adapted, str(folder))
    job = ("-m", "tests.models.readers.peft_oracle", "logits", folder, tmp_path / "o")
    root = Path(__file__).parents[3]
    command = [os.environ["PEFT_PYTHON"], "-W", "error::UserWarning", *map(str, job)]
    subprocess.run(command, check=True, cwd=root)
    close(logits(adapted), np.load(tmp_path / "o.npy"))
