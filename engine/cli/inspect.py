"""Inspect a token dataset: statistics, verification, documents and samples."""

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.text import Text

from engine.cli.arguments import command_name, program_parser, require_at_least
from engine.cli.progress import ProgressDisplay
from engine.config.schema import DatasetConfig
from engine.data import inspection
from engine.data.inspection import ConversationExcerpt, DocumentExcerpt, document_kind, printable
from engine.data.samples.pretrain import PretrainDataset
from engine.data.samples.sample import SPLITS
from engine.data.storage.reader import IndexedDataset
from engine.data.storage.writer import seal
from engine.data.tokenizers.protocol import Tokenizer
from engine.errors import ConfigError
from engine.formatting import counted

EXAMPLES = """
examples:
  %(prog)s data/corpus_text_document
  %(prog)s data/corpus_text_document --verify
  %(prog)s megatron/web_text_document --seal
  %(prog)s data/corpus_text_document --tokenizer tok.model --sample 7 --seq-length 512
  %(prog)s data/chats_sft --tokenizer models/base --sample 7

A sample of a fine-tuning dataset is a conversation: target tokens are green, or in «» without colors.
"""
HEAD_TOKENS = 64  # shown per document with --head
DOCUMENT_TOKENS = 4096  # shown with --document
IDS_SHOWN = 32


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; see `--help`."""
    options = parser().parse_args(arguments)
    require_at_least(0, head=options.head, document=options.document, sample=options.sample)
    require_at_least(1, seq_length=options.seq_length, vocab_size=options.vocab_size)
    report = _examine(options)
    if options.json:
        print(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())
    else:
        _print(report)


def _examine(options: argparse.Namespace) -> dict[str, Any]:
    data = IndexedDataset(options.prefix, sealed=not options.seal)
    tokenizer = inspection.find_tokenizer(data, options.tokenizer)
    report: dict[str, Any] = {}
    if options.seal:
        with closing(VerifyProgress(data.num_bytes)) as progress:
            seal(data.prefix, options.vocab_size or _vocab_size(data, tokenizer), progress)
        data = IndexedDataset(options.prefix)
    if options.verify:
        vocab_size = options.vocab_size or _vocab_size(data, tokenizer)
        with closing(VerifyProgress(data.num_bytes)) as progress:
            data.verify(vocab_size, progress)
        report["verified"] = {"tokens": data.num_tokens, "vocab_size": vocab_size}
    report = inspection.summary(data) | report
    documents = inspection.conversations if data.has_mask else inspection.documents
    if options.head:
        numbers = range(min(options.head, data.num_documents))
        report["head"] = documents(data, numbers, tokenizer, HEAD_TOKENS)
    if options.document is not None:
        report["document"] = documents(data, [options.document], tokenizer, DOCUMENT_TOKENS)
    if options.sample is not None and data.has_mask:
        if options.seq_length is not None:
            raise ConfigError(f"--seq-length does not apply to {data.prefix}: with a mask, a sample is a conversation")
        report["document"] = documents(data, [options.sample], tokenizer, DOCUMENT_TOKENS)
    elif options.sample is not None:
        if options.seq_length is None:
            raise ConfigError(
                "--sample needs --seq-length, and --seed and --split if the run does not use the defaults"
            )
        dataset = DatasetConfig(path=options.prefix, weight=1.0)
        samples = PretrainDataset([dataset], options.split, options.part, options.seq_length, options.seed)
        report["sample"] = inspection.sample(samples, options.sample, tokenizer)
    return report


def _vocab_size(data: IndexedDataset, tokenizer: Tokenizer | None) -> int | None:
    if tokenizer is not None:
        return tokenizer.vocab_size
    return None if data.info is None else data.info.vocab_size


class VerifyProgress(ProgressDisplay):
    """Progress of a verification: rate and time left, with a last line when complete."""

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` bytes are verified."""
        self.update(done, f"verified  {done / self.seconds / 1e6:,.0f} MB/s", due=done >= total or None)


