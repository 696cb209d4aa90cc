"""Text files to token datasets, in as many processes as wanted; the bytes written do not depend on how many.

The parent reads and writes; workers parse and encode blocks of lines, which come back in the order in which they
went out. Rejected: one output file a worker and merging them, which writes everything twice.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import orjson

from engine import __version__
from engine.data.preprocess.documents import REJECTS_SUFFIX, Block, Reject, Source, parse_block, read_blocks
from engine.data.preprocess.workers import ordered_map
from engine.data.storage.format import token_dtype
from engine.data.storage.info import DatasetInfo, SourceFile
from engine.data.storage.writer import IndexedDatasetWriter
from engine.data.tokenizers.protocol import Tokenizer
from engine.errors import ConfigError, DataError

HOPELESS = 1000  # lines rejected before the first document: the input is not what it is taken for

Ids = npt.NDArray[np.integer[Any]]


@dataclass
class Counts:
    """What has been done so far. `num_bytes` is of text; `position` is in the input files as stored."""

    documents: int = 0
    tokens: int = 0
    num_bytes: int = 0
    position: int = 0
    rejected: int = 0
    empty: int = 0

    def add(self, block: "EncodedBlock") -> None:
        self.documents += sum(len(lengths) for lengths in block.lengths)
        self.tokens += sum(len(ids) for ids in block.ids)
        self.num_bytes += block.num_bytes
        self.position = block.position
        self.rejected += len(block.rejects)
        self.empty += block.empty


@dataclass
class EncodedBlock:
    """A block's documents as ids; `ids` and `lengths` have one entry a key."""

    position: int
    rejects: list[Reject]
    num_bytes: int = 0
    empty: int = 0
    ids: list[Ids] = field(default_factory=list)
    lengths: list[Ids] = field(default_factory=list)

    def write(self, writers: Sequence[IndexedDatasetWriter]) -> None:
        for writer, ids, lengths in zip(writers, self.ids, self.lengths, strict=True):
            writer.add_documents(ids, lengths)


class BlockEncoder:
    """What a worker does with a block."""

    def __init__(self, tokenizer: Tokenizer, keys: Sequence[str], append_eod: bool) -> None:
        self._tokenizer = tokenizer
        self._keys = keys
        self._end = np.array([tokenizer.eod_id] if append_eod else [], np.int32)
        self._dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, block: Block) -> EncodedBlock:
        documents, rejects = parse_block(block, self._keys)
        encoded = EncodedBlock(block.position, rejects)
        for column in range(len(self._keys)):
            texts = [document[column] for document in documents if document[column]]
            encoded.empty += len(documents) - len(texts)
            encoded.num_bytes += sum(len(text.encode()) for text in texts)
            self._add(encoded, self._tokenizer.encode_batch(texts))
        return encoded

    def _add(self, encoded: EncodedBlock, documents: list[Ids]) -> None:
        whole = [ids for ids in documents if ids.size]  # normalisation may leave nothing of a text
        encoded.empty += len(documents) - len(whole)
        flat = np.concatenate([part for ids in whole for part in (ids, self._end)] or [self._end[:0]])
        limit = self._tokenizer.vocab_size
        if flat.size and int(flat.max()) >= limit:
            raise DataError(f"the tokenizer gave id {flat.max()}, but its vocabulary has {limit} entries")
        encoded.ids.append(flat.astype(self._dtype))
        encoded.lengths.append(np.array([ids.size + self._end.size for ids in whole], np.int32))


class RejectFile:
    """Keeps every rejected line in `PREFIX.rejects.jsonl`, which exists only when there are any.

    A context manager: an exception leaves nothing behind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._file: BinaryIO | None = None

    def __enter__(self) -> "RejectFile":
        return self

    def add(self, rejects: Iterable[Reject]) -> None:
        for reject in rejects:
            self._file = self._file or self._partial.open("wb")
            self._file.write(orjson.dumps(reject, option=orjson.OPT_APPEND_NEWLINE))

    def sync(self) -> None:
        """All that can fail for want of space; what is left is a renaming."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a full disk has been met before
            if self._file is not None:
                self._file.close()
        if kind is not None:
            with suppress(OSError):  # a prefix below a file; the error on its way says so
                self._partial.unlink(missing_ok=True)
        elif self._file is not None:
            self._partial.replace(self.path)
        else:
            self.path.unlink(missing_ok=True)


