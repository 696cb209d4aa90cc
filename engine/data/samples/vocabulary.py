"""Compatibility checks between dataset, tokenizer and model, run before the first step."""

import numpy as np

from engine.data.storage.reader import IndexedDataset
from engine.errors import DataError

PROBES = 64  # places of a dataset at which token ids are checked
PROBE_TOKENS = 4096


def check_vocabulary(data: IndexedDataset, vocab_size: int) -> None:
    """Check about 250,000 token ids, spread over the dataset, so that a run with the wrong tokenizer fails before its
    first step. `IndexedDataset.verify` checks all of them, and the datasets of a run each batch.

    Raises:
        DataError: an id is not below `vocab_size`.
    """
    if data.info is not None and data.info.vocab_size > vocab_size:
        raise DataError(
            f"{data.prefix}.json: made with a vocabulary of {data.info.vocab_size}, larger than "
            f"model.vocab_size = {vocab_size}; raise model.vocab_size or use the model's tokenizer"
        )
    count = min(PROBE_TOKENS, data.num_tokens)
    places = np.linspace(0, data.num_tokens - count, PROBES).astype(np.int64)  # including the first and the last
    for start in np.unique(places).tolist():
        data.check_ids(start, data.tokens(start, count), vocab_size)


def check_tokenizer(data: IndexedDataset, tokenizer_hash: str) -> None:
    """Compare a tokenizer's hash with the one in the dataset's description, if there is one.

    Raises:
        DataError: the dataset was made with another tokenizer.
    """
    if data.info is not None and data.info.tokenizer_hash != tokenizer_hash:
        raise DataError(
            f"{data.prefix}.json: made with a {data.info.tokenizer_kind} tokenizer of hash "
            f"{data.info.tokenizer_hash}; data.tokenizer has {tokenizer_hash}; "
            "set it to the tokenizer of the data, or preprocess the text again"
        )
