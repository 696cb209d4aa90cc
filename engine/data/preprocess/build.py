"""Writes encoded blocks to datasets, and rejected lines to a separate file: all files or none.

The parent process reads and writes; workers parse and encode blocks of lines. Results arrive in the order in which the
blocks were sent, so the output does not depend on the number of workers. Alternative considered: one output file per
worker and a merge, which writes everything twice.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from engine import __version__
from engine.data.preprocess.rejects import Reject, RejectFile, rejects_path
from engine.data.preprocess.sources import Source
from engine.data.storage.info import DatasetInfo, SourceFile
from engine.data.storage.writer import IndexedDatasetWriter
from engine.data.tokenizers.protocol import Ids, Tokenizer
from engine.errors import DataError

MAX_LEADING_REJECTS = 1000  # lines rejected before the first document; with more, the input has another format


@dataclass
class Counts:
    """Progress. `num_bytes` counts bytes of text; `position` counts stored bytes of the input files."""

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
    """The encoded documents of a block; `ids` and `lengths` have one entry per dataset."""

    position: int
    rejects: list[Reject]
    num_bytes: int = 0
    empty: int = 0
    ids: list[Ids] = field(default_factory=list)
    lengths: list[npt.NDArray[np.integer[Any]]] = field(default_factory=list)

    def write(self, writers: Sequence[IndexedDatasetWriter]) -> None:
        for writer, ids, lengths in zip(writers, self.ids, self.lengths, strict=True):
            writer.add_documents(ids, lengths)


class DatasetBuild:
    """The datasets being written and the file of rejected lines.

    A context manager: exiting commits all datasets, then the rejects; an exception removes both.

    Args:
        writers: one per dataset.
        output_prefix: prefix of the file of rejected lines.
        counts: updated after each block.
    """

    def __init__(self, writers: Sequence[IndexedDatasetWriter], output_prefix: str, counts: Counts) -> None:
        self._writers, self._counts = writers, counts
        self._rejects = RejectFile(rejects_path(output_prefix))

    def __enter__(self) -> "DatasetBuild":
        with ExitStack() as stack:  # exits in reverse order: datasets first
            stack.enter_context(self._rejects)
            for writer in self._writers:
                stack.enter_context(writer)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def write_all(
        self,
        blocks: Generator[EncodedBlock, None, None],
        on_reject: Callable[[Reject], None],
        on_progress: Callable[[Counts], None],
        advice: str,
    ) -> None:
        """Write all blocks and close the generator. Until the exit, the caller may still raise or set descriptions.

        Args:
            on_reject: called with each rejected line; may raise.
            on_progress: called with the counts after each block.
            advice: the setting to check if no line is accepted.

        Raises:
            DataError: the input begins with `MAX_LEADING_REJECTS` rejected lines.
        """
        counts = self._counts
        with closing(blocks):
            for block in blocks:
                block.write(self._writers)
                self._rejects.add(block.rejects)
                counts.add(block)
                for reject in block.rejects:
                    on_reject(reject)
                if counts.rejected >= MAX_LEADING_REJECTS and not counts.documents + counts.empty:
                    raise DataError(f"{counts.rejected:,} lines and no document; {block.rejects[0]}; {advice}")
                on_progress(counts)
        self._rejects.sync()


def dataset_info(tokenizer: Tokenizer, sources: Sequence[Source], counts: Counts) -> DatasetInfo:
    """Return the description of a dataset made with `tokenizer` from `sources`."""
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
    """Return the sources for an error message: the first one and the number of others."""
    return sources[0].path + (f" and {len(sources) - 1} more files" if len(sources) > 1 else "")
