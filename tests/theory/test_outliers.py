"""Planted outliers of each kind are found and named, and none where there are none."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.theory.outliers import massive, outliers, sinks
from jaxquant.theory.profile import profile
from tests.support.arrays import draw, stack

X = draw(256, 64)
GATED = X * draw(256, 64, seed=1)  # what a gated MLP gives of noise: heavy tails, no outliers
RELU = jnp.maximum(X - 0.5, 0)  # two thirds are 0
PLAIN = {"gaussian": X, "gated": GATED, "relu": RELU}


@pytest.mark.parametrize("x", PLAIN.values(), ids=PLAIN)
def test_noise_has_no_outliers(x):
    assert profile(x).kinds == ()
    assert profile(1e4 * x).kinds == ()  # of a size alone nothing follows
    assert profile(0 * x).kinds == ()


@pytest.mark.parametrize("x", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize(
    ("kinds", "plant"),
    [
        (("channel",), lambda x: x.at[:, 5].add(40)),
        (("channel",), lambda x: x.at[:, 5].set(40 * X[:, 5])),  # of either sign
        (("channel",), lambda x: x.at[20:, 5].add(40)),  # nearly all tokens
        ((), lambda x: x.at[100:, 5].add(40)),  # not nearly all, nor few
        (("token",), lambda x: x.at[7, 5].set(-90)),
        (("token",), lambda x: x.at[7:12, 5].set(90)),
        (("token",), lambda x: x.at[7].multiply(60)),
        (("token", "massive"), lambda x: x.at[0, 5].set(4000)),
        (("token",), lambda x: 0.01 * x.at[0, 5].set(4000)),  # 1000 medians, but below 100
        (("channel", "token"), lambda x: x.at[:, 5].add(40).at[3, 9].set(-90)),
    ],
)
def test_a_planted_outlier_is_found(x, kinds, plant):
    assert profile(plant(x)).kinds == kinds


def test_figures_are_the_direct_ones():
    x = X.at[0, 5].set(-90).at[3, 9].set(60).at[:, 7].add(30)
    got, size = profile(x, top=3), np.abs(np.asarray(x))
    assert got.top == (
        (-90.0, 0, 5),
        (60.0, 3, 9),
        (float(x[:, 7].max()), int(x[:, 7].argmax()), 7),
    )
    assert got.median == np.median(size)
    assert (got.max, got.rest, got.tokens) == (90, 60, 256)
    assert (got.n_spikes, got.spikes[0]) == (2, (90.0, 0, 5))
    channel = got.channels[0]
    assert channel.channel == 7 and channel.share == 1
    np.testing.assert_allclose(
        channel.ratio, np.median(size.mean(0) ** -1) * size[:, 7].mean(), 0.1
    )
    assert profile(RELU).median == np.median(RELU[RELU > 0])
    odd = profile(x[:255, :63])  # a middle, and not two
    assert odd.median == np.median(size[:255, :63])
    assert profile(x[:1], top=100).rest == 0


def test_massive_activations_and_sinks():
    h = np.stack([X, X, X])
    h[1, 0, 5] = h[2, 0, 5] = 4000
    h[2, 9, 8] = -2000
    found = massive(h)
    assert [m[:4] for m in found] == [(1, 0, 5, 4000), (2, 0, 5, 4000), (2, 9, 8, -2000)]
    assert massive(np.where(np.abs(h) > 100, 99, h)) == ()
    assert massive(h * np.where(np.abs(h) > 100, 1, 10)) == ()
    attention = np.full((2, 256), 1 / 256)
    assert sinks(attention) == ()
    attention[1, 3] = 0.4
    assert sinks(attention) == ((1, 3, pytest.approx(0.4)),)
    assert sinks(attention, share=0.001)[0].token == 0
    with pytest.raises(ValueError, match=r"hidden must be \[L, t, d\], got shape \[256, 64\]"):
        massive(X)
    with pytest.raises(ValueError, match=r"attention must be \[L, t\], got shape \[256\]"):
        sinks(attention[0])


def test_a_report_names_sites_layers_channels_and_tokens():
    """A stack whose second layer is fed an outlier by the first."""
    net, x = stack()(), draw(64, 32).at[:, 4].add(50)
    params = net.init(jax.random.key(0), x)["params"]
    fn = lambda p, x: net.apply({"params": p}, x)
    hidden = np.stack([x, x.at[2, 3].set(-5000)])
    attention = np.zeros((2, 64))
    attention[1, 2] = 0.5
    texts = [f"<{t}>" for t in range(64)]
    found = outliers(fn, params, x, hidden=hidden, attention=attention, texts=texts)
    assert [(p.site, p.layer) for p in found.inputs] == [
        ("layers/d/kernel", (i,)) for i in range(3)
    ]
    assert all(p.kinds == ("channel",) and p.channels[0].channel == 4 for p in found.inputs)
    assert found.hidden[1].kinds == ("channel", "token", "massive")
    text = str(found)
    assert "massive activation: token 2 '<2>', channel 3, after layers 1" in text
    assert "attention sink: key 2 '<2>', layers 1: up to 0.500" in text
    assert text.splitlines()[2].split()[:2] == ["residual", "1"]
    back = json.loads(json.dumps(found.to_json()))
    assert back["hidden"][1]["kinds"] == ["channel", "token", "massive"]
    assert back["inputs"][0]["weights"] == ["layers/d/kernel"]
    sites, layers, heat = found.heat()
    assert (sites, layers) == (["residual", "layers/d/kernel"], [(0,), (1,), (2,)])
    assert np.isnan(heat[2, 0]) and heat[1, 0] == pytest.approx(np.log10(found.hidden[1].ratio))


def test_layers_apart_are_layers_of_one_site():
    params = {"blocks": [{"q": draw(32, 32, seed=i), "k": draw(32, 32)} for i in (1, 2)]}

    def fn(p, x):
        for block in p["blocks"]:
            x = jnp.tanh(x @ block["q"]) + x @ block["k"]
        return x

    found = outliers(fn, params, X[:, :32])
    assert [(p.site, p.layer) for p in found.inputs] == [
        ("blocks/*/{k,q}", (0,)), ("blocks/*/{k,q}", (1,)),
    ]  # fmt: skip
    assert found.inputs[1].weights == ("blocks/1/k", "blocks/1/q")


def test_what_is_not_seen_is_in_the_report():
    def fn(p, x):
        twice = jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, length=2)[0]
        return twice, jnp.argmax(x @ p["v"], -1)

    params = {"w": draw(64, 64), "v": draw(64, 64)}
    with pytest.warns(UserWarning, match="no gradient reached the output of v"):
        found = outliers(fn, params, X)
    assert found.inputs == ()
    assert set(found.unseen) == {
        "w (2 products with it are summed)", "v (no gradient reached it)",
    }  # fmt: skip
    assert "not seen: w (2 products" in str(found)


def test_bad_input():
    fn = lambda p, x: x @ p["w"]
    with pytest.raises(ValueError, match="w of layer .. holds NaN or infinite activations"):
        outliers(fn, {"w": draw(64, 8)}, X.at[3, 3].set(jnp.nan))
    with pytest.raises(ValueError, match="pass jaxquant.dequantize"):
        outliers(fn, {"w": jq.quantize_array(draw(64, 8), jq.rtn(4, 8))}, X)
