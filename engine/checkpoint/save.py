"""Saves checkpoints with a two-phase commit over ranks.

Every rank writes its rectangles and a list of them to a `.partial` directory. After all ranks have finished, rank 0
checks that every element of every tensor is present exactly once, writes the manifest and renames the directory. A
checkpoint therefore exists completely or not at all, even after a power failure. The caller passes the function by
which ranks agree, so this module does not depend on `torch.distributed`.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from engine.checkpoint.manifest import (
    CONFIG_FILE,
    MANIFEST,
    TOKENIZER_DIRECTORY,
    Manifest,
    State,
    encode_manifest,
    problem_of,
)
from engine.checkpoint.retention import discard, next_save_number, remove_quietly, retain, set_aside
from engine.checkpoint.run_directory import PARTIAL, checkpoints_dir, step_name
from engine.checkpoint.shares import StateSlice, gather_shares, share_name, write_share
from engine.checkpoint.storage import Storage
from engine.errors import StorageError, TriaxisError

FirstProblem = Callable[[str | None], str | None]
"""A collective: every rank passes its problem or None, and all receive the problem of the first rank that has one."""


def save(
    run_dir: Path | str,
    slices: Iterable[StateSlice],
    state: State,
    *,
    config_yaml: str,
    tokenizer_files: Sequence[Path],
    keep_last: int,
    rank: int,
    world_size: int,
    first_problem: FirstProblem,
    storage: Storage | None = None,
) -> Path:
    """Save a checkpoint. A collective: every rank calls it, even one that owns no slices.

    A valid checkpoint of the same step (of a run that resumed from an earlier step) is replaced: until the new one is
    committed, it is kept as `step_X.previous`, which `find` recognizes. The `keep_last` newest and the best checkpoint
    are kept, older ones removed.

    Args:
        run_dir: the run directory; the same on all ranks.
        slices: the slices that this rank owns.
        state: the state of the run apart from its tensors.
        config_yaml: the content of `config.yaml`.
        tokenizer_files: files to copy into the checkpoint.
        first_problem: the collective by which ranks agree.
        storage: file operations; tests pass one with a hook.

    Returns:
        the committed directory.

    Raises:
        StorageError: on all ranks if any rank could not write; partial files are removed, older checkpoints are intact.
    """
    files = storage or Storage()
    target = checkpoints_dir(run_dir) / step_name(state.step)
    partial = target.with_name(target.name + PARTIAL)

    def commit() -> None:
        manifest = gather_shares(files, partial, state, world_size, next_save_number(target.parent))
        _commit(files, partial, target, manifest, config_yaml, tokenizer_files, world_size)
        retain(files, target.parent, keep_last, state)

    try:
        _on_all_ranks(first_problem, rank, lambda: _prepare(files, partial) if rank == 0 else None)
        _on_all_ranks(first_problem, rank, lambda: write_share(files, partial, list(slices), rank, world_size))
        _on_all_ranks(first_problem, rank, lambda: commit() if rank == 0 else None)
    except Exception:
        if rank == 0:
            remove_quietly(files, partial)
        raise
    return target


def _on_all_ranks(first_problem: FirstProblem, rank: int, action: Callable[[], None]) -> None:
    """Run `action`, and raise on all ranks if it failed on any."""
    error: Exception | None = None
    try:
        action()
    except Exception as problem:
        error = problem
    first = first_problem(f"rank {rank}: {error}" if error else None)
    if error and not isinstance(error, (OSError, TriaxisError)):
        raise error  # a bug keeps its traceback
    if first is not None:
        raise StorageError(f"checkpoint not saved: {first}") from error


def _prepare(files: Storage, partial: Path) -> None:
    """Create an empty directory for all ranks, and remove the files of interrupted saves."""
    root = partial.parent
    files.make_directory(root, exist_ok=True)
    for name in files.names(root):
        if name.endswith(PARTIAL):
            files.remove(root / name)
    files.make_directory(partial)
    files.sync_directory(root)


def _commit(
    files: Storage,
    partial: Path,
    target: Path,
    manifest: Manifest,
    config_yaml: str,
    tokenizer_files: Sequence[Path],
    world_size: int,
) -> None:
    """Run the second phase: write the shared files and the manifest, and rename the directory."""
    stored = dict(manifest.files)
    stored[CONFIG_FILE] = files.write(partial / CONFIG_FILE, config_yaml.encode())
    if tokenizer_files:
        files.make_directory(partial / TOKENIZER_DIRECTORY)
        for source in tokenizer_files:
            name = f"{TOKENIZER_DIRECTORY}/{source.name}"
            stored[name] = files.copy(source, partial / name)
        files.sync_directory(partial / TOKENIZER_DIRECTORY)
    manifest = manifest.model_copy(update={"files": stored})
    if problem := problem_of(manifest):
        raise StorageError(f"{partial}: {problem}")
    files.write(partial / MANIFEST, encode_manifest(manifest))
    for rank in range(world_size):
        files.remove(partial / share_name(rank))
    files.sync_directory(partial)
    previous = set_aside(files, target)
    files.rename(partial, target)
    files.sync_directory(target.parent)
    files.replace_text(target.parent / "latest", target.name)
    if previous:
        discard(files, previous)
