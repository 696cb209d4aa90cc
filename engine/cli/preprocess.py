"""Turn text into a token dataset: OUTPUT_PREFIX_KEY_document.bin, .idx and .json. With --task sft, turn conversations
into a fine-tuning dataset: OUTPUT_PREFIX_sft.bin, .idx, .mask.bin and .json.

Flags have Megatron's names where Megatron has them. All work is in `engine.data.preprocess.pretrain` and
`engine.data.preprocess.sft`.
"""

import argparse
import os
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import NoReturn, get_args

from engine.data.chat.template import ChatTemplate, TrainOn, find_template
from engine.data.inspection import length_statistics
from engine.data.preprocess.documents import RECORDS, TEXTS, Reject, Source, find_sources
from engine.data.preprocess.pretrain import Counts, dataset_prefix, preprocess, rejects_path
from engine.data.preprocess.sft import (
    OnTooLong,
    Rules,
    SupervisedCounts,
    describe,
    preprocess_conversations,
    sft_prefix,
)
from engine.data.storage.indexed import IndexedDataset, dataset_file
from engine.data.tokenizers.fast_sentencepiece import EncoderMismatch
from engine.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from engine.errors import ConfigError, DataError

KINDS = {  # --tokenizer-type in lower case: the kind it means
    "sentencepiece": "sentencepiece",
    "sentencepiecetokenizer": "sentencepiece",
    "gptsentencepiecetokenizer": "sentencepiece",
    "llama2tokenizer": "sentencepiece",
    "huggingface": "huggingface",
    "huggingfacetokenizer": "huggingface",
    "byte": "byte",
    "bytetokenizer": "byte",
}
OF_TASK = {  # flags that mean nothing to the other task
    "pretrain": ("--append-eod", "--json-keys", "--encoder"),
    "sft": ("--chat-template", "--train-on", "--max-length", "--on-too-long"),
}
QUOTED_REASONS = 5  # one reject of each is shown on the terminal; the file has all
QUOTED_FILES = 10
SECONDS_BETWEEN_LINES = 5.0

