"""The first phase of a save: every rank writes its slices to a separate shard file, and rank 0 gathers the lists."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from engine.checkpoint.manifest import (
    DTYPE_NAMES,
    Manifest,
    State,
    StoredFile,
    StoredRectangle,
    StoredTensor,
    entry_key,
    shard_name,
)
from engine.checkpoint.rectangles import Shape
from engine.checkpoint.storage import Entry, Storage
from engine.errors import StorageError
from engine.parallel.table import Rectangle


@dataclass(frozen=True)
class StateSlice:
    """A rectangle of a logical tensor, or of its optimizer state, that this rank owns and writes.

    Attributes:
        kind: `param` (the fp32 master weights), `exp_avg`, `exp_avg_sq`, ...
        name: the Hugging Face name.
        shape: global shape of the tensor.
        rectangle: its position in the tensor.
        tensor: the rectangle's elements, on any device; or a function that returns them in blocks, in order, called
            just before the write.
        dtype: dtype of the stored elements; None: the tensor's dtype. Required with a function.
    """

    kind: str
    name: str
    shape: Shape
    rectangle: Rectangle
    tensor: Tensor | Callable[[], Iterable[Tensor]]
    dtype: torch.dtype | None = None


class _Share(BaseModel):
    """The list that a rank writes for rank 0: its part of the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    file: StoredFile | None  # None: this rank owns nothing
    tensors: dict[str, dict[str, StoredTensor]]


def write_share(files: Storage, partial: Path, slices: Sequence[StateSlice], rank: int, world_size: int) -> None:
    """Write this rank's slices to its shard file, and the list of them to `share_name(rank)`."""
    entries = [_entry(part) for part in slices]
    if len({entry.key for entry in entries}) < len(entries):
        raise ValueError(f"rank {rank} was given the same rectangle twice")
    shard = shard_name(rank, world_size)
    written = files.write_safetensors(partial / shard, entries) if entries else None
    tensors: dict[str, dict[str, StoredTensor]] = {}
    for part, entry in zip(slices, entries, strict=True):
        stored = StoredRectangle(
            file=shard,
            key=entry.key,
            start=part.rectangle.start,
            extent=part.rectangle.extent,
            xxh3_64=written.hashes[entry.key] if written else "",
        )
        tensor = StoredTensor(shape=tuple(part.shape), dtype=DTYPE_NAMES[entry.dtype], rectangles=(stored,))
        _add(tensors.setdefault(part.kind, {}), part.name, tensor)
    share = _Share(file=written.file if written else None, tensors=tensors)
    files.write(partial / share_name(rank), share.model_dump_json().encode())
    files.sync_directory(partial)


def _entry(part: StateSlice) -> Entry:
    key = entry_key(part.kind, part.name, part.rectangle)
    tensor = part.tensor
    if isinstance(tensor, Tensor):
        if tuple(tensor.shape) != part.rectangle.extent:
            raise ValueError(f"{key}: shape {list(tensor.shape)}, expected {list(part.rectangle.extent)}")
        return Entry(key, part.rectangle.extent, part.dtype or tensor.dtype, lambda: [tensor])
    if part.dtype is None:
        raise ValueError(f"{key}: a tensor that is read later needs a dtype")
    return Entry(key, part.rectangle.extent, part.dtype, tensor)


def _add(tensors: dict[str, StoredTensor], name: str, tensor: StoredTensor) -> None:
    """Add the rectangles of `tensor` to those already listed under its name."""
    known = tensors.get(name)
    if known is None:
        tensors[name] = tensor
        return
    if (known.shape, known.dtype) != (tensor.shape, tensor.dtype):
        raise ValueError(f"{name}: given as {known.dtype} {known.shape} and as {tensor.dtype} {tensor.shape}")
    tensors[name] = known.model_copy(update={"rectangles": known.rectangles + tensor.rectangles})


def gather_shares(files: Storage, partial: Path, state: State, world_size: int, save_number: int) -> Manifest:
    """Gather the lists of all ranks to a manifest, without the files that rank 0 adds.

    Raises:
        StorageError: names the rank whose list or file is missing, damaged or of another size.
    """
    stored_files: dict[str, StoredFile] = {}
    tensors: dict[str, dict[str, StoredTensor]] = {}
    for rank in range(world_size):
        share = _read_share(files, partial, rank)
        if share.file:
            shard = shard_name(rank, world_size)
            if (size := files.size(partial / shard)) != share.file.size:
                raise StorageError(f"rank {rank} wrote {share.file.size} bytes into {shard}, but it has {size}")
            stored_files[shard] = share.file
        for kind, named in share.tensors.items():
            for name, tensor in named.items():
                _add(tensors.setdefault(kind, {}), name, tensor)
    return Manifest(save_number=save_number, state=state, files=stored_files, tensors=tensors)


def _read_share(files: Storage, partial: Path, rank: int) -> _Share:
    try:
        return _Share.model_validate_json(files.read(partial / share_name(rank)))
    except FileNotFoundError:
        raise StorageError(f"rank {rank} wrote nothing into {partial}") from None
    except ValidationError as error:
        raise StorageError(f"the list that rank {rank} wrote to {partial} is damaged: {error}") from None


def share_name(rank: int) -> str:
    """Return the name of the file in which `rank` lists its slices until the checkpoint is committed."""
    return f"share-{rank:05d}.json"
