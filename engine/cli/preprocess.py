"""Preprocess text into a token dataset, or conversations into a fine-tuning dataset, and summarize the result."""

import argparse
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from typing import NoReturn

from engine.cli.arguments import command_name
from engine.cli.preprocess_options import KINDS, parse_options, preprocessing_parser
from engine.cli.progress import ProgressDisplay
from engine.data.chat.find import find_template
from engine.data.chat.template import ChatTemplate
from engine.data.inspection import length_statistics
from engine.data.preprocess.build import Counts
from engine.data.preprocess.pretrain import dataset_prefix, preprocess
from engine.data.preprocess.record_encoder import Rules
from engine.data.preprocess.rejects import Reject, rejects_path
from engine.data.preprocess.sft import SftCounts, describe_outcomes, preprocess_sft, sft_prefix
from engine.data.preprocess.sources import RECORDS, STDIN, TEXTS, Source, find_sources
from engine.data.storage.reader import IndexedDataset
from engine.data.tokenizers.fast_sentencepiece import EncoderMismatch
from engine.data.tokenizers.load import load_tokenizer
from engine.data.tokenizers.protocol import Tokenizer
from engine.errors import ConfigError, DataError
from engine.formatting import counted, duration, megabytes

QUOTED_REASONS = 5  # reject reasons shown on the terminal, with one line each; the rejects file has all
QUOTED_FILES = 10


