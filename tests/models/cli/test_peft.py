"""`finetune --peft`, and `--adapter` of `eval` and `generate`."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxquant_models import load
from jaxquant_models.cli.commands import main
from jaxquant_models.readers.peft import load_peft
from jaxquant_models.readers.peft_files import CONFIG, WEIGHTS, recorded
from tests.models.readers.peft_oracle import DATA
from tests.support.command import fails

ADAPTER = DATA / "lora"  # written by the real PEFT, for models of this shape


@pytest.fixture(scope="module")
def trained(tiny):
    """A folder with a packed base, the base with trained adapters, and these as a PEFT folder."""
    home = tiny.parent
    for args in (
        ("quantize", tiny, "--method", "nf4", "--group-size", 8, "--out", home / "base"),
        tune(home, "one", "--peft", home / "peft"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in args])
        assert not stop.value.code
    return home


def tune(home, out, *options):
    return (
        "finetune", home / "base", "--method", "qlora", "--rank", 2, "--only", "*attn/[qv]/kernel",
        "--set", "learning_rate=0.02", "--text", home / "text.txt", "--context", 64, "--batch", 2,
        "--steps", 6, "--out", home / out, *options,
    )  # fmt: skip


def score(run, home, *args):
    text = ("--text", home / "text.txt", "--ctx", 64, "--chunks", 2, "--json")
    status, out, err = run("eval", *args, *text)
    assert status == 0, err
    return [json.loads(report) for report in out.splitlines()]


def test_the_folder_holds_what_was_trained(trained, run):
    config = json.loads((trained / "peft" / CONFIG).read_text())
    assert config["r"] == 2 and config["lora_alpha"] == 4
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == str(trained / "base")
    want, found = load(trained / "one"), load_peft(trained / "peft", load(trained / "base"))
    for a, b in zip(*map(jax.tree.leaves, (want.params, found.params)), strict=True):
        np.testing.assert_array_equal(a, b)
    (one,) = score(run, trained, trained / "one")
    (same,) = score(run, trained, trained / "base", "--adapter", trained / "peft")
    (base,) = score(run, trained, trained / "base")
    assert same["adapter"] == str(trained / "peft") and "adapter" not in one
    assert same["perplexity"] == pytest.approx(one["perplexity"], rel=1e-5)
    assert same["perplexity"] < 0.95 * base["perplexity"]
    assert same["bytes"] == one["bytes"] > base["bytes"]


def test_several_adapters_have_a_report_each(trained, run):
    adapters = ("--adapter", trained / "peft", "--adapter", ADAPTER)
    reports = score(run, trained, trained / "base", *adapters, "--against", trained / "base")
    assert [r["adapter"] for r in reports] == [str(trained / "peft"), str(ADAPTER)]
    assert reports[0]["kl"] > 1e-4 and reports[1]["kl"] > reports[0]["kl"]


def texts(run, model, *options):
    status, out, err = run(
        "generate", model, "--prompt", "the quick", "--max-tokens", 8, *options, "--json"
    )
    assert status == 0, err
    return [json.loads(line) for line in out.splitlines()]


def test_generation_with_packed_weights(trained, run):
    first, other = trained / "peft", DATA / "dora"
    adapters = ("--adapter", first, "--adapter", other)
    one, two = texts(run, trained / "base", *adapters)
    assert (one["adapter"], two["adapter"]) == (str(first), str(other))
    assert one["text"] == texts(run, trained / "one")[0]["text"] != two["text"]


def test_generation_with_floats(tiny, run):
    first, other = ADAPTER, DATA / "rslora"
    command = ("generate", tiny, "--prompt", "the quick", "--max-tokens", 8)
    status, out, err = run(*command, "--adapter", first, "--adapter", other)
    assert status == 0, err
    texts = out.removeprefix(f"adapter: {first}\nthe quick").split(f"\nadapter: {other}\nthe quick")
    assert len(texts) == 2 and texts[0] != texts[1].removesuffix("\n")


def test_the_adapter_of_another_base(trained, tiny, run, tmp_path):
    text = ("--text", trained / "text.txt", "--ctx", 64, "--adapter", trained / "peft")
    fails(run("eval", tiny, *text), 1, "was made for another base")
    fails(run("eval", trained / "one", *text), 1, "has adapters already")
    fails(run("eval", tiny, *text[:-1], tmp_path), 1, "is not a PEFT folder")
    short = ("generate", tiny, "--prompt", "a")
    fails(run(*short, "--adapter", ADAPTER, "--adapter", tmp_path), 1, "is not a PEFT folder")
    shutil.copytree(ADAPTER, tmp_path / "o")
    (tmp_path / "o" / WEIGHTS).write_bytes(b"garbage")
    fails(run(*short, "--adapter", tmp_path / "o"), 1, "not a complete safetensors file")


def test_where_the_folder_is_written(trained, run, tmp_path):
    fails(run(*tune(trained, "x", "--peft", trained / "peft")), 2, "is not an empty directory")
    fails(run(*tune(trained, "x", "--peft", trained / "x")), 2, "must be two directories")
    fails(run(*tune(trained, "x", "--peft", trained / "x" / "y")), 2, "must be two directories")
    (tmp_path / "notes").write_text("")
    fails(run(*tune(trained, "x", "--peft", tmp_path, "--overwrite")), 2, "move the other files")
    qat = [{"qlora": "qat"}.get(a, a) for a in tune(trained, "x", "--peft", tmp_path / "o")]
    del qat[qat.index("--rank") : qat.index("--rank") + 2]
    fails(run(*qat), 2, "--peft writes LoRA adapters, which --method qat does not train")
    assert not (trained / "x").exists() and not (tmp_path / "o").exists()


def test_a_run_killed_after_the_folder_was_written(trained, run, tmp_path):
    """The same command writes both again; another may not replace the folder."""
    shutil.copytree(trained / "base", tmp_path / "base")
    shutil.copy(trained / "text.txt", tmp_path)
    command = tune(tmp_path, "cut", "--peft", tmp_path / "peft")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxquant_models.cli.output.save_model", killed)
        assert run(*command)[0] == 130
    assert (tmp_path / "peft" / WEIGHTS).exists() and not (tmp_path / "cut").exists()
    assert len(recorded(tmp_path / "peft")["jaxquant_run"]) == 64
    other = run(*tune(tmp_path, "other", "--peft", tmp_path / "peft"))
    fails(other, 2, "is not an empty directory")
    assert run(*command)[0] == 0
    found = load_peft(tmp_path / "peft", load(tmp_path / "base")).params
    for a, b in zip(*map(jax.tree.leaves, (found, load(tmp_path / "cut").params)), strict=True):
        np.testing.assert_array_equal(a, b)
