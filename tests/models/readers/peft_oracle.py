"""The real PEFT and Transformers against our PEFT folders, in both directions; a script.

It needs peft, transformers, accelerate and torch in an environment of their own, and none of ours:

    python tests/models/readers/peft_oracle.py make MODEL DATA    # writes what test_peft.py reads
    python tests/models/readers/peft_oracle.py logits MODEL DIR   # of a folder that we wrote

MODEL is the folder of the tiny Llama. `make` trains nothing: it draws the adapters. With `logits`
the logits go to DIR.npy. `tests.models.readers.test_peft` runs the second where PEFT_PYTHON names
the interpreter.
"""

import importlib
import shutil
import sys
from pathlib import Path

import numpy as np

TOKENS = (np.arange(12) * 37) % 256
CONFIGS = {
    "lora": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {
        "r": 3, "lora_alpha": 5, "use_rslora": True, "lora_dropout": 0.1,
        "target_modules": ["k_proj", "o_proj", "lm_head"],
    },
    "dora": {"r": 2, "lora_alpha": 8, "use_dora": True, "target_modules": ["q_proj", "up_proj"]},
}  # fmt: skip


def libraries():
    """torch, peft and transformers, which the tests of this repository do without."""
    return (importlib.import_module(name) for name in ("torch", "peft", "transformers"))


def base(folder):
    _, _, transformers = libraries()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def logits(model):
    torch, *_ = libraries()
    with torch.no_grad():
        return model(torch.tensor(TOKENS[None].astype(np.int64))).logits[0].numpy()


def make(model, data):
    """Write an adapter of each kind, and its logits."""
    torch, peft, _ = libraries()
    for seed, (name, fields) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        config = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
        adapted = peft.get_peft_model(base(model), config).eval()
        for key, value in adapted.named_parameters():
            if "lora_B" in key:
                value.data.normal_(0, 0.3)
            if "magnitude" in key:
                value.data.mul_(torch.empty_like(value).uniform_(0.6, 1.4))
        adapted.save_pretrained(data / name)
        (data / name / "README.md").unlink(missing_ok=True)
        shutil.rmtree(data / name / "__pycache__", ignore_errors=True)
        np.save(data / f"{name}.npy", logits(adapted).astype(np.float32))


def main(job, model, folder):
    if job == "make":
        make(Path(model), Path(folder))
    else:
        _, peft, _ = libraries()
        adapted = peft.PeftModel.from_pretrained(base(model), folder).eval()
        np.save(f"{folder}.npy", logits(adapted))


if __name__ == "__main__":
    main(*sys.argv[1:])
