"""Models as other programs leave them."""

from pathlib import Path

import pytest

from engine.testing.tokenizers import write_chatml_tokenizer


def write_llama(directory: Path) -> Path:
    """Write a small Llama with a tokenizer and no chat template, by transformers; skip the test without it."""
    transformers = pytest.importorskip("transformers")
    import torch

    write_chatml_tokenizer(directory)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=260, **shape, max_position_embeddings=256, bos_token_id=None, eos_token_id=0, initializer_range=0.05
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory
