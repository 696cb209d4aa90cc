"""What can be told about a token dataset, as plain values that a program prints or dumps as JSON.

Memory stays bounded whatever the size of the dataset.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from engine.data.files import Ints
from engine.data.indexed import IndexedDataset
from engine.data.pretrain import PretrainDataset
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.errors import ConfigError, DataError

LOW_BITS = 20  # the median is found in two passes: the high bits of a length, then these


@dataclass(frozen=True)
class Piece:
    """Tokens of one document, from its token `offset` on. `text` is None without a tokenizer."""

    document: int
    offset: int
    num_tokens: int
    ids: list[int]
    text: str | None


def summary(data: IndexedDataset) -> dict[str, Any]:
    """Counts, type, size, document lengths and the description beside the dataset."""
    return {
        "prefix": str(data.prefix),
        "documents": data.num_documents,
        "sequences": data.num_sequences,
        "tokens": data.num_tokens,
        "dtype": data.dtype.name,
        "bytes": data.num_bytes,
        "document_tokens": length_statistics(data),
        "description": None if data.info is None else data.info.model_dump(),
    }


def length_statistics(data: IndexedDataset) -> dict[str, float] | None:
    """Smallest, median (the lower of two), mean and largest document; None without documents."""
    if data.num_documents == 0:
        return None
    low, high = 1 << 62, 0
    coarse = np.zeros(1 << LOW_BITS, np.int64)
    for lengths in data.document_lengths():
        low, high = min(low, int(lengths.min())), max(high, int(lengths.max()))
        coarse += _histogram(lengths >> LOW_BITS)
    rank = (data.num_documents - 1) // 2
    bucket, rank = _at_rank(coarse, rank)
    fine = np.zeros(1 << LOW_BITS, np.int64)
    for lengths in data.document_lengths():
        fine += _histogram(lengths[lengths >> LOW_BITS == bucket] & ((1 << LOW_BITS) - 1))
    median = (bucket << LOW_BITS) + _at_rank(fine, rank)[0]
    return {"min": low, "median": median, "mean": data.num_tokens / data.num_documents, "max": high}


def find_tokenizer(data: IndexedDataset, spec: str | None) -> Tokenizer | None:
    """The tokenizer named by `spec`, or the one that the description needs no file for.

    Raises:
        DataError: the dataset was made with another one.
    """
    if spec is None:
        return load_tokenizer("byte") if data.info is not None and data.info.tokenizer_kind == "byte" else None
    tokenizer = load_tokenizer(spec)
    if data.info is not None and data.info.tokenizer_hash != tokenizer.hash:
        raise DataError(
            f"{data.prefix}.json: made with a {data.info.tokenizer_kind} tokenizer of hash "
            f"{data.info.tokenizer_hash}; --tokenizer {spec} has {tokenizer.hash}"
        )
    return tokenizer


def documents(
    data: IndexedDataset, numbers: Sequence[int], tokenizer: Tokenizer | None, max_tokens: int
) -> list[Piece]:
    """The beginnings of some documents, up to `max_tokens` of each.

    Raises:
        ConfigError: there is no such document.
    """
    for j in numbers:
        if not 0 <= j < data.num_documents:
            raise ConfigError(f"--document {j}: {data.prefix} has {data.num_documents:,} documents, counted from 0")
    ends = [(data.document_start(j), data.document_start(j + 1)) for j in numbers]
    return [
        Piece(j, 0, stop - start, *_read(data, start, min(stop, start + max_tokens), tokenizer))
        for j, (start, stop) in zip(numbers, ends, strict=True)
    ]


def sample(dataset: PretrainDataset, i: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Sample `i`: where it lies, where documents start inside it, and its pieces."""
    here, content = dataset.where(i), dataset.sample(i)
    data = dataset.datasets[here.dataset]
    cuts = [0, *content.boundaries.tolist(), dataset.seq_length]
    pieces = []
    for start, stop in pairwise(cuts):
        j = data.document_at(here.start + start)
        offset = here.start + start - data.document_start(j)
        text = _read(data, here.start + start, here.start + stop, tokenizer)
        pieces.append(Piece(j, offset, stop - start, *text))
    return {
        "number": i,
        "dataset": here.name,
        "epoch": here.epoch,
        "number_in_epoch": here.number,
        "first_token": here.start,
        "boundaries": content.boundaries.tolist(),
        "last_label": int(content.labels[-1]),
        "pieces": pieces,
    }


def _read(data: IndexedDataset, start: int, stop: int, tokenizer: Tokenizer | None) -> tuple[list[int], str | None]:
    ids = data.tokens(start, stop - start).tolist()
    return ids, None if tokenizer is None else decode(ids, tokenizer)


def decode(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Text of `ids`; those outside the vocabulary are shown as numbers, as most tokenizers fail on them."""
    text, known = "", []
    for i in [*ids, -1]:
        if 0 <= i < tokenizer.vocab_size:
            known.append(i)
            continue
        text += tokenizer.decode(known) + f"<id {i}>"
        known = []
    return text.removesuffix("<id -1>")


def _histogram(values: Ints) -> Ints:
    """Counts of values below 2^LOW_BITS; larger ones count as the largest."""
    return np.bincount(np.minimum(values, (1 << LOW_BITS) - 1), minlength=1 << LOW_BITS)


def _at_rank(counts: Ints, rank: int) -> tuple[int, int]:
    """The value of the entry with `rank` in order, and its rank among those of the same value."""
    upto = np.cumsum(counts)
    value = int(np.searchsorted(upto, rank, side="right"))
    return value, rank - int(upto[value] - counts[value])
