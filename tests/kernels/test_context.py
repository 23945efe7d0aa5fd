"""Settings, and functions that are one compiled program where none is in force."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from pallas_kernels.context import Setting, compiled
from tests.support.arrays import draw
from tests.support.compiling import compilations

FACTOR = Setting("a factor of this test", 1.0)


@partial(compiled, static_argnums=1)
def times(x, power, offset=0.0):
    return FACTOR.get() * x**power + offset


def test_a_program_does_not_keep_a_setting():
    x = jnp.arange(3.0)
    assert times(x, 2).tolist() == [0, 1, 4]
    with FACTOR.set(10.0):
        assert times(x, 2).tolist() == [0, 10, 40]
    assert times(x, 2).tolist() == [0, 1, 4]
    assert jax.jit(lambda x: times(x, 2))(x).tolist() == [0, 1, 4]


def test_arguments_go_by_position_and_by_name():
    x = jnp.arange(3.0)
    for call in (lambda: times(x, 2, 1.0), lambda: times(x, power=2, offset=1.0)):
        assert call().tolist() == [1, 2, 5]
    assert times(offset=1.0, power=2, x=x).tolist() == [1, 2, 5]
    with pytest.raises(TypeError, match="missing a required argument: 'power'"):
        times(x)


def test_formats_and_activations_take_names():
    format, w = jq.formats.Integer(4, 16), draw(32, 8)
    data = format.encode(w)
    np.testing.assert_array_equal(format.dequantize(data, k=32), format.dequantize(data, 32))
    rows = jq.Activations(4).rounded(draw(3, 16), data={})
    assert rows.shape == (3, 16)


def test_weights_alike_share_a_program_and_no_buffer():
    """Whatever their names: a model of many layers is decoded by one program for each shape."""
    fn = lambda p, x: [x @ w for w in p.values()]
    params, x = {str(i): draw(32, 16, seed=i) for i in range(4)}, draw(8, 32)
    stats = jq.calibrate(fn, params, [x])
    q = jq.quantize(params, jq.lsq(4, 16, activations="int8,static"), stats)
    leaves = jax.tree.leaves(q)
    assert len({a.unsafe_buffer_pointer() for a in leaves}) == len(leaves)
    with compilations() as found:
        jq.dequantize(q)
        jq.thaw(q, jq.lsq(4, 16, activations="int8,static"))
    assert len(found) <= 2 + 2  # scalars that a program is given
