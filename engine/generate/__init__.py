"""Text from a model: decoding with a key/value cache, ranks that serve it, prompts."""
