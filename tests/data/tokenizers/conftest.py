"""Model files of each kind, and a tokenizer of each kind."""

import pytest

from engine.data.tokenizers.load import load_tokenizer
from engine.testing.tokenizers import standard_library_texts, train_sentencepiece
from tests.data.tokenizers.examples import huggingface


@pytest.fixture(scope="session")
def sentencepiece_model():
    return train_sentencepiece(standard_library_texts(50_000), vocab_size=500)


@pytest.fixture
def sentencepiece_file(tmp_path, sentencepiece_model):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model)
    return path


@pytest.fixture
def huggingface_file(tmp_path):
    return huggingface(tmp_path, special=["<s>", "</s>"])


@pytest.fixture(params=["byte", "sentencepiece", "huggingface"])
def tokenizer(request):
    spec = "byte" if request.param == "byte" else request.getfixturevalue(f"{request.param}_file")
    return load_tokenizer(spec)
