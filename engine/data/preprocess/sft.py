"""Preprocesses conversations to fine-tuning datasets, and counts skipped records by reason."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.data.chat.encoder import ChatEncoder
from engine.data.chat.template import ChatTemplate
from engine.data.preprocess.blocks import read_blocks
from engine.data.preprocess.build import Counts, DatasetBuild, EncodedBlock, dataset_info, source_names
from engine.data.preprocess.record_encoder import OUTCOMES, RecordEncoder, Rules, SftBlock, check_over_budget
from engine.data.preprocess.records import FORMATS
from engine.data.preprocess.rejects import Reject
from engine.data.preprocess.sources import Source
from engine.data.preprocess.workers import ordered_map
from engine.data.storage.format import token_dtype
from engine.data.storage.writer import IndexedDatasetWriter
from engine.data.tokenizers.protocol import Tokenizer
from engine.errors import ConfigError, DataError


@dataclass
class SftCounts(Counts):
    """The sums of `SftBlock`, with `formats` by file. `num_bytes` counts bytes of records."""

    num_targets: int = 0
    formats: dict[str, Counter[str]] = field(default_factory=dict)
    problems: Counter[str] = field(default_factory=Counter)
    outcome: Counter[str] = field(default_factory=Counter)

    def add(self, block: EncodedBlock) -> None:
        assert isinstance(block, SftBlock)
        super().add(block)
        self.num_targets += int(block.mask.sum())
        self.formats.setdefault(block.file, Counter()).update(block.formats)
        self.problems += block.problems
        self.outcome += block.outcome

    @property
    def conversations(self) -> int:
        """The number of conversations kept; smaller than the number of documents if some were split."""
        return sum(formats.total() for formats in self.formats.values())


def sft_prefix(output_prefix: str) -> Path:
    """Return the prefix of the fine-tuning dataset."""
    return Path(f"{output_prefix}_sft")


def preprocess_sft(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    template: ChatTemplate | ConfigError,
    output_prefix: str,
    rules: Rules,
    *,
    workers: int,
    on_reject: Callable[[Reject], None] = lambda reject: None,
    on_progress: Callable[[Counts], None] = lambda counts: None,
) -> SftCounts:
    """Write the dataset `sft_prefix(output_prefix)` with a target mask, one document per conversation, atomically.

    Args:
        sources: see `find_sources`, with `RECORDS`.
        template: for conversations, or the error to raise at the first one if there is no template.
        rules: see `Rules`.
        on_reject: called with each rejected record; may raise.
        on_progress: called with the counts after each block.

    Raises:
        ConfigError: there are conversations, but no template.
        DataError: no targets remain, a conversation is too long with `on_too_long` = error, or too many conversations
            exceed the template's budget.
        WorkerFailed: a worker process was killed.
    """
    counts = SftCounts()

    def check_and_report(reject: Reject) -> None:
        on_reject(reject)
        check_over_budget(counts.problems, reject)

    writer = IndexedDatasetWriter(sft_prefix(output_prefix), token_dtype(tokenizer.vocab_size), masked=True)
    chat = template if isinstance(template, ConfigError) else ChatEncoder(tokenizer, template)
    advice = f"expected objects with one of {', '.join('+'.join(keys) for keys in FORMATS.values())}"
    with DatasetBuild([writer], output_prefix, counts) as build:
        blocks = ordered_map(RecordEncoder(tokenizer, chat, rules), read_blocks(sources), workers)
        build.write_all(blocks, check_and_report, on_progress, advice)
        if not counts.num_targets:
            what = "; ".join(describe_outcomes(counts)) or "no records"
            raise DataError(f"no targets in {source_names(sources)}: {what}")
        writer.info = dataset_info(tokenizer, sources, counts)
        if counts.outcome["template"] and isinstance(chat, ChatEncoder) and isinstance(template, ChatTemplate):
            used = {"chat_template": template.source, "end_of_turn_id": chat.end_of_turn_id}
            writer.info = writer.info.model_copy(update=used)
    return counts


def describe_outcomes(counts: SftCounts) -> list[str]:
    """Return one line per problem and per outcome, with the number of conversations."""
    rejected = sorted(counts.problems.items(), key=lambda item: (-item[1], item[0]))
    told = [f"{count:,} rejected: {problem}" for problem, count in rejected]
    return told + [f"{counts.outcome[name]:,} {text}" for name, text in OUTCOMES.items() if counts.outcome[name]]