def dataset_prefix(output_prefix: str, key: str) -> Path:
    """Megatron's name for the dataset of a key."""
    return Path(f"{output_prefix}_{key}_document")


def rejects_path(output_prefix: str) -> Path:
    return Path(output_prefix + REJECTS_SUFFIX)


def preprocess(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    output_prefix: str,
    *,
    keys: Sequence[str],
    append_eod: bool,
    workers: int,
    on_reject: Callable[[Reject], None] = lambda reject: None,
    on_progress: Callable[[Counts], None] = lambda counts: None,
) -> Counts:
    """Write one dataset a key; all of them or none.

    Args:
        sources: see `find_sources`.
        keys: of the JSON objects; a plain text file has only one text.
        append_eod: put `tokenizer.eod_id` behind each document.
        on_reject: told of each rejected line; may raise.
        on_progress: told of the counts after each block.

    Raises:
        DataError: there is not a single token, or nothing but rejected lines at the beginning.
        EncoderMismatch: see `FastSentencePiece`.
        WorkerFailed: a worker process was killed.
    """
    if len(keys) > 1 and any(source.kind == "text" for source in sources):
        raise ConfigError(f"plain text files have one text each, but --json-keys names {len(keys)}: {', '.join(keys)}")
    dtype = token_dtype(tokenizer.vocab_size)
    counts = Counts()
    writers = [IndexedDatasetWriter(dataset_prefix(output_prefix, key), dtype) for key in keys]
    encode = BlockEncoder(tokenizer, keys, append_eod)
    with filled(writers, sources, encode, output_prefix, counts, workers, on_reject, on_progress, "see --json-keys"):
        for writer, key in zip(writers, keys, strict=True):
            if writer.num_tokens == 0:
                raise DataError(_nothing_in(sources, key, counts))
            writer.info = dataset_info(tokenizer, sources, counts)
    return counts


@contextmanager
def filled(
    writers: Sequence[IndexedDatasetWriter],
    sources: Sequence[Source],
    encode: Callable[[Block], EncodedBlock],
    output_prefix: str,
    counts: Counts,
    workers: int,
    on_reject: Callable[[Reject], None],
    on_progress: Callable[[Counts], None],
    advice: str,
) -> Iterator[None]:
    """All blocks encoded and written; the body may still refuse. Leaving it commits all datasets, then the rejects.

    Raises:
        DataError: nothing but rejected lines at the beginning; `advice` says which setting may be wrong.
    """
    with ExitStack() as stack:  # left in reverse order: workers stop, datasets are committed, then the rejects
        rejects = stack.enter_context(RejectFile(rejects_path(output_prefix)))
        for writer in writers:
            stack.enter_context(writer)
        for block in stack.enter_context(closing(ordered_map(encode, read_blocks(sources), workers))):
            block.write(writers)
            rejects.add(block.rejects)
            counts.add(block)
            for reject in block.rejects:
                on_reject(reject)
            if counts.rejected >= HOPELESS and not counts.documents + counts.empty:
                raise DataError(f"{counts.rejected:,} lines and no document; {block.rejects[0]}; {advice}")
            on_progress(counts)
        rejects.sync()
        yield


def dataset_info(tokenizer: Tokenizer, sources: Sequence[Source], counts: Counts) -> DatasetInfo:
    return DatasetInfo(
        tokenizer_kind=tokenizer.kind,
        tokenizer_hash=tokenizer.hash,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        version=__version__,
        sources=tuple(SourceFile(path=source.path, bytes=source.num_bytes) for source in sources),
        skipped=counts.rejected,
    )


def source_names(sources: Sequence[Source]) -> str:
    return sources[0].path + (f" and {len(sources) - 1} more files" if len(sources) > 1 else "")


def _nothing_in(sources: Sequence[Source], key: str, counts: Counts) -> str:
    return (
        f"not a single token for key {key!r} in {source_names(sources)}: {counts.empty} empty documents, "
        f"{counts.rejected} rejected lines; see --input and --json-keys"
    )
