"""`--rotate-residual`: from the command to a checkpoint that runs; what it says, and refuses."""

import json

import chex
import jax
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.storage import checkpoint
from jaxquant_models import load
from jaxquant_models.architectures.llama import LAYER_MATRICES, RESIDUAL_READERS
from jaxquant_models.cli.commands import main
from jaxquant_models.runs.calibration import calibrate_model
from jaxquant_models.runs.recipes import recipe_of
from jaxquant_models.runs.rotation import (
    learned_rotation,
    random_rotation,
    rotate_model,
    untie_model,
)
from tests.support.tiny_llama import BASE, FAMILIES, VOCAB, D, random_tensors, write_folder

TEXT = "the quick brown fox jumps over the lazy dog. " * 60
SETTINGS = ["--bits", 4, "--activations", "int4,asymmetric,clip=0.9", "--set", "symmetric=false"]


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    hf = FAMILIES["llama-tied"] | {"max_position_embeddings": 64}
    folder = write_folder(tmp_path_factory.mktemp("r") / "m", hf, random_tensors(hf))
    (folder.parent / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def run(capsys, tied, tmp_path):
    def call(command, *args):
        common = ["--calibration", tied.parent / "text.txt", "--calibration-tokens", 512]
        more = [*common, "--out", tmp_path / "o"] if command == "quantize" else []
        with pytest.raises(SystemExit) as stop:
            main([command, *(str(a) for a in [*args, *more])])
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


@pytest.mark.parametrize("how", [["random"], ["learned", "--rotate-steps", 3]], ids=lambda h: h[0])
def test_from_the_command_to_a_checkpoint_that_runs(how, tied, run, tmp_path):
    options = ["--method", "quarot", *SETTINGS, "--rotate-residual", *how]
    status, _, err = run("quantize", tied, *options)
    assert status == 0, err
    assert f"stored separately, which adds {2 * VOCAB * D:,} bytes" in " ".join(err.split())
    assert ("rotation" in err and "held out" in err) == (how[0] == "learned")
    packed = load(tmp_path / "o")
    assert not packed.config.tie_embeddings and packed.params["head"]["kernel"].shape == (D, VOCAB)
    sides = {p: w.input for p, w in jq.core.path_leaves(packed.params) if isinstance(w, jq.QTensor)}
    online = [p for p, side in sides.items() if side is not None]
    assert online == ["layers/attn/o/kernel", "layers/mlp/down/kernel"] and len(sides) == 7
    text = tied.parent / "text.txt"
    status, out, _ = run("eval", tmp_path / "o", "--text", text, "--ctx", 64, "--chunks", 2,
                         "--against", tied, "--json")  # fmt: skip
    assert status == 0 and 0 < json.loads(out)["kl"] < 2
    assert run("generate", tmp_path / "o", "--prompt", "the", "--max-tokens", 4)[0] == 0


def test_a_rotation_being_learned_goes_on(tied, run, tmp_path, monkeypatch):
    """Interrupted after ten steps: repeated, the command ends as one never interrupted."""
    options = ["--method", "rtn", "--group-size", -1, "--activations", "int4"]
    options += ["--rotate-residual", "learned", "--rotate-steps", 14]
    real, steps = jq.tuning.learn_rotation, []

    def stopped(*args, progress, **more):
        def tell(update):
            steps.append(update.step)
            if len(steps) == 12:
                raise KeyboardInterrupt
            progress(update)

        return real(*args, progress=tell, **more)

    monkeypatch.setattr(jq.tuning, "learn_rotation", stopped)
    assert run("quantize", tied, *options)[0] == 130
    status, _, err = run("quantize", tied, *options)
    assert status == 0 and "continuing from" in err
    assert steps == [*range(1, 13), *range(11, 15)]
    cut = checkpoint.load(tmp_path / "o")
    monkeypatch.setattr(jq.tuning, "learn_rotation", real)
    assert run("quantize", tied, *options, "--overwrite")[0] == 0
    chex.assert_trees_all_equal(checkpoint.load(tmp_path / "o"), cut)


def test_other_kinds_of_methods(tied):
    """Rotations of what reads the stream go; other transforms, and orders of formats, stay."""
    side = lambda method: dict(recipe_of(method, True).rules)[RESIDUAL_READERS[0]].input
    assert side(jq.quarot()) is None and side(jq.quip_sharp(2)) is None
    assert side(jq.quarot(alpha=0.5)) == jq.transforms.Smooth(0.5)
    assert side(jq.smoothquant(rotate=True)) == jq.transforms.Smooth(0.5)
    for method in (jq.smoothquant(), jq.duquant(), jq.entropy_coded(2), jq.rtn(4)):
        assert side(method) == method.input
    assert dict(recipe_of(jq.quarot(), True).rules)[LAYER_MATRICES] == jq.quarot()


def test_transforms_fitted_to_inputs_are_learned_with(tied):
    model = untie_model(load(tied))
    recipe = recipe_of(jq.quarot(alpha=0.5), rotated=True)
    start = random_rotation(model, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 256, (4, 24))
    stats = calibrate_model(rotate_model(model, start), tokens, weighting="uniform")
    once = jq.tuning.Healing(steps=1, learning_rate=0.1)
    got = learned_rotation(model, recipe, tokens, once, start=start, stats=stats)
    assert np.max(np.abs(got - start)) > 1e-3


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ("--method quarot --rotate-steps 3", 2, "--rotate-steps needs --rotate-residual learned"),
        (
            "--method quarot --rotate-residual random --rotate-steps 3",
            2,
            "--rotate-steps needs --rotate-residual learned",
        ),
        ("--method quarot --rotate-residual best", 2, "'best' is not one of"),
        ("--method rtn --target-bits 4 --rotate-residual learned", 2, "learned needs one recipe"),
        ("--method gptq --group-size -1 --rotate-residual learned", 1, "nothing to learn"),
        (
            "--method smoothquant --activations int8,static --rotate-residual learned",
            1,
            "static scales",
        ),
    ],
)
def test_bad_use(options, status, message, tied, run, tmp_path):
    code, _, err = run("quantize", tied, *options.split())
    assert code == status and message in err
    assert not (tmp_path / "o").exists()


def test_a_width_without_a_hadamard_transform(run, tmp_path):
    hf = BASE | {"hidden_size": 22}
    shape = lambda a: tuple(22 if n == D else n for n in a.shape)
    tensors = {n: np.ones(shape(a), np.float32) for n, a in random_tensors(hf).items()}
    folder = write_folder(tmp_path / "m", hf, tensors)
    code, _, err = run("quantize", folder, "--method", "quarot", "--rotate-residual", "random")
    assert code == 1 and "no Hadamard transform of its 22 channels" in err
