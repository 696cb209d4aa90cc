"""The inputs of a run (data, tokenizer, checkpoints, initial weights), opened and checked before anything large is
allocated.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.checkpoint.huggingface.config import require_expressible
from engine.checkpoint.model_directory import ModelDirectory
from engine.checkpoint.opening import initial_weights
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.run_directory import candidates, open_checkpoint
from engine.config.schema import SOURCES, Config, DataConfig, ModelConfig, RunConfig
from engine.data.chat.find import find_template
from engine.data.samples.contents import changed, contents, verify_first
from engine.data.samples.dataset import SampleDataset
from engine.data.samples.pretrain import PretrainDataset, part_tokens
from engine.data.samples.sample import SPLITS, Split
from engine.data.samples.sft import SftDataset
from engine.data.samples.vocabulary import check_tokenizer, check_vocabulary
from engine.data.tokenizers.load import load_tokenizer
from engine.data.tokenizers.probe import PLAIN_TEXTS
from engine.data.tokenizers.protocol import Tokenizer
from engine.errors import CheckpointError, ConfigError, DataError
from engine.model.parameters import parameter_table
from engine.ops.choice import require_attention, require_fp8, require_implementations, require_norm
from engine.parallel.layout import World
from engine.parallel.table import ParameterTable

# The most passes over the data of which a source reports a gain, by task: up to 4, repeated tokens are worth about as
# much as new ones (Muennighoff et al. 2023); a fine-tuning of 16 epochs (Ouyang et al. 2022).
_MAX_PASSES = {"pretrain": (4, "arXiv 2305.16264"), "sft": (16, "arXiv 2203.02155")}
VERIFIED_SAMPLES = 8  # at the start of each rank; a sample needs a few blocks of 4 MiB
_MAX_EXCESS = 0.1  # of all tokens, by which a part may exceed its share; whole documents never divide exactly


@dataclass(frozen=True)
class Inputs:
    """Opened and checked inputs of a run.

    Attributes:
        dtype: dtype of the parameters that matmuls read.
        valid_data: None if the run never evaluates.
        checkpoints: checkpoints to resume from, newest first; empty for a fresh start.
        weights: initial weights of a fresh start from a trained model.
    """

    table: ParameterTable
    dtype: torch.dtype
    tokenizer: Tokenizer
    train_data: SampleDataset
    valid_data: SampleDataset | None
    checkpoints: list[Checkpoint]
    weights: ModelDirectory | None


def model_dtype(mode: str, device_type: str) -> torch.dtype:
    """Return the dtype of the parameters that matmuls read, for `precision.mode` on a device."""
    bf16 = mode in ("bf16", "fp8") or (mode == "auto" and device_type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def open_inputs(config: Config, world: World) -> Inputs:
    """Open and check all inputs of the run.

    Raises:
        ConfigError: a setting is not supported by the device, the tokenizer or an export; the run directory is in use.
        DataError: a dataset is damaged, too small, changed, or written with another tokenizer.
        CheckpointError: a checkpoint or the initial weights belong to another model, or a checkpoint
            has another tokenizer.
    """
    require_fp8(config.precision, config.ops, world.device)
    require_implementations(config.ops, world.device)
    require_norm(config.model, config.ops)
    dtype, table = model_dtype(config.precision.mode, world.device.type), parameter_table(config.model)
    require_attention(config.model, config.ops, dtype, config.run, world.device)
    require_expressible(config.model)  # before training a model that cannot be exported
    tokenizer = open_tokenizer(config.data.tokenizer, config.model.vocab_size)
    train_data = open_data(config, "train", tokenizer)
    valid_data = open_data(config, "valid", tokenizer) if config.train.eval_steps else None
    shapes = {tensor.name: tensor.shape for tensor in table.logical()}
    report: Callable[[str], None] = print if world.is_main else lambda _: None
    checkpoints = _choose_checkpoints(config.run, report)
    for checkpoint in checkpoints[:1]:  # older ones of run.dir have the tokenizer and the data of the newest
        _require_same_tokenizer(checkpoint, config.data.tokenizer, tokenizer)
        _require_same_data(checkpoint, train_data, config.data, report)
    if world.is_model_parallel_leader:
        verify_first(train_data, _first_samples(config, world, checkpoints))
    for checkpoint in checkpoints:
        _require_same_architecture(checkpoint, config.model)  # first: it names settings
        checkpoint.require(shapes)
    weights = None if checkpoints else initial_weights(config.model)
    if weights is not None:
        weights.require(shapes)
    if isinstance(weights, Checkpoint) and (other := _other_tokenizer(weights, tokenizer)):
        report(f"warning     {weights.path} was trained with another tokenizer, {other}, than {config.data.tokenizer}")
    return Inputs(table, dtype, tokenizer, train_data, valid_data, checkpoints, weights)


def open_tokenizer(path: str, vocab_size: int) -> Tokenizer:
    """Load the tokenizer at `path` (`data.tokenizer`) and check that `model.vocab_size` covers it.

    Raises:
        ConfigError: no such tokenizer, or the model's vocabulary is smaller.
    """
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size = {vocab_size} is smaller than the {tokenizer.vocab_size} entries of "
            f"data.tokenizer = {path}; set model.vocab_size to at least that"
        )
    return tokenizer


def open_data(config: Config, part: Split, tokenizer: Tokenizer) -> SampleDataset:
    """Open the training or validation data, and check it against the tokenizer and the vocabulary.

    Raises:
        DataError: a file is missing, damaged, too small, or written with another tokenizer or vocabulary.
    """
    wanted = config.data
    datasets = wanted.valid if wanted.valid and part == "valid" else wanted.train
    split, part = ((1.0, 0.0, 0.0), "train") if wanted.valid else (wanted.split, part)
    if config.task == "sft":
        epochs = 1 if part == "valid" or datasets is wanted.valid else config.train.epochs or None
        data: SampleDataset = SftDataset(
            datasets,
            split,
            part,
            wanted.seq_length,
            config.run.seed,
            packed=wanted.packing,
            epochs=epochs,
            vocab_size=config.model.vocab_size,
        )
    else:
        data = PretrainDataset(
            datasets, split, part, wanted.seq_length, config.run.seed, vocab_size=config.model.vocab_size
        )
    for dataset in data.datasets:
        check_tokenizer(dataset, tokenizer.hash)
        check_vocabulary(dataset, config.model.vocab_size)
    return data


def describe_data(
    config: Config, train: SampleDataset, valid: SampleDataset | None, tokenizer: Tokenizer
) -> Iterator[str]:
    """Yield log lines on the size of each part, and on what is unusual about the data."""
    for dataset in train.datasets:
        if dataset.checksums is None:
            yield (
                f"data        {dataset.prefix} has no checksums, so that changed tokens would not be noticed; "
                f"triaxis inspect {dataset.prefix} --seal writes them"
            )
    parts: list[tuple[Split, SampleDataset | None]] = [("train", train), ("valid", valid)]
    for part, data in parts:
        if data is not None:
            yield f"data        {data.num_tokens:,} tokens to {part}"
            yield from packing_summary(data, part, config.batch.global_)
    yield from split_warnings(config, train)
    yield from repetition_warnings(config, train)
    yield from describe_template(train, tokenizer)


def split_warnings(config: Config, data: SampleDataset) -> Iterator[str]:
    """Yield a warning for each pretraining dataset of which a part has many more tokens than `data.split` asks for."""
    split = config.data.split
    if config.task == "sft" or config.data.valid:
        return
    for dataset in data.datasets:
        spans = [part_tokens(dataset, split, part) for part in SPLITS]
        shares = [(end - begin) / dataset.num_tokens for begin, end in spans]
        excess, share, asked, part = max(
            (share - size / sum(split), share, size / sum(split), part)
            for share, size, part in zip(shares, split, SPLITS, strict=True)
        )
        if excess > _MAX_EXCESS:
            yield (
                f"warning     {share:.0%} of the tokens of {dataset.prefix} are in the {part} part although data.split "
                f"= {list(split)} asks for {asked:.0%}: the split is by document; cut large files into documents, e.g. "
                "JSONL with a line per chapter"
            )


def packing_summary(data: SampleDataset, part: Split, global_batch_size: int) -> Iterator[str]:
    """Yield log lines on how conversations are packed into sequences; none in pretraining."""
    summary, rows = data.summary(), data.num_rows
    if summary is None or rows is None:
        return
    yield f"sequences   {part}: {summary}"
    if part == "train" and rows < global_batch_size:
        yield (
            f"warning     batch.global = {global_batch_size} is more than the {rows} sequences of an epoch: a step "
            "repeats conversations, or contains empty sequences; lower batch.global"
        )


def repetition_warnings(config: Config, data: SampleDataset) -> Iterator[str]:
    """Yield a warning for each training dataset that the run reads more often than is known to help."""
    train, (most, source) = config.train, _MAX_PASSES[config.task]
    rows = data.num_rows
    by_epochs = rows is not None and train.epochs and train.steps * config.batch.global_ >= train.epochs * rows
    setting, value = ("train.epochs", train.epochs) if by_epochs else ("train.steps", train.steps)
    warmup_and_decay = config.lr_schedule.warmup_steps + (config.lr_schedule.decay_steps or 0)
    for dataset, passes in zip(data.datasets, data.passes(train.steps * config.batch.global_), strict=True):
        if passes > most:
            weight = ", lower its weight in data.train" if len(data.datasets) > 1 else ""
            lower = int(value * most / passes)
            is_enough = lower > 0 and int(train.steps * most / passes) > warmup_and_decay
            shorter = f", or lower {setting} = {value} to {lower}" if is_enough else ""
            yield (
                f"warning     the run reads {dataset.prefix} {passes:,.1f} times; that more than {most} passes help is "
                f"not known ({source}): add data{weight}{shorter}"
            )


def describe_template(data: SampleDataset, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield log lines that compare the chat templates of the data and the tokenizer; none in pretraining."""
    template = chat_template(data)
    if template is None:
        return
    ends = {dataset.info.end_of_turn_id for dataset in data.datasets if dataset.info is not None} - {None}
    names = [repr(token) for token, i in tokenizer.special_tokens.items() if i in ends]
    yield f"chat        with the template of the data; turns end with {' or '.join(names) or 'nothing'}"
    try:
        own = find_template(tokenizer).source
    except ConfigError:
        return
    if own != template:
        yield "warning     the tokenizer has a different chat template; exports will contain the template of the data"


