"""Import and export of Hugging Face directories: config.json, weights and tokenizer files."""
