"""Turn text into a token dataset: OUTPUT_PREFIX_KEY_document.bin, .idx and .json.

Flags have Megatron's names where Megatron has them. All work is in `engine.data.preprocessing`.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from engine.data.documents import Reject, Source, find_sources
from engine.data.fast_sentencepiece import EncoderMismatch
from engine.data.indexed import dataset_file
from engine.data.preprocessing import Counts, dataset_prefix, preprocess, rejects_path
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.errors import ConfigError, DataError, run_program

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
QUOTED_REJECTS = 5  # shown on the terminal; the file has all
SECONDS_BETWEEN_LINES = 5.0

EXAMPLE = """
inputs: .jsonl and .json (one object a line), .txt (a file is one document), as are .md, .rst and .py;
each also as .gz and .zst. Directories are searched for .jsonl and .txt; others are named, or matched by a pattern.

example: python tools/preprocess_data.py --input corpus/ --output-prefix data/corpus \\
             --tokenizer-model tokenizer.model --append-eod
"""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    _check(options)
    signal.signal(signal.SIGTERM, _end)
    sources = find_sources(options.input)
    if not options.append_eod:
        print("warning: without --append-eod the model never learns where a document ends", file=sys.stderr)
    tokenizer = _tokenizer(options.tokenizer_type, options.tokenizer_model, fast=options.encoder == "auto")
    print(f"tokenizer  {tokenizer.kind}: {tokenizer.vocab_size:,} ids, end of document {tokenizer.eod_id}")
    print(f"input      {len(sources):,} file{'s'[: len(sources) > 1]}, {_megabytes(sum(s.num_bytes for s in sources))}")
    try:
        _run(options, sources, tokenizer)
    except EncoderMismatch as error:
        print(f"warning: {error}; starting again with plain SentencePiece", file=sys.stderr)
        _run(options, sources, _tokenizer(options.tokenizer_type, options.tokenizer_model, fast=False))


def _run(options: argparse.Namespace, sources: list[Source], tokenizer: Tokenizer) -> None:
    print(f"encoder    {tokenizer.encoder}; {options.workers} workers", flush=True)
    start = time.monotonic()
    counts = preprocess(
        sources,
        tokenizer,
        options.output_prefix,
        keys=options.json_keys,
        append_eod=options.append_eod,
        workers=options.workers,
        on_reject=_RejectReporter(options.on_bad_line == "fail"),
        on_progress=_ProgressReporter(sum(source.num_bytes for source in sources), options.log_interval),
    )
    _summarize(options, counts, time.monotonic() - start)


class _RejectReporter:
    """Quotes the first rejected lines, or ends the program at the first."""

    def __init__(self, fail: bool) -> None:
        self._fail = fail
        self._count = 0

    def __call__(self, reject: Reject) -> None:
        if self._fail:
            raise DataError(f"{reject}; it starts {reject.text[:60]!r}; --on-bad-line skip leaves such lines out")
        self._count += 1
        if self._count <= QUOTED_REJECTS:
            print(f"skipped: {reject}", file=sys.stderr)
        elif self._count == QUOTED_REJECTS + 1:
            print("skipped: more such lines", file=sys.stderr)


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
        f"done       {counts.documents:,} documents, {counts.tokens:,} tokens in {_duration(seconds)}\n"
        f"           {_megabytes(counts.num_bytes)} of text, {counts.num_bytes / counts.tokens:.2f} bytes a token, "
        f"{_megabytes(counts.num_bytes / max(seconds, 1e-9))}/s"
    )
    if counts.empty:
        print(f"           {counts.empty:,} empty documents left out")
    if counts.rejected:
        print(f"           {counts.rejected:,} lines skipped: {rejects_path(options.output_prefix)}")
    for key in options.json_keys:
        prefix = dataset_prefix(options.output_prefix, key)
        print(f"           {prefix}.bin .idx .json\nnext       python tools/inspect_data.py {prefix}")


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
        raise ConfigError("--tokenizer-model is missing: a SentencePiece model, a tokenizer.json, or `byte`")
    for name, value in (("--workers", options.workers), ("--log-interval", options.log_interval)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} = {value}; expected 1 or more")
    if len(set(options.json_keys)) < len(options.json_keys):
        raise ConfigError(f"--json-keys names a key twice: {', '.join(options.json_keys)}")
    prefixes = [dataset_prefix(options.output_prefix, key) for key in options.json_keys]
    outputs = [dataset_file(prefix, kind) for prefix in prefixes for kind in ("bin", "idx", "json")]
    existing = [str(path) for path in (*outputs, rejects_path(options.output_prefix)) if path.exists()]
    if existing and not options.overwrite:
        raise ConfigError(f"{existing[0]} exists; choose another --output-prefix, or replace it with --overwrite")


def _end(number: int, frame: object) -> NoReturn:
    """SIGTERM unwinds like any exception, so that what is half-written goes."""
    print("terminated", file=sys.stderr)
    sys.exit(128 + number)


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
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="a dataset is written for each (default: text)")
    add("--output-prefix", required=True, help="where to write, without the ending")
    add("--tokenizer-type", help="SentencePieceTokenizer, Llama2Tokenizer, HuggingFaceTokenizer or ByteTokenizer; "
        "seen from the model when not given")  # fmt: skip
    add("--tokenizer-model", metavar="PATH", help="SentencePiece model, tokenizer.json, a directory, or `byte`")
    add("--append-eod", action="store_true", help="end every document with the end-of-document id")
    add("--workers", type=int, default=_cores(), help="processes that encode (default: the cores, here %(default)s)")
    add("--log-interval", type=int, metavar="DOCUMENTS", help="documents between progress lines (default: by time)")
    add("--on-bad-line", choices=("skip", "fail"), default="skip",
        help="skip: count, report and keep bad lines in OUTPUT_PREFIX.rejects.jsonl (default); fail: stop")  # fmt: skip
    add("--encoder", choices=("auto", "sentencepiece"), default="auto",
        help="auto: gigatoken where it gives the ids of SentencePiece (default)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace existing output")
    return parser


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    run_program(main)