def chat_template(data: SampleDataset) -> str | None:
    """Return the chat template that the data were preprocessed with, or None if it is not recorded.

    Raises:
        DataError: the datasets were preprocessed with different templates.
    """
    infos = [(data.prefix, data.info.chat_template) for data in data.datasets if data.info is not None]
    used = {template: prefix for prefix, template in infos if template is not None}
    if len(used) > 1:
        first, second, *_ = used.values()
        raise DataError(
            f"{first} and {second} were preprocessed with different chat templates, but a model has one; "
            "preprocess them with the same chat template"
        )
    return next(iter(used), None)


def _first_samples(config: Config, world: World, checkpoints: Sequence[Checkpoint]) -> range:
    """Return the samples with which this rank begins, at most `VERIFIED_SAMPLES`."""
    share = config.batch.global_ // world.layout.dp
    consumed = checkpoints[0].state.consumed_samples if checkpoints else 0
    first = consumed + world.coords.dp * share
    return range(first, first + min(share, VERIFIED_SAMPLES))


def _require_same_data(
    checkpoint: Checkpoint, data: SampleDataset, settings: DataConfig, report: Callable[[str], None]
) -> None:
    """Reject, or with `data.on_change` = warn report, datasets that have changed since the checkpoint.

    Datasets that were added, left out or weighted otherwise are changes of the settings, which the log lists.
    """
    if names := changed(checkpoint.state.data_contents, contents(data.datasets)):
        problem = f"{', '.join(names)} in data.train: the tokens are not those with which {checkpoint.path} was trained"
        if settings.on_change == "refuse":
            raise DataError(f"{problem}; restore the data, or accept the change with data.on_change = warn")
        report(f"warning     {problem}")


