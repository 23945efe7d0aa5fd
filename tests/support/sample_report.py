"""Reports for the tests of the page: a full one, and a minimal one."""

import math

from jaxquant_models.schemas.report import (
    Advice,
    ChipRow,
    Dimensions,
    Energy,
    Frontier,
    Histogram,
    Identity,
    LimitRow,
    Point,
    Report,
    TensorRow,
)

KINDS = {
    "attn/q": (576, 576), "attn/k": (576, 192), "attn/v": (576, 192), "attn/o": (576, 576),
    "mlp/gate": (576, 1536), "mlp/up": (576, 1536), "mlp/down": (1536, 576),
}  # fmt: skip
LAYERS = 30


def tensor(kind: str, layer: int, number: int) -> TensorRow:
    """A matrix whose figures are smooth functions of where it is."""
    rows, columns = KINDS[kind]
    wave = math.sin(0.37 * layer + number) ** 2
    distortion = 0.004 * (1 + 3 * wave) * (8 if (kind, layer) == ("mlp/down", 11) else 1)
    shannon = 0.5 * math.log2(1 / distortion)
    return TensorRow(
        path=f"params/layers_{layer}/{kind}/kernel", kind=kind, shape=[rows, columns],
        method="gptq", format="int4, groups of 64", bytes=rows * columns * 17 // 32, stored=4.25,
        entropy=3.71 + 0.1 * wave, ideal=3.95 + 0.1 * wave, exponent=2.61 + 0.05 * wave,
        distortion=distortion, output_distortion=1.4 * distortion, shannon=shannon,
        gap=4.25 - shannon, gap_decibels=6.0206 * (4.25 - shannon), temperature=0.013 * wave,
        largest=7.9 + 20 * wave, kurtosis=0.9 + 3 * wave,
        outliers=["channel", "massive"] if kind == "mlp/down" and layer == 11 else [],
    )  # fmt: skip


def limits() -> list[LimitRow]:
    """One row of each verdict."""
    rows = [
        ("softmax crowding", "Every head can put a weight of 0.9 on one of 2,048 tokens.",
         "expectation", 7.31, 9.82, False, "violated", "Layer 3, head 5 has the smallest margin."),
        ("generation survival", "Greedy text repeats no more than the reference's, by McNemar.",
         "survival", 0.31, 0.05, False, "collapsed", "11 of 32 continuations end in a loop."),
        ("fact floor", "At least a share of .02 of the facts seen once is wrong.", "theorem",
         0.27, 0.02, True, "holds", ""),
        ("retrieval", "Recall at 10 of embeddings stays above 0.95.", "survival", 0.982, 0.95,
         True, "survives", ""),
        ("capacity", "Cover: as many facts as twice the parameters.", "theorem", None, None, None,
         "undecided", "The text is too short."),
        ("first divergence", "The first token that differs.", "description", 13.0, None, None,
         "-", ""),
    ]  # fmt: skip
    names = ("name", "statement", "kind", "measured", "bound", "holds", "verdict", "note")
    return [LimitRow(**dict(zip(names, row, strict=True)), seconds=1.25) for row in rows]


def chips() -> list[ChipRow]:
    """Bounds of a model of 73 MB; a chip without a bandwidth is left out of the figures."""
    peaks = {
        "v5e": (819e9, 197e12), "v5p": (2765e9, 459e12), "v6e": (1638e9, 918e12),
        "tpu7x": (7380e9, 2307e12), "A100": (2039e9, 312e12), "H100": (3352e9, 989e12),
        "H200": (4800e9, 989e12), "B200": (8000e9, 2250e12), "laptop DDR5": (89.6e9, 1e12),
        "unknown": (0.0, 0.0),
    }  # fmt: skip
    rows = []
    for chip, (bandwidth, peak) in peaks.items():
        rows.append(
            ChipRow(
                chip=chip, source="data sheet, read 2026-11", fits=chip != "unknown",
                decode=bandwidth / 82e6, prefill=peak / 270e6, wall="memory",
                critical_batch=None if chip == "unknown" else peak / max(bandwidth, 1) / 3.3,
                intensity=3.3, ridge=peak / max(bandwidth, 1), joules=0.0031 if bandwidth else None,
                bandwidth=bandwidth or None, prefill_intensity=1730.0 if bandwidth else None,
            )
        )  # fmt: skip
    return rows


