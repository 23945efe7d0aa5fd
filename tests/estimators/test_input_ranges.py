"""Learned ranges of inputs: what a frozen weight holds is what training used, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant as jq
from jaxquant.estimators.input_ranges import PACT, LSQRange

RANGES = [
    (LSQRange(), "int8,static"),
    (LSQRange(), "int4,asymmetric,static"),
    (PACT(), "int8,static"),
    (PACT(), "int4,static"),
    (PACT(unsigned=True), "int4,asymmetric,static"),
]


@pytest.mark.parametrize(("estimator", "form"), RANGES, ids=str)
def test_served_ranges_do_not_depend_on_the_program(estimator, form):
    """A compiled program multiplies by the reciprocal of a constant, where JAX itself divides."""
    form = jq.Activations.of(form)
    served = lambda learned: estimator.served(learned, form)
    zero = jnp.full(1, 0.0 if form.symmetric else -1.0)
    for scale in np.linspace(0.01, 3, 50, dtype=np.float32):  # some of which would tell
        learned = estimator.start({"scale": jnp.full(1, scale), "zero": zero}, form)
        compiled = jax.jit(served)(learned)
        for name, a in served(learned).items():
            np.testing.assert_array_equal(a, compiled[name])
