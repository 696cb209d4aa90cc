"""A tokenizer with the special tokens of several families."""

import json

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from engine.data.tokenizers.load import load_tokenizer
from engine.testing.tokenizers import standard_library_texts
from tests.data.chat.examples import (
    SPECIAL,
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A byte-level tokenizer with the special tokens of several families, as transformers and we read it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        standard_library_texts(30_000),
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    path = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="session")
def tokenizer(folder):
    return load_tokenizer(folder)
