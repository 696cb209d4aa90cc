"""Computes statistics and excerpts of a token dataset, as plain values to print or dump as JSON.

Memory use does not grow with the dataset.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from engine.data.samples.pretrain import PretrainDataset
from engine.data.storage.files import CHUNK, Ints
from engine.data.storage.reader import IndexedDataset
from engine.data.tokenizers.load import load_tokenizer
from engine.data.tokenizers.protocol import Tokenizer
from engine.data.tokenizers.stream import stream_text
from engine.errors import ConfigError, DataError
from engine.formatting import counted

LOW_BITS = 20  # the median takes two passes: over the high bits of the lengths, then over these low bits


@dataclass(frozen=True)
class DocumentExcerpt:
    """Tokens of one document from token `offset` on. `text` is None without a tokenizer."""

    document: int
    offset: int
    num_tokens: int
    ids: list[int]
    text: str | None


@dataclass(frozen=True)
class TokenRun:
    """Consecutive tokens, either all targets or all not. `text` is None without a tokenizer."""

    is_target: bool
    ids: list[int]
    text: str | None


@dataclass(frozen=True)
class ConversationExcerpt:
    """The beginning of a conversation, with counts of the whole conversation."""

    document: int
    num_tokens: int
    num_targets: int
    runs: list[TokenRun]


def summary(data: IndexedDataset) -> dict[str, Any]:
    """Return counts, dtype, size, document lengths and the description (`PREFIX.json`) of a dataset."""
    targets = {"target_tokens": count_targets(data)} if data.has_mask else {}
    return targets | {
        "prefix": str(data.prefix),
        "documents": data.num_documents,
        "sequences": data.num_sequences,
        "tokens": data.num_tokens,
        "dtype": data.dtype.name,
        "bytes": data.num_bytes,
        "checksums": None if data.checksums is None else data.checksums.identity(),
        "document_tokens": length_statistics(data),
        "description": None if data.info is None else data.info.model_dump(),
    }


def count_targets(data: IndexedDataset) -> int:
    """Count the target tokens."""
    starts = range(0, data.num_tokens, CHUNK)
    return sum(int(data.mask(start, min(CHUNK, data.num_tokens - start)).sum(dtype=np.int64)) for start in starts)


def length_statistics(data: IndexedDataset) -> dict[str, float] | None:
    """Return minimum, (lower) median, mean and maximum of document lengths in tokens; None without documents."""
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
    """Load the tokenizer `spec`. By default, the byte tokenizer if the dataset was made with it, else None.

    Raises:
        DataError: the dataset was made with another tokenizer.
    """
    if spec is None:
        return load_tokenizer("byte") if data.info is not None and data.info.tokenizer_kind == "byte" else None
    tokenizer = load_tokenizer(spec)
    if data.info is not None and data.info.tokenizer_hash != tokenizer.hash:
        raise DataError(
            f"{data.prefix}.json: made with a {data.info.tokenizer_kind} tokenizer of hash "
            f"{data.info.tokenizer_hash}; tokenizer {spec} has {tokenizer.hash}"
        )
    return tokenizer


def documents(
    data: IndexedDataset, numbers: Sequence[int], tokenizer: Tokenizer | None, max_tokens: int
) -> list[DocumentExcerpt]:
    """Return the first `max_tokens` tokens of each of the documents `numbers`.

    Raises:
        ConfigError: no such document.
    """
    for j in numbers:
        _check_document(data, j)
    ends = [(data.document_start(j), data.document_start(j + 1)) for j in numbers]
    return [
        DocumentExcerpt(j, 0, stop - start, *_read(data, start, min(stop, start + max_tokens), tokenizer))
        for j, (start, stop) in zip(numbers, ends, strict=True)
    ]


def conversations(
    data: IndexedDataset, numbers: Sequence[int], tokenizer: Tokenizer | None, max_tokens: int
) -> list[ConversationExcerpt]:
    """Return the first `max_tokens` tokens of each of the conversations `numbers`; the dataset has a mask.

    Raises:
        ConfigError: no such conversation.
    """
    found = []
    for j in numbers:
        _check_document(data, j)
        start, stop = data.document_start(j), data.document_start(j + 1)
        mask = data.mask(start, stop - start)
        ids = data.tokens(start, min(max_tokens, stop - start)).tolist()
        found.append(
            ConversationExcerpt(j, stop - start, int(mask.sum()), _runs(ids, mask.astype(bool).tolist(), tokenizer))
        )
    return found


def _runs(ids: list[int], mask: list[bool], tokenizer: Tokenizer | None) -> list[TokenRun]:
    texts = [""] * len(ids) if tokenizer is None else token_texts(ids, tokenizer)
    runs = []
    for is_target, tokens in groupby(zip(mask, ids, texts, strict=False), key=lambda token: token[0]):
        members = list(tokens)
        text = None if tokenizer is None else "".join(text for _, _, text in members)
        runs.append(TokenRun(is_target, [i for _, i, _ in members], text))
    return runs


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Return the text that each id adds. Special tokens are shown by name, ids without text as numbers."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    texts: list[str] = []
    for plain, group in groupby(ids, key=lambda i: 0 <= i < tokenizer.vocab_size and i not in names):
        members = list(group)
        if not plain:
            texts += [names.get(i, f"<id {i}>") for i in members]
            continue
        *added, rest = stream_text(tokenizer, members)
        added[-1] += rest
        texts += [text or _silent(i, tokenizer) for i, text in zip(members, added, strict=True)]
    return texts


def _silent(i: int, tokenizer: Tokenizer) -> str:
    """Return the text shown for an id that adds none; it may be part of a character or a leading space."""
    return "" if tokenizer.decode([i]) else tokenizer.decode([i, i]) or f"<id {i}>"


def document_kind(masked: bool) -> str:
    """Return the word for a document in messages."""
    return "conversation" if masked else "document"


def _check_document(data: IndexedDataset, j: int) -> None:
    if not 0 <= j < data.num_documents:
        kind, count = document_kind(data.has_mask), data.num_documents
        raise ConfigError(f"no {kind} {j} in {data.prefix}: it has {counted(count, kind)}, counted from 0")


def sample(dataset: PretrainDataset, i: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the location of sample `i`, its document boundaries, and excerpts of its documents."""
    here, content = dataset.where(i), dataset.sample(i)
    data = dataset.datasets[here.dataset]
    cuts = [0, *content.boundaries.tolist(), dataset.seq_length]
    excerpts = []
    for start, stop in pairwise(cuts):
        j = data.document_at(here.start + start)
        offset = here.start + start - data.document_start(j)
        text = _read(data, here.start + start, here.start + stop, tokenizer)
        excerpts.append(DocumentExcerpt(j, offset, stop - start, *text))
    return {
        "number": i,
        "dataset": here.name,
        "epoch": here.epoch,
        "number_in_epoch": here.number,
        "first_token": here.start,
        "boundaries": content.boundaries.tolist(),
        "last_label": int(content.labels[-1]),
        "pieces": excerpts,
    }


def _read(data: IndexedDataset, start: int, stop: int, tokenizer: Tokenizer | None) -> tuple[list[int], str | None]:
    ids = data.tokens(start, stop - start).tolist()
    return ids, None if tokenizer is None else decode(ids, tokenizer)


def decode(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Decode `ids`; ids outside the vocabulary, on which most tokenizers fail, are shown as numbers."""
    text, known = "", []
    for i in [*ids, -1]:
        if 0 <= i < tokenizer.vocab_size:
            known.append(i)
            continue
        text += tokenizer.decode(known) + f"<id {i}>"
        known = []
    return text.removesuffix("<id -1>")


def printable(text: str) -> str:
    """Escape control characters, so that the text is safe to write to a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _histogram(values: Ints) -> Ints:
    """Count each value in [0, 2^LOW_BITS); larger values count as the largest."""
    return np.bincount(np.minimum(values, (1 << LOW_BITS) - 1), minlength=1 << LOW_BITS)


def _at_rank(counts: Ints, rank: int) -> tuple[int, int]:
    """Return the value at `rank` in sorted order, and its rank among equal values."""
    upto = np.cumsum(counts)
    value = int(np.searchsorted(upto, rank, side="right"))
    return value, rank - int(upto[value] - counts[value])
