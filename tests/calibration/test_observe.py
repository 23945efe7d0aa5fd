"""Any summary of every input in one pass, against the inputs themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from tests.support.arrays import draw, stack
from tests.support.networks import NETWORKS


@dataclasses.dataclass(frozen=True)
class Last:
    """The last row, how many there are, and where the largest entry is."""

    def zeros(self, k, n):
        return jnp.zeros(k), jnp.zeros(()), jnp.zeros(())

    def of(self, seen):
        where = jnp.argmax(jnp.abs(seen.rows)).astype(jnp.float32)
        return seen.rows[-1], jnp.float32(len(seen.rows)), where


def check(summary, rows):
    last, count, where = summary
    rows = np.asarray(rows)
    np.testing.assert_allclose(last, rows[-1], atol=1e-5)
    assert (count, where) == (len(rows), np.argmax(np.abs(rows)))


@pytest.mark.parametrize("network", NETWORKS, ids=lambda f: f.__name__)
def test_what_weights_multiply(network):
    fn, tree, paths = network()
    a, b, x = draw(32, 64), draw(64, 32, seed=1), draw(5, 32, seed=2)
    found = jq.calibration.observe(fn, tree(a, b), x, summary=Last())
    assert list(found) == list(paths)  # in the order of use
    for path, rows in zip(paths, (x, jnp.tanh(x @ a)), strict=True):
        assert found[path].weights == (path,)
        assert np.all(found[path].products == 1)
        if found[path].products.ndim == 0:  # else heads as batch axes of an Einsum's weight
            check(found[path].summary, rows)


@pytest.mark.parametrize("remat", [False, True])
def test_every_layer_of_a_stack(remat):
    net, x = stack()(remat=remat), draw(5, 32)
    params = net.init(jax.random.key(0), x)["params"]
    found = jq.calibration.observe(
        lambda p, x: net.apply({"params": p}, x), params, x, summary=Last()
    )
    (seen,) = found.values()
    assert seen.products.tolist() == [1, 1, 1]
    h = x
    for i, w in enumerate(params["layers"]["d"]["kernel"]):
        check([a[i] for a in seen.summary], h)
        h = h + jnp.tanh(h @ w)


def test_every_expert():
    w, x = draw(4, 32, 16), draw(4, 5, 32, seed=1)
    fn = lambda p, x: jax.vmap(lambda w, x: x @ w)(p["w"], x)
    seen = jq.calibration.observe(fn, {"w": w}, x, summary=Last())["w"]
    for i in range(4):
        check([a[i] for a in seen.summary], x[i])


def test_weights_of_one_input_see_it_once():
    params = {"k": draw(32, 16), "o": draw(8, 8), "q": draw(32, 8)}
    fn = lambda p, x: (jnp.tanh(x @ p["q"]) @ p["o"], x @ p["k"])
    found = jq.calibration.observe(fn, params, draw(5, 32), summary=Last())
    assert [seen.weights for seen in found.values()] == [("k", "q"), ("o",)]
    more = lambda p, x: (fn(p, x), 2 * x @ p["k"])  # k reads another input too
    found = jq.calibration.observe(more, params, draw(5, 32), summary=Last())
    assert [seen.weights for seen in found.values()] == [("k",), ("q",), ("o",)]
    assert [float(seen.products) for seen in found.values()] == [2, 1, 1]


def test_what_no_gradient_reaches_is_told():
    fn = lambda p, x: (jnp.argmax(x @ p["a"], -1), 2 * x @ p["b"])
    params = {"a": draw(32, 8), "b": draw(32, 8, seed=1)}
    with pytest.warns(UserWarning, match="no gradient reached the output of a, so the inputs"):
        found = jq.calibration.observe(fn, params, draw(5, 32), summary=Last())
    assert (found["a"].products, found["b"].products) == (0, 1)


def test_bad_input():
    params = {"w": jq.quantize_array(draw(32, 8), jq.rtn(8, group_size=-1))}
    with pytest.raises(ValueError, match="w .1 in all. are packed: pass jaxquant.dequantize"):
        jq.calibration.observe(lambda p, x: x @ p["w"], params, draw(5, 32), summary=Last())
    with pytest.raises(ValueError, match="it multiplies by none"):
        jq.calibration.observe(
            lambda p, x: x + p["w"], {"w": draw(5, 32)}, draw(5, 32), summary=Last()
        )