def parser() -> argparse.ArgumentParser:
    """Create the parser of this command."""
    return preprocessing_parser()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see `--help`."""
    options = parse_options(arguments)
    signal.signal(signal.SIGTERM, _end)
    sft = options.task == "sft"
    unread: Callable[[str], None] = partial(print, "warning:", file=sys.stderr)
    sources = find_sources(options.input, RECORDS if sft else TEXTS, unread)
    if not sft and not options.append_eod:
        print("warning: without --append-eod the model never learns where a document ends", file=sys.stderr)
    fast = not sft and options.encoder != "sentencepiece" and STDIN not in options.input  # which is read only once
    tokenizer = _tokenizer(options.tokenizer_type, options.tokenizer_model, fast=fast)
    print(f"tokenizer  {tokenizer.kind}: {tokenizer.vocab_size:,} ids, end of document {tokenizer.eod_id}")
    if tokenizer.note:
        print(f"           {tokenizer.note}")
    if not sft and tokenizer.adds_bos and not options.prepend_bos:
        begin = _token_name(tokenizer, tokenizer.bos_id or 0)
        print(
            f"warning: transformers starts every text with {begin}, by the files of this tokenizer; "
            f"documents start with it, too, with --prepend-bos",
            file=sys.stderr,
        )
    print(f"input      {counted(len(sources), 'file')}, {megabytes(sum(s.num_bytes for s in sources))}")
    if sft:
        _run_sft(options, sources, tokenizer)
        return
    try:
        _run(options, sources, tokenizer)
    except EncoderMismatch as error:
        print(f"warning: {error}; restarting with plain SentencePiece", file=sys.stderr)
        _run(options, sources, _tokenizer(options.tokenizer_type, options.tokenizer_model, fast=False))


def _run(options: argparse.Namespace, sources: list[Source], tokenizer: Tokenizer) -> None:
    print(f"encoder    {tokenizer.encoder}; {counted(options.workers, 'worker')}", flush=True)
    with closing(DocumentProgress(sources, options.log_interval)) as progress:
        counts = preprocess(
            sources,
            tokenizer,
            options.output_prefix,
            keys=options.json_keys,
            append_eod=options.append_eod,
            prepend_bos=options.prepend_bos,
            workers=options.workers,
            on_reject=_RejectReporter(options.on_bad_line == "fail"),
            on_progress=progress,
        )
    _summarize(options, counts, progress.seconds)


def _run_sft(options: argparse.Namespace, sources: list[Source], tokenizer: Tokenizer) -> None:
    template = _template(tokenizer, options.chat_template)
    name = template.name if isinstance(template, ChatTemplate) else "none"
    print(f"template   {name}\nworkers    {options.workers}", flush=True)
    rules = Rules(options.train_on or "assistant", options.max_length, options.on_too_long or "truncate")
    with closing(DocumentProgress(sources, options.log_interval)) as progress:
        counts = preprocess_sft(
            sources,
            tokenizer,
            template,
            options.output_prefix,
            rules,
            workers=options.workers,
            on_reject=_RejectReporter(options.on_bad_line == "fail"),
            on_progress=progress,
        )
    _summarize_sft(options, counts, tokenizer, progress.seconds)


def _template(tokenizer: Tokenizer, wanted: str | None) -> ChatTemplate | ConfigError:
    """Return the template, or the error if there is none: plain texts and token ids do not need one."""
    try:
        return find_template(tokenizer, wanted)
    except ConfigError as error:
        if wanted is not None:
            raise
        return error


class _RejectReporter:
    """Print one rejected line for each of the first reasons, or fail at the first rejected line."""

    def __init__(self, fail: bool) -> None:
        self._fail = fail
        self._quoted: set[str] = set()

    def __call__(self, reject: Reject) -> None:
        if self._fail:
            raise DataError(f"{reject}; it starts {reject.text[:60]!r}; --on-bad-line skip leaves such lines out")
        kind = reject.reason.partition(":")[0]
        if kind not in self._quoted and len(self._quoted) < QUOTED_REASONS:
            self._quoted.add(kind)
            print(f"skipped: {reject}", file=sys.stderr)


class DocumentProgress(ProgressDisplay):
    """Progress in bytes of the input; with an `interval`, one line per `interval` documents."""

    def __init__(self, sources: list[Source], interval: int | None) -> None:
        super().__init__(sum(source.num_bytes for source in sources), file=sys.stdout)
        self._interval = interval
        self._shown_documents = 0

    def __call__(self, counts: Counts) -> None:
        due = None
        if self._interval is not None:
            due = counts.documents // self._interval > self._shown_documents // self._interval
            self._shown_documents = counts.documents
        text = (
            f"{counts.documents:,} documents  {megabytes(counts.num_bytes)}  "
            f"{megabytes(counts.num_bytes / self.seconds)}/s  {counts.tokens:,} tokens  "
            f"{counts.tokens / self.seconds:,.0f} tokens/s"
        )
        self.update(counts.position, text, due=due)


def _summarize(options: argparse.Namespace, counts: Counts, seconds: float) -> None:
    print(
        f"done       {counted(counts.documents, 'document')}, {counts.tokens:,} tokens in {duration(seconds)}\n"
        f"           {megabytes(counts.num_bytes)} of text, {counts.num_bytes / counts.tokens:.2f} bytes per token, "
        f"{megabytes(counts.num_bytes / max(seconds, 1e-9))}/s"
    )
    if counts.empty:
        print(f"           {counted(counts.empty, 'empty document')} left out")
    if counts.rejected:
        print(f"           {counted(counts.rejected, 'line')} skipped: {rejects_path(options.output_prefix)}")
    for key in options.json_keys:
        prefix = dataset_prefix(options.output_prefix, key)
        print(f"           {prefix}.bin .idx .json\nnext       {command_name('inspect')} {shlex.quote(str(prefix))}")


def _summarize_sft(options: argparse.Namespace, counts: SftCounts, tokenizer: Tokenizer, seconds: float) -> None:
    data = IndexedDataset(sft_prefix(options.output_prefix))
    lengths = length_statistics(data)
    assert data.info is not None and lengths is not None
    for format_line in _formats(counts):
        print(format_line)
    if (end := data.info.end_of_turn_id) is not None:
        print(f"turn end   {_token_name(tokenizer, end)}, a target token")
    kept = counts.conversations
    print(
        f"done       {counted(kept, 'conversation')}, {counts.tokens:,} tokens in {duration(seconds)}, "
        f"{kept / max(seconds, 1e-9):,.0f} conversations/s\n"
        f"           {counts.num_targets:,} target tokens, {counts.num_targets / counts.tokens:.1%}\n"
        f"           tokens per document: median {lengths['median']:,}, longest {lengths['max']:,}"
    )
    _summarize_rejected(options, counts)
    for sentence in describe_outcomes(counts):
        print(f"           {sentence}")
    if counts.outcome["spelled"]:
        spelled = f"{counts.outcome['spelled']:,}"
        print(
            f"warning: conversations whose text contains a special token, which is encoded as such: {spelled}",
            file=sys.stderr,
        )
    tokenizer_flag = "" if tokenizer.kind == "byte" else f" --tokenizer {shlex.quote(options.tokenizer_model)}"
    print(f"           {data.prefix}.bin .idx .mask.bin .json")
    print(f"next       {command_name('inspect')} {shlex.quote(str(data.prefix))}{tokenizer_flag} --sample 0")


def _summarize_rejected(options: argparse.Namespace, counts: SftCounts) -> None:
    """Print the number of rejected records, with a warning if they are more than half."""
    total = counts.conversations + counts.outcome["dropped"] + counts.rejected
    if counts.rejected:
        rejected = f"{counts.rejected:,} of {counted(total, 'record')} rejected"
        print(f"           {rejected}, which are in {rejects_path(options.output_prefix)}:")
        if counts.rejected > total / 2:
            print(f"warning: {rejected}, more than half", file=sys.stderr)


def _formats(counts: SftCounts) -> list[str]:
    """Format the counts of all files and, if there are several, of each of the first files."""
    total = sum(counts.formats.values(), Counter[str]())
    lines = [f"formats    {_format_counts(total)}"]
    if len(counts.formats) > 1:
        named = list(counts.formats.items())[:QUOTED_FILES]
        lines += [f"           {file}: {_format_counts(formats)}" for file, formats in named]
        lines += ["           and more files"][: len(counts.formats) > QUOTED_FILES]
    return lines


def _format_counts(formats: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in formats.most_common()) or "nothing kept"


def _token_name(tokenizer: Tokenizer, token: int) -> str:
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    return f"{names.get(token, tokenizer.decode([token]))!r} (id {token})"


def _tokenizer(type_name: str | None, model: str | None, *, fast: bool) -> Tokenizer:
    wanted = KINDS[type_name.lower()] if type_name else None
    tokenizer = load_tokenizer("byte" if wanted == "byte" else model or "", fast=fast)
    if wanted not in (None, tokenizer.kind):
        raise ConfigError(f"--tokenizer-type {type_name} needs a {wanted} model, but {model} is {tokenizer.kind}")
    return tokenizer


def _end(number: int, frame: object) -> NoReturn:
    """Turn SIGTERM into an exception, so that unfinished files are removed."""
    print("terminated", file=sys.stderr)
    sys.exit(128 + number)