def _require_same_tokenizer(checkpoint: Checkpoint, path: str, tokenizer: Tokenizer) -> None:
    """Reject a checkpoint of a run whose ids mean other text."""
    if other := _other_tokenizer(checkpoint, tokenizer):
        raise CheckpointError(
            f"{checkpoint.path} was trained with another tokenizer than data.tokenizer = {path}; resume with "
            f"data.tokenizer = {other}, or choose another run.dir for a new run (from these weights: "
            f"model.from_checkpoint = {checkpoint.path})"
        )


def _other_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer) -> str | None:
    """Return the tokenizer of the checkpoint if it gives other ids; None also if the checkpoint has no copy of it.

    Files that differ may give the same ids, as after an export and import.
    """
    spec = checkpoint.tokenizer_spec
    if spec is None or (checkpoint.tokenizer_dir is None and spec != "byte"):
        return None
    own = load_tokenizer(spec)
    same = own.hash == tokenizer.hash or all(own.encode(text) == tokenizer.encode(text) for text in PLAIN_TEXTS)
    return None if same else spec


def _require_same_architecture(checkpoint: Checkpoint, model: ModelConfig) -> None:
    """Reject a checkpoint of another architecture, even if its tensors have the same shapes. Only settings that do not
    affect trained weights may differ, and those that users change to extend the context.
    """
    stored, wanted = checkpoint.model.model_dump(), model.model_dump()
    may_differ = {*SOURCES, "init_std", "max_position", "rope_theta", "rope_scaling", "sliding_window", "window_layers"}
    different = [
        f"model.{key}: {value} in the checkpoint, {wanted[key]} here"
        for key, value in stored.items()
        if value != wanted[key] and key not in may_differ
    ]
    if different:
        raise CheckpointError("\n  ".join([f"{checkpoint.path} belongs to another model:", *different]))


def _choose_checkpoints(run: RunConfig, report: Callable[[str], None]) -> list[Checkpoint]:
    """List the checkpoints to resume from: those in run.dir, newest first; else the one `run.resume` names; else none.

    A path below run.dir is taken literally, so that a run can return to an older step.
    """
    resume, own = run.resume, run.dir
    if resume not in ("auto", "never"):
        named = open_checkpoint(Path(resume))
        inside = own.resolve() in Path(resume).resolve().parents
        return [named] if inside else candidates(own, report) or [named]
    found = candidates(own, report)
    if resume == "never" and found:
        raise ConfigError(
            f"run.resume = never, but {own} holds a checkpoint of step {found[0].state.step}; "
            "choose another run.dir, or resume with run.resume = auto"
        )
    return found
