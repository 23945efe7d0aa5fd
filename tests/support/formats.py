"""The table of formats: a new one enters every contract by one line in FORMATS."""

import jaxquant as jq
from tests.support.foreign import SignLog

# One row at a time, a scale per group: LDLQ may visit the rows in any order.
SCALAR = [
    *(
        jq.formats.Integer(bits=b, group_size=g, symmetric=s)
        for b in (2, 3, 4, 8)
        for g in (16, -1, "tensor")
        for s in (True, False)
    ),
    jq.formats.Integer(bits=4, group_size=16, scale_dtype="bfloat16"),
    jq.formats.Integer(bits=3, group_size=20, pad=True),
    jq.formats.Integer(bits=4, group_size=16, mse=True),
    jq.formats.Ternary(group_size=16),
    jq.formats.Ternary(group_size="tensor"),
    jq.formats.NormalFloat(4, 16),
    jq.formats.NormalFloat(3, 20, "bfloat16", pad=True),
    jq.formats.NormalFloat(2, -1, "float16"),
    jq.formats.Float8("e4m3"),
    jq.formats.Float8("e4m3", "tensor", "float16"),
    jq.formats.Float8("e5m2", 16, "bfloat16"),
    jq.formats.MXFP4(pad=True),
    jq.formats.Stretched(16),
    jq.formats.Offset(jq.formats.Integer(4, 16, symmetric=True)),
    jq.formats.Offset(jq.formats.Integer(2, 20, symmetric=True, pad=True), "bfloat16", mse=True),
    jq.formats.Offset(jq.formats.NormalFloat(3, -1), "float32"),
]


FORMATS = [
    *SCALAR,
    jq.formats.NormalFloat(4, 16, double_quant=True),
    jq.formats.NVFP4(),
    jq.formats.E8P(2),
    jq.formats.E8P(3),
    jq.formats.E8P(4),
    jq.formats.Trellis((2,), L=8),
    jq.formats.Trellis((3, 0, 1), L=8, code="3inst"),
    jq.formats.Trellis((2,), L=10, code="hyb"),
    jq.formats.Trellis((1,), L=10, code="vpu"),
    jq.formats.EntropyCoded(4, states=4, lanes=4),
    jq.formats.DualScale(4),
    jq.formats.DualScale(8),
    jq.formats.FloatPlanes(bits=3, listed=64),
    jq.formats.FloatPlanes(bits=4, listed=64),
    jq.formats.HuffmanLanes(words=256),
    jq.formats.Additive(2, 4, 4),
    jq.formats.Additive(1, 9, 3),
    jq.formats.Vector(4, 4, 4),
    jq.formats.Vector(4, 6, 2, outliers=0.05),
    SignLog(),
]
