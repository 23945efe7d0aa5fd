"""The real PEFT and Transformers against our PEFT folders, in both directions.

The tests only read what `make` has written to the folder data/peft: adapters, and the logits of the
tiny model with them. To write it again, or to compute the logits of a folder that we wrote, install
peft, transformers, accelerate and torch (for CPUs) in an environment of their own, and run there,
from the root of the repository:

  python -m tests.models.readers.peft_oracle make
  python -m tests.models.readers.peft_oracle logits MODEL DIR   # writes DIR.npy

With the interpreter of that environment in PEFT_PYTHON, test_peft.py runs the second itself.

The weights are not stored: `weights` draws them again, by the generator whose numbers NumPy has
promised to keep.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.support.tiny_llama import BASE, random_tensors, write_folder

DATA = Path(__file__).parent / "data" / "peft"
TOKENS = (np.arange(8) * 37) % 256
CONFIGS = {
    "lora": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {
        "r": 3, "lora_alpha": 5, "use_rslora": True, "lora_dropout": 0.1,
        "target_modules": ["k_proj", "o_proj", "lm_head"],
    },
    "dora": {"r": 2, "lora_alpha": 8, "use_dora": True, "target_modules": ["q_proj", "up_proj"]},
}  # fmt: skip


def weights():
    """The tensors of the tiny Llama, by their Hugging Face names."""
    draw = np.random.RandomState(0)
    shapes = {name: a.shape for name, a in sorted(random_tensors(BASE).items())}
    norm = lambda shape: 1 + 0.2 * draw.standard_normal(shape)
    matrix = lambda shape: draw.standard_normal(shape) * shape[-1] ** -0.5
    drawn = {n: norm(s) if len(s) == 1 else matrix(s) for n, s in shapes.items()}
    return {name: a.astype(np.float32) for name, a in drawn.items()}


def base(folder):
    """The model of a folder, in Transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def logits(model):
    """Its logits for `TOKENS`, float32 [t, V]."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS[None].astype(np.int64))).logits[0].numpy()


def make(model):
    """Write an adapter of each kind, drawn at random, and its logits."""
    import peft
    import torch

    for seed, (name, fields) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        config = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
        adapted = peft.get_peft_model(base(model), config).eval()
        for key, value in adapted.named_parameters():
            if "lora_B" in key:
                value.data.normal_(0, 0.3)
            if "magnitude" in key:
                value.data.mul_(torch.empty_like(value).uniform_(0.6, 1.4))
        # PEFT adds the weights of an adapted output matrix, unless told otherwise.
        adapted.save_pretrained(DATA / name, save_embedding_layers=False)
        (DATA / name / "README.md").unlink(missing_ok=True)
        (DATA / name / "adapter_model.safetensors").chmod(0o644)
        np.save(DATA / f"{name}.npy", logits(adapted))


def main(job, *folders):
    """Run a job of the command line."""
    import peft

    if job == "make":
        with tempfile.TemporaryDirectory() as folder:
            make(write_folder(Path(folder) / "tiny", BASE, weights()))
    else:
        model, folder = folders
        np.save(f"{folder}.npy", logits(peft.PeftModel.from_pretrained(base(model), folder).eval()))


if __name__ == "__main__":
    main(*sys.argv[1:])
