"""The table of rounders: a new one enters every contract by one line, with a format for it."""

from jaxquant.formats import Additive, EntropyCoded, Integer, Trellis
from jaxquant.rounding import LDLQ, Beam, Clipped, Nearest, TwoSided, Waterfill
from tests.support.foreign import Coarse

ROUNDERS = [
    (Nearest(), Integer(3, 16)),
    (LDLQ(), Integer(3, 16)),
    (LDLQ(act_order=False, passes=1, scales=(0.9, 1.0)), Trellis((2,), L=8)),
    (Clipped(Nearest()), Integer(3, 16)),
    (Clipped(LDLQ()), Integer(3, 16)),
    (TwoSided(), Trellis((2,), L=8)),
    (Beam(beam=2, sweeps=1), Additive(2, 4, 4)),
    (Waterfill(), EntropyCoded(3.0, states=4, lanes=4)),
    (Waterfill(correlation=0.5), EntropyCoded(3.0, states=4, lanes=4)),
    (Coarse(), Integer(3, 16)),
]
