"""The table of formats: a new one enters every contract by one line in FORMATS."""

import jaxquant as jq
from tests.support.foreign import SignLog

# One row at a time, a scale per group: LDLQ may visit the rows in any order.
SCALAR = [
    *(
        jq.Integer(bits=b, group_size=g, symmetric=s)
        for b in (2, 3, 4, 8)
        for g in (16, -1, "tensor")
        for s in (True, False)
    ),
    jq.Integer(bits=4, group_size=16, scale_dtype="bfloat16"),
    jq.Integer(bits=3, group_size=20, pad=True),
    jq.Integer(bits=4, group_size=16, mse=True),
    jq.Ternary(group_size=16),
    jq.Ternary(group_size="tensor"),
    jq.NormalFloat(4, 16),
    jq.NormalFloat(3, 20, "bfloat16", pad=True),
    jq.NormalFloat(2, -1, "float16"),
    jq.Float8("e4m3"),
    jq.Float8("e4m3", "tensor", "float16"),
    jq.Float8("e5m2", 16, "bfloat16"),
    jq.MXFP4(pad=True),
    jq.Stretched(16),
]


FORMATS = [
    *SCALAR,
    jq.NormalFloat(4, 16, double_quant=True),
    jq.NVFP4(),
    jq.E8P(2),
    jq.E8P(3),
    jq.E8P(4),
    jq.Trellis((2,), L=8),
    jq.Trellis((3, 0, 1), L=8, code="3inst"),
    jq.Trellis((2,), L=10, code="hyb"),
    jq.Trellis((1,), L=10, code="vpu"),
    jq.EntropyCoded(4, states=4, lanes=4),
    jq.DualScale(4),
    jq.DualScale(8),
    jq.Additive(2, 4, 4),
    jq.Additive(1, 9, 3),
    jq.Vector(4, 4, 4),
    jq.Vector(4, 6, 2, outliers=0.05),
    SignLog(),
]
