"""`jaxquant inspect --outliers`: what it prints and draws, bad usage; and of the real model."""

import importlib.util
import json
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxquant.theory.outliers import massive
from jaxquant_models import load
from jaxquant_models.architectures.hidden_states import hidden_states
from jaxquant_models.cli.outlier_report import heat_map, plot
from jaxquant_models.runs.outliers import outliers_of
from jaxquant_models.runs.sequences import token_sequences
from tests.support.command import fails

COMMAND = ("--outliers", "--tokens", 96)


def test_every_site_of_every_layer(tiny, run, tmp_path):
    text, packed = tiny.parent / "text.txt", tmp_path / "packed"
    run("quantize", tiny, "--method", "rtn", "--group-size", 8, "--out", packed)
    for model in (tiny, packed):
        status, out, err = run("inspect", model, *COMMAND, "--text", text, "--json")
        assert (status, err) == (0, "")
        report = json.loads(out)
        assert [p["layer"] for p in report["hidden"]] == [[0], [1], [2]]
        kinds = dict.fromkeys(p["site"] for p in report["inputs"])
        assert list(kinds) == [
            "layers/attn/{k,q,v}/kernel", "layers/attn/o/kernel",
            "layers/mlp/{gate,up}/kernel", "layers/mlp/down/kernel", "head/kernel",
        ]  # fmt: skip
        assert len(report["inputs"]) == 13
        assert report["texts"][:3] == ["t", "h", "e"]
        assert report["unseen"] == report["massive"] == []


def test_the_page_is_plain_text_where_there_is_no_terminal(tiny, run):
    status, out, _ = run("inspect", tiny, *COMMAND, "--text", tiny.parent / "text.txt")
    assert status == 0
    assert "\x1b" not in out
    assert "layers/mlp/down/kernel" in out and "log10(max / median)" in out
    rows = [
        line.split() for line in out.splitlines() if line.strip().startswith(("0 ", "1 ", "2 "))
    ]
    assert [len(row) for row in rows[-3:]] == [6, 6, 6]  # the layer and five sites
    assert all(0 < float(cell) < 5 for row in rows[-3:] for cell in row[1:])


def test_the_heat_map_is_coloured_in_a_terminal(tiny):
    model = load(tiny)
    found = outliers_of(model, np.arange(80))
    console = Console(force_terminal=True, color_system="truecolor", width=100)
    with console.capture() as page:
        console.print(heat_map(found))
    assert "\x1b[37;48;2;" in page.get()
    assert "48;2;253;231;37" in page.get()  # the scale's end


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of matplotlib's own parts
@pytest.mark.parametrize("suffix", [".png", ".SVG"])
def test_a_picture(tiny, run, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    file, text = tmp_path / f"heat{suffix}", tiny.parent / "text.txt"
    assert run("inspect", tiny, *COMMAND, "--text", text, "--plot", file, "--json")[0] == 0
    begins = {".png": b"\x89PNG", ".SVG": b"<?xml"}[suffix]
    assert file.read_bytes().startswith(begins)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]  # nothing left aside
    with pytest.raises(ValueError, match="there is no folder"):
        plot(None, tmp_path / "none" / "heat.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--outliers", "give --text FILE, or --text builtin"),
        ("--text builtin", "need --outliers; give it too"),
        ("--plot x.png", "need --outliers; give it too"),
        ("--outliers --text builtin --plot x.gif", "--plot writes .png, .svg, .pdf, got 'x.gif'"),
        ("--outliers --text builtin --plot x", "--plot writes .png, .svg, .pdf, got 'x'"),
        ("--outliers --text builtin --plot /nowhere/x.png", "there is no folder /nowhere"),
        ("--outliers --text builtin --tokens 64", "is not in the range"),
    ],
)
def test_bad_usage(tiny, run, options, message):
    fails(run("inspect", tiny, *options.split()), 2, message)


def test_bad_texts(tiny, run, tmp_path):
    (tmp_path / "t.txt").write_text("short")
    fails(run("inspect", tiny, "--outliers", "--text", tmp_path / "t.txt"), 1, "needs 512")
    fails(run("inspect", tiny, "--outliers", "--text", "/nowhere.txt"), 1, "cannot read /nowhere")
    many = ("--outliers", "--text", "builtin", "--tokens", 2000)
    fails(run("inspect", tiny, *many), 1, "exceeds the model's 1024 positions")


def test_without_matplotlib(tiny, run, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    options = (*COMMAND, "--text", "builtin", "--plot", tmp_path / "x.png")
    fails(run("inspect", tiny, *options), 2, "run: pip install 'jaxquant[report]'")


def of_text(beginning):
    """The demo model, and tokens of which the first ones are given."""
    model = load("smollm2-135m")
    return model, token_sequences(model, beginning + topics["assert"] * 2, 128, 1)[0]


@pytest.mark.model
@pytest.mark.slow
def test_the_first_token_of_the_real_model_is_massive():
    """Born in layer 11's down projection, a sink as long as it lasts; figures of "\\n\\n" alone.

    Nothing comes before the first token, so what it has is the same in every text.
    """
    model, tokens = of_text("\n\n = ")
    assert tokens[0] == 1116
    found = outliers_of(model, tokens)
    giant = {m.layer: m for m in found.massive if (m.token, m.channel) == (0, 507)}
    assert {m.token for m in found.massive} == {0}
    assert set(range(11, 27)) <= set(giant) <= set(range(11, 29))
    assert giant[11].value == pytest.approx(24851.28, rel=1e-4)
    down = {p.layer: p for p in found.inputs if p.site == "layers/mlp/down/kernel"}
    giants = {layer for layer, p in down.items() if "massive" in p.kinds}
    assert {(11,), (28,)} <= giants <= {(11,), (28,), (29,)}
    for layer, channel, value in ((11, 1229, 3068.95), (28, 678, 2347.12)):
        assert down[layer,].top[0] == (pytest.approx(value, rel=1e-4), 0, channel)
        assert down[layer,].rest < 100  # the twin: no other token has such
    key = {s.layer: s.share for s in found.sinks if s.token == 0}
    assert set(range(12, 30)) <= set(key) and 11 not in key
    qkv = {p.layer: p for p in found.inputs if p.site == "layers/attn/{k,q,v}/kernel"}
    assert all(qkv[layer,].channels[0].channel == 247 for layer in range(9, 25))
    assert all("channel" in p.kinds and "massive" not in p.kinds for p in qkv.values())


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize(
    ("beginning", "value", "giants"),
    [
        ("<|im_start|>", 24917.4, {0}),
        ("<|endoftext|>", 20458.6, {0}),
        ("", 22543.1, {0}),  # "The"
        # Two so alike that the second has no past to tell it from the first.
        ("\n\n", 23843.64, {0, 1}),  # "\n", "\n"
        ("The ", 22543.1, {0, 1}),  # "The", " The"
    ],
)
def test_whatever_the_first_token(beginning, value, giants):
    model, tokens = of_text(beginning)
    residual = jax.jit(hidden_states(model.config))(model.params, jnp.asarray(tokens)).residual
    assert residual[12, 0, 507] == pytest.approx(value, rel=1e-4)
    assert {m.token for m in massive(residual)} == giants
