"""Train a SentencePiece tokenizer on JSONL or text files.

    python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 4000 --output data/tokenizer

writes data/tokenizer.model. Text is kept as it is (no normalisation; runs of spaces are pieces), and what the
vocabulary lacks is spelt in bytes, so that every text survives a round trip.
"""

import argparse
import io
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from engine.data.documents import find_sources, parse_block, read_blocks
from engine.errors import ConfigError, DataError, run_program

LONGEST_SENTENCE = 4000  # bytes; the trainer leaves out longer ones


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a SentencePiece tokenizer.")
    parser.add_argument("--input", nargs="+", required=True, help=".jsonl or .txt files, or directories of them")
    parser.add_argument("--json-key", default="text", help="key of the text in a JSON line (default: text)")
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="writes PREFIX.model")
    parser.add_argument("--vocab-size", type=int, required=True, help="entries, 256 of them for single bytes")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="(default: bpe)")
    parser.add_argument("--max-lines", type=int, default=1_000_000, help="lines to learn from (default: a million)")
    options = parser.parse_args()

    model = train(lines(options.input, options.json_key), options.vocab_size, options.model_type, options.max_lines)
    target = options.output.with_name(options.output.name + ".model")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_bytes(model)
    os.replace(partial, target)
    print(f"{target}: {options.vocab_size:,} pieces ({options.model_type})")


def train(sentences: Iterator[str], vocab_size: int, model_type: str, max_lines: int) -> bytes:
    """A serialised SentencePiece model with ids 0 unknown, 1 beginning, 2 end of a document.

    Raises:
        ConfigError: the trainer cannot make such a vocabulary from this text.
        DataError: there is no text.
    """
    first = next(sentences, None)
    if first is None:
        raise DataError("--input holds no text to learn from")
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
            max_sentence_length=LONGEST_SENTENCE,
            input_sentence_size=max_lines,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ConfigError(f"--vocab-size {vocab_size} does not work with this text: {error}") from None
    return model.getvalue()


def lines(inputs: list[str], json_key: str) -> Iterator[str]:
    """Every non-empty line of every document."""
    for block in read_blocks(find_sources(inputs)):
        documents, rejects = parse_block(block, [json_key])
        if rejects:
            raise DataError(str(rejects[0]))
        for (text,) in documents:
            yield from (line for line in text.split("\n") if line)


if __name__ == "__main__":
    run_program(main)
