"""Files and wheels in: models, tokenizers, texts."""
