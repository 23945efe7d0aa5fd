"""`finetune`, `train-bitnet`: what they make, that they go on to the same bits, and bad input."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import jaxquant as jq
from jaxquant import storage
from jaxquant.evaluation import evaluate
from jaxquant.storage import checkpoint
from jaxquant_models import load
from jaxquant_models.cli.commands import main
from jaxquant_models.readers.checkpoint import save_model
from jaxquant_models.runs import pretraining
from jaxquant_models.runs.pretraining_request import PretrainingRequest
from jaxquant_models.runs.sequences import token_sequences
from tests.support.command import fails
from tests.support.stopped import same_bits, stopped_at
from tests.support.tiny_llama import BASE, byte_tokenizer_json, random_tensors, write_folder

TEXT = "".join(f"the {i} quick brown foxes jump over {i * i} lazy dogs. " for i in range(120))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training") / "model"
    write_folder(folder, BASE, random_tensors(BASE))
    (folder / "tokenizer.json").write_text(byte_tokenizer_json())
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(scope="module")
def packed(tiny):
    """A start at 2 bits."""
    out = tiny.parent / "packed"
    with pytest.raises(SystemExit) as stop:
        main(f"quantize {tiny} --method rtn --bits 2 --group-size 8 --out {out}".split())
    assert not stop.value.code
    return out


def tune(tiny, model, *options):
    return ("finetune", model, "--text", tiny.parent / "text.txt", "--context", 64, *options)


def kl(tiny, result):
    source, model = load(tiny), load(result)
    teacher, sequences = (source.apply_fn, source.params), token_sequences(source, TEXT, 64, 8)
    student = jq.quantized(source.apply_fn)
    return evaluate(student, model.params, sequences, against=teacher).kl


@pytest.mark.parametrize(
    "options",
    [
        "--steps 20 --block-steps 10 --batch 4 --set learning_rate=0.02",
        "--steps 40 --batch 4 --only *mlp/[du]*/kernel --set learning_rate=0.03",
        "--steps 100 --batch 8 --method zeroqat --set learning_rate=0.03",
    ],
)
def test_a_checkpoint_comes_nearer_to_its_teacher(tiny, packed, run, tmp_path, options):
    out = tmp_path / "o"
    command = tune(tiny, packed, "--teacher", tiny, *options.split(), "--out", out, "--json")
    status, text, err = run(*command, "--metrics", tmp_path / "m")
    assert status == 0, err
    assert kl(tiny, out) < 0.99 * kl(tiny, packed)
    before, after = checkpoint.load(packed), checkpoint.load(out)
    assert storage.stored_recipe(out) == storage.stored_recipe(packed)
    assert json.loads(text)["bits_per_weight"] == jq.bits_per_weight(before)
    same = {
        path: np.array_equal(w.data["codes"], dict(jq.core.path_leaves(after))[path].data["codes"])
        for path, w in jq.core.path_leaves(before)
        if isinstance(w, jq.QTensor)
    }
    if "only" in options:
        assert {path for path, kept in same.items() if not kept} == {
            "layers/mlp/down/kernel", "layers/mlp/up/kernel"
        }  # fmt: skip
    lines = (tmp_path / "m" / "metrics.jsonl").read_text().splitlines()
    assert all("loss" in json.loads(line) for line in lines)
    assert any(p.name.startswith("events") for p in (tmp_path / "m").iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "o"]


def test_floats_and_next_tokens(tiny, run, tmp_path):
    """Of floats the model is its own teacher; "none" learns the text."""
    for name, teacher in (("own", ()), ("text", ("--teacher", "none"))):
        command = tune(tiny, tiny, "--bits", 2, "--group-size", 8, "--batch", 4, "--steps", 12)
        more = ("--set", "learning_rate=0.03", "--set", "dampening=0.1")
        status, _, err = run(*command, *teacher, *more, "--out", tmp_path / name)
        assert status == 0, err
    source, score = load(tiny), {}
    pieces = token_sequences(source, TEXT, 64, 8)
    for name in ("own", "text"):
        model = load(tmp_path / name)
        found = jq.evaluate(jq.quantized(model.apply_fn), model.params, pieces)
        score[name] = found.perplexity
    assert score["text"] < 0.8 * score["own"]


def test_what_is_continuous_trains_where_codes_do_not(tiny, run, tmp_path):
    start = ("--method", "vptq", "--bits", 2, "--calibration", tiny.parent / "text.txt",
             "--calibration-tokens", 512, "--effort", "fast")  # fmt: skip
    status, _, err = run("quantize", tiny, *start, "--out", tmp_path / "vq")
    assert status == 0, err
    command = tune(tiny, tmp_path / "vq", "--steps", 8)
    fails(run(*command, "--out", tmp_path / "o"), 2, "give --teacher MODEL")
    status, _, err = run(*command, "--teacher", tiny, "--batch", 4, "--out", tmp_path / "o")
    assert status == 0, err
    assert kl(tiny, tmp_path / "o") < kl(tiny, tmp_path / "vq")


def test_text_of_the_teachers_own(tiny, packed, run, tmp_path):
    command = ("finetune", packed, "--teacher", tiny, "--context", 32, "--out", tmp_path / "o")
    fails(run(*command, "--steps", 4), 2, "nothing to train on")
    status, _, err = run(*command, "--steps", 10, "--generated", 8, "--batch", 2)
    assert status == 0, err
    assert kl(tiny, tmp_path / "o") < kl(tiny, packed)


def test_another_architecture_does_not_teach(tiny, packed, run, tmp_path):
    tied = tmp_path / "tied"
    write_folder(tied, BASE | {"tie_word_embeddings": True}, random_tensors(BASE))
    command = tune(tiny, packed, "--teacher", tied, "--steps", 2, "--out", tmp_path / "o")
    fails(run(*command), 2, "another architecture: tie_embeddings True, not False")
    rotated = tmp_path / "rotated"
    options = ("--method", "rtn", "--group-size", 8, "--rotate-residual", "random")
    status, _, err = run("quantize", tiny, *options, "--out", rotated)
    assert status == 0, err
    command = tune(tiny, rotated, "--teacher", tiny, "--steps", 0, "--block-steps", 2)
    fails(run(*command, "--out", tmp_path / "o"), 1, "another basis")


def test_layers_apart_train_as_a_stack(tiny, run, tmp_path):
    recipes = {
        "alike": [("layers/*kernel", jq.rtn(2, 8)), ("*", jq.KEEP)],
        "unlike": [("layers/0/*kernel", jq.rtn(2, 8)), ("layers/*kernel", jq.rtn(3, 8)),
                   ("*", jq.KEEP)],
    }  # fmt: skip
    source = load(tiny)
    for name, rules in recipes.items():
        params = jq.quantize(jq.ptq.unstack(source.params, "layers"), jq.Recipe(rules))
        model = dataclasses.replace(source, params=params)
        save_model(tmp_path / name, model, jq.Recipe(rules))
    command = lambda name: tune(tiny, tmp_path / name, "--teacher", tiny, "--batch", 4)
    more = ("--steps", 12, "--out", tmp_path / "o")
    fails(
        run(*command("unlike"), *more), 2, "layers that are stored apart are trained as one stack"
    )
    status, _, err = run(*command("alike"), *more)
    assert status == 0, err
    assert kl(tiny, tmp_path / "o") < kl(tiny, tmp_path / "alike")
    assert "0" in load(tmp_path / "o").params["layers"]


def test_a_killed_run_ends_as_an_uninterrupted_one(tiny, packed, run, tmp_path):
    options = tune(tiny, packed, "--teacher", tiny, "--block-steps", 12, "--steps")
    assert run(*options, 22, "--out", tmp_path / "whole")[0] == 0
    cut = (*options, 22, "--out", tmp_path / "cut")
    for count in (4, 6):
        stopped_at(count, *cut)
        assert not (tmp_path / "cut").exists()
    other = run(*options, 21, "--out", tmp_path / "cut")
    fails(other, 1, "holds another run, which differs in end to end")
    assert run(*cut)[0] == 0
    same_bits(tmp_path)


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ("--steps 0", 2, "nothing to do"),
        ("--steps 2 --bits 3", 2, "a checkpoint keeps its own"),
        ("--steps 2 --block-steps 2", 2, "--teacher MODEL"),
        ("--steps 2 --set magic=1", 2, "unknown settings ['magic']"),
        ("--steps 2 --set learning_rate=-1", 2, "learning_rate must be positive"),
        ("--steps 2 --context 1024", 2, "exceeds the 256 positions"),
        ("--steps 2 --only magic", 1, "pattern 'magic' matches no leaf"),
        ("--steps 2 --only embed/*", 1, "nothing to train"),
        ("--steps 2 --batch 500", 1, "one step needs 500"),
        ("--steps 2 --generated 2", 2, "--teacher MODEL"),
        ("--steps 2 --text /nowhere", 1, "cannot read /nowhere"),
        ("--steps 8 --set other_rate=1e30", 1, "is nan; lower the learning rate"),
    ],
)
def test_bad_input(tiny, packed, run, tmp_path, options, status, message):
    options = options.split()
    fails(run(*tune(tiny, packed, *options, "--out", tmp_path / "o")), status, message)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("place", ["o", "o.partial"])
def test_metrics_are_not_written_where_the_model_is(tiny, packed, run, tmp_path, place):
    command = tune(tiny, packed, "--steps", 2, "--metrics", tmp_path / place)
    message = "is where the model will be written"
    fails(run(*command, "--out", tmp_path / "o"), 2, message)
    command = ("train-bitnet", "--metrics", tmp_path / place, "--out", tmp_path / "o")
    fails(run(*command), 2, message)
    assert list(tmp_path.iterdir()) == []


def test_a_text_shorter_than_a_sequence(tiny, packed, run, tmp_path):
    (tmp_path / "t.txt").write_text("short")
    command = ("finetune", packed, "--text", tmp_path / "t.txt", "--steps", 2)
    fails(run(*command, "--context", 64, "--out", tmp_path / "o"), 1, "one chunk needs 64")
    command = ("train-bitnet", "--text", tmp_path / "t.txt", "--size", "1m")
    fails(run(*command, "--out", tmp_path / "o"), 1, "chunk needs")


BITNET = ("--size", "1m", "--steps", 6, "--context", 16, "--batch", 2, "--vocabulary", 300)


@pytest.mark.parametrize("more", [(), ("--a48", "--steps", 20)])
def test_bitnet_from_scratch(tiny, run, tmp_path, more):
    command = ("train-bitnet", "--text", tiny.parent / "text.txt", *BITNET, *more)
    status, text, err = run(*command, "--out", tmp_path / "o", "--json")
    assert status == 0, err
    report = json.loads(text)
    assert report["weights"] > 900_000
    loaded = load(tmp_path / "o")
    layers = [w for path, w in jq.core.path_leaves(loaded.params) if path.endswith("kernel")]
    assert all(w.format == jq.bitnet().format for w in layers)
    forms = {str(w.activations) for w in layers}
    assert forms == ({"int8", "int4,mean", "int8,top=0.5"} if more else {"int8"})
    status, out, _ = run("generate", tmp_path / "o", "--prompt", "the", "--max-tokens", 4)
    assert status == 0
    status, out, _ = run("inspect", tmp_path / "o")
    assert status == 0 and "Ternary" in out
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


def test_gains_of_norms_do_not_decay():
    request = PretrainingRequest("1m", steps=10, vocabulary=300)
    config = request.config(300)
    params = pretraining.converted(
        request, config, pretraining.initial_state(request, config), range(1)
    ).params
    optimizer = request.optimizer()
    state, still = optimizer.init(params), jax.tree.map(np.zeros_like, params)
    for _ in range(3):
        updates, state = optimizer.update(still, state, params)
    layer = updates["layers"]
    assert not any(np.any(u) for u in jax.tree.leaves((layer["attn_norm"], updates["norm"])))
    assert not np.any(layer["attn"]["sub_norm"]["scale"])
    assert np.any(layer["attn"]["q"]["kernel"].data["codes"])
    assert np.any(updates["embed"]["embedding"])


def test_a_finished_run_stays_a_run_of_a48():
    """Killed after its last step it comes back as it was."""
    request = PretrainingRequest(
        "1m", steps=3, context=16, batch_size=2, vocabulary=300, float_share=0.4, a48=0.1
    )
    assert (request.ternary_from, request.a48_from) == (1, 2)
    data = pretraining.training_data(request, TEXT)
    kept = {}
    first, _ = pretraining.train(request, data, finished=kept)
    again, _ = pretraining.train(request, data, finished=kept)
    forms = lambda p: {
        str(w.activations) for _, w in jq.core.path_leaves(p) if isinstance(w, jq.QTensor)
    }
    assert forms(first) == forms(again) == {"int8", "int4,mean", "int8,top=0.5"}


def test_a_killed_bitnet_ends_as_an_uninterrupted_one(tiny, run, tmp_path):
    """Killed at the fourth of its steps, two of which are kept."""
    options = ["train-bitnet", "--text", tiny.parent / "text.txt", *BITNET, "--save-every", 2,
               "--float-share", 0.5, "--out"]  # fmt: skip
    assert run(*options, tmp_path / "whole")[0] == 0
    stopped_at(3, *options, tmp_path / "cut")
    fails(run(*options, tmp_path / "cut", "--seed", 1), 1, "holds another run")
    assert run(*options, tmp_path / "cut")[0] == 0
    same_bits(tmp_path)
