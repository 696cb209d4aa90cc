"""Verifies that a checkpoint and a Hugging Face directory are the same model, after a conversion in either direction.

The tensors are compared bitwise; logits, token ids and the ends of generated text with what `transformers` makes of the
directory. What cannot be compared, such as logits without `transformers`, is reported as not compared, never as equal.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import engine
from engine.checkpoint.huggingface.directory import HuggingFaceDirectory
from engine.checkpoint.huggingface.exported_ids import require_trained_ids
from engine.checkpoint.huggingface.files import GENERATION_CONFIG, Json, read_json
from engine.checkpoint.huggingface.generation_config import end_of_turn_ids, stop_ids
from engine.checkpoint.load import build_decoder
from engine.checkpoint.model_directory import OnTensor
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.rectangles import Shape
from engine.config.schema import SOURCES
from engine.data.tokenizers.load import load_tokenizer
from engine.data.tokenizers.protocol import Tokenizer
from engine.errors import CheckpointError, ConfigError
from engine.formatting import counted

LOGITS_PROBE_TOKENS = 256
TOLERANCE = 1e-4  # of logits in fp32, times the largest logit if that is above 1
_MAX_NAMES = 5  # of tensors in a message


class NotComparedError(Exception):
    """The reason why a check cannot be made."""


@dataclass(frozen=True)
class Check:
    """The result of one comparison.

    Attributes:
        detail: what was compared and the figures, or the difference, or the reason.
    """

    name: Literal["tensors", "logits", "token ids", "generation"]
    result: Literal["equal", "different", "not compared"]
    detail: str


def verify(
    checkpoint: Checkpoint, path: Path, shapes: Mapping[str, Shape], progress: OnTensor | None = None
) -> list[Check]:
    """Compare a checkpoint with the Hugging Face directory at `path`.

    One tensor at a time is in memory; the logits need the model in fp32, and are left out if that does not fit.

    Args:
        shapes: names and shapes that the checkpoint's model implies, in model order.
        progress: called after each tensor.

    Raises:
        CheckpointError: the directory is not a model that can be read.
    """
    directory = HuggingFaceDirectory(path)
    return [
        _check("tensors", lambda: _compare_tensors(checkpoint, directory, shapes, progress)),
        _check("logits", lambda: _compare_logits(directory, shapes)),
        _check("token ids", lambda: _compare_ids(checkpoint, directory)),
        _check("generation", lambda: _compare_generation(checkpoint, directory)),
    ]


def _check(name: Literal["tensors", "logits", "token ids", "generation"], compare: Callable[[], str]) -> Check:
    try:
        return Check(name, "equal", compare())
    except NotComparedError as reason:
        return Check(name, "not compared", str(reason))
    except CheckpointError as difference:
        return Check(name, "different", str(difference))


def _compare_tensors(
    checkpoint: Checkpoint, directory: HuggingFaceDirectory, shapes: Mapping[str, Shape], progress: OnTensor | None
) -> str:
    """Compare the configurations, and every tensor bitwise in the narrower of the two dtypes."""
    ours, theirs = (dict(one.model) | dict.fromkeys(SOURCES) for one in (checkpoint, directory))
    if differing := [f"{key} {ours[key]!r} and {theirs[key]!r}" for key in ours if ours[key] != theirs[key]]:
        raise CheckpointError(f"the configurations differ: {', '.join(differing)}")
    checkpoint.require(shapes)
    directory.require(shapes)
    dtypes, different = set[str](), list[str]()
    for name in shapes:
        master, stored = checkpoint.read(name), directory.read(name)
        dtype = min(master.dtype, stored.dtype, key=lambda one: one.itemsize)
        dtypes.add(str(stored.dtype).removeprefix("torch."))
        if not torch.equal(*(one.to(dtype).contiguous().view(torch.uint8) for one in (master, stored))):
            different.append(name)
        if progress:
            progress(name, master.numel())
    if different:
        names = ", ".join(different[:_MAX_NAMES]) + ", …" * (len(different) > _MAX_NAMES)
        raise CheckpointError(f"{len(different)} of {counted(len(shapes), 'tensor')}: {names}")
    return f"{counted(len(shapes), 'tensor')}, bitwise in {' and '.join(sorted(dtypes))}"


@torch.no_grad()
def _compare_logits(directory: HuggingFaceDirectory, shapes: Mapping[str, Shape]) -> str:
    """Compare the logits of a probe in fp32, as this package and as `transformers` compute them."""
    if find_spec("transformers") is None:
        raise NotComparedError("transformers is not installed (the extra hf)")
    num_bytes, available = 4 * sum(map(math.prod, shapes.values())), _available_bytes()
    if num_bytes > available:
        raise NotComparedError(
            f"the model in fp32 needs {num_bytes / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available"
        )
    model = directory.model
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        model.vocab_size, (min(LOGITS_PROBE_TOKENS, model.max_position),), generator=generator
    )  # [t]
    ours, theirs = _our_logits(directory, tokens), _their_logits(directory.path, tokens)  # [t, v]
    difference, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    figures = f"largest difference {difference:.1e}, largest logit {largest:.3g}, {len(tokens)} tokens, fp32"
    if not difference <= TOLERANCE * max(1.0, largest):
        raise CheckpointError(f"{figures}; expected at most {TOLERANCE * max(1.0, largest):.1e}")
    return figures


def _our_logits(directory: HuggingFaceDirectory, tokens: Tensor) -> Tensor:
    decoder = build_decoder(directory, torch.float32, torch.device("cpu"))
    hidden = decoder(tokens, torch.arange(len(tokens)), decoder.attend_within((0, len(tokens))))
    return decoder.logits(hidden)


def _their_logits(path: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        config.dtype = torch.float32  # transformers 4 loads in fp32, 5 in the dtype of the configuration
        model = AutoModelForCausalLM.from_pretrained(
            path, config=config, local_files_only=True, attn_implementation="eager"
        )
        logits: Tensor = model.float().eval()(tokens[None]).logits[0]
    except Exception as error:  # by kind of model, anything
        raise CheckpointError(f"transformers cannot run the model: {error}") from None
    return logits


def _available_bytes() -> float:
    """Memory that is free or used as a cache, where the system says it; else all of it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _compare_ids(checkpoint: Checkpoint, directory: HuggingFaceDirectory) -> str:
    if directory.tokenizer_spec is None:
        raise NotComparedError(f"{directory.path} has no tokenizer")
    compared = require_trained_ids(directory.path, _tokenizer(checkpoint))
    if not compared.readers:
        raise NotComparedError("the library tokenizers is not installed (the extra hf)")
    chats = counted(compared.num_conversations, "conversation")
    return f"{counted(compared.num_texts, 'text')}, {chats}, read by {' and '.join(compared.readers)}"


