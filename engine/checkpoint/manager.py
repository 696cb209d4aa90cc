"""Saving checkpoints.

A save is a two-phase commit over ranks. Every rank writes its rectangles and a list of them into a `.partial`
directory; when all have, rank 0 checks that every element of every tensor is there exactly once, writes the manifest
and renames the directory. A checkpoint therefore exists completely or not at all, whenever and wherever the power goes.
Ranks meet through a function the caller gives, so that nothing here knows of `torch.distributed`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from engine.checkpoint import rectangles as fmt
from engine.checkpoint.reader import (
    MANIFEST,
    PARTIAL,
    PREVIOUS,
    Checkpoint,
    candidates,
    checkpoints_dir,
    find,
    open_checkpoint,
    step_name,
    valid_checkpoints,
    warn,
)
from engine.checkpoint.rectangles import Manifest, Rectangle, Shape, State, StoredFile, StoredRectangle, StoredTensor
from engine.checkpoint.storage import Entry, Storage
from engine.errors import CheckpointError, StorageError, TriaxisError

__all__ = ["Checkpoint", "Piece", "State", "candidates", "find", "open_checkpoint", "save"]

Agree = Callable[[str | None], str | None]


@dataclass(frozen=True)
class Piece:
    """A rectangle of a logical tensor that this rank owns.

    Attributes:
        kind: `param` (the fp32 master), `exp_avg`, `exp_avg_sq`, ...
        name: the Hugging Face name.
        shape: global shape of the whole tensor.
        tensor: the rectangle's elements, on any device; or a function that reads them when their turn comes.
        dtype: how to store them; None keeps the tensor's own (a function needs it said).
    """

    kind: str
    name: str
    shape: Shape
    rectangle: Rectangle
    tensor: Tensor | Callable[[], Tensor]
    dtype: torch.dtype | None = None


class _Share(BaseModel):
    """What one rank wrote: the note it leaves for rank 0, which becomes a part of the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    file: StoredFile | None  # None: this rank owns nothing
    tensors: dict[str, dict[str, StoredTensor]]


def save(
    run_dir: Path | str,
    pieces: Iterable[Piece],
    state: State,
    *,
    config_yaml: str,
    tokenizer_files: Sequence[Path],
    keep_last: int,
    rank: int,
    world_size: int,
    agree: Agree,
    storage: Storage | None = None,
) -> Path:
    """Write a checkpoint; every rank calls it, also one that owns nothing.

    A valid checkpoint of the same step (a run went back and came here again) is replaced: it is set aside as
    `step_X.previous`, which `find` knows, until the new one is in place. The `keep_last` newest are kept, and the best.

    Args:
        agree: a collective: every rank calls it with its own problem or None, and all get the first problem of any.

    Returns:
        the committed directory.

    Raises:
        StorageError: on all ranks when any rank could not write; nothing is left behind, older checkpoints are intact.
    """
    files = storage or Storage()
    target = checkpoints_dir(run_dir) / step_name(state.step)
    partial = target.with_name(target.name + PARTIAL)

    def commit() -> None:
        manifest = _gather(files, partial, state, world_size, _next_save_number(target.parent))
        _commit(files, partial, target, manifest, config_yaml, tokenizer_files, world_size)
        _retain(files, target.parent, keep_last, state)

    try:
        _together(agree, rank, lambda: _prepare(files, partial) if rank == 0 else None)
        _together(agree, rank, lambda: _write_share(files, partial, list(pieces), rank, world_size))
        _together(agree, rank, lambda: commit() if rank == 0 else None)
    except Exception:
        if rank == 0:
            _remove_quietly(files, partial)
        raise
    return target


def _together(agree: Agree, rank: int, action: Callable[[], None]) -> None:
    """Run `action`, then let all ranks know whether it worked everywhere."""
    error: Exception | None = None
    try:
        action()
    except Exception as problem:
        error = problem
    first = agree(f"rank {rank}: {error}" if error else None)
    if error and not isinstance(error, (OSError, TriaxisError)):
        raise error  # a fault of the program keeps its traceback
    if first is not None:
        raise StorageError(f"checkpoint not saved: {first}") from error


def _prepare(files: Storage, partial: Path) -> None:
    """A fresh directory for all ranks; whatever an interrupted save left is removed."""
    root = partial.parent
    files.make_directory(root, exist_ok=True)
    for name in files.names(root):
        if name.endswith(PARTIAL):
            files.remove(root / name)
    files.make_directory(partial)
    files.sync_directory(root)


def _write_share(files: Storage, partial: Path, pieces: Sequence[Piece], rank: int, world_size: int) -> None:
    entries = [_entry(piece) for piece in pieces]
    if len({entry.key for entry in entries}) < len(entries):
        raise ValueError(f"rank {rank} was given the same rectangle twice")
    shard = fmt.shard_name(rank, world_size)
    written = files.write_safetensors(partial / shard, entries) if entries else None
    tensors: dict[str, dict[str, StoredTensor]] = {}
    for piece, entry in zip(pieces, entries, strict=True):
        stored = StoredRectangle(
            file=shard,
            key=entry.key,
            start=piece.rectangle.start,
            extent=piece.rectangle.extent,
            xxh3_64=written.hashes[entry.key] if written else "",
        )
        part = StoredTensor(shape=tuple(piece.shape), dtype=fmt.DTYPE_NAMES[entry.dtype], rectangles=(stored,))
        _add(tensors.setdefault(piece.kind, {}), piece.name, part)
    share = _Share(file=written.file if written else None, tensors=tensors)
    files.write(partial / _share_name(rank), share.model_dump_json().encode())
    files.sync_directory(partial)


