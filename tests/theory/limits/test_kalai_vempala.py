"""Hallucination of calibrated models in a toy world, recomputed; miscalibration by too few bins."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxquant.theory.limits.kalai_vempala import hallucination_bound, miscalibration, toy_world

CALIBRATED, MEMORIZER = toy_world(jax.random.key(1))


def test_hallucination_and_miscalibration_make_up_for_monofacts():
    assert CALIBRATED.monofacts == MEMORIZER.monofacts > 0.15
    assert CALIBRATED.hallucination == pytest.approx(CALIBRATED.monofacts, abs=0.02)
    assert CALIBRATED.miscalibration < 1e-9
    assert MEMORIZER.hallucination == 0
    assert MEMORIZER.miscalibration == pytest.approx(MEMORIZER.monofacts, abs=0.03)
    assert CALIBRATED.bound > 0.05 and CALIBRATED.limits()[0].verdict == "holds"
    assert MEMORIZER.bound <= 0 and MEMORIZER.limits()[0].verdict == "undecided"


def test_a_memorizer_that_claims_calibration_is_seen():
    """In a single bin every model is calibrated, but bins must be level sets."""
    one_bin = miscalibration(np.ones(3), np.array([0.5, 0.5, 0.0]), np.array([0.2, 0.2, 0.6]))
    assert one_bin == pytest.approx(0)
    bound = CALIBRATED.bound + CALIBRATED.miscalibration  # at Mis = 0
    claim = dataclasses.replace(MEMORIZER, miscalibration=0.0, bound=bound)
    assert claim.limits()[0].verdict == "violated"


def test_miscalibration_by_hand():
    each, model = np.array([0.4, 0.1, 0.1]), np.array([0.4, 0.2, 0.4])
    truth = np.array([0.5, 0.5, 0.0])
    assert miscalibration(each, model, truth) == pytest.approx((0.1 + 0.1) / 2)


def test_the_bound_by_hand():
    found = hallucination_bound(0.5, 0.1, 1000, np.log(1000), 0.05)
    assert found == pytest.approx(0.4 - 3e-3 / 0.05 - (6 * np.log(120) / 1000) ** 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hallucination_bound(np.nan, 0.0, 10, 1.0), "rates from 0 to 1"),
        (lambda: hallucination_bound(0.5, 0.0, 0, 1.0), "1 document"),
        (lambda: hallucination_bound(0.5, 0.0, 10, 1.0, 0.0), "0 < d"),
        (lambda: miscalibration(np.ones(2), np.ones(1), np.ones(1)), "three arrays"),
        (lambda: miscalibration(np.ones(1), np.ones(1), np.full(1, np.nan)), "nonnegative"),
        (lambda: miscalibration(np.ones(2), np.ones(2), np.ones(2)), "must sum to 1"),
        (lambda: toy_world(jax.random.key(0), 0), "1 document"),
        (lambda: toy_world(jax.random.key(0), 10, 10, 10), "more factoids than facts"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
