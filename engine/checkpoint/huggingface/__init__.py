"""Hugging Face directories: config.json, weights and tokenizer files, in and out."""