def _compare_generation(checkpoint: Checkpoint, directory: HuggingFaceDirectory) -> str:
    """Compare the ids that end generated text. The directory's may include the end of turn of the chat template."""
    tokenizer = _tokenizer(checkpoint)
    ours, theirs = stop_ids(tokenizer), _their_stop_ids(directory)
    if not theirs:
        raise NotComparedError(f"{directory.path} names no id that ends generated text")
    if ours - theirs or theirs - ours - end_of_turn_ids(tokenizer):
        raise CheckpointError(f"generation ends with {sorted(theirs)}, in the checkpoint with {sorted(ours)}")
    return f"ends with {', '.join(map(str, sorted(theirs)))}"


def _their_stop_ids(directory: HuggingFaceDirectory) -> set[int]:
    """Return the ids with which `transformers` ends a text: those of generation_config.json, or else config.json."""
    path = directory.path / GENERATION_CONFIG
    config: Mapping[str, Any] = read_json(path) if path.exists() else directory.config
    if path.exists() and find_spec("transformers"):
        from transformers import GenerationConfig

        try:
            config = GenerationConfig.from_pretrained(directory.path, local_files_only=True).to_dict()
        except Exception as error:  # settings that contradict each other
            raise CheckpointError(f"transformers cannot read {path}: {error}") from None
    ids = config.get("eos_token_id")
    return {ids} if isinstance(ids, int) else set(ids or ())


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.tokenizer_spec is None:
        raise NotComparedError(f"{checkpoint.path} has no tokenizer")
    try:
        return load_tokenizer(checkpoint.tokenizer_spec, fast=False)
    except ConfigError as error:
        raise NotComparedError(str(error)) from None


def as_json(checkpoint: Checkpoint, path: Path, checks: list[Check]) -> Json:
    """Return a report as a JSON object."""
    return {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.state.step,
        "huggingface": str(path),
        "versions": {"triaxis": engine.__version__}
        | {name: version(name) for name in ("torch", "transformers") if find_spec(name)},
        "checks": {check.name: {"result": check.result, "detail": check.detail} for check in checks},
    }
