"""The model card of an export, `README.md`: what the model is and how it was trained, as far as the run knows.

Names of models, data and tokenizers are the last part of their paths, so that a card shows nothing of the machine that
it was written on. License, language and intended use are left to the author of the model.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import torch
import yaml

import engine
from engine.checkpoint.manifest import State
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.rectangles import Shape
from engine.config.schema import Config, ModelConfig
from engine.formatting import counted
from engine.model.families import family_of

MODEL_CARD = "README.md"
_HUB_CACHE = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")  # DIR/snapshots/REVISION is a model
_TO_ADD = """The run does not know license, languages, origin of the data, intended use and limits. Before you publish
the model, add them here, and `license:` and `language:` at the top.
"""


def model_card(title: str, checkpoint: Checkpoint, shapes: Mapping[str, Shape], dtype: torch.dtype) -> str:
    """Return the model card of an export of `checkpoint`: metadata for the Hugging Face Hub, then Markdown.

    Args:
        title: the heading.
        shapes: names and shapes of the weights.
        dtype: dtype of the exported weights.
    """
    config, state = _config(checkpoint), checkpoint.state
    base = _source(config, state)
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["triaxis"]}
    if base is not None and "/" in base:  # the name of a model on the Hub
        metadata["base_model"] = base
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# {_plain(title)}",
        _summary(config, state, base),
        _table("model", _architecture(checkpoint.model, shapes, dtype)),
    ]
    if config is not None:
        parts.append(_table("training", _training(config, state, _last_losses(checkpoint))))
    return "\n\n".join([*parts, _TO_ADD])


def _config(checkpoint: Checkpoint) -> Config | None:
    """Return the configuration of the run; None for imported weights, or if this release does not know its settings."""
    try:
        content = yaml.safe_load(checkpoint.config_yaml_path.read_text(encoding="utf-8"))
        return Config.model_validate(content)
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _source(config: Config | None, state: State) -> str | None:
    """Return the name of the model that the weights come from, or started from; None for a model from scratch."""
    if config is None:
        imported = state.layout.get("imported")
        return _name(Path(imported)) if isinstance(imported, str) else None
    path = config.model.from_hf or config.model.from_checkpoint
    return None if path is None else _name(path)


def _name(path: Path) -> str:
    """Return the last part of a path, or OWNER/NAME of a model in the cache of the Hub."""
    for part in path.parts:
        if found := _HUB_CACHE.fullmatch(part):
            return f"{found['owner']}/{found['name']}"
    return path.name


def _summary(config: Config | None, state: State, base: str | None) -> str:
    by = f"Triaxis {engine.__version__}"
    if config is None:
        return f"Converted by {by}" + (f" from `{_plain(base)}`, without training." if base else ".")
    how = "Fine-tuned on conversations" if config.task == "sft" else "Trained on text"
    return f"{how} with {by}, {f'starting from `{_plain(base)}`' if base else 'from random weights'}."


def _architecture(model: ModelConfig, shapes: Mapping[str, Shape], dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    yield "architecture", family_of(model.family).architecture
    yield "parameters", f"{sum(map(math.prod, shapes.values())):,}"
    yield "weights", str(dtype).removeprefix("torch.")
    yield "layers", f"{model.num_layers} of {model.hidden_size:,} features, feed-forward {model.intermediate_size:,}"
    yield "heads", f"{model.num_heads}, {model.num_kv_heads} of keys and values, {model.head_dim} features each"
    yield "vocabulary", f"{model.vocab_size:,}"
    yield "positions", f"{model.max_position:,}"


def _training(config: Config, state: State, losses: Mapping[str, tuple[int, float]]) -> Iterator[tuple[str, str]]:
    data, optimizer, schedule, train = config.data, config.optimizer, config.lr_schedule, config.train
    targets = "target " * (config.task == "sft")
    yield "steps", f"{state.step:,} of {train.steps:,}"
    yield "tokens", f"{state.consumed_tokens:,} {targets}tokens, {state.consumed_samples:,} sequences"
    yield "batch", f"{config.batch.global_:,} sequences of {data.seq_length:,} tokens"
    yield "data", ", ".join(f"`{_plain(one.path.name)}` (weight {one.weight:g})" for one in data.train)
    yield "tokenizer", f"`{_plain(_name(Path(data.tokenizer)))}`"
    decay = f"weight decay {optimizer.weight_decay:g}, gradients clipped at {optimizer.clip_grad:g}"
    yield "optimizer", f"AdamW, betas {optimizer.betas[0]:g} and {optimizer.betas[1]:g}, eps {optimizer.eps:g}, {decay}"
    warmup = counted(schedule.warmup_steps, "warmup step")
    end = f" to {schedule.min_lr:g}" * (schedule.kind != "constant")
    yield "learning rate", f"{optimizer.lr:g}, {schedule.kind}{end}, {warmup}"
    details = {"fp8": f", {config.precision.recipe}", "auto": " (bf16 on a GPU, fp32 on a CPU)"}
    yield "precision", config.precision.mode + details.get(config.precision.mode, "")
    yield "layout", ", ".join(f"{axis} {size}" for axis, size in state.layout.items() if isinstance(size, int))
    yield "seed", str(config.run.seed)
    for name, (step, loss) in losses.items():
        yield name, f"{loss:.4f} at step {step:,}"
    if state.best is not None:
        yield "best evaluation loss", f"{state.best.loss:.4f} at step {state.best.step:,}"


def _last_losses(checkpoint: Checkpoint) -> dict[str, tuple[int, float]]:
    """Return the last losses up to the checkpoint's step, of training and evaluation, as (step, loss)."""
    path, found = checkpoint.path.absolute().parent.parent / "metrics.jsonl", dict[str, tuple[int, float]]()
    if not path.is_file():
        return found
    with path.open("rb") as lines:
        for line in lines:
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:  # the last line of a run that was killed
                continue
            step = record.get("step") if isinstance(record, dict) else None
            if not isinstance(step, int) or step > checkpoint.state.step:
                continue
            for name, key in {"training loss": "loss", "evaluation loss": "eval_loss"}.items():
                if isinstance(loss := record.get(key), float):
                    found[name] = step, loss
    return found


def _table(title: str, rows: Iterator[tuple[str, str]]) -> str:
    return "\n".join([f"| {title} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _plain(text: str | None) -> str:
    """Return a name without characters that would end a cell, a line or code in Markdown, or hide something."""
    return "".join("_" if one in "|`<>[]" or not one.isprintable() else one for one in text or "")