def _entry(piece: Piece) -> Entry:
    key = fmt.entry_key(piece.kind, piece.name, piece.rectangle)
    tensor = piece.tensor
    if isinstance(tensor, Tensor):
        return Entry(key, piece.rectangle.extent, piece.dtype or tensor.dtype, lambda: tensor)
    if piece.dtype is None:
        raise ValueError(f"{key}: a tensor that is read later needs its dtype said")
    return Entry(key, piece.rectangle.extent, piece.dtype, tensor)


def _add(tensors: dict[str, StoredTensor], name: str, part: StoredTensor) -> None:
    """Put the rectangles of `part` to those already known of the same tensor."""
    known = tensors.get(name)
    if known is None:
        tensors[name] = part
        return
    if (known.shape, known.dtype) != (part.shape, part.dtype):
        raise ValueError(f"{name}: given as {known.dtype} {known.shape} and as {part.dtype} {part.shape}")
    tensors[name] = known.model_copy(update={"rectangles": known.rectangles + part.rectangles})


def _gather(files: Storage, partial: Path, state: State, world_size: int, save_number: int) -> Manifest:
    """One manifest out of the shares of all ranks."""
    stored_files: dict[str, StoredFile] = {}
    tensors: dict[str, dict[str, StoredTensor]] = {}
    for rank in range(world_size):
        share = _read_share(files, partial, rank)
        if share.file:
            shard = fmt.shard_name(rank, world_size)
            if (size := files.size(partial / shard)) != share.file.size:
                raise StorageError(f"rank {rank} wrote {share.file.size} bytes into {shard}, but it has {size}")
            stored_files[shard] = share.file
        for kind, parts in share.tensors.items():
            for name, part in parts.items():
                _add(tensors.setdefault(kind, {}), name, part)
    return Manifest(save_number=save_number, state=state, files=stored_files, tensors=tensors)


def _read_share(files: Storage, partial: Path, rank: int) -> _Share:
    try:
        return _Share.model_validate_json(files.read(partial / _share_name(rank)))
    except FileNotFoundError:
        raise StorageError(f"rank {rank} wrote nothing into {partial}") from None
    except ValidationError as error:
        raise StorageError(f"the list that rank {rank} left in {partial} is damaged: {error}") from None


def _commit(
    files: Storage,
    partial: Path,
    target: Path,
    manifest: Manifest,
    config_yaml: str,
    tokenizer_files: Sequence[Path],
    world_size: int,
) -> None:
    stored = dict(manifest.files)
    stored[fmt.CONFIG_FILE] = files.write(partial / fmt.CONFIG_FILE, config_yaml.encode())
    if tokenizer_files:
        files.make_directory(partial / fmt.TOKENIZER_DIRECTORY)
        for source in tokenizer_files:
            name = f"{fmt.TOKENIZER_DIRECTORY}/{source.name}"
            stored[name] = files.copy(source, partial / name)
        files.sync_directory(partial / fmt.TOKENIZER_DIRECTORY)
    manifest = manifest.model_copy(update={"files": stored})
    if problem := fmt.problem_of(manifest):
        raise StorageError(f"{partial}: {problem}")
    files.write(partial / MANIFEST, fmt.encode_manifest(manifest))
    for rank in range(world_size):
        files.remove(partial / _share_name(rank))
    files.sync_directory(partial)
    previous = _set_aside(files, target)
    files.rename(partial, target)
    files.sync_directory(target.parent)
    files.replace_text(target.parent / "latest", target.name)
    if previous:
        _discard(files, previous)


def _set_aside(files: Storage, target: Path) -> Path | None:
    """Make room for `target` without ever being without a valid checkpoint that was there before."""
    previous = target.with_name(target.name + PREVIOUS)
    if not target.exists():
        return previous if previous.exists() else None
    if not _is_valid(target):
        _discard(files, target)
        return previous if previous.exists() else None
    if previous.exists():
        _discard(files, previous)
    files.rename(target, previous)
    return previous


def _retain(files: Storage, root: Path, keep_last: int, state: State) -> None:
    """Remove all but the best and the `keep_last` newest valid checkpoints. Damaged ones stay for a person to see."""
    valid = sorted(valid_checkpoints(root), key=lambda checkpoint: checkpoint.manifest.save_number)
    best = None if state.best is None else state.best.step
    for checkpoint in valid[: -max(1, keep_last)]:
        if checkpoint.state.step != best:
            _discard(files, checkpoint.path)


def _discard(files: Storage, path: Path) -> None:
    """Take the name away first: a half-removed checkpoint must not look like a damaged one."""
    removed = path.with_name(path.name + ".removed" + PARTIAL)
    files.rename(path, removed)
    files.remove(removed)


def _remove_quietly(files: Storage, path: Path) -> None:
    try:
        files.remove(path)
    except OSError as error:
        warn(f"could not remove {path}: {error}; the next save will")


def _next_save_number(root: Path) -> int:
    return 1 + max((checkpoint.manifest.save_number for checkpoint in valid_checkpoints(root)), default=0)


def _is_valid(path: Path) -> bool:
    try:
        Checkpoint(path)
    except CheckpointError:
        return False
    return True


def _share_name(rank: int) -> str:
    return f"share-{rank:05d}.json"
