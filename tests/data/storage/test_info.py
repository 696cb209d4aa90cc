"""The description beside a dataset."""

import json

import numpy as np
import pytest

from engine.data.storage.info import SourceFile
from engine.data.storage.reader import IndexedDataset
from engine.data.storage.writer import IndexedDatasetWriter
from engine.errors import DataFormatError
from tests.data.storage.raw import INFO, some


def test_the_description_carries_the_counts_and_is_read_back(tmp_path):
    with IndexedDatasetWriter(tmp_path / "deep" / "set.v1", np.uint16, INFO) as writer:
        writer.add_document([1, 2])
        writer.info = INFO.model_copy(update={"skipped": 4, "sources": (SourceFile(path="a.txt", bytes=9),)})
    info = IndexedDataset(tmp_path / "deep" / "set.v1").info
    assert info is not None
    assert (info.num_documents, info.num_tokens, info.skipped) == (1, 2, 4)
    assert info.sources == (SourceFile(path="a.txt", bytes=9),)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", r"set\.json: content"),
        ('{"tokenizer_kind": "byte"}', r"set\.json: tokenizer_hash"),
        (
            INFO.model_copy(update={"num_tokens": 6, "num_documents": 3}).model_dump_json(),
            r"num_tokens = 6; expected 5",
        ),
    ],
)
def test_a_description_that_is_damaged_or_of_another_dataset(tmp_path, text, message):
    prefix = some(tmp_path)
    (tmp_path / "set.json").write_text(text)
    with pytest.raises(DataFormatError, match=message):
        IndexedDataset(prefix)


def test_a_description_cannot_command_the_terminal(tmp_path):
    prefix = some(tmp_path)
    description = {"tokenizer_kind": "\x1b]0;gone\x07", "tokenizer_hash": "a", "vocab_size": 300, "eod_id": 2}
    (tmp_path / "set.json").write_text(json.dumps(description))
    with pytest.raises(DataFormatError, match=r"set\.json: tokenizer_kind = '\\x1b"):
        IndexedDataset(prefix)
