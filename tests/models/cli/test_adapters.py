"""`finetune` with adapters, and `merge`: results, resumption to the same bits, and errors."""

import json

import jax
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.evaluation import evaluate
from jaxquant.storage import checkpoint
from jaxquant_models import load
from jaxquant_models.cli.finetune import request_of
from jaxquant_models.runs.sequences import token_sequences
from tests.support.command import fails
from tests.support.stopped import same_bits, stopped_at
from tests.support.tiny_llama import BASE, byte_tokenizer_json, random_tensors, write_folder

TEXT = "".join(f"the {i} quick brown foxes jump over {i * i} lazy dogs. " for i in range(120))
METHODS = {
    "qlora": "--rank 4 --set learning_rate=0.02",
    "qa-lora": "--rank 2 --set learning_rate=0.02",
    "l4q": "--rank 4 --set learning_rate=0.02",
    "lota": "--rank 4",
    "peqa": "--set scale_rate=0.02",
}
EXACT = ("qa-lora", "l4q", "lota", "peqa")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "model"
    write_folder(folder, BASE, random_tensors(BASE))
    (folder / "tokenizer.json").write_text(byte_tokenizer_json())
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


def tune(tiny, method, out, *options):
    text = tiny.parent / "text.txt"
    common = ("--text", text, "--context", 64, "--batch", 4, "--bits", 3, "--group-size", 8)
    return ("finetune", tiny, "--method", method, *common, "--out", out, *options)


def perplexity(model):
    return evaluate(
        jq.quantized(model.apply_fn), model.params, token_sequences(model, TEXT, 64, 8)
    ).perplexity


@pytest.mark.parametrize(
    "method",
    [
        *("qlora", "qa-lora"),
        pytest.param("peqa", marks=pytest.mark.slow),
        *(
            pytest.param(m, marks=[pytest.mark.slow, pytest.mark.thorough])
            for m in METHODS
            if m not in ("qlora", "qa-lora", "peqa")
        ),
    ],
)
def test_an_adapter_learns_the_text_and_is_merged(tiny, run, tmp_path, method):
    out, merged = tmp_path / "adapted", tmp_path / "merged"
    command = tune(tiny, method, out, *METHODS[method].split(), "--steps", 25)
    status, text, err = run(*command)
    assert status == 0, err
    adapted = load(out)
    assert perplexity(adapted) < 0.8 * perplexity(load(tiny))
    assert any(isinstance(w.format, jq.adapters.Adapted) for w in packed(adapted))
    status, text, err = run("merge", out, "--text", tiny.parent / "text.txt", "--chunks", 2,
                            "--out", merged, "--json")  # fmt: skip
    assert status == 0, err
    report, after = json.loads(text), load(merged)
    assert report["bits_per_weight"] == jq.bits_per_weight(after.params)
    assert not any(isinstance(w.format, jq.adapters.Adapted) for w in packed(after))
    tokens = np.asarray(token_sequences(adapted, TEXT, 64, 2))
    logits = jax.jit(jq.quantized(adapted.apply_fn))
    found, want = logits(after.params, tokens), logits(adapted.params, tokens)
    assert report["exact"] == (method in EXACT)
    if method in EXACT:
        assert report["kept"] == 1 and report["kl"] < 1e-9
        np.testing.assert_allclose(found, want, atol=1e-6 * np.abs(want).max())
        assert generated(run, out) == generated(run, merged)
    else:
        assert report["kept"] < 1 and report["kl"] > 1e-4
        status, text, err = run("merge", out, "--bits", 4, "--method", "gptq", "--text",
                                tiny.parent / "text.txt", "--out", tmp_path / "again",
                                "--json")  # fmt: skip
        assert status == 0, err
        assert json.loads(text)["kept"] > report["kept"]
        assert {w.format.bits for w in packed(load(tmp_path / "again"))} == {4}


def packed(model):
    return [w for _, w in jq.core.path_leaves(model.params) if isinstance(w, jq.QTensor)]


def generated(run, model):
    status, out, err = run("generate", model, "--prompt", "the 7 quick", "--max-tokens", 12)
    assert status == 0, err
    return out.splitlines()[0]


def test_evaluation_and_inspection_of_an_adapted_model(tiny, run, tmp_path):
    status, _, err = run(*tune(tiny, "qlora", tmp_path / "o", "--steps", 2, "--rank", 2))
    assert status == 0, err
    text = ("--text", tiny.parent / "text.txt", "--ctx", 64, "--chunks", 2, "--json")
    status, out, err = run("eval", tmp_path / "o", *text)
    assert status == 0, err
    assert json.loads(out)["bits_per_weight"] > 3
    status, out, _ = run("inspect", tmp_path / "o")
    assert status == 0 and "LoRA" in out


