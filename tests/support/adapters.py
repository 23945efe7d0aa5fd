"""The table of adapters: a new one enters every contract by one line in ADAPTERS."""

import jaxquant as jq

GROUP = 16
INTEGER = jq.formats.Integer(3, GROUP, symmetric=True, scale_dtype="float32")
OFFSET = jq.formats.Offset(INTEGER, "float32")
NORMAL = jq.formats.NormalFloat(4, GROUP)
HALF = jq.formats.Offset(jq.formats.Integer(2, GROUP, symmetric=True))

# Name -> adapter, format of the base.
ADAPTERS = {
    "lora": (jq.adapters.LoRA(4), NORMAL),
    "rslora": (jq.adapters.LoRA(4, alpha=4, rslora=True), INTEGER),
    "dora": (jq.adapters.LoRA(4, dora=True), NORMAL),
    "lora, doubly quantized": (jq.adapters.LoRA(4), jq.formats.NormalFloat(4, 16, "float32", True)),
    "lora, lattice": (jq.adapters.LoRA(4), jq.formats.E8P(2)),
    "lora, trellis": (jq.adapters.LoRA(4), jq.formats.Trellis((2,), L=8)),
    "lora, floats": (jq.adapters.LoRA(4), jq.formats.Dense()),
    "qalora": (jq.adapters.QALoRA(3), OFFSET),
    "qalora, sum": (jq.adapters.QALoRA(2, alpha=1, pooling="sum"), HALF),
    "qalora, table": (jq.adapters.QALoRA(2), jq.formats.Offset(NORMAL)),
    "l4q": (jq.adapters.L4Q(4), OFFSET),
    "l4q, half": (jq.adapters.L4Q(4, alpha=2), HALF),
    "l4q, range": (jq.adapters.L4Q(4, init="range"), OFFSET),
    "lota": (jq.adapters.LoTA(4, threshold=0.375), OFFSET),
    "lota, of the text": (jq.adapters.LoTA(4, threshold=0.375, divided=False), HALF),
    "peqa": (jq.adapters.PEQA(), INTEGER),
    "peqa, offsets": (jq.adapters.PEQA(), HALF),
    "peqa, asymmetric": (jq.adapters.PEQA(), jq.formats.Integer(4, GROUP)),
    "peqa, additive": (jq.adapters.PEQA(), jq.formats.Additive(2, 4, 4)),
}
EXACT = {name for name, (adapter, _) in ADAPTERS.items() if adapter.exact}