def _print(report: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for name, value in _rows(report):
        console.print(Text(f"{name:<23} ", "bold").append(value, "not bold"))
    for piece in [*report.get("head", []), *report.get("document", [])]:
        if isinstance(piece, ConversationExcerpt):
            _print_conversation(console, piece)
            continue
        title = f"document {piece.document:,}: {piece.num_tokens:,} tokens"
        _print_piece(console, piece, title + _shown(len(piece.ids), piece.num_tokens))
    if "sample" in report:
        _print_sample(console, report["sample"])


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    kind = document_kind("target_tokens" in report)
    rows = [
        ("dataset", report["prefix"]),
        (f"{kind}s", f"{report['documents']:,} in {counted(report['sequences'], 'sequence')}"),
        ("tokens", f"{report['tokens']:,} as {report['dtype']}"),
        ("size", f"{report['bytes']:,} bytes"),
    ]
    if (targets := report.get("target_tokens")) is not None:
        rows.append(("target tokens", f"{targets:,}, {targets / max(report['tokens'], 1):.1%}"))
    if (lengths := report["document_tokens"]) is not None:
        text = (
            f"min {lengths['min']:,}, median {lengths['median']:,}, mean {lengths['mean']:,.1f}, max {lengths['max']:,}"
        )
        rows.append((f"tokens per {kind}", text))
    if (info := report["description"]) is not None:
        tokenizer = f"{info['tokenizer_kind']}, {info['vocab_size']:,} ids, end of document {info['eod_id']}"
        rows.append(("tokenizer", f"{tokenizer}, hash {info['tokenizer_hash']}"))
        rows.append(
            (
                "made from",
                f"{counted(len(info['sources']), 'source')}, {sum(s['bytes'] for s in info['sources']):,} bytes",
            )
        )
        rows.append(("skipped", counted(info["skipped"], "line")))
    else:
        rows.append(("tokenizer", "not recorded (no .json next to the dataset)"))
    rows.append(("checksums", report["checksums"] or f"none; {command_name('inspect')} PREFIX --seal writes them"))
    if (verified := report.get("verified")) is not None:
        size = verified["vocab_size"]
        against = (
            f"below {size:,}" if size else "not negative; give --vocab-size or --tokenizer to check an upper bound"
        )
        mask = "; the mask has a 0 or 1 for each" if targets is not None else ""
        blocks = "every checksum; " if report["checksums"] else ""
        rows.append(("verified", f"{blocks}every pointer; all {verified['tokens']:,} token ids are {against}{mask}"))
    return rows


def _print_sample(console: Console, sample: dict[str, Any]) -> None:
    console.rule(f"sample {sample['number']:,}")
    number, first = sample["number_in_epoch"], sample["first_token"]
    starts = ", ".join(map(str, sample["boundaries"])) or "none"
    console.print(f"epoch {sample['epoch']:,}, number {number:,} of it, tokens from {first:,} on")
    console.print(f"documents start inside at: {starts}; the last label is {sample['last_label']}")
    for piece in sample["pieces"]:
        title = f"document {piece.document:,}, {piece.num_tokens:,} tokens from its token {piece.offset:,} on"
        _print_piece(console, piece, title)


def _print_conversation(console: Console, conversation: ConversationExcerpt) -> None:
    count, targets = conversation.num_tokens, conversation.num_targets
    shown = _shown(sum(len(run.ids) for run in conversation.runs), count)
    title = f"{document_kind(True)} {conversation.document:,}: {count:,} tokens, {targets:,} target tokens{shown}"
    console.print(Text(title, "bold cyan"))
    colored = console.color_system is not None and not console.no_color
    text = Text()
    for run in conversation.runs:
        said = printable(run.text) if run.text is not None else " ".join(map(str, run.ids))
        if colored or not run.is_target:
            text.append(said, "bold green" if run.is_target else None)
        else:
            text.append(f"«{said}»")
        text.append(" " if run.text is None else "")
    console.print(text)


def _shown(count: int, of: int) -> str:
    return f", the first {count:,}" if count < of else ""


def _print_piece(console: Console, piece: DocumentExcerpt, title: str) -> None:
    console.print(Text(title, "bold cyan"))
    if piece.text is not None:
        console.print(Text(printable(piece.text)))
        return
    more = " ..." if len(piece.ids) > IDS_SHOWN else ""
    console.print(Text(" ".join(map(str, piece.ids[:IDS_SHOWN])) + more))


def parser() -> argparse.ArgumentParser:
    """Create the parser of this command."""
    parser = program_parser("inspect", __doc__, EXAMPLES)
    add = parser.add_argument
    add("prefix", type=Path, help="the dataset, without .bin or .idx")
    add("--tokenizer", metavar="SPEC", help="decode to text with a tokenizer's file or directory, or `byte`")
    add("--verify", action="store_true", help="check every block's checksum, every pointer and every token id")
    add("--seal", action="store_true", help="verify a dataset without checksums, or a changed one, and write them")
    add("--vocab-size", type=int, metavar="V", help="upper bound of ids (default: from the tokenizer, or as recorded)")
    add("--head", type=int, default=0, metavar="N", help="show the start of the first N documents")
    add("--document", type=int, metavar="J", help="show document (or conversation) J, counted from 0")
    add("--sample", type=int, metavar="I", help="show training sample I of only this dataset (needs "
        "--seq-length), or conversation I of a fine-tuning dataset")  # fmt: skip
    add("--seq-length", type=int, metavar="S", help="data.seq_length of the run")
    add("--seed", type=int, default=1234, help="run.seed (default %(default)s)")
    add("--split", type=_split, default=(98.0, 1.0, 1.0), help="data.split (default 98,1,1)")
    add("--part", choices=SPLITS, default="train", help="which split (default train)")
    add("--json", action="store_true", help="print JSON")
    return parser


def _split(text: str) -> tuple[float, ...]:
    shares = tuple(float(share) for share in text.split(","))
    if len(shares) != len(SPLITS):
        raise argparse.ArgumentTypeError(f"{text!r} is not three shares, as in 98,1,1")
    return shares
