"""The fields of the blocks of GGML's types, as records of byte planes.

The scales of a block, its codes, and the upper bits of codes that are stored apart are fields of
their own. A field is where it is; what its numbers mean does not matter here. Packed scales of 6
bits (Q4_K, Q5_K) are three fields of 4 bytes, each of which has one form: lower bits of the scales,
of the minima, and the rest of both.

Source: the structures `block_*` of ggml (ggml-common.h), as `gguf.quants` takes them apart.
"""

from jaxquant.lossless import Record

BLOCKS = {
    "F64": Record("f8"),
    "F32": Record("f4"),
    "F16": Record("u2"),
    "BF16": Record("f2"),
    "I8": Record("u1"),
    "I16": Record("u2"),
    "I32": Record("u4"),
    "I64": Record("u8"),
    "Q1_0": Record("u2 16u1", 128),  # d, codes
    "Q4_0": Record("u2 16u1", 32),  # d, codes
    "Q4_1": Record("u2 u2 16u1", 32),  # d, m, codes
    "Q5_0": Record("u2 4u1 16u1", 32),  # d, fifth bits, codes
    "Q5_1": Record("u2 u2 4u1 16u1", 32),  # d, m, fifth bits, codes
    "Q8_0": Record("u2 32u1", 32),  # d, codes
    "Q8_1": Record("f4 f4 32u1", 32),  # d, s, codes
    "Q2_K": Record("16u1 64u1 u2 u2", 256),  # scales, codes, d, dmin
    "Q3_K": Record("32u1 64u1 4u1 4u1 4u1 u2", 256),  # third bits, codes, scales, d
    "Q4_K": Record("u2 u2 4u1 4u1 4u1 128u1", 256),  # d, dmin, scales, codes
    "Q5_K": Record("u2 u2 4u1 4u1 4u1 32u1 128u1", 256),  # d, dmin, scales, fifth bits, codes
    "Q6_K": Record("128u1 64u1 16u1 u2", 256),  # lower bits, upper bits, scales, d
    "Q8_K": Record("f4 256u1 16u2", 256),  # d, codes, sums
    "IQ1_S": Record("u2 32u1 8u2", 256),  # d, codes, upper bits and scales
    "IQ1_M": Record("32u1 16u1 4u2", 256),  # codes, upper bits, scales
    "IQ2_XXS": Record("u2 64u1", 256),  # d, codes with signs and scales
    "IQ2_XS": Record("u2 32u2 8u1", 256),  # d, codes with signs, scales
    "IQ2_S": Record("u2 32u1 32u1 8u1 8u1", 256),  # d, codes, signs, upper bits, scales
    "IQ3_XXS": Record("u2 64u1 8u4", 256),  # d, codes, signs and scales
    "IQ3_S": Record("u2 64u1 8u1 32u1 4u1", 256),  # d, codes, upper bits, signs, scales
    "IQ4_NL": Record("u2 16u1", 32),  # d, codes
    "IQ4_XS": Record("u2 u2 4u1 128u1", 256),  # d, upper bits of scales, lower bits, codes
    "TQ1_0": Record("48u1 4u1 u2", 256),  # five codes a byte, four codes a byte, d
    "TQ2_0": Record("64u1 u2", 256),  # codes, d
    "MXFP4": Record("u1 16u1", 32),  # scale, codes
    "NVFP4": Record("4u1 32u1", 64),  # scales, codes
}
