"""Command-line options of preprocessing, and their checks. Flags that Megatron also has keep their names."""

import argparse
import os
from collections.abc import Sequence
from typing import get_args

from engine.cli.arguments import program_parser, require_at_least
from engine.data.chat.template import TrainOn
from engine.data.preprocess.pretrain import dataset_prefix
from engine.data.preprocess.record_encoder import OnTooLong
from engine.data.preprocess.rejects import rejects_path
from engine.data.preprocess.sft import sft_prefix
from engine.data.storage.format import dataset_file
from engine.errors import ConfigError

KINDS = {  # --tokenizer-type in lower case, and the kind of tokenizer
    "sentencepiece": "sentencepiece",
    "sentencepiecetokenizer": "sentencepiece",
    "gptsentencepiecetokenizer": "sentencepiece",
    "llama2tokenizer": "sentencepiece",
    "huggingface": "huggingface",
    "huggingfacetokenizer": "huggingface",
    "byte": "byte",
    "bytetokenizer": "byte",
}
OF_TASK = {  # flags that apply only to one task
    "pretrain": ("--append-eod", "--prepend-bos", "--json-keys", "--encoder"),
    "sft": ("--chat-template", "--train-on", "--max-length", "--on-too-long"),
}
DESCRIPTION = """Turn text into a token dataset: OUTPUT_PREFIX_KEY_document.bin, .idx and .json. With --task sft, turn
conversations into a fine-tuning dataset: OUTPUT_PREFIX_sft.bin, .idx, .mask.bin and .json.

Flags that Megatron also has keep their names."""
EXAMPLES = """
inputs: .jsonl (one object per line), .json (objects or one array), .csv and .tsv (the first row has the keys);
.txt, .md, .rst and .py (one document per file); all also as .gz, .zst, .bz2 and .xz; .parquet and .arrow (one document
per row), also in folders of datasets.save_to_disk; - is standard input, as .jsonl. Directories are searched for .jsonl,
.txt, .parquet and .arrow, except in hidden directories; name other files, or match them by a pattern.

with --task sft: .jsonl, .json, .parquet and .arrow, of records in any of these formats, recognized by their keys:
messages, conversations (ShareGPT), instruction/input/output (Alpaca), prompt/completion, text, or input_ids with labels
or a mask. Directories are searched for all four.

examples:
  %(prog)s --input corpus/ --output-prefix data/corpus --tokenizer-model tokenizer.model --append-eod
  %(prog)s --task sft --input chats.jsonl --output-prefix data/chats --tokenizer-model models/base \\
      --chat-template chatml --max-length 4097
"""


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line, and set the default of `json_keys`.

    Raises:
        ConfigError: options conflict or are out of range, or the output exists.
    """
    options = preprocessing_parser().parse_args(arguments)
    _check_task(options)
    options.json_keys = options.json_keys or ["text"]
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    """Checks that argparse cannot do."""
    if not options.output_prefix:
        raise ConfigError("--output-prefix is empty; expected a path prefix, as in data/corpus")
    if options.output_prefix.endswith("/"):
        raise ConfigError(
            f"--output-prefix {options.output_prefix} is a directory; expected a path prefix, as in "
            f"{options.output_prefix}corpus"
        )
    name = options.tokenizer_type
    if name and name.lower() not in KINDS:
        raise ConfigError(
            f"--tokenizer-type {name} is unknown; expected SentencePieceTokenizer, Llama2Tokenizer, "
            f"HuggingFaceTokenizer or ByteTokenizer"
        )
    if not options.tokenizer_model and KINDS.get((name or "").lower()) != "byte":
        raise ConfigError("--tokenizer-model is missing: a tokenizer's file, a directory that contains one, or `byte`")
    require_at_least(1, workers=options.workers, log_interval=options.log_interval)
    require_at_least(2, max_length=options.max_length)
    if len(set(options.json_keys)) < len(options.json_keys):
        raise ConfigError(f"--json-keys names a key twice: {', '.join(options.json_keys)}")
    prefixes = [dataset_prefix(options.output_prefix, key) for key in options.json_keys]
    if options.task == "sft":
        prefixes = [sft_prefix(options.output_prefix)]
    outputs = [dataset_file(prefix, kind) for prefix in prefixes for kind in ("bin", "idx", "json", "mask.bin")]
    existing = [str(path) for path in (*outputs, rejects_path(options.output_prefix)) if path.exists()]
    if existing and not options.overwrite:
        raise ConfigError(f"{existing[0]} exists; choose another --output-prefix, or replace it with --overwrite")


def _check_task(options: argparse.Namespace) -> None:
    other = "pretrain" if options.task == "sft" else "sft"
    for flag in OF_TASK[other]:
        if vars(options)[flag.removeprefix("--").replace("-", "_")] not in (None, False):
            raise ConfigError(f"{flag} applies only to --task {other}, not to --task {options.task}")
    if options.on_too_long is not None and options.max_length is None:
        raise ConfigError(
            f"--on-too-long {options.on_too_long} needs --max-length, the maximum tokens per conversation"
        )


def preprocessing_parser() -> argparse.ArgumentParser:
    """Create the parser of the options."""
    parser = program_parser("preprocess", DESCRIPTION, EXAMPLES)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="files, directories or glob patterns")
    add(
        "--task", choices=tuple(OF_TASK), default="pretrain", help="training task of the dataset (default: %(default)s)"
    )
    add("--json-keys", nargs="+", metavar="KEY", help="write one dataset per key (default: text)")
    add("--output-prefix", required=True, help="path prefix of the output files")
    add("--tokenizer-type", help="SentencePieceTokenizer, Llama2Tokenizer, HuggingFaceTokenizer or ByteTokenizer; "
        "by default inferred from the model")  # fmt: skip
    add("--tokenizer-model", "--tokenizer", metavar="PATH",
        help="SentencePiece model, tokenizer.json, tekken.json, vocab.json, tiktoken file, a directory that contains "
        "one, or `byte`")  # fmt: skip
    add("--append-eod", action="store_true", help="end every document with the end-of-document id")
    add("--prepend-bos", action="store_true", help="start every document with the beginning-of-text id")
    add("--chat-template", metavar="TEMPLATE", help="sft: a built-in template (chatml, llama2, llama3, mistral) or a "
        "Jinja file (default: the tokenizer's)")  # fmt: skip
    add("--train-on", choices=get_args(TrainOn), help="sft: turns whose tokens are targets (default: assistant)")
    add("--max-length", type=int, metavar="TOKENS", help="sft: maximum tokens per conversation; a training sequence "
        "fits data.seq_length + 1 (default: no limit)")  # fmt: skip
    add("--on-too-long", choices=get_args(OnTooLong),
        help="sft: truncate keeps the first tokens (default), drop, split into several, error: stop")  # fmt: skip
    add("--workers", type=int, default=_num_cores(), help="encoder processes (default: number of cores)")
    add(
        "--log-interval",
        type=int,
        metavar="DOCUMENTS",
        help="documents between progress lines where output is\npiped (default: by time)",
    )
    add("--on-bad-line", choices=("skip", "fail"), default="skip",
        help="skip: count, report and keep bad lines in OUTPUT_PREFIX.rejects.jsonl (default); fail: stop")  # fmt: skip
    add("--encoder", choices=("auto", "sentencepiece"),
        help="auto: gigatoken if its ids match SentencePiece's (default)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace existing output")
    return parser


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
