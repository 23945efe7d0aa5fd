"""The command: what it prints, its exit status, and one clear line for every bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import storage
from jaxquant.durable import claims
from jaxquant.durable.store import Folder
from jaxquant.storage import checkpoint
from jaxquant_models import load
from jaxquant_models.cli import output
from jaxquant_models.cli.commands import main
from jaxquant_models.cli.output import Output
from jaxquant_models.readers import registry
from jaxquant_models.runs.generated_text import generated_sequences
from jaxquant_models.runs.quantization import plan_model
from tests.support.command import TEXT, fails
from tests.support.generation_memory import generation_memory
from tests.support.stopped import same_bits, stopped_at
from tests.support.tiny_llama import BASE, random_tensors, write_folder


@pytest.fixture(scope="module")
def packed(tiny):
    out = tiny.parent / "packed"
    with pytest.raises(SystemExit):
        main(
            f"quantize {tiny} --method gptq --bits 4 --group-size 8 --out {out} "
            f"--calibration-tokens 1024 --calibration {tiny.parent / 'text.txt'}".split()
        )
    return out


def test_the_four_commands(tiny, packed, run):
    text = tiny.parent / "text.txt"
    status, out, _ = run("eval", packed, "--text", text, "--ctx", 64, "--against", tiny, "--json")
    report = json.loads(out)
    assert status == 0
    assert report["perplexity"] > 1
    assert 0 < report["kl"] < 5
    assert 0 < report["top1_agreement"] <= 1
    assert report["prefill_tokens_per_second"] > 0 and report["compile_seconds"] > 0
    assert report["peak_memory_bytes"] > report["bytes_in_memory"] >= report["bytes"]
    status, out, _ = run("inspect", packed, "--json")
    rows = {r["path"]: r for r in json.loads(out)["tensors"]}
    assert rows["layers/mlp/up/kernel"]["method"] == "gptq"
    assert rows["embed/embedding"]["method"] == "none"
    status, out, _ = run("generate", packed, "--prompt", "the quick", "--max-tokens", 8, "--json")
    assert status == 0
    first = json.loads(out)
    assert first["tokens"] <= 8
    assert first["bytes_in_memory"] > 0 and first["decode_tokens_per_second"] > 0
    assert first["peak_memory_bytes"] > first["bytes_in_memory"] and first["compile_seconds"] > 0
    again = run("generate", packed, "--prompt", "the quick", "--max-tokens", 8, "--json")[1]
    assert json.loads(again)["text"] == first["text"]
    assert run("inspect", packed)[0] == 0


def test_packed_model_is_the_dequantized_one(packed):
    model = load(packed)
    tokens = jnp.arange(64)[None]
    got = jax.jit(jq.quantized(model.apply_fn))(model.params, tokens)
    want = model.apply_fn(jq.dequantize(model.params), tokens)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert jq.explain(model.apply_fn, model.params, tokens).materialised == ()


def test_bytes_are_those_stored(packed, run):
    report = json.loads(run("inspect", packed, "--json")[1])
    formats = {r["path"]: r["format"] for r in report["tensors"]}
    assert formats["embed/embedding"] == "float16"
    assert formats["layers/attn_norm/scale"] == "float32"
    stored = checkpoint.load(packed)
    assert report["bytes"] == sum(w.nbytes for _, w in jq.core.path_leaves(stored))


def test_any_exception_is_one_line(run, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(registry, "outline", broken)
    fails(run("inspect", "x"), 1, "RuntimeError: first second")


def test_a_warning_is_printed_as_it_is(run, monkeypatch):
    """Names of leaves and files may look like markup of the console."""

    def warned(*_, **__):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("/tmp/[red]/a[/b]/" + "long" * 60, stacklevel=1)
        raise ValueError("then")

    monkeypatch.setattr(registry, "outline", warned)
    result = run("inspect", "x")
    fails(result, 1, "then")
    assert "warning: /tmp/[red]/a[/b]/" + "long" * 60 in result[2].splitlines()


def test_a_job_told_to_stop_leaves_no_output_and_goes_on(tiny, run, tmp_path, monkeypatch):
    command = ("quantize", tiny, "--method", "rtn", "--group-size", 8, "--out", tmp_path / "o")
    with monkeypatch.context() as patch:
        patch.setattr(output, "save_model", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        fails(run(*command), 130, "interrupted; no output was written")
    assert [p.name for p in tmp_path.iterdir()] == ["o.partial"]
    status, _, err = run(*command)
    assert status == 0
    assert "continuing from" in err
    assert "3 of 3 layers were done before" in err
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


@pytest.fixture
def quick(tiny, tmp_path):
    """The quickest command that writes tmp_path / "o"."""
    return ("quantize", tiny, "--method", "rtn", "--group-size", 8, "--out", tmp_path / "o")


def test_two_runs_on_one_output(quick, run, tmp_path):
    """The later one stops at once, whatever it was asked for, and touches nothing."""
    with Folder(tmp_path / "o.partial", {"seed": 1}) as kept:
        kept["a"] = {"x": np.ones(3)}
        message = "o.partial is in use by another run of this process"
        fails(run(*quick), 1, message)
        assert list(kept) == ["a"]
    holds = f"import runpy, time; c = runpy.run_path({claims.__file__!r})['claim']; "
    holds += f"h = c({str(tmp_path / 'o.partial')!r}); print(1, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", holds], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        message = f"o.partial is in use by process {other.pid} on"
        for command in (
            quick,
            ("train-bitnet", "--out", tmp_path / "o"),
            ("finetune", quick[1], "--steps", 1, "--text", "builtin", "--out", tmp_path / "o"),
        ):
            fails(run(*command), 1, message)
        other.kill()
    assert [p.name for p in tmp_path.iterdir()] == ["o.partial"]
    status, _, err = run(*quick)
    assert status == 0
    assert "holds another run, which differs in" in err


def test_an_output_that_another_run_has_written_meanwhile(
    packed, quick, run, tmp_path, monkeypatch
):
    """It began when there was none; then it is not overwritten, and its own work stays."""
    publish = Output.publish

    def late(self, *rest):
        shutil.copytree(packed, tmp_path / "o")
        publish(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "publish", late)
        fails(run(*quick), 1, "exists and is not an empty directory; pass overwrite")
    assert storage.stored_recipe(tmp_path / "o") == storage.stored_recipe(packed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o", "o.partial"]
    status, _, err = run(*quick, "--overwrite")
    assert (status, "3 of 3 layers were done before" in err) == (0, True)
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_killed_when_its_output_was_in_place(quick, run, tmp_path, monkeypatch, overwrite):
    """The same command ends what it began; another one leaves the output alone."""
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "remove", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        fails(run(*quick), 130, f"interrupted; the output is in {tmp_path / 'o'}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o", "o.partial"]
    first = checkpoint.load(tmp_path / "o")
    if not overwrite:
        fails(run(*quick, "--seed", 7), 1, "exists and is not an empty directory")
        assert [p.name for p in tmp_path.iterdir()] == ["o"]
        return
    assert run(*quick)[0] == 0
    chex.assert_trees_all_equal(checkpoint.load(tmp_path / "o"), first)
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


def test_folders_of_the_user_are_not_touched(quick, packed, run, tmp_path):
    (tmp_path / "o.partial").mkdir()
    (tmp_path / "o.partial" / "run.json").write_text("{}")
    fails(run(*quick), 1, "jaxquant did not write the files in it; nothing in it was changed")
    assert (tmp_path / "o.partial" / "run.json").read_text() == "{}"
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.txt").write_text("precious")
    fails(run(*quick, "--overwrite"), 2, "not a jaxquant checkpoint; it will not be overwritten")
    shutil.copytree(packed, tmp_path / "o", dirs_exist_ok=True)
    fails(run(*quick, "--overwrite"), 2, "'thesis.txt', which would be lost")
    shutil.rmtree(tmp_path / "o.partial")
    (tmp_path / "o.partial").write_text("precious")
    (tmp_path / "o" / "thesis.txt").unlink()
    fails(
        run(*quick, "--overwrite"),
        1,
        "o.partial is needed as a working directory, but it is not a directory",
    )
    assert (tmp_path / "o.partial").read_text() == "precious"


def test_what_a_run_leaves_when_it_was_just_over_goes(packed, quick, run, tmp_path):
    shutil.copytree(packed, tmp_path / "o")
    (tmp_path / "o.partial").mkdir()
    (tmp_path / "o.partial" / claims.LOCK).write_bytes(claims.OURS)
    fails(run(*quick), 2, "exists and is not an empty directory")
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


def test_a_damaged_file_is_done_again(quick, run, tmp_path, monkeypatch):
    """To the very arrays of a run without damage; a line says so."""
    assert run(*quick[:-1], tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(output, "save_model", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        fails(
            run(*quick),
            130,
            f"run the same command again to continue from {tmp_path / 'o.partial'}",
        )
    layer = tmp_path / "o.partial" / "layers.parts" / "1"
    file = max((p for p in layer.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-1] ^= 16
    file.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        status, _, err = run(*quick)
    assert (status, " ".join(err.split()).count("the layer is made again")) == (0, 1)
    assert "2 of 3 layers were done before" in err
    chex.assert_trees_all_equal(*(checkpoint.load(tmp_path / n) for n in ("whole", "o")))


KILLED = """
import os, signal, sys
from jaxquant_models.cli.commands import main
from jaxquant.durable import store
count, writes = int(sys.argv[1]), 0
before = store.os.replace
def replace(a, b):
    global writes
    writes += 1
    if writes == count:
        os.kill(os.getpid(), signal.SIGKILL)  # a file written, not yet in its place
    before(a, b)
