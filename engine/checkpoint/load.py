"""A model ready to be used, from whatever directory holds one."""

from collections.abc import Callable
from pathlib import Path

import orjson
import torch
from torch import Tensor, nn

from engine.checkpoint.huggingface.directory import GENERATION_CONFIG, HuggingFaceDirectory
from engine.checkpoint.manager import open_checkpoint
from engine.checkpoint.rectangles import Rectangle
from engine.config.schema import ModelConfig
from engine.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from engine.errors import CheckpointError, ConfigError
from engine.model.decoder import Decoder
from engine.model.layers import Parameters
from engine.model.parameters import logical_shapes, parameter_table, tp_problem, whole_model
from engine.parallel.layout import NO_TP, TensorParallel

Read = Callable[[str, Rectangle], Tensor]


def load_decoder(
    path: Path, dtype: torch.dtype, device: torch.device, tp: TensorParallel = NO_TP
) -> tuple[Decoder, Tokenizer]:
    """The decoder and the tokenizer of a run (its newest checkpoint), a checkpoint or a Hugging Face directory.

    With `tp`, this rank's part of the decoder: no more is read.

    Raises:
        CheckpointError: there is no model, it is damaged, or it comes without a tokenizer.
        ConfigError: the model cannot be cut for so many ranks.
    """
    if (path / "config.json").exists() and not (path / "manifest.json").exists():
        source = HuggingFaceDirectory(path)
        source.require(logical_shapes(source.model))
        tokenizer = load_tokenizer(str(path)) if source.tokenizer_files else None
        decoder = _build(source.model, source.read, dtype, device, tp)
    else:
        checkpoint = open_checkpoint(path)
        model, spec = checkpoint.model_config(), checkpoint.tokenizer_spec
        checkpoint.require("param", logical_shapes(model))
        tokenizer = load_tokenizer(spec) if spec else None
        decoder = _build(model, lambda name, part: checkpoint.read("param", name, part), dtype, device, tp)
    if tokenizer is None:
        raise CheckpointError(f"{path} holds a model but no tokenizer; put its tokenizer files beside it")
    return decoder, tokenizer


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end what a model writes: the tokenizer's end of document, and `eos_token_id` (a number or a list) of a
    generation_config.json beside the tokenizer's files.

    Raises:
        CheckpointError: that file is something else.
    """
    ids = {tokenizer.eod_id}
    for path in {file.with_name(GENERATION_CONFIG) for file in tokenizer.files}:
        if path.is_file():
            ids |= _end_ids(path, tokenizer.vocab_size)
    return frozenset(ids)


def _end_ids(path: Path, vocab_size: int) -> set[int]:
    try:
        content = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    named = content.get("eos_token_id") if isinstance(content, dict) else content
    ids = [] if named is None else named if isinstance(named, list) else [named]
    if not isinstance(content, dict) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise CheckpointError(f"{path}: eos_token_id = {named!r}; expected ids from 0 to {vocab_size - 1}")
    return set(ids)


@torch.no_grad()
def _build(model: ModelConfig, read: Read, dtype: torch.dtype, device: torch.device, tp: TensorParallel) -> Decoder:
    _require_tp(model, tp.size)
    parameters = {}
    for parameter in parameter_table(model, tp=tp).parameters:
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        for tensor, part in parameter.split(values):
            part.copy_(read(tensor.name, tensor.rectangle))
        parameters[parameter.path] = nn.Parameter(values, requires_grad=False)
    return Decoder(model, Parameters(parameters), whole_model(model), tp)


def _require_tp(model: ModelConfig, tp: int) -> None:
    if problem := tp_problem(model, tp):
        works = ", ".join(str(n) for n in range(1, model.num_heads + 1) if not tp_problem(model, n))
        raise ConfigError(f"{tp} ranks cannot share the layers: {tp} {problem}; --nproc-per-node can be {works}")
