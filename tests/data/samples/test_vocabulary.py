import numpy as np
import pytest

from engine.data.samples.vocabulary import check_tokenizer, check_vocabulary
from engine.data.storage.info import DatasetInfo
from engine.data.storage.reader import IndexedDataset
from engine.data.storage.writer import IndexedDatasetWriter
from engine.errors import DataError


def written(prefix, num_tokens, info=None) -> IndexedDataset:
    with IndexedDatasetWriter(prefix, np.uint16, info) as writer:
        writer.add_document(np.arange(num_tokens))
    return IndexedDataset(prefix)


@pytest.mark.parametrize("num_tokens", [300, 20_000])
def test_ids_beyond_the_vocabulary_are_found_at_start(tmp_path, num_tokens):
    data = written(tmp_path / "web", num_tokens)
    check_vocabulary(data, num_tokens)
    last = num_tokens - 1
    with pytest.raises(
        DataError,
        match=rf"web\.bin: tokens\[{last}\] = {last}; expected 0 \.\. {last - 1}, .*it is token {last} of document 0",
    ):
        check_vocabulary(data, last)


def test_the_recorded_vocabulary_and_tokenizer_are_compared(tmp_path):
    info = DatasetInfo(tokenizer_kind="sentencepiece", tokenizer_hash="abc", vocab_size=32_000, eod_id=2)
    data = written(tmp_path / "web", 100, info)
    check_vocabulary(data, 32_000)
    check_tokenizer(data, "abc")
    check_tokenizer(written(tmp_path / "foreign", 100), "xyz")
    with pytest.raises(DataError, match=r"web\.json: made with a vocabulary of 32000, .*model\.vocab_size = 500"):
        check_vocabulary(data, 500)
    with pytest.raises(DataError, match=r"web\.json: made with a sentencepiece tokenizer of hash abc; .*has xyz"):
        check_tokenizer(data, "xyz")