def frontier() -> Frontier:
    """Variants of 2 to 8 bits, with the model itself."""
    rows = [
        ("gptq 4 bits", "", 4.25, 89_412_864, 0.0412, 0.907, 18.31, True),
        ("rtn 4 bits", "--method rtn --bits 4", 4.25, 89_412_864, 0.118, 0.85, 20.4, False),
        ("gptq 3 bits", "--method gptq --bits 3", 3.25, 76_140_000, 0.187, 0.812, 21.7, False),
        ("trellis 3 bits", "--method trellis --bits 3", 3.02, 73_100_000, 0.094, 0.864, 19.5, True),
        ("qtip 2 bits", "--method qtip --bits 2", 2.02, 59_900_000, 0.612, 0.66, 35.9, True),
        ("vptq 2 bits", "--method vptq --bits 2", 2.13, 61_200_000, 0.71, 0.64, 39.1, False),
        ("rtn 2 bits", "--method rtn --bits 2", 2.25, 62_900_000, 7.9, 0.05, 41200.0, False),
        ("rtn 8 bits", "--method rtn --bits 8", 8.25, 142_500_000, 0.0007, 0.99, 17.52, True),
        ("nf4", "--method nf4", 4.5, 92_700_000, 0.061, 0.889, 18.8, False),
        ("gptq 4.25, healed", "--method gptq --heal 200", 4.25, 89_412_864, 0.0298, 0.92, 18.0,
         True),
    ]  # fmt: skip
    names = ("name", "command", "bits_per_weight", "bytes", "kl", "top1", "perplexity")
    points = [
        Point(
            **dict(zip(names, row[:7], strict=True))
            | {"command": row[1] and f"jaxquant quantize smollm2-135m {row[1]} --out DIR"},
            on_frontier=row[7] and row[0] != "gptq 4 bits",
        )
        for row in rows
    ]
    return Frontier(reference="smollm2-135m", perplexity=17.49, points=points, tokens=16384)


def full(**changes: object) -> Report:
    """A report with every section, of a model with 210 matrices."""
    fields: dict[str, object] = {
        "made": {"time": "2026-12-02T14:00:00Z", "jaxquant": "0.2.0", "jax": "0.10.2"},
        "seconds": {"tensors": 14.2, "frontier": 261.0, "limits": 122.4, "roofline": 0.004},
        "identity": Identity(
            model="/tmp/gptq-4", against="smollm2-135m", text="builtin", tokens=16384,
            architecture={"family": "llama", "layers": LAYERS, "hidden": 576, "heads": 9,
                          "rope_theta": 1e5, "tied": True, "vocabulary": 49152},
            parameters=134_515_008, bytes=89_412_864, bytes_on_disk=85_100_200,
            bits_per_weight=4.25, bits_over_all=5.317, methods={"gptq": 210, "float": 1},
        ),
        "tensors": [tensor(k, i, n) for i in range(LAYERS) for n, k in enumerate(KINDS)],
        "histograms": [
            Histogram(kind=k, first=-18, entropy=2.61 + 0.07 * n,
                      counts=[round(4e5 * math.exp(-((i - 11 - 0.2 * n) ** 2) / 6))
                              for i in range(19)])
            for n, k in enumerate(["all", "mlp/down"])
        ],
        "frontier": frontier(),
        "dimensions": Dimensions(
            estimators=["TwoNN", "MLE", "participation ratio"], points=2048,
            layers=[[9 + 8 * math.sin(i / 10), 11 + 7 * math.sin(i / 10), 3 + 0.6 * i]
                    for i in range(LAYERS + 1)],
            reference=[[9 + 8.4 * math.sin(i / 10), 11 + 7.7 * math.sin(i / 10), 3 + 0.63 * i]
                       for i in range(LAYERS + 1)],
        ),
        "limits": limits(),
        "context": 2048,
        "roofline": chips(),
        "energy": Energy(
            node="45 nm, Horowitz 2014", weights=0.00286, cache=0.00074, arithmetic=0.00011,
            landauer=1.88e-12,
            constants={"dram_picojoules_per_bit": 4.0, "int8_product_picojoules": 0.2},
            sources={"dram_picojoules_per_bit": "HBM2, O'Connor et al. 2017"},
            by_bits=[(b, 0.0007 * b, 0.00011) for b in (2.0, 3.0, 4.25, 8.0, 16.0)],
        ),
        "advice": [
            Advice(command="jaxquant quantize smollm2-135m --method gptq --bits 4 --heal 200 "
                   "--out gptq-4-healed", measured=True, bytes=89_412_864, kl=0.0298, kl_now=0.0412,
                   reason="Healing lowers KL by 28 % at the same bytes."),
            Advice(command="jaxquant quantize smollm2-135m --target-bits 3.4 --effort best "
                   "--out mixed", measured=False, bytes=78_100_000, kl=0.039, kl_now=0.0412,
                   reason="Bits move from q and k to down of layer 11, the hottest by far."),
        ],
        "findings": [
            "One matrix, down of layer 11, causes a fifth of all distortion of outputs.",
            "The codes carry 3.76 of their 4.25 bits: a lossless code would save 11.5 %.",
            "11 of 32 greedy continuations loop, although perplexity rose by 4.7 % only.",
            "Decoding needs 40 times fewer operations per byte than an H100 has to offer.",
        ],
        "notes": ["Left out: activations of the embedding."],
    }  # fmt: skip
    return Report.model_validate(fields | changes)


def minimal(**changes: object) -> Report:
    """A report with what is required alone."""
    identity = Identity(
        model="m", against=None, text="builtin", tokens=1, architecture={}, parameters=0, bytes=0,
        bytes_on_disk=None, bits_per_weight=0, bits_over_all=0, methods={},
    )  # fmt: skip
    lists = ("tensors", "histograms", "limits", "roofline", "advice", "findings", "notes")
    empty: dict[str, object] = {name: [] for name in lists}
    empty |= {"made": {}, "seconds": {}, "identity": identity, "context": 1}
    empty |= dict.fromkeys(("frontier", "dimensions", "energy"))
    return Report.model_validate(empty | changes)
