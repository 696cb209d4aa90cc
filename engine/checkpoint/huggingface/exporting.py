"""Exports a checkpoint to a Hugging Face directory: weights, `config.json`, tokenizer files and model card.

Weights are copied tensor by tensor. The directory is read back and verified before it is renamed to its final name.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from engine.checkpoint.huggingface.config import hf_config
from engine.checkpoint.huggingface.directory import HuggingFaceDirectory
from engine.checkpoint.huggingface.exported_ids import require_trained_ids
from engine.checkpoint.huggingface.files import (
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    Json,
    plan_shards,
    read_json,
    write_json,
)
from engine.checkpoint.huggingface.generation_config import TOKEN_IDS, token_ids, write_generation_config
from engine.checkpoint.huggingface.model_card import MODEL_CARD, model_card
from engine.checkpoint.huggingface.tokenizer_files import write_tokenizer
from engine.checkpoint.model_directory import OnTensor, with_progress
from engine.checkpoint.reader import Checkpoint
from engine.checkpoint.rectangles import Shape
from engine.checkpoint.storage import Entry, Storage, Written, new_directory, tensor_bytes
from engine.config.schema import SOURCES, ModelConfig
from engine.data.tokenizers.protocol import Tokenizer
from engine.errors import CheckpointError
from engine.model.families import stored_tensors

SHARD_BYTES = 5 * 1000**3


def export(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
    out_dir: Path | str,
    shapes: Mapping[str, Shape],
    *,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = SHARD_BYTES,
    with_tokenizer: bool = True,
    progress: OnTensor | None = None,
) -> Path:
    """Write a Hugging Face directory under a temporary name, verify it, and rename it to `out_dir`.

    Args:
        tokenizer: the run's tokenizer; None if there is none.
        shapes: names and shapes that the model implies, in model order.
        dtype: dtype of the exported weights.
        shard_bytes: maximum size of a weight file in bytes; a larger tensor has a separate file.
        with_tokenizer: whether to write its files; without, only the ids of its special tokens are written.
        progress: called after each tensor.

    Returns:
        `out_dir`.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model, the tokenizer would give other ids, a weight
            is too large for fp16, or the verification failed.
        ConfigError: `out_dir` exists and is not empty, or the family cannot express the model.
    """
    checkpoint.require(shapes)
    model, files, out = checkpoint.model, Storage(), Path(out_dir)
    ids = token_ids(tokenizer, checkpoint.state.imported, model.vocab_size)
    bos_id, eos_id, pad_id = (ids[key] for key in TOKEN_IDS)
    config = hf_config(model, dtype=dtype, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id)
    with new_directory(out) as partial:
        write_json(files, partial / CONFIG, config)
        if tokenizer and with_tokenizer:
            write_tokenizer(files, partial, checkpoint.tokenizer_dir, tokenizer)
        write_generation_config(files, partial / GENERATION_CONFIG, _generation_config(checkpoint), tokenizer, ids)
        if tokenizer and with_tokenizer:
            _require_ids(partial, tokenizer)
        files.write(partial / MODEL_CARD, model_card(out.absolute().name, checkpoint, shapes, dtype).encode())
        stored = stored_tensors(model, shapes)
        written = _write_weights(files, partial, checkpoint, shapes, stored, dtype, shard_bytes, progress)
        _verify(partial, model, shapes, stored, dtype, written)
    return out


def _require_ids(partial: Path, tokenizer: Tokenizer) -> None:
    try:
        require_trained_ids(partial, tokenizer)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --without-tokenizer exports the weights alone") from None


def _generation_config(checkpoint: Checkpoint) -> Json:
    """Return the settings of generation that came with the run's tokenizer or with imported weights."""
    path = checkpoint.tokenizer_dir / GENERATION_CONFIG if checkpoint.tokenizer_dir else None
    if path is not None and path.exists():
        return read_json(path)
    imported = checkpoint.state.imported.get("generation_config")
    return dict(imported) if isinstance(imported, dict) else {}


def _write_weights(
    files: Storage,
    partial: Path,
    checkpoint: Checkpoint,
    shapes: Mapping[str, Shape],
    stored: Mapping[str, Iterable[str]],
    dtype: torch.dtype,
    shard_bytes: int,
    progress: OnTensor | None,
) -> dict[str, Written]:
    blocks = with_progress(checkpoint, progress)

    def load(name: str) -> Iterator[Tensor]:
        for block in chain.from_iterable(map(blocks, stored[name])):
            if dtype == torch.float16 and max(map(abs, block.aminmax())) > torch.finfo(dtype).max:
                raise CheckpointError(f"{name} has values beyond 65504, the largest of fp16; export with --dtype bf16")
            yield block

    def shape(name: str) -> Shape:
        parts = [shapes[part] for part in stored[name]]
        return parts[0] if len(parts) == 1 else (sum(part[0] for part in parts), *parts[0][1:])

    def entry(name: str) -> Entry:
        return Entry(name, shape(name), dtype, lambda: load(name))

    sizes = {name: torch.Size(shape(name)).numel() * dtype.itemsize for name in stored}
    shards = plan_shards(sizes, shard_bytes)
    written = {
        shard: files.write_safetensors(partial / shard, [entry(name) for name in names], {"format": "pt"})
        for shard, names in shards.items()
    }
    if len(shards) > 1:
        weight_map = {name: shard for shard, names in shards.items() for name in names}
        write_json(files, partial / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    return written


def _verify(
    partial: Path,
    model: ModelConfig,
    shapes: Mapping[str, Shape],
    stored: Mapping[str, Iterable[str]],
    dtype: torch.dtype,
    written: Mapping[str, Written],
) -> None:
    """Re-open the export and verify the configuration and the hash of every tensor.

    Raises:
        CheckpointError: names the tensor that differs.
    """
    found = HuggingFaceDirectory(partial)
    found.require(shapes)
    if found.model != model.model_copy(update=dict.fromkeys(SOURCES)):
        raise CheckpointError(f"{partial / CONFIG} does not read back as the model it was written for")
    hashes = {name: digest for file in written.values() for name, digest in file.hashes.items()}
    for name, parts in stored.items():
        digest = xxhash.xxh3_64()
        for block in chain.from_iterable(map(found.blocks, parts)):
            digest.update(tensor_bytes(block))
        if block.dtype != dtype or digest.hexdigest() != hashes[name]:
            raise CheckpointError(f"{partial}: {name} does not read back as it was written")
