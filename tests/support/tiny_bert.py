"""A BERT encoder of a few thousand weights, written as a Hugging Face folder."""

import json

import numpy as np
from safetensors.numpy import save_file

from jaxquant_models.readers.encoder import (
    TENSORS,
)

HF = {
    "model_type": "bert", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 16,
    "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0, "hidden_act": "gelu",
}  # fmt: skip


def random_tensors():
    rng = np.random.default_rng(0)
    d, f = HF["hidden_size"], HF["intermediate_size"]
    shapes = {"intermediate.dense.weight": (f, d), "intermediate.dense.bias": (f,)}
    shapes |= {"word_embeddings.weight": (50, d), "position_embeddings.weight": (16, d)}
    shapes |= {"token_type_embeddings.weight": (2, d), ".output.dense.weight": (d, f)}
    names = [t.format(i) for t in TENSORS.values() for i in range(3)]
    out = {"embeddings.position_ids": np.arange(16)[None]}
    for name in dict.fromkeys(names):
        special = [shapes[end] for end in shapes if name.endswith(end)]
        if "attention." in name or not special:
            special = [(d, d) if name.endswith("weight") and "Norm" not in name else (d,)]
        out[name] = rng.normal(0.0, 0.3, special[0]).astype(np.float32)
    return out


def write(at):
    """An encoder with random weights, its words the numbers from 4 to 49."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(4, HF["vocab_size"]))]
    vocab = {word: i for i, word in enumerate(words)}
    ends = {name: {"id": name, "ids": [vocab[name]], "tokens": [name]} for name in words[2:4]}
    token = lambda name: {"SpecialToken": {"id": name, "type_id": 0}}
    single = [token("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, token("[SEP]")]
    tokenizer = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "decoder": None,
        "truncation": None, "padding": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": ends
        },
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    }  # fmt: skip
    (at / "config.json").write_text(json.dumps(HF))
    (at / "tokenizer.json").write_text(json.dumps(tokenizer))
    (at / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 5}))
    save_file(random_tensors(), at / "model.safetensors")
    return at
