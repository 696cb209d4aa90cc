"""Preprocesses text files to token datasets for pretraining: one dataset per JSON key."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from engine.data.preprocess.blocks import LineBlock, read_blocks
from engine.data.preprocess.build import Counts, DatasetBuild, EncodedBlock, dataset_info, source_names
from engine.data.preprocess.documents import parse_block
from engine.data.preprocess.rejects import Reject
from engine.data.preprocess.sources import Source
from engine.data.preprocess.workers import ordered_map
from engine.data.storage.format import token_dtype
from engine.data.storage.writer import IndexedDatasetWriter
from engine.data.tokenizers.protocol import Ids, Tokenizer
from engine.errors import ConfigError, DataError


class DocumentEncoder:
    """Encodes the documents of a block; runs in a worker.

    Args:
        tokenizer: the model's tokenizer.
        keys: keys of the JSON objects; one dataset each.
        append_eod: end each document with `tokenizer.eod_id`.
        prepend_bos: start each document with `tokenizer.bos_id`.
    """

    def __init__(self, tokenizer: Tokenizer, keys: Sequence[str], append_eod: bool, prepend_bos: bool = False) -> None:
        self._tokenizer = tokenizer
        self._keys = keys
        self._end = np.array([tokenizer.eod_id] if append_eod else [], np.int32)
        self._begin = np.array([tokenizer.bos_id] if prepend_bos else [], np.int32)
        self._dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, block: LineBlock) -> EncodedBlock:
        documents, rejects = parse_block(block, self._keys)
        encoded = EncodedBlock(block.position, rejects)
        for column in range(len(self._keys)):
            texts = [document[column] for document in documents if document[column]]
            encoded.empty += len(documents) - len(texts)
            encoded.num_bytes += sum(len(text.encode()) for text in texts)
            self._add(encoded, self._tokenizer.encode_batch(texts))
        return encoded

    def _add(self, encoded: EncodedBlock, documents: list[Ids]) -> None:
        whole = [ids for ids in documents if ids.size]  # normalization may remove all of a text
        encoded.empty += len(documents) - len(whole)
        flat = np.concatenate([part for ids in whole for part in (self._begin, ids, self._end)] or [self._end[:0]])
        limit = self._tokenizer.vocab_size
        if flat.size and int(flat.max()) >= limit:
            raise DataError(f"the tokenizer gave id {flat.max()}, but its vocabulary has {limit} entries")
        encoded.ids.append(flat.astype(self._dtype))
        encoded.lengths.append(np.array([self._begin.size + ids.size + self._end.size for ids in whole], np.int32))


def dataset_prefix(output_prefix: str, key: str) -> Path:
    """Return Megatron-LM's name for the dataset of a key."""
    return Path(f"{output_prefix}_{key}_document")


def preprocess(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    output_prefix: str,
    *,
    keys: Sequence[str],
    append_eod: bool,
    prepend_bos: bool = False,
    workers: int,
    on_reject: Callable[[Reject], None] = lambda reject: None,
    on_progress: Callable[[Counts], None] = lambda counts: None,
) -> Counts:
    """Write one dataset per key; all of them or none.

    Args:
        sources: see `find_sources`.
        keys: keys of the JSON objects; a plain text file has only one text.
        append_eod: end each document with `tokenizer.eod_id`.
        prepend_bos: start each document with `tokenizer.bos_id`.
        on_reject: called with each rejected line; may raise.
        on_progress: called with the counts after each block.

    Raises:
        ConfigError: `prepend_bos` with a tokenizer without `bos_id`.
        DataError: no tokens, or the input begins with too many rejected lines; see `DatasetBuild.write_all`.
        EncoderMismatch: see `FastSentencePiece`.
        WorkerFailed: a worker process was killed.
    """
    if len(keys) > 1 and any(source.kind == "text" for source in sources):
        raise ConfigError(f"plain text files have one text each, but json_keys names {len(keys)}: {', '.join(keys)}")
    if prepend_bos and tokenizer.bos_id is None:
        raise ConfigError("--prepend-bos: the tokenizer has no beginning-of-text token; leave the option out")
    dtype = token_dtype(tokenizer.vocab_size)
    counts = Counts()
    writers = [IndexedDatasetWriter(dataset_prefix(output_prefix, key), dtype) for key in keys]
    with DatasetBuild(writers, output_prefix, counts) as build:
        blocks = ordered_map(DocumentEncoder(tokenizer, keys, append_eod, prepend_bos), read_blocks(sources), workers)
        build.write_all(blocks, on_reject, on_progress, advice="see json_keys")
        for writer, key in zip(writers, keys, strict=True):
            if writer.num_tokens == 0:
                raise DataError(_nothing_in(sources, key, counts))
            writer.info = dataset_info(tokenizer, sources, counts)
    return counts


def _nothing_in(sources: Sequence[Source], key: str, counts: Counts) -> str:
    return (
        f"not a single token for key {key!r} in {source_names(sources)}: {counts.empty} empty documents, "
        f"{counts.rejected} rejected lines; check the input and json_keys"
    )