EXAMPLE = """
inputs: .jsonl and .json (one object a line), .txt (a file is one document), as are .md, .rst and .py;
each also as .gz and .zst. Directories are searched for .jsonl and .txt; others are named, or matched by a pattern.

with --task sft: .jsonl, .json (objects or one array) and .parquet, of records in any of these shapes, each seen from
its keys: messages, conversations (ShareGPT), instruction/input/output (Alpaca), prompt/completion, text, or
input_ids with labels or a mask. Directories are searched for all three.

examples: python tools/preprocess_data.py --input corpus/ --output-prefix data/corpus \\
              --tokenizer-model tokenizer.model --append-eod
          python tools/preprocess_data.py --task sft --input chats.jsonl --output-prefix data/chats \\
              --tokenizer-model models/base --chat-template chatml --max-length 4097
"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    _check(options)
    signal.signal(signal.SIGTERM, _end)
    sft = options.task == "sft"
    sources = find_sources(options.input, RECORDS if sft else TEXTS)
    if not sft and not options.append_eod:
        print("warning: without --append-eod the model never learns where a document ends", file=sys.stderr)
    fast = not sft and options.encoder != "sentencepiece"
    tokenizer = _tokenizer(options.tokenizer_type, options.tokenizer_model, fast=fast)
    print(f"tokenizer  {tokenizer.kind}: {tokenizer.vocab_size:,} ids, end of document {tokenizer.eod_id}")
    print(f"input      {_count(len(sources), 'file')}, {_megabytes(sum(s.num_bytes for s in sources))}")
    if sft:
        _run_sft(options, sources, tokenizer)
        return
    try:
        _run(options, sources, tokenizer)
    except EncoderMismatch as error:
        print(f"warning: {error}; starting again with plain SentencePiece", file=sys.stderr)
        _run(options, sources, _tokenizer(options.tokenizer_type, options.tokenizer_model, fast=False))


def _run(options: argparse.Namespace, sources: list[Source], tokenizer: Tokenizer) -> None:
    print(f"encoder    {tokenizer.encoder}; {_count(options.workers, 'worker')}", flush=True)
    start = time.monotonic()
    counts = preprocess(
        sources,
        tokenizer,
        options.output_prefix,
        keys=_keys(options),
        append_eod=options.append_eod,
        workers=options.workers,
        on_reject=_RejectReporter(options.on_bad_line == "fail"),
        on_progress=_ProgressReporter(sum(source.num_bytes for source in sources), options.log_interval),
    )
    _summarize(options, counts, time.monotonic() - start)


def _run_sft(options: argparse.Namespace, sources: list[Source], tokenizer: Tokenizer) -> None:
    template = _template(tokenizer, options.chat_template)
    name = template.name if isinstance(template, ChatTemplate) else "none"
    print(f"template   {name}\nworkers    {options.workers}", flush=True)
    rules = Rules(options.train_on or "assistant", options.max_length, options.on_too_long or "truncate")
    start = time.monotonic()
    counts = preprocess_conversations(
        sources,
        tokenizer,
        template,
        options.output_prefix,
        rules,
        workers=options.workers,
        on_reject=_RejectReporter(options.on_bad_line == "fail"),
        on_progress=_ProgressReporter(sum(source.num_bytes for source in sources), options.log_interval),
    )
    _summarize_sft(options, counts, tokenizer, time.monotonic() - start)


def _template(tokenizer: Tokenizer, wanted: str | None) -> ChatTemplate | ConfigError:
    """The template, or why there is none; plain texts and token ids need none."""
    try:
        return find_template(tokenizer, wanted)
    except ConfigError as error:
        if wanted is not None:
            raise
        return error


class _RejectReporter:
    """Quotes one rejected line for each of the first reasons, or ends the program at the first."""

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


class _ProgressReporter:
    """A line every `interval` documents; every few seconds when that is None."""

    def __init__(self, total_bytes: int, interval: int | None) -> None:
        self._total = total_bytes
        self._interval = interval
        self._start = self._shown_at = time.monotonic()
        self._shown_documents = 0

    def __call__(self, counts: Counts) -> None:
        now = time.monotonic()
        if self._interval is None:
            due = now - self._shown_at >= SECONDS_BETWEEN_LINES
        else:
            due = counts.documents // self._interval > self._shown_documents // self._interval
        if not due:
            return
        self._shown_at, self._shown_documents = now, counts.documents
        seconds = max(now - self._start, 1e-9)
        remaining = seconds * (self._total / max(counts.position, 1) - 1)
        print(
            f"{counts.position / max(self._total, 1):6.1%}  {counts.documents:,} documents  "
            f"{_megabytes(counts.num_bytes)}  {_megabytes(counts.num_bytes / seconds)}/s  {counts.tokens:,} tokens  "
            f"{counts.tokens / seconds:,.0f} tokens/s  ETA {_duration(remaining)}",
            flush=True,
        )


def _summarize(options: argparse.Namespace, counts: Counts, seconds: float) -> None:
    print(
        f"done       {_count(counts.documents, 'document')}, {counts.tokens:,} tokens in {_duration(seconds)}\n"
        f"           {_megabytes(counts.num_bytes)} of text, {counts.num_bytes / counts.tokens:.2f} bytes a token, "
        f"{_megabytes(counts.num_bytes / max(seconds, 1e-9))}/s"
    )
    if counts.empty:
        print(f"           {_count(counts.empty, 'empty document')} left out")
    if counts.rejected:
        print(f"           {_count(counts.rejected, 'line')} skipped: {rejects_path(options.output_prefix)}")
    for key in _keys(options):
        prefix = dataset_prefix(options.output_prefix, key)
        print(f"           {prefix}.bin .idx .json\nnext       python tools/inspect_data.py {prefix}")


def _summarize_sft(options: argparse.Namespace, counts: SupervisedCounts, tokenizer: Tokenizer, seconds: float) -> None:
    data = IndexedDataset(sft_prefix(options.output_prefix))
    lengths = length_statistics(data)
    assert data.info is not None and lengths is not None
    for format_line in _formats(counts):
        print(format_line)
    if (end := data.info.end_of_turn_id) is not None:
        print(f"turn end   {_token_name(tokenizer, end)}, which is learned")
    kept = counts.conversations
    print(
        f"done       {_count(kept, 'conversation')}, {counts.tokens:,} tokens in {_duration(seconds)}, "
        f"{kept / max(seconds, 1e-9):,.0f} conversations/s\n"
        f"           {counts.learned:,} tokens are learned, {counts.learned / counts.tokens:.1%}\n"
        f"           tokens a document: median {lengths['median']:,}, longest {lengths['max']:,}"
    )
    _summarize_rejected(options, counts)
    for sentence in describe(counts):
        print(f"           {sentence}")
    if counts.outcome["spelled"]:
        spelled = f"{counts.outcome['spelled']:,}"
        print(f"warning: conversations that spell a special token, which becomes it: {spelled}", file=sys.stderr)
    tokenizer_flag = "" if tokenizer.kind == "byte" else f" --tokenizer {shlex.quote(options.tokenizer_model)}"
    print(f"           {data.prefix}.bin .idx .mask.bin .json")
    print(f"next       python tools/inspect_data.py {data.prefix}{tokenizer_flag} --sample 0")


def _summarize_rejected(options: argparse.Namespace, counts: SupervisedCounts) -> None:
    """Before the reasons; a data set of which most is lost is seldom what was wanted."""
    total = counts.conversations + counts.outcome["dropped"] + counts.rejected
    if counts.rejected:
        rejected = f"{counts.rejected:,} of {_count(total, 'record')} rejected"
        print(f"           {rejected}, which are in {rejects_path(options.output_prefix)}:")
        if counts.rejected > total / 2:
            print(f"warning: {rejected}, more than half", file=sys.stderr)


def _formats(counts: SupervisedCounts) -> list[str]:
    """A line for all files, and one for each of the first where they are several."""
    total = sum(counts.formats.values(), Counter[str]())
    lines = [f"formats    {_in_words(total)}"]
    if len(counts.formats) > 1:
        named = list(counts.formats.items())[:QUOTED_FILES]
        lines += [f"           {file}: {_in_words(formats)}" for file, formats in named]
        lines += ["           and more files"][: len(counts.formats) > QUOTED_FILES]
    return lines


def _in_words(formats: Counter[str]) -> str:
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


def _check(options: argparse.Namespace) -> None:
    """What argparse cannot see."""
    if not options.output_prefix:
        raise ConfigError("--output-prefix is empty; expected where to write, as in data/corpus")
    name = options.tokenizer_type
    if name and name.lower() not in KINDS:
        raise ConfigError(
            f"--tokenizer-type {name} is unknown; expected SentencePieceTokenizer, Llama2Tokenizer, "
            f"HuggingFaceTokenizer or ByteTokenizer"
        )
    if not options.tokenizer_model and KINDS.get((name or "").lower()) != "byte":
        raise ConfigError(
            "--tokenizer-model is missing: "
            "a SentencePiece model, a tokenizer.json, a directory that holds one, or `byte`"
        )
    lowest = (("--workers", options.workers, 1), ("--log-interval", options.log_interval, 1))
    for name, value, low in (*lowest, ("--max-length", options.max_length, 2)):
        if value is not None and value < low:
            raise ConfigError(f"{name} = {value}; expected {low} or more")
    _check_task(options)
    if len(set(_keys(options))) < len(_keys(options)):
        raise ConfigError(f"--json-keys names a key twice: {', '.join(_keys(options))}")
    prefixes = [dataset_prefix(options.output_prefix, key) for key in _keys(options)]
    if options.task == "sft":
        prefixes = [sft_prefix(options.output_prefix)]
    outputs = [dataset_file(prefix, kind) for prefix in prefixes for kind in ("bin", "idx", "json", "mask.bin")]
    existing = [str(path) for path in (*outputs, rejects_path(options.output_prefix)) if path.exists()]
    if existing and not options.overwrite:
        raise ConfigError(f"{existing[0]} exists; choose another --output-prefix, or replace it with --overwrite")


def _check_task(options: argparse.Namespace) -> None:
    other = "pretrain" if options.task == "sft" else "sft"
    for flag in OF_TASK[other]:
        if getattr(options, flag.removeprefix("--").replace("-", "_")) not in (None, False):
            raise ConfigError(f"{flag} has no meaning with --task {options.task}, only with --task {other}")
    if options.on_too_long is not None and options.max_length is None:
        raise ConfigError(f"--on-too-long {options.on_too_long} needs --max-length, the tokens that are too many")


def _keys(options: argparse.Namespace) -> list[str]:
    return options.json_keys or ["text"]


def _end(number: int, frame: object) -> NoReturn:
    """SIGTERM unwinds like any exception, so that what is half-written goes."""
    print("terminated", file=sys.stderr)
    sys.exit(128 + number)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, directories or glob patterns")
    add("--task", choices=tuple(OF_TASK), default="pretrain", help="what the data are for (default: %(default)s)")
    add("--json-keys", nargs="+", metavar="KEY", help="a dataset is written for each (default: text)")
    add("--output-prefix", required=True, help="where to write, without the ending")
    add("--tokenizer-type", help="SentencePieceTokenizer, Llama2Tokenizer, HuggingFaceTokenizer or ByteTokenizer; "
        "seen from the model when not given")  # fmt: skip
    add(
        "--tokenizer-model",
        metavar="PATH",
        help="SentencePiece model, tokenizer.json, a directory that holds one, or `byte`",
    )
    add("--append-eod", action="store_true", help="end every document with the end-of-document id")
    add("--chat-template", metavar="TEMPLATE", help="sft: the name of a built-in one (chatml, llama2, llama3, mistral) "
        "or a Jinja file (default: the tokenizer's own)")  # fmt: skip
    add("--train-on", choices=get_args(TrainOn), help="sft: which turns are learned (default: assistant)")
    add("--max-length", type=int, metavar="TOKENS", help="sft: conversations of more are too long, of which a sequence "
        "of the training fits data.seq_length + 1 (default: none is)")  # fmt: skip
    add("--on-too-long", choices=get_args(OnTooLong),
        help="sft: truncate keeps the first tokens (default), drop, split into several, error: stop")  # fmt: skip
    add("--workers", type=int, default=_cores(), help="processes that encode (default: the cores, here %(default)s)")
    add("--log-interval", type=int, metavar="DOCUMENTS", help="documents between progress lines (default: by time)")
    add("--on-bad-line", choices=("skip", "fail"), default="skip",
        help="skip: count, report and keep bad lines in OUTPUT_PREFIX.rejects.jsonl (default); fail: stop")  # fmt: skip
    add("--encoder", choices=("auto", "sentencepiece"),
        help="auto: gigatoken where it gives the ids of SentencePiece (default)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace existing output")
    return parser


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