store.os.replace = replace
main(sys.argv[2:])
"""


def of_work(tiny, *method):
    options = ["--calibration", tiny.parent / "text.txt", "--calibration-tokens", 1024, "--out"]
    return ["quantize", tiny, *method, *options]


@pytest.mark.slow
def test_a_killed_run_ends_as_an_uninterrupted_one(tiny, tmp_path):
    """kill -9 while calibrating and while healing; then the same: equal bytes."""
    options = of_work(tiny, "--method", "gptq", "--group-size", 8, "--heal", 12)
    command = lambda count, out: [sys.executable, "-c", KILLED, str(count), *map(str, options), out]
    # Whatever XLA makes of the programs, they are the same ones; so it may be quick about it.
    quick = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    start = lambda count, out: subprocess.run(
        command(count, out), capture_output=True, check=False, env=quick
    )
    assert start(0, tmp_path / "whole").returncode == 0
    for count in (6, 26):
        assert start(count, tmp_path / "cut").returncode == -signal.SIGKILL
        assert not (tmp_path / "cut").exists()
    assert start(0, tmp_path / "cut").returncode == 0
    same_bits(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_a_run_stopped_while_learning_goes_on_to_the_same_bits(tiny, run, tmp_path):
    options = of_work(tiny, "--method", "flatquant", "--learn", 22)
    assert run(*options, tmp_path / "whole")[0] == 0
    stopped_at(4, *options, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    assert run(*options, tmp_path / "cut")[0] == 0
    same_bits(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_bits_shared_out_and_healed(tiny, run, tmp_path):
    """A budget is kept, healing included, and said; one out of reach is an error that says why."""
    text = tiny.parent / "text.txt"
    options = ["--calibration", text, "--calibration-tokens", 1024, "--out", tmp_path / "o"]
    budget = ["--method", "rtn", "--group-size", 8, "--symmetric", "--target-bits", 7, "--heal", 3]
    status, out, err = run("quantize", tiny, *budget, *options, "--json")
    assert status == 0, err
    assert 6 < json.loads(out)["bits_per_weight"] <= 7
    assert "healing of block 1" in err
    assert "bits per weight (within reach" in err
    assert "held out" in err
    rates = {w.format.bits for _, w in jq.core.path_leaves(checkpoint.load(tmp_path / "o"))
             if isinstance(w, jq.QTensor)}  # fmt: skip
    assert len(rates) > 1
    options[-1] = tmp_path / "p"
    budget[-3] = 2.5
    fails(run("quantize", tiny, *budget, *options), 1, "2.5 bits per weight cannot be reached")
    assert not (tmp_path / "p").exists()


def test_a_short_text_is_told_before_any_work(tiny, run, tmp_path):
    (tmp_path / "t.txt").write_text("the quick " * 80)  # one sequence of 512 bytes and a bit
    for more in (["--heal", 2], ["--target-bits", 7]):
        options = [
            "--method",
            "gptq",
            "--group-size",
            8,
            "--symmetric",
            *more,
            "--calibration",
            tmp_path / "t.txt",
        ]
        fails(run("quantize", tiny, *options, "--out", tmp_path / "o"), 1, "at least 3 are needed")
    assert [p.name for p in tmp_path.iterdir()] == ["t.txt"]


def test_a_model_writes_its_own_text_to_heal_on(tiny, run, tmp_path):
    options = ["--method", "vptq", "--bits", 4, "--heal-text", "generated"]
    for setting in ("length=4", "residual_bits=0", "beam=1", "sweeps=0"):
        options += ["--set", setting]
    options += ["--heal", 2, "--heal-batch", 2, "--heal-codes", 3]
    status, _, err = run("quantize", tiny, *options, "--out", tmp_path / "o")
    assert status == 0, err
    assert "recoding" in err
    model = load(tiny)
    tokens = generated_sequences(model, 3, 32, 1, {})
    assert tokens.shape == (3, 32)
    assert len(np.unique(tokens[:, 1:])) > 8
    again = generated_sequences(model, 3, 32, 1, {})
    np.testing.assert_array_equal(tokens, again)


def test_bits_of_an_unquantized_model(tiny, run):
    report = json.loads(run("inspect", tiny, "--json")[1])
    assert report["bits_per_weight"] == 32
    text = tiny.parent / "text.txt"
    other = json.loads(run("eval", tiny, "--text", text, "--ctx", 64, "--chunks", 1, "--json")[1])
    assert (other["bits_per_weight"], other["bytes"]) == (32, report["bytes"])


def test_the_plan_states_the_bytes_that_are_stored(tiny, packed):
    plan = plan_model(load(tiny), storage.stored_recipe(packed))
    stored = checkpoint.load(packed)
    assert {e.path: e.bytes for e in plan.entries} == {
        p: w.nbytes for p, w in jq.core.path_leaves(stored)
    }


def test_a_quantized_model_is_not_quantized_again(packed, run, tmp_path):
    result = run("quantize", packed, "--method", "rtn", "--group-size", 8, "--out", tmp_path / "o")
    fails(result, 1, "cannot be quantized: expected a floating array of rank >= 2, got QTensor")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method rtn --bits 5", "bits must be one of"),
        ("--method rtn --group-size 0", "group_size must be positive"),
        ("--method magic", "unknown method 'magic'"),
        ("--method ternary --bits 3", "unexpected keyword argument 'bits'"),
        ("", "give --method, --recipe or --target-bits"),
        ("--method rtn --bits 3 --target-bits 3", "give either --bits or --target-bits, not both"),
        ("--method rtn --heal-text builtin", "--heal-text needs training"),
        ("--method rtn --heal-batch 2", "give --heal STEPS or --learn STEPS too"),
        ("--method rtn --heal 2 --heal-codes 2", "aqlm or vptq"),
        ("--method rtn --learn 2", "can be learned: flatquant"),
        ("--method rtn --target-bits -3", "--target-bits must be above 0 and at most 8"),
        ("--method rtn --target-bits nan", "--target-bits must be above 0 and at most 8"),
        ("--method aqlm --target-bits 2", "aqlm has no option that sets only its number of bits"),
        ("--method rtn --group-size 0 --target-bits 3", "group_size must be positive"),
        ("--recipe /nowhere.json", "cannot read /nowhere.json"),
        ("--method gptq --calibration-tokens 3", "--calibration-tokens must be at least 512"),
    ],
)
def test_bad_usage(tiny, run, tmp_path, options, message):
    fails(run("quantize", tiny, *options.split(), "--out", tmp_path / "o"), 2, message)
    assert list(tmp_path.iterdir()) == []


def test_bad_models_and_texts(tiny, run, tmp_path):
    text = tmp_path / "t.txt"
    quantize = ("--method", "rtn", "--group-size", 8, "--out", tmp_path / "o")
    fails(run("quantize", tmp_path / "none", *quantize), 1, "no model")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x09" * 40)
    fails(run("quantize", tmp_path / "cut.gguf", *quantize), 1, "cut.gguf")
    text.write_bytes(b"good \xff bad")
    fails(run("eval", tiny, "--text", text), 1, "not UTF-8 text: byte 5")
    text.write_text("")
    fails(run("eval", tiny, "--text", text), 1, "holds no text")
    fails(run("quantize", tiny, *quantize, "--calibration", text), 1, "holds no text")
    text.write_text(TEXT)
    for sizes in (("--ctx", 3), ("--chunks", 0)):
        fails(run("eval", tiny, "--text", text, *sizes), 2, "must be")
    fails(run("generate", tiny, "--prompt", "x", "--seed", 2**70), 2, "is not in the range")
    fails(run("eval", tiny, "--text", text, "--ctx", 10**12), 1, "exceeds the model's 1024")
    fails(run("eval", tiny, "--text", text, "--ctx", 2048), 1, "exceeds the model's 1024 positions")
    text.write_text("short")
    fails(run("eval", tiny, "--text", text), 1, "one chunk needs 512")
    bad = random_tensors(BASE)
    bad["model.layers.1.mlp.up_proj.weight"][3, 3] = np.nan
    folder = write_folder(tmp_path / "nan", BASE, bad)
    fails(run("quantize", folder, *quantize), 1, "up_proj")
    (folder / "model.safetensors").unlink()
    fails(run("quantize", folder, *quantize), 1, "safetensors")
    fails(run("quantize", tiny, "--method", "rtn", "--out", tmp_path / "o"), 1, "does not divide k")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "file").write_text("x")
    fails(run("quantize", tiny, *quantize), 2, "exists and is not an empty directory")


def test_a_missing_shard(tiny, run, tmp_path):
    folder = write_folder(tmp_path / "m", BASE, random_tensors(BASE))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = dict.fromkeys(random_tensors(BASE), "model-00001-of-00002.safetensors")
    shards["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    message = "model-00002-of-00002.safetensors"
    fails(run("quantize", folder, "--method", "rtn", "--out", tmp_path / "o"), 1, message)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a tmpfs")
def test_a_full_disk(tiny, run, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], check=False
    ).returncode:
        pytest.skip("may not mount")
    try:
        out = disk / "o"
        result = run("quantize", tiny, "--method", "rtn", "--group-size", 8, "--out", out)
        fails(result, 1, "No space left")
        assert not out.exists()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_decoding_loop_holds_no_float_copy_of_the_weights():
    """XLA lifts loop-invariant dequantization out of a loop unless it is prevented."""
    w = jq.quantize_array(jnp.ones((1024, 1024)), jq.rtn(bits=4))

    def decode(w, x):
        return jax.lax.fori_loop(0, 8, lambda _, x: jnp.tanh(jq.quantized(jnp.matmul)(x, w)), x)

    def lifted(w, x):
        dense = w.dequantize()
        return jax.lax.fori_loop(0, 8, lambda _, x: jnp.tanh(x @ dense), x)

    def entry(fn):
        text = jax.jit(fn).lower(w, jnp.ones((1, 1024))).compile().as_text()
        return text[text.index("ENTRY") :]

    assert "f32[1024,1024]" in entry(lifted)  # the twin: what lifting looks like
    assert "f32[1024,1024]" not in entry(decode), "a float copy of the weights outlives the loop"


@pytest.mark.model
@pytest.mark.slow
def test_generate_on_the_real_model_stays_below_a_float_copy():
    model = load("smollm2-135m")
    recipe = jq.Recipe([("*kernel", jq.rtn()), ("*embedding", jq.rtn()), ("*", jq.KEEP)])
    params = jax.eval_shape(lambda p: jq.quantize(p, recipe, model.sites()), model.params)
    packed = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(params))
    taken = generation_memory(jq.quantized(model.apply_cached), params, model.config, 32)
    assert taken < packed
    assert taken < 0.15 * 4 * 134_515_008  # a float copy of the model


def test_console_script_and_module():
    code = "import sys; from jaxquant_models.cli.commands import main; "
    code += "sys.argv=['jaxquant','--version']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert jq.__version__ in done.stdout


@pytest.mark.model
@pytest.mark.slow
def test_the_demo_model_at_four_bits(run, tmp_path):
    """The real model by the real path; figures with room for the machine, none of time."""
    out = tmp_path / "o"
    assert run("quantize", "smollm2-135m", "--method", "rtn", "--out", out)[0] == 0
    status, text, _ = run("inspect", out, "--json")
    report = json.loads(text)
    layers = [r for r in report["tensors"] if r["method"] == "rtn"]
    assert status == 0
    assert report["bits_per_weight"] == 4.3125
    assert len(layers) == 7
    assert sum(r["shape"][0] for r in layers) == 210
    assert sum(r["bytes"] for r in layers) < 0.30 * 2 * 106_168_320
    status, text, _ = run(
        "eval", out, "--text", "builtin", "--chunks", 2, "--against", "smollm2-135m", "--json"
    )
    figures = json.loads(text)
    assert figures["tokens_scored"] == 510
    assert figures["kl"] < 0.6
    assert load("smollm2-135m").config.n_layers == 30