@pytest.mark.slow
def test_checkpoints_get_adapters_in_their_own_format(tiny, run, tmp_path):
    base = tmp_path / "base"
    command = ("quantize", tiny, "--method", "quip_sharp", "--bits", 2, "--calibration-tokens", 512)
    assert run(*command, "--calibration", tiny.parent / "text.txt", "--out", base)[0] == 0
    command = ("finetune", base, "--text", tiny.parent / "text.txt", "--context", 64, "--rank", 2)
    status, _, err = run(*command, "--steps", 3, "--method", "qlora", "--only", "*mlp/*/kernel",
                         "--out", tmp_path / "o")  # fmt: skip
    assert status == 0, err
    formats = [type(w.format).__name__ for w in packed(load(tmp_path / "o"))]
    assert formats.count("Adapted") == 3 and formats.count("E8P") == 4
    fails(run(*command, "--steps", 3, "--method", "qa-lora", "--out", tmp_path / "p"), 2,
          "QALoRA needs a format with groups of rows")  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        "qlora --rank 2 --paged",
        pytest.param(
            "l4q --rank 2 --optimizer adam8bit", marks=[pytest.mark.slow, pytest.mark.thorough]
        ),
    ],
)
def test_a_killed_run_ends_as_an_uninterrupted_one(tiny, run, tmp_path, options):
    method, *options = options.split()
    command = lambda name: tune(tiny, method, tmp_path / name, *options, "--steps", 22)
    assert run(*command("whole"))[0] == 0
    stopped_at(3, *command("cut"))
    other = run(*tune(tiny, method, tmp_path / "cut", *options, "--steps", 21))
    fails(other, 1, "holds another run, which differs in end to end")
    assert run(*command("cut"))[0] == 0
    same_bits(tmp_path)


@pytest.mark.slow
def test_starts_that_make_up_for_rounding(tiny, run, tmp_path):
    found = {}
    for init in ("zero", "loftq", "cloq", "pissa"):
        options = ("--steps", 1, "--rank", 8, "--init", init, "--set", "learning_rate=1e-9")
        status, _, err = run(*tune(tiny, "qlora", tmp_path / init, *options, "--bits", 2))
        assert status == 0, err
        source, model = load(tiny), load(tmp_path / init)
        teacher, pieces = (source.apply_fn, source.params), token_sequences(source, TEXT, 64, 4)
        student = jq.quantized(source.apply_fn)
        found[init] = evaluate(student, model.params, pieces, against=teacher).kl
    assert max(found["loftq"], found["cloq"]) < 0.8 * found["zero"]


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ("qlora --set-blocks seed=1", 2, "leave out --block-steps and --set-blocks"),
        ("qlora --steps 0", 2, "give --steps of at least 1"),
        ("peqa --rank 2", 2, "peqa trains scales, which have no rank"),
        ("lota --alpha 2", 2, "lota changes codes by whole steps"),
        ("qa-lora --init loftq", 2, "--init is an option of qlora"),
        ("qlora --init loftq --alpha 3", 2, "finds its own scaling"),
        ("qat --rank 2", 2, "--rank is an option of adapters"),
        ("zeroqat --paged", 2, "--paged is an option of adapters"),
        ("lota --paged", 2, "without a state: leave out"),
        ("qlora --rank 99", 2, "rank 99 exceeds"),
        ("qa-lora --rank 4", 2, "rank 4 exceeds the 3 groups of the 24 inputs"),
        ("qlora --only magic", 2, "'magic' matches no leaf"),
        ("qlora --set magic=1", 2, "unknown settings ['magic']"),
        ("qlora --rank 0", 2, "0 is not in the range"),
        ("l4q --alpha=-1", 2, "alpha must be positive"),
    ],
)
def test_bad_input(tiny, run, tmp_path, options, status, message):
    method, *options = options.split()
    command = tune(tiny, method, tmp_path / "o", "--steps", 2, *options)
    fails(run(*command), status, message)
    assert not (tmp_path / "o").exists()


def test_a_checkpoint_has_no_floats_to_start_from(tiny, run, tmp_path):
    base = tmp_path / "base"
    assert run("quantize", tiny, "--method", "rtn", "--group-size", 8, "--out", base)[0] == 0
    command = ("finetune", base, "--method", "qlora", "--text", tiny.parent / "text.txt",
               "--context", 64, "--steps", 2, "--out", tmp_path / "o")  # fmt: skip
    fails(run(*command, "--init", "loftq"), 2, "needs a MODEL with float weights")
    fails(run(*command, "--bits", 3), 2, "a checkpoint keeps its own")
    fails(run("merge", base, "--out", tmp_path / "o"), 2, "has no adapters to merge")


def test_options_of_a_merge_are_checked_against_the_base(tiny, run, tmp_path):
    out = tmp_path / "qa"
    assert run(*tune(tiny, "qa-lora", out, "--steps", 2, "--rank", 2))[0] == 0
    text = tiny.parent / "text.txt"
    merge = ("merge", out, "--text", text, "--chunks", 1, "--out", tmp_path / "m")
    fails(run(*merge, "--method", "gptq"), 2, "merge exactly, so nothing is rounded again")
    fails(run(*merge, "--bits", 4), 1, "codes of 3 bits, so bits=4 cannot be met")
    assert not (tmp_path / "m").exists()
    again = ("finetune", out, "--text", text, "--context", 64, "--steps", 2, "--method", "qlora")
    fails(run(*again, "--out", tmp_path / "n"), 2, "has an adapter already")
    status, _, err = run(*merge, "--bits", 3)
    assert status == 0, err
    assert checkpoint.load(tmp_path / "m")


def test_factors_that_start_large_learn_slowly():
    options = {
        "packed": False, "watch": False, "generated": 0, "method": "qlora", "bits": 2,
        "group_size": None, "only": (), "context": 64, "steps": 8, "block_steps": 0, "batch": 1,
        "seed": 0, "block_settings": (), "rank": 4, "alpha": None, "optimizer": None,
        "paged": False,
    }  # fmt: skip
    rate = lambda init, *settings: (
        request_of(**options, init=init, settings=settings).end_to_end.learning_rate
    )
    assert rate("cloq") == rate("loftq") == rate("zero") / 2 == rate(None) / 2
    assert rate("cloq", "learning_rate=0.1") == 0.1
