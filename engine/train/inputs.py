"""What a run reads: opened and checked before anything large is allocated."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.checkpoint.huggingface.config import hf_config
from engine.checkpoint.initial import InitialWeights, initial_weights
from engine.checkpoint.manager import Checkpoint, candidates, open_checkpoint
from engine.config.schema import SOURCES, Config
from engine.data.chat.template import find_template
from engine.data.samples.dataset import SampleDataset
from engine.data.samples.pretrain import PretrainDataset, Split
from engine.data.samples.sft import SftDataset
from engine.data.samples.vocabulary import check_tokenizer, check_vocabulary
from engine.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from engine.errors import CheckpointError, ConfigError, DataError
from engine.model.parameters import parameter_table
from engine.ops.choice import require_fp8, require_implementations
from engine.parallel.layout import World
from engine.parallel.table import ParameterTable


@dataclass(frozen=True)
class Inputs:
    """Everything, ready to use.

    `checkpoints` are those it may go on from, the best first; `weights` those of a fresh start, if it has any.
    """

    table: ParameterTable
    dtype: torch.dtype
    tokenizer: Tokenizer
    train_data: SampleDataset
    valid_data: SampleDataset | None
    checkpoints: list[Checkpoint]
    weights: InitialWeights | None


def model_dtype(config: Config, device_type: str) -> torch.dtype:
    """The dtype of the parameters that are multiplied with."""
    mode = config.precision.mode
    bf16 = mode in ("bf16", "fp8") or (mode == "auto" and device_type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def open_inputs(config: Config, world: World) -> Inputs:
    """Open everything the run reads, and refuse what cannot work."""
    require_fp8(config.precision, config.ops, world.device)
    require_implementations(config.ops, world.device)
    dtype, table = model_dtype(config, world.device.type), parameter_table(config.model)
    hf_config(config.model, dtype=dtype, bos_id=None, eos_id=None)  # what could not be exported is not trained
    tokenizer = open_tokenizer(config)
    train_data = open_data(config, "train", tokenizer)
    valid_data = open_data(config, "valid", tokenizer) if config.train.eval_steps else None
    shapes = {tensor.name: tensor.shape for tensor in table.logical()}
    checkpoints = _choose_checkpoints(config, print if world.is_main else lambda _: None)
    for checkpoint in checkpoints:
        checkpoint.require("param", shapes)
        _require_same_architecture(checkpoint, config)
    weights = None if checkpoints else initial_weights(config.model)
    if weights is not None:
        weights.require(shapes)
    return Inputs(table, dtype, tokenizer, train_data, valid_data, checkpoints, weights)


def open_tokenizer(config: Config) -> Tokenizer:
    """The run's tokenizer, which must not be larger than the model's vocabulary."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {config.model.vocab_size} is smaller than the {tokenizer.vocab_size} entries of "
            f"data.tokenizer = {config.data.tokenizer}; set model.vocab_size to at least that"
        )
    return tokenizer


def open_data(config: Config, part: Split, tokenizer: Tokenizer) -> SampleDataset:
    """The data to train or to validate with, checked against the tokenizer and the vocabulary."""
    wanted = config.data
    datasets = wanted.valid if wanted.valid and part == "valid" else wanted.train
    split, part = ((1.0, 0.0, 0.0), "train") if wanted.valid else (wanted.split, part)
    if config.task == "sft":
        epochs = 1 if part == "valid" or datasets is wanted.valid else config.train.epochs or None
        data: SampleDataset = SftDataset(
            datasets, split, part, wanted.seq_length, config.run.seed, packed=wanted.packing, epochs=epochs
        )
    else:
        data = PretrainDataset(datasets, split, part, wanted.seq_length, config.run.seed)
    for dataset in data.datasets:
        check_tokenizer(dataset, tokenizer.hash)
        check_vocabulary(dataset, config.model.vocab_size)
    return data


def packing_summary(data: SampleDataset, part: Split, global_batch_size: int) -> Iterator[str]:
    """How conversations are packed into sequences, for people; nothing in pretraining."""
    summary, rows = data.summary(), data.num_rows
    if summary is None or rows is None:
        return
    yield f"sequences   {part}: {summary}"
    if part == "train" and rows < global_batch_size:
        yield (
            f"warning     batch.global = {global_batch_size} is more than the {rows} sequences of an epoch: a step "
            "reads conversations several times, or has empty sequences; lower it"
        )


def describe_template(data: SampleDataset, tokenizer: Tokenizer) -> Iterator[str]:
    """How conversations are written, for people."""
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
        yield "warning     the tokenizer comes with another chat template; the export will have that of the data"


def chat_template(data: SampleDataset) -> str | None:
    """The template that the training data were written with.

    Raises:
        DataError: several.
    """
    infos = [(data.prefix, data.info.chat_template) for data in data.datasets if data.info is not None]
    used = {template: prefix for prefix, template in infos if template is not None}
    if len(used) > 1:
        first, second, *_ = used.values()
        raise DataError(
            f"{first} and {second} were made with different chat templates, and a model has one; "
            "preprocess them with the same --chat-template"
        )
    return next(iter(used), None)


def _require_same_architecture(checkpoint: Checkpoint, config: Config) -> None:
    """Tensors of the same shapes can belong to another model. What may differ are settings that mean nothing to trained
    weights and those that people change on purpose to lengthen the context."""
    stored, wanted = checkpoint.model_config().model_dump(), config.model.model_dump()
    may_differ = {*SOURCES, "init_std", "max_position", "rope_theta", "rope_scaling", "sliding_window"}
    different = [
        f"model.{key} = {wanted[key]}, in the checkpoint {value}"
        for key, value in stored.items()
        if value != wanted[key] and key not in may_differ
    ]
    if different:
        raise CheckpointError("\n  ".join([f"{checkpoint.path} is of another model:", *different]))


def _choose_checkpoints(config: Config, report: Callable[[str], None]) -> list[Checkpoint]:
    """Where to start from: what run.dir holds, newest first; else what `run.resume` names; else nothing.

    A path below run.dir is taken literally, so that a run can go back to an older step.
    """
    resume, own = config.run.resume, config.run.dir
    if resume not in ("auto", "never"):
        named = open_checkpoint(Path(resume))
        inside = own.resolve() in Path(resume).resolve().parents
        return [named] if inside else candidates(own, report) or [named]
    found = candidates(own, report)
    if resume == "never" and found:
        raise ConfigError(
            f"run.resume = never, but {own} holds a checkpoint of step {found[0].state.step}; "
            "choose another run.dir, or run.resume = auto to go on"
        )
    return found
