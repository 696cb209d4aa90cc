"""Train a SentencePiece tokenizer on JSONL or text files.

Text is not normalized, runs of spaces are pieces, and characters outside the vocabulary fall back to bytes, so that
every text survives encoding and decoding.
"""

import argparse
import io
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from engine.cli.arguments import program_parser
from engine.data.preprocess.blocks import read_blocks
from engine.data.preprocess.documents import parse_block
from engine.data.preprocess.sources import find_sources
from engine.errors import ConfigError, DataError, StorageError

EXAMPLES = """
example:
  %(prog)s --input corpus.jsonl --vocab-size 4000 --output data/tokenizer
"""
MAX_SENTENCE_BYTES = 4000  # the trainer skips longer ones
MIN_LINES = 101  # the smallest limit that the trainer accepts
MAX_VOCABULARY = 1_000_000
QUOTED_REJECTS = 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see `--help`."""
    options = parser().parse_args(arguments)
    target = options.output.with_name(options.output.name.removesuffix(".model") + ".model")
    _check(options, target)
    model = train_model(
        training_lines(options.input, options.json_key), options.vocab_size, options.model_type, options.max_lines
    )
    _write(target, model)
    print(f"{target}: {options.vocab_size:,} pieces ({options.model_type})")


def parser() -> argparse.ArgumentParser:
    """Create the parser of this command."""
    parser = program_parser("tokenizer", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help=".jsonl or .txt files, or directories of them")
    add("--json-key", default="text", help="key of the text in a JSON line (default: text)")
    add("--output", type=Path, required=True, metavar="PREFIX", help="output PREFIX.model; the suffix is optional")
    add("--vocab-size", type=int, required=True, help="number of entries, 256 of them single bytes")
    add("--model-type", choices=("bpe", "unigram"), default="bpe", help="(default: bpe)")
    add("--max-lines", type=int, default=1_000_000,
        help="training lines, sampled at random from all (default: a million)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace an existing model")
    return parser


def _check(options: argparse.Namespace, target: Path) -> None:
    if not 1 <= options.vocab_size <= MAX_VOCABULARY:
        raise ConfigError(f"--vocab-size {options.vocab_size}: expected 1 .. {MAX_VOCABULARY:,}")
    if not MIN_LINES <= options.max_lines < 1 << 31:
        raise ConfigError(f"--max-lines {options.max_lines}: expected {MIN_LINES} .. {(1 << 31) - 1:,}")
    if target.exists() and not options.overwrite:
        raise ConfigError(f"{target} exists; choose another --output, or replace it with --overwrite")


def _write(target: Path, model: bytes) -> None:
    """Write `model` atomically."""
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            try:
                file.write(model)
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                partial.unlink()
                raise
        os.replace(partial, target)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror}; free space or choose another --output") from error


def train_model(sentences: Iterator[str], vocab_size: int, model_type: str, max_lines: int) -> bytes:
    """Train a SentencePiece model and return it serialized. Ids: 0 unknown, 1 beginning, 2 end of a document.

    Raises:
        ConfigError: the trainer cannot build such a vocabulary from this text.
        DataError: the input has no text.
    """
    first = next(sentences, None)
    if first is None:
        raise DataError("--input contains no text to train on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], sentences),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9999,
            max_sentence_length=MAX_SENTENCE_BYTES,
            input_sentence_size=max_lines,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(f"--vocab-size {vocab_size} {_reason(str(error))}") from None
    return model.getvalue()


def _reason(error: str) -> str:
    """Translate an error of the trainer into advice."""
    if found := re.search(r"too high.* <= (\d+)", error):
        return f"is too large for this text; lower it to {found[1]} or less, or give more text"
    if found := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return f"is too small for the bytes and characters of this text; raise it to {found[1]} or more"
    if "sentences_.empty()" in error:
        return f"cannot be trained: every line is longer than {MAX_SENTENCE_BYTES} bytes; break the lines of --input"
    return f"does not work with this text: {error}"


def training_lines(inputs: list[str], json_key: str) -> Iterator[str]:
    """Yield every non-empty line of every document. Invalid input lines are counted, and the first ones printed."""
    skipped = 0
    for block in read_blocks(find_sources(inputs)):
        documents, rejects = parse_block(block, [json_key])
        for reject in rejects[: max(0, QUOTED_REJECTS - skipped)]:
            print(f"skipped: {reject}", file=sys.stderr)
        skipped += len(rejects)
        for (text,) in documents:
            yield from (line for line in text.split("\n") if line)
    if skipped:
        print(f"skipped: {skipped:,} lines in all", file=sys.stderr)
